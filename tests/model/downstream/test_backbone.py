"""The tower as a backbone: its maps are the tower's tokens, and open_clip's at every block; at
other sizes the positions are interpolated as in MAE and A-CLIP (bicubic); images that patches do
not divide are padded; every trained parameter gets a gradient.

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
    tower = small(flavour).vision
    images = images_of(32, 32)

    maps = Backbone(tower, LAST)(images)

    tokens = tower(patchify(images, 8), everywhere(2))[:, 1:]
    map_tokens = maps["2"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower.norm(map_tokens), tokens)


def test_tokens_equal_open_clips_at_every_block():
    reference = peer()
    towers = small("clip")
    towers.load_state_dict(ours(reference.state_dict()))
    images = images_of(32, 32)

    tokens = Backbone(towers.vision, (1, 2, 3, 4)).tokens(images)

    results = reference.visual.forward_intermediates(
        images, indices=[0, 1, 2, 3], intermediates_only=True
    )
    expected = results["image_intermediates"]
    for block_tokens, block_expected in zip(tokens, expected, strict=True):
        torch.testing.assert_close(block_tokens, block_expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "height, width, grid", [(32, 32, (4, 4)), (24, 56, (3, 7)), (33, 40, (5, 5)), (5, 8, (1, 1))]
)
def test_shapes(flavour, height, width, grid):
    rows, columns = grid
    half_rows = (rows + 1) // 2
    half_columns = (columns + 1) // 2

    maps = Backbone(small(flavour).vision)(images_of(height, width))

    assert maps.keys() == {"0", "1", "2", "3"}
    assert maps["0"].shape == (2, 128, 4 * rows, 4 * columns)
    assert maps["1"].shape == (2, 128, 2 * rows, 2 * columns)
    assert maps["2"].shape == (2, 128, rows, columns)
    assert maps["3"].shape == (2, 128, half_rows, half_columns)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("grid", [(4, 4), (5, 8)])
def test_positions_are_bicubic_and_at_the_native_grid_the_towers_own(flavour, grid):
    """A tower of another grid, with the interpolated positions of the first, gives the same
    tokens.
    """
    tower = small(flavour).vision
    images = images_of(8 * grid[0], 8 * grid[1])

    # Learned positions have a first row for the class token.
    class_rows = 1 if flavour == "clip" else 0
    cls, table = tower.positions.detach().split([class_rows, 16])
    image = F.interpolate(table.T.reshape(1, -1, 4, 4), grid, mode="bicubic", align_corners=False)
    positions = torch.cat([cls, image[0].flatten(1).T])
    if grid == tower.grid:
        torch.testing.assert_close(positions, tower.positions.detach())
    other = deepcopy(tower)
    other.grid = grid
    other.positions = torch.nn.Parameter(positions)

    tokens = Backbone(tower).tokens(images)
    other_tokens = Backbone(other).tokens(images)

    for a, b in zip(tokens, other_tokens, strict=True):
        torch.testing.assert_close(a, b)


def test_bytes_are_normalised_and_padded_with_the_mean_colour():
    backbone = Backbone(small("flip").vision)
    pixels = torch.randint(0, 256, (2, 3, 30, 35), dtype=torch.uint8)
    mean = torch.tensor(CLIP.vision.mean).view(3, 1, 1)
    std = torch.tensor(CLIP.vision.std).view(3, 1, 1)
    padded = F.pad((pixels / 255 - mean) / std, (0, 5, 0, 2))

    from_bytes = backbone(pixels)
    from_floats = backbone(padded)

    for a, b in zip(from_bytes.values(), from_floats.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("taps", [None, (2, 2, 2, 2)])
def test_every_trainable_parameter_gets_a_gradient_and_recomputing_changes_none(taps):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(small("clip", checkpoint_activations=recompute).vision, taps)
        maps = backbone(images_of(24, 40))
        loss = sum(m.square().mean() for m in maps.values())
        loss.backward()
        trained = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
        results.append(trained)
        assert len(trained) > 30
        for name, gradient in trained.items():
            if not name.endswith("bias"):
                assert gradient is not None, name
                assert gradient.any(), name
        assert not any(block._forward_hooks for block in backbone.tower.blocks)

    stored, recomputed = results
    for name, gradient in stored.items():
        torch.testing.assert_close(gradient, recomputed[name], msg=name)


def test_drop_path_is_for_training_and_spares_the_first_block():
    backbone = Backbone(small("clip").vision, (1, 2, 3, 4), drop_path=0.9)
    images = images_of(32, 32)
    expected = Backbone(backbone.tower, (1, 2, 3, 4)).tokens(images)

    torch.manual_seed(0)
    in_training = backbone.tokens(images)
    in_evaluation = backbone.eval().tokens(images)

    same = [torch.equal(a, b) for a, b in zip(in_training, expected)]
    assert same == [True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(in_evaluation, expected))


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
    backbone = Backbone(small("clip", vision=cfg).vision)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)

    from_bytes = backbone(pixels)
    from_floats = backbone(pixels / 127.5 - 1)

    torch.testing.assert_close(from_bytes["2"], from_floats["2"])
