"""A-CLIP's choice of patches: their number; scores from the teacher's full attention matrices
(equation 4); the same choice as a literal implementation of the paper, one image at a time; the
strategies. And the complementary views of an ensemble, which show every patch once.

Run: pytest tests/model/methods/test_attentive.py -s
    prints the agreement with the slow procedure
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.data.masking import RandomMask, complementary_masks
from glimpse.data.transforms import View, enclosing_box, random_box
from glimpse.model.methods.aclip import Aclip, Options
from glimpse.model.methods.attentive import (
    STRATEGIES,
    PatchSelector,
    gather_patches,
    scores_in_view,
)
from glimpse.tests.model.test_towers import CLIP, SMALL

GRIDS = [((12, 16), 2), ((6, 9), 3), ((3, 5), 1)]  # patches, and the side of a block in patches


def uniform(images, grid, seed=0):
    rows, columns = grid
    return torch.rand(images, rows * columns, generator=torch.Generator().manual_seed(seed))


def staying(keep, grid):
    """Positions (B, K) -> (B, L), True where a patch stays."""
    rows, columns = grid
    return torch.zeros(len(keep), rows * columns, dtype=torch.bool).scatter_(1, keep, True)


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
    rows, columns = grid
    attentive = PatchSelector("low", block, patch, grid)

    for share, count in zip((1 / 2, 1 / 3, 1 / 4), counts):
        assert attentive.count_blocks(share) * (block // patch) ** 2 == count
        assert attentive.choose(uniform(3, grid), share).shape == (3, count)
    assert attentive.choose(uniform(1, grid), 1.0).tolist() == [list(range(rows * columns))]


# ---- scores


@pytest.mark.parametrize("side", [4, 2])  # the model's own grid, and half the resolution
@pytest.mark.parametrize("layers, pool", [("all", "cls"), ("last", "mean")])
def test_scores_are_the_mean_of_whole_attention_matrices(layers, side, pool):
    """The mean is over the teacher's heads and layers (equation 4). The other result is the pooled
    tokens.
    """
    torch.manual_seed(0)
    cfg = replace(CLIP, **SMALL, vision=replace(CLIP.vision, pool=pool))
    method = Aclip(cfg, 100, 12, Options(block=8, layers=layers))
    view = dict(
        patches=torch.randint(0, 256, (3, side**2, 192), dtype=torch.uint8),
        positions=torch.arange(side**2).expand(3, -1),
    )

    scores, pooled = method.run_teacher(view)

    # The teacher again, with the queries and keys of every block.
    vision = method.teacher.vision
    outputs = []
    for block in vision.blocks:
        block.attn.qkv.register_forward_hook(lambda _, args, out: outputs.append(out))
    tokens = vision(view["patches"], view["positions"], grid=(side, side))
    torch.testing.assert_close(pooled, vision.pool(tokens))

    # (layers, B, heads, 1 + L, width of a head)
    q, k, _ = torch.stack(outputs).unflatten(3, (3, 4, 32)).permute(3, 0, 1, 4, 2, 5)
    attention = (q @ k.mT / 32**0.5).softmax(4)
    if layers == "last":
        attention = attention[-1:]
    of_class_token = attention.mean((0, 2))[:, 0, 1:]
    torch.testing.assert_close(scores, of_class_token)


def test_the_teachers_grid_has_the_models_proportions():
    model = SimpleNamespace(cfg=SimpleNamespace(grid=(12, 16)))

    for rows, columns in ((12, 16), (6, 8), (3, 4), (24, 32)):
        view = dict(positions=torch.zeros(2, rows * columns))
        assert Aclip.teacher_grid(model, view) == (rows, columns)


# ---- against the paper, slowly


def boxes_of(images):
    """Draw (box of the teacher, boxes of two views) for pictures of many sizes and shapes."""
    rng = np.random.default_rng(0)
    view = View(crop=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
    boxes = []
    for _ in range(images):
        height, width = rng.integers(100, 641, 2).tolist()
        views = [random_box(height, width, view, rng) for _ in range(2)]
        boxes.append((enclosing_box(views), views))
    return boxes


def slowly(scores, teacher, view, grid, side, count):
    """Follow section 3.3 for a picture with scores (rows, columns) -> (L,), True where a patch
    stays.
    """
    # The map at the size of the teacher's box, and the view cut out of it.
    teacher_top, teacher_left, height, width = teacher
    top, left, rows, columns = view
    top -= teacher_top
    left -= teacher_left
    enlarged = F.interpolate(
        scores[None, None], (height, width), mode="bilinear", align_corners=False
    )
    cut = enlarged[:, :, top : top + rows, left : left + columns]
    assert cut.shape[2:] == (rows, columns), "the teacher's box encloses the view"

    # Scores of the view's patches, and of its blocks.
    patches = F.interpolate(cut, grid, mode="bilinear", align_corners=False, antialias=False)
    blocks = F.avg_pool2d(patches, side)[0, 0]

    # The patches of the best blocks.
    stays = torch.zeros(blocks.numel())
    stays[blocks.flatten().sort(descending=True).indices[:count]] = 1
    stays = stays.view(1, 1, *blocks.shape)
    return F.interpolate(stays, scale_factor=side, mode="nearest").flatten().bool()


def maps(images, grid, smooth):
    """Draw scores (B, rows, columns) that add up to 1: from coarse noise, enlarged, or from noise
    of each patch.
    """
    rng = torch.Generator().manual_seed(1)
    size = (5, 5) if smooth else grid
    noise = torch.randn(images, 1, *size, generator=rng)
    logits = F.interpolate(noise, grid, mode="bicubic")[:, 0]
    return logits.flatten(1).softmax(1).unflatten(1, grid)


@pytest.mark.parametrize(
    "images, teacher_grid, grid, side, share, smooth",
    [
        (300, (14, 14), (14, 14), 2, 1 / 2, True),
        (100, (14, 14), (14, 14), 1, 1 / 3, True),
        (100, (7, 7), (14, 14), 2, 1 / 2, True),  # A-CLIP-eff: half the resolution
        (100, (12, 16), (12, 16), 2, 1 / 4, True),
        (100, (6, 8), (12, 16), 2, 1 / 2, True),
        # Corners between patches, which the slow way rounds off, pixel by pixel.
        (100, (14, 14), (14, 14), 2, 1 / 2, False),
    ],
)
def test_scores_choose_as_the_paper_does(images, teacher_grid, grid, side, share, smooth):
    """Two views of each image."""
    attentive = PatchSelector("low", 16 * side, 16, grid)
    count = attentive.count_blocks(share)
    scores = maps(images, teacher_grid, smooth)

    # The paper's procedure, view by view.
    teacher_boxes = []
    view_boxes = []
    choices = []
    for image_scores, (teacher, views) in zip(scores, boxes_of(images)):
        for view in views:
            teacher_boxes.append(teacher)
            view_boxes.append(view)
            choices.append(slowly(image_scores, teacher, view, grid, side, count))
    slow = torch.stack(choices)

    # Ours, all views at once.
    teachers = torch.tensor(teacher_boxes, dtype=torch.float32)
    views = torch.tensor(view_boxes, dtype=torch.float32)
    view_scores = scores.flatten(1).repeat_interleave(2, 0)
    patch_scores = scores_in_view(view_scores, teacher_grid, teachers, views, grid)
    fast = staying(attentive.choose(patch_scores, share), grid)

    assert (fast.sum(1) == slow.sum(1)).all()
    assert not torch.equal(slow[0::2], slow[1::2])
    agree = ((fast & slow).sum() / slow.sum()).item()
    kind = "smooth" if smooth else "raw"
    print(
        f"teacher {teacher_grid}, view {grid}, block {side}, {kind}:"
        f" {agree:.4%} of the kept patches agree"
    )
    assert agree > (0.995 if smooth else 0.99)


def test_a_view_that_is_the_whole_reads_the_map_itself():
    box = torch.tensor([[30.0, 10.0, 120.0, 200.0]])
    corner = torch.tensor([[110.0, 170.0, 40.0, 40.0]])  # the last patch of the box
    scores = uniform(1, (3, 5))

    at_box = scores_in_view(scores, (3, 5), box, box, (3, 5))
    at_corner = scores_in_view(scores, (3, 5), box, corner, (1, 1))

    torch.testing.assert_close(at_box, scores)
    torch.testing.assert_close(at_corner, scores[:, -1:])


# ---- strategies


@pytest.mark.parametrize("grid, side", GRIDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_contract(strategy, grid, side):
    rows, columns = grid
    attentive = PatchSelector(strategy, 8 * side, 8, grid)
    scores = uniform(50, grid)
    noise = uniform(50, grid, 1)

    keep = attentive.choose(scores, 0.4, noise)
    of_one_image = attentive.choose(scores[7:8], 0.4, noise[7:8])
    of_scaled_scores = attentive.choose(10 * scores.double(), 0.4, noise)

    assert keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all()
    assert keep.min() >= 0
    assert keep.max() < rows * columns
    stays = staying(keep, grid).view(50, rows // side, side, columns // side, side)
    blocks = stays.transpose(2, 3).flatten(3)
    assert torch.equal(blocks.any(3), blocks.all(3)), "a block stays or goes as one"
    assert torch.equal(keep[7:8], of_one_image), "an image's choice does not depend on its batch"
    assert torch.equal(keep, of_scaled_scores), "scores count by their order"


@pytest.mark.parametrize("share", [1 / 4, 1 / 2, 2 / 3])
# Numbers of blocks that all three shares divide.
@pytest.mark.parametrize("grid, side", [((12, 16), 2), ((9, 12), 3)])
def test_high_keeps_what_low_drops(grid, side, share):
    low = PatchSelector("low", 8 * side, 8, grid)
    high = PatchSelector("high", 8 * side, 8, grid)
    scores = uniform(50, grid)

    low_patches = staying(low.choose(scores, share), grid)
    high_patches = staying(high.choose(scores, 1 - share), grid)

    assert torch.equal(high_patches, ~low_patches)
    means = low.group_by_block(scores).mean(2)
    stays = low.group_by_block(low_patches).all(2)
    worst_staying = means.masked_fill(~stays, 2).amin(1)
    best_dropped = means.masked_fill(stays, -1).amax(1)
    assert (worst_staying > best_dropped).all(), "the best stay"


@pytest.mark.parametrize("strategy, sure, rate", [("mixed", 18, 6 / 30), ("random", 0, 24 / 48)])
def test_what_is_drawn_is_drawn_uniformly(strategy, sure, rate):
    """24 of 48 blocks stay: with mixed always the best 18, and 6 of the 30 others; with random
    any.
    """
    grid = (12, 16)
    draws = 5000
    attentive = PatchSelector(strategy, 32, 16, grid)
    scores = uniform(1, grid).expand(draws, -1)
    noise = uniform(draws, grid, 1)

    keep = attentive.choose(scores, 0.5, noise)
    with_other_scores = attentive.choose(scores.flip(1), 0.5, noise)

    patch_rates = staying(keep, grid).double().mean(0)
    rates = attentive.group_by_block(patch_rates[None])[0, :, 0]
    best = attentive.group_by_block(scores[:1])[0].mean(1).argsort(descending=True)
    near = 5 * (rate * (1 - rate) / draws) ** 0.5
    assert (rates[best[:sure]] == 1).all()
    np.testing.assert_allclose(rates[best[sure:]], rate, atol=near)
    ignores_scores = torch.equal(keep, with_other_scores)
    assert ignores_scores == (strategy == "random"), "random ignores the scores"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tie_keeps_the_earlier_block(strategy):
    attentive = PatchSelector(strategy, 8, 8, (10, 20))
    equal = torch.full((2, 200), 0.5)

    keep = attentive.choose(equal, 0.5, equal)

    assert torch.equal(keep, torch.arange(100).expand(2, 100))


@pytest.mark.parametrize(
    "strategy, block, share, message",
    [
        ("lowest", 32, 0.5, "options.strategy: unknown 'lowest'; known: low, high, mixed, random"),
        (
            "low",
            8,
            0.5,
            "options.block: 8 does not divide the grid of 12 x 18 patches of 16 pixels; use 16, 32,"
            " 48, 96",
        ),
        ("low", 40, 0.5, "options.block: 40 does not divide"),
        ("low", 64, 0.5, "options.block: 64 does not divide"),  # divides 12, not 18
        (
            "low",
            96,
            0.05,
            "options.keep: 0.05 keeps 0 of 6 blocks; use smaller blocks, or another share",
        ),
        ("low", 96, 1.2, "options.keep: 1.2 keeps 7 of 6 blocks"),
    ],
)
def test_refuses(strategy, block, share, message):
    grid = (12, 18)

    with pytest.raises(ValueError, match=message):
        PatchSelector(strategy, block, 16, grid).choose(uniform(1, grid), share)


def test_take():
    patches = torch.randint(0, 256, (3, 15, 7), dtype=torch.uint8)
    keep = uniform(3, (3, 5)).argsort(1)[:, :4]

    taken = gather_patches(patches, keep)

    assert taken.shape == (3, 4, 7)
    for b in range(3):
        for k in range(4):
            assert torch.equal(taken[b, k], patches[b, keep[b, k]])


# ---- an ensemble's views


@pytest.mark.parametrize("views, ratio", [(2, 1 / 2), (4, 3 / 4), (8, 7 / 8), (1, 0)])
@pytest.mark.parametrize("grid", [(14, 14), (4, 8), (3, 11), (7, 9)])
def test_complementary_views_show_every_patch_once(grid, views, ratio):
    patches = grid[0] * grid[1]
    visible = RandomMask(ratio).visible_count(patches)
    noise = uniform(400, grid)

    keeps = complementary_masks(noise, views)
    of_one_image = complementary_masks(noise[9:10], views)

    # Every patch once, in views of nearly equal size.
    assert len(keeps) == views
    assert all((keep.diff(dim=1) > 0).all() for keep in keeps)
    assert torch.equal(torch.cat(keeps, 1).sort(1).values, torch.arange(patches).expand(400, -1))
    rests = {0, 1} if patches % views else {0}
    assert {keep.shape[1] - visible for keep in keeps} <= rests

    # Independent of the batch, and uniform.
    for keep, expected in zip(keeps, of_one_image):
        assert torch.equal(keep[9:10], expected)
    rates = staying(keeps[0], grid).double().mean(0)
    mean = keeps[0].shape[1] / patches
    near = 5 * (mean * (1 - mean) / 400) ** 0.5
    message = "a patch is in any view as likely"
    np.testing.assert_allclose(rates, mean, atol=near, err_msg=message)


@pytest.mark.parametrize("views", [0, 16])
def test_as_many_views_as_patches_at_most(views):
    with pytest.raises(ValueError, match=f"--ensemble {views}: 15 patches make 1 to 15 views"):
        complementary_masks(uniform(1, (3, 5)), views)
