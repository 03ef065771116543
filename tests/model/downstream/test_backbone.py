"""The tower as a backbone: its maps are the tower's own tokens, and open_clip's at every block; at
other sizes the positions are those of MAE's and A-CLIP's bicubic; images that patches do not divide
are padded; what trains gets a gradient.

Run: pytest tests/model/downstream/test_backbone.py
"""

import dataclasses
from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from glimpse.data.patches import patchify
from glimpse.model.downstream.backbone import Backbone
from glimpse.tests.model.test_towers import CLIP, FLAVOURS, everywhere, ours, peer, small

LAST = (4, 4, 4, 4)  # of nano's four blocks


def images_of(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_map_at_the_patches_stride_is_the_towers_own_tokens(flavour):
    tower, images = small(flavour).vision, images_of(32, 32)
    tokens = tower(patchify(images, 8), everywhere(2))[:, 1:]
    found = Backbone(tower, LAST)(images)["2"]
    torch.testing.assert_close(tower.norm(found.flatten(2).transpose(1, 2)), tokens)


def test_tokens_equal_open_clips_at_every_block():
    reference, towers = peer(), small("clip")
    towers.load_state_dict(ours(reference.state_dict()))
    images = images_of(32, 32)
    theirs = reference.visual.forward_intermediates(
        images, indices=[0, 1, 2, 3], intermediates_only=True
    )["image_intermediates"]
    for mine, their in zip(
        Backbone(towers.vision, (1, 2, 3, 4)).tokens(images), theirs, strict=True
    ):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "height, width, grid", [(32, 32, (4, 4)), (24, 56, (3, 7)), (33, 40, (5, 5)), (5, 8, (1, 1))]
)
def test_shapes(flavour, height, width, grid):
    rows, columns = grid
    shapes = [
        (2, 128, *side)
        for side in (
            (4 * rows, 4 * columns),
            (2 * rows, 2 * columns),
            grid,
            (-(-rows // 2), -(-columns // 2)),
        )
    ]
    maps = Backbone(small(flavour).vision)(images_of(height, width))
    assert {name: m.shape for name, m in maps.items()} == dict(zip("0123", shapes))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("grid", [(4, 4), (5, 8)])
def test_positions_are_bicubic_and_at_the_native_grid_the_towers_own(flavour, grid):
    """A tower made for another grid, whose table is the first one's interpolated, gives the same
    tokens.
    """
    tower = small(flavour).vision
    with_cls = int(flavour == "clip")  # the first row of learned positions is the class token's
    cls, table = tower.positions.detach().split([with_cls, 16])
    image = F.interpolate(table.T.reshape(1, -1, 4, 4), grid, mode="bicubic", align_corners=False)
    other, grown = deepcopy(tower), torch.cat([cls, image[0].flatten(1).T])
    if grid == tower.grid:
        torch.testing.assert_close(grown, tower.positions.detach())
    other.grid, other.positions = grid, torch.nn.Parameter(grown)
    images = images_of(8 * grid[0], 8 * grid[1])
    for a, b in zip(Backbone(tower).tokens(images), Backbone(other).tokens(images), strict=True):
        torch.testing.assert_close(a, b)


def test_bytes_are_normalised_and_padded_with_the_mean_colour():
    backbone, pixels = (
        Backbone(small("flip").vision),
        torch.randint(0, 256, (2, 3, 30, 35), dtype=torch.uint8),
    )
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP.vision.mean, CLIP.vision.std))
    whole = F.pad((pixels / 255 - mean) / std, (0, 5, 0, 2))
    for a, b in zip(backbone(pixels).values(), backbone(whole).values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("taps", [None, (2, 2, 2, 2)])
def test_every_trainable_parameter_gets_a_gradient_and_recomputing_changes_none(taps):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(small("clip", checkpoint_activations=recompute).vision, taps)
        sum(m.square().mean() for m in backbone(images_of(24, 40)).values()).backward()
        trained = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
        results.append(trained)
        assert len(trained) > 30
        assert all(
            gradient is not None and gradient.any()
            for name, gradient in trained.items()
            if not name.endswith("bias")
        )
        assert not any(block._forward_hooks for block in backbone.tower.blocks)
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], msg=name)


def test_drop_path_is_for_training_and_spares_the_first_block():
    backbone, images = (
        Backbone(small("clip").vision, (1, 2, 3, 4), drop_path=0.9),
        images_of(32, 32),
    )
    kept = Backbone(backbone.tower, (1, 2, 3, 4)).tokens(images)
    torch.manual_seed(0)
    same = [torch.equal(a, b) for a, b in zip(backbone.tokens(images), kept)]
    assert same == [True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(backbone.eval().tokens(images), kept))


@pytest.mark.parametrize("depth, taps", [(12, (4, 6, 8, 12)), (24, (8, 12, 16, 24))])
def test_taps_are_those_of_the_papers(depth, taps):
    tower = small("clip").vision
    tower.blocks.extend([tower.blocks[0]] * (depth - 4))
    assert Backbone(tower).taps == taps


@pytest.mark.parametrize("taps", [(1, 2, 3), (1, 2, 3, 5), (0, 1, 2, 3)])
def test_wrong_taps_say_what_is_allowed(taps):
    with pytest.raises(ValueError, match="four of the tower's blocks, each a number from 1 to 4"):
        Backbone(small("clip").vision, taps)


def test_statistics_are_the_towers():
    cfg = dataclasses.replace(CLIP.vision, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    tower, pixels = (
        small("clip", vision=cfg).vision,
        torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8),
    )
    backbone = Backbone(tower)
    torch.testing.assert_close(backbone(pixels)["2"], backbone(pixels / 127.5 - 1)["2"])
