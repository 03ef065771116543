"""Patches: ordered like the flattened weight of a stride-P convolution, and exactly invertible.

Copying only the visible patches gives the same values as selecting them from all patches.
"""

import numpy as np
import pytest
import torch

from glimpse.data.patches import patchify, patchify_visible, unpatchify


def test_a_linear_layer_over_patches_is_the_convolution():
    images = torch.randn(2, 3, 32, 48)
    conv = torch.nn.Conv2d(3, 5, 16, stride=16)

    linear = patchify(images, 16) @ conv.weight.flatten(1).T + conv.bias

    expected = conv(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(linear, expected, atol=1e-5, rtol=1e-5)


def test_unpatchify_inverts():
    images = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)

    patches = patchify(images, 8)

    assert patches.shape == (2, 15, 192)
    assert patches.dtype == torch.uint8
    assert torch.equal(unpatchify(patches, 8, (3, 5)), images)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("keep", [[0, 3, 4, 14], [14, 2], list(range(15))])
def test_visible_is_patchify_at_keep(keep, mirrored):
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    if mirrored:
        image = image[:, ::-1]

    patches = patchify_visible(image, 8, np.array(keep, dtype=np.int64))

    batch = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = patchify(batch, 8)[0, keep]
    assert patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    assert np.array_equal(patches, expected.numpy())
    assert not np.shares_memory(patches, image)


def test_an_image_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="225 x 224 pixels does not divide into patches of 16"):
        patchify(torch.zeros(1, 3, 225, 224), 16)
    with pytest.raises(ValueError, match="32 x 40 pixels does not divide into patches of 16"):
        patchify_visible(np.zeros((32, 40, 3), np.uint8), 16, np.array([0]))
