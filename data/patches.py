"""Divide images into patches, and assemble images from patches.

The values of a patch are ordered (channel, row, column), like the flattened weight of a stride-P
convolution. A linear layer over patches therefore equals that convolution, and its weights convert
by reshaping.

Shapes: B images, C channels, H x W pixels, P patch side in pixels, L = (H / P) * (W / P) patches in
row-major order, K visible patches.
"""

import numpy as np
from torch import Tensor


def patch_grid(height: int, width: int, P: int) -> tuple[int, int]:
    """Return (rows, columns) of patches; ValueError if P does not divide the image's sides."""
    if height % P or width % P:
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {P}; change the"
            " image or the patch size"
        )
    return height // P, width // P


def patchify(images: Tensor, P: int) -> Tensor:
    """Divide images (B, C, H, W) into patches (B, L, C*P*P)."""
    B, C, H, W = images.shape
    rows, columns = patch_grid(H, W, P)
    return (
        images.reshape(B, C, rows, P, columns, P)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(B, rows * columns, C * P * P)
    )


def unpatchify(patches: Tensor, P: int, grid_size: tuple[int, int]) -> Tensor:
    """Assemble images (B, C, H, W) from patches (B, L, C*P*P); grid_size is (rows, columns)."""
    B = patches.shape[0]
    rows, columns = grid_size
    return (
        patches.reshape(B, rows, columns, -1, P, P)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(B, -1, rows * P, columns * P)
    )


def patchify_visible(image: np.ndarray, P: int, keep: np.ndarray) -> np.ndarray:
    """Return the patches `keep` (K,) of an image (H, W, C) as (K, C*P*P); copy only these."""
    height, width = image.shape[:2]
    rows, columns = patch_grid(height, width, P)
    # A view (rows, columns, C, P, P) of the same memory; the indexing below copies.
    tiles = image.reshape(rows, P, columns, P, -1).transpose(0, 2, 4, 1, 3)
    return tiles[keep // columns, keep % columns].reshape(len(keep), -1)
