"""A-CLIP's choice of patches: how many stay; scores are the teacher's whole attention matrices'
(equation 4); read off at a view's patches they choose as the paper's procedure does, done slowly,
one image at a time; what each strategy keeps. And the complementary views of an ensemble, which
show every patch once.

Run: pytest tests/model/methods/test_attentive.py -s
    prints the agreement with the slow procedure
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.data.masking import Random, complementary
from glimpse.data.transforms import View, enclosing, random_box
from glimpse.model.methods.aclip import Aclip, Options
from glimpse.model.methods.attentive import STRATEGIES, Attentive, scores_at, take
from glimpse.tests.model.test_towers import CLIP, SMALL

GRIDS = [((12, 16), 2), ((6, 9), 3), ((3, 5), 1)]  # patches, and how many to a block's side


def uniform(images, grid, seed=0):
    return torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))


def staying(keep, grid):
    """Positions (B, K) -> (B, L), True where a patch stays."""
    return torch.zeros(len(keep), grid[0] * grid[1], dtype=torch.bool).scatter_(1, keep, True)


@pytest.mark.parametrize(
    "patch, block, grid, counts",
    [
        (16, 32, (14, 14), (100, 64, 48)),  # A-CLIP's release keeps 100
        (16, 16, (14, 14), (98, 65, 49)),
        (14, 28, (16, 16), (128, 84, 64)),
        (32, 32, (7, 7), (25, 16, 12)),
        (16, 32, (12, 16), (96, 64, 48)),
        (8, 24, (9, 15), (72, 45, 36)),  # of 15 blocks 8, 5, 4
    ],
)
def test_how_many_stay(patch, block, grid, counts):
    attentive = Attentive("low", block, patch, grid)
    for share, count in zip((1 / 2, 1 / 3, 1 / 4), counts):
        assert attentive.kept(share) * (block // patch) ** 2 == count
        assert attentive.choose(uniform(3, grid), share).shape == (3, count)
    assert attentive.choose(uniform(1, grid), 1.0).tolist() == [list(range(grid[0] * grid[1]))]


# ---- scores


@pytest.mark.parametrize("side", [4, 2])  # the model's own grid, and half the resolution
@pytest.mark.parametrize("layers, pool", [("all", "cls"), ("last", "mean")])
def test_scores_are_the_mean_of_whole_attention_matrices(layers, side, pool):
    """Of the teacher, over heads and layers (equation 4); what else is made of its view are its
    pooled tokens.
    """
    torch.manual_seed(0)
    method = Aclip(
        replace(CLIP, **SMALL, vision=replace(CLIP.vision, pool=pool)),
        100,
        12,
        Options(block=8, layers=layers),
    )
    seen = dict(
        patches=torch.randint(0, 256, (3, side**2, 192), dtype=torch.uint8),
        positions=torch.arange(side**2).expand(3, -1),
    )
    scores, pooled = method.look(seen)
    vision, made = method.teacher.vision, []
    for block in vision.blocks:
        block.attn.qkv.register_forward_hook(lambda _, args, out: made.append(out))
    torch.testing.assert_close(
        pooled, vision.pool(vision(seen["patches"], seen["positions"], grid=(side, side)))
    )
    # (layers, B, heads, 1 + L, width of a head)
    q, k, _ = torch.stack(made).unflatten(3, (3, 4, 32)).permute(3, 0, 1, 4, 2, 5)
    whole = (q @ k.mT / 32**0.5).softmax(4)
    torch.testing.assert_close(
        scores, (whole if layers == "all" else whole[-1:]).mean((0, 2))[:, 0, 1:]
    )


def test_the_teachers_grid_has_the_models_proportions():
    model = SimpleNamespace(cfg=SimpleNamespace(grid=(12, 16)))
    for grid in ((12, 16), (6, 8), (3, 4), (24, 32)):
        assert Aclip.teacher_grid(model, dict(positions=torch.zeros(2, grid[0] * grid[1]))) == grid


# ---- against the paper, slowly


def boxes_of(images):
    """(the teacher's box, two views' boxes) of pictures of many sizes and shapes."""
    rng, found = np.random.default_rng(0), []
    for _ in range(images):
        height, width = rng.integers(100, 641, 2).tolist()
        views = [
            random_box(height, width, View(crop=(0.5, 1.0), ratio=(3 / 4, 4 / 3)), rng)
            for _ in range(2)
        ]
        found.append((enclosing(views), views))
    return found


def slowly(scores, teacher, view, grid, side, count):
    """Section 3.3 for one picture: the map (rows, columns) at the size of the teacher's box, the
    view cut out of it and resized to its patches, the mean of each block, the best blocks. -> (L,),
    True where a patch stays.
    """
    (top, left, rows, columns), size = view, teacher[2:]
    drawn = F.interpolate(scores[None, None], size, mode="bilinear", align_corners=False)
    cut = drawn[
        :,
        :,
        top - teacher[0] : top - teacher[0] + rows,
        left - teacher[1] : left - teacher[1] + columns,
    ]
    assert cut.shape[2:] == (rows, columns), "the teacher's box encloses the view"
    blocks = F.avg_pool2d(
        F.interpolate(cut, grid, mode="bilinear", align_corners=False, antialias=False), side
    )[0, 0]
    stays = torch.zeros(blocks.numel())
    stays[blocks.flatten().sort(descending=True).indices[:count]] = 1
    return (
        F.interpolate(stays.view(1, 1, *blocks.shape), scale_factor=side, mode="nearest")
        .flatten()
        .bool()
    )


def maps(images, grid, smooth):
    """Scores (B, rows, columns) that add up to 1: of coarse noise, drawn larger, or of noise patch
    by patch.
    """
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(images, 1, *((5, 5) if smooth else grid), generator=rng)
    return F.interpolate(noise, grid, mode="bicubic")[:, 0].flatten(1).softmax(1).unflatten(1, grid)


@pytest.mark.parametrize(
    "images, teacher_grid, grid, side, share, smooth",
    [
        (300, (14, 14), (14, 14), 2, 1 / 2, True),
        (100, (14, 14), (14, 14), 1, 1 / 3, True),
        (100, (7, 7), (14, 14), 2, 1 / 2, True),  # A-CLIP-eff: half the resolution
        (100, (12, 16), (12, 16), 2, 1 / 4, True),
        (100, (6, 8), (12, 16), 2, 1 / 2, True),
        # whose corners from patch to patch the slow way rounds off, pixel by pixel
        (100, (14, 14), (14, 14), 2, 1 / 2, False),
    ],
)
def test_scores_choose_as_the_paper_does(images, teacher_grid, grid, side, share, smooth):
    """Two views of each image."""
    boxes, attentive = boxes_of(images), Attentive("low", 16 * side, 16, grid)
    scores, count = maps(images, teacher_grid, smooth), attentive.kept(share)
    slow = torch.stack(
        [
            slowly(x, teacher, view, grid, side, count)
            for x, (teacher, views) in zip(scores, boxes)
            for view in views
        ]
    )
    teachers, views = (
        torch.tensor(x, dtype=torch.float32)
        for x in zip(*((t, view) for t, views in boxes for view in views))
    )
    at = scores_at(scores.flatten(1).repeat_interleave(2, 0), teacher_grid, teachers, views, grid)
    fast = staying(attentive.choose(at, share), grid)
    assert (fast.sum(1) == slow.sum(1)).all() and not torch.equal(slow[0::2], slow[1::2])
    agree = ((fast & slow).sum() / slow.sum()).item()
    print(
        f"teacher {teacher_grid}, view {grid}, block {side}, {'smooth' if smooth else 'raw'}:"
        f" {agree:.4%} of the kept patches agree"
    )
    assert agree > (0.995 if smooth else 0.99)


def test_a_view_that_is_the_whole_reads_the_map_itself():
    box, scores = torch.tensor([[30.0, 10.0, 120.0, 200.0]]), uniform(1, (3, 5))
    torch.testing.assert_close(scores_at(scores, (3, 5), box, box, (3, 5)), scores)
    corner = torch.tensor([[110.0, 170.0, 40.0, 40.0]])  # its last patch
    torch.testing.assert_close(scores_at(scores, (3, 5), box, corner, (1, 1)), scores[:, -1:])


# ---- strategies


@pytest.mark.parametrize("grid, side", GRIDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_contract(strategy, grid, side):
    attentive, scores, noise = (
        Attentive(strategy, 8 * side, 8, grid),
        uniform(50, grid),
        uniform(50, grid, 1),
    )
    keep = attentive.choose(scores, 0.4, noise)
    assert (
        keep.dtype == torch.int64
        and (keep.diff(dim=1) > 0).all()
        and keep.min() >= 0
        and keep.max() < grid[0] * grid[1]
    )
    blocks = (
        staying(keep, grid)
        .view(50, grid[0] // side, side, grid[1] // side, side)
        .transpose(2, 3)
        .flatten(3)
    )
    assert torch.equal(blocks.any(3), blocks.all(3)), "a block stays or goes as one"
    assert torch.equal(keep[7:8], attentive.choose(scores[7:8], 0.4, noise[7:8])), (
        "an image's choice does not depend on its batch"
    )
    assert torch.equal(keep, attentive.choose(10 * scores.double(), 0.4, noise)), (
        "scores count by their order"
    )


@pytest.mark.parametrize("share", [1 / 4, 1 / 2, 2 / 3])
# blocks that all three shares divide
@pytest.mark.parametrize("grid, side", [((12, 16), 2), ((9, 12), 3)])
def test_high_keeps_what_low_drops(grid, side, share):
    low, high = (Attentive(strategy, 8 * side, 8, grid) for strategy in ("low", "high"))
    scores = uniform(50, grid)
    kept = staying(low.choose(scores, share), grid)
    assert torch.equal(staying(high.choose(scores, 1 - share), grid), ~kept)
    mean, stays = low.blocks(scores).mean(2), low.blocks(kept).all(2)
    assert (mean.masked_fill(~stays, 2).amin(1) > mean.masked_fill(stays, -1).amax(1)).all(), (
        "the best stay"
    )


@pytest.mark.parametrize("strategy, sure, rate", [("mixed", 18, 6 / 30), ("random", 0, 24 / 48)])
def test_what_is_drawn_is_drawn_uniformly(strategy, sure, rate):
    """Of 48 blocks 24 stay: in mixed the best 18 for sure, and 6 of the 30 others; in random
    any.
    """
    grid, draws = (12, 16), 5000
    attentive, scores, noise = (
        Attentive(strategy, 32, 16, grid),
        uniform(1, grid).expand(draws, -1),
        uniform(draws, grid, 1),
    )
    keep = attentive.choose(scores, 0.5, noise)
    rates = attentive.blocks(staying(keep, grid).double().mean(0)[None])[0, :, 0]
    best = attentive.blocks(scores[:1])[0].mean(1).argsort(descending=True)
    assert (rates[best[:sure]] == 1).all()
    np.testing.assert_allclose(
        rates[best[sure:]], rate, atol=5 * (rate * (1 - rate) / draws) ** 0.5
    )
    elsewhere = attentive.choose(scores.flip(1), 0.5, noise)
    assert torch.equal(keep, elsewhere) == (strategy == "random"), "random ignores the scores"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tie_keeps_the_earlier_block(strategy):
    grid, same = (10, 20), torch.full((2, 200), 0.5)
    assert torch.equal(
        Attentive(strategy, 8, 8, grid).choose(same, 0.5, same), torch.arange(100).expand(2, 100)
    )


@pytest.mark.parametrize(
    "strategy, block, share, message",
    [
        ("lowest", 32, 0.5, "options.strategy 'lowest': unknown; known: low, high, mixed, random"),
        (
            "low",
            8,
            0.5,
            (
                "options.block 8: a grid of 12 x 18 patches of 16 pixels divides into blocks of 16,"
                " 32, 48, 96"
            ),
        ),
        ("low", 40, 0.5, "options.block 40: "),
        ("low", 64, 0.5, "options.block 64: "),  # divides 12, not 18
        (
            "low",
            96,
            0.05,
            "options.keep 0.05: keeps 0 of 6 blocks; use smaller blocks, or another share",
        ),
        ("low", 96, 1.2, "options.keep 1.2: keeps 7 of 6 blocks"),
    ],
)
def test_refuses(strategy, block, share, message):
    with pytest.raises(ValueError, match=message):
        Attentive(strategy, block, 16, (12, 18)).choose(uniform(1, (12, 18)), share)


def test_take():
    patches, keep = (
        torch.randint(0, 256, (3, 15, 7), dtype=torch.uint8),
        uniform(3, (3, 5)).argsort(1)[:, :4],
    )
    assert take(patches, keep).tolist() == [
        [patches[b, i].tolist() for i in row] for b, row in enumerate(keep.tolist())
    ]


# ---- an ensemble's views


@pytest.mark.parametrize("views, ratio", [(2, 1 / 2), (4, 3 / 4), (8, 7 / 8), (1, 0)])
@pytest.mark.parametrize("grid", [(14, 14), (4, 8), (3, 11), (7, 9)])
def test_complementary_views_show_every_patch_once(grid, views, ratio):
    patches, noise = grid[0] * grid[1], uniform(400, grid)
    keeps = complementary(noise, views)
    assert len(keeps) == views and all((keep.diff(dim=1) > 0).all() for keep in keeps)
    assert torch.equal(torch.cat(keeps, 1).sort(1).values, torch.arange(patches).expand(400, -1))
    assert {keep.shape[1] - Random(ratio).visible(patches) for keep in keeps} <= (
        {0, 1} if patches % views else {0}
    )
    assert all(
        torch.equal(keep[9:10], one) for keep, one in zip(keeps, complementary(noise[9:10], views))
    )
    rates = staying(keeps[0], grid).double().mean(0)
    mean = keeps[0].shape[1] / patches
    np.testing.assert_allclose(
        rates,
        mean,
        atol=5 * (mean * (1 - mean) / 400) ** 0.5,
        err_msg="a patch is in any view as likely",
    )


@pytest.mark.parametrize("views", [0, 16])
def test_as_many_views_as_patches_at_most(views):
    with pytest.raises(ValueError, match=f"--ensemble {views}: 15 patches make 1 to 15 views"):
        complementary(uniform(1, (3, 5)), views)
