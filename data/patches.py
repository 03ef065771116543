"""Cut images into patches, and put patches back together.

A patch is laid out (channel, row, column), as the weight of a stride-P convolution flattens. A
linear layer over patches therefore equals that convolution, and its weights convert by reshaping.
Letters: B images, H x W pixels, P pixels to a patch side, L = (H / P) * (W / P) patches in reading
order, K visible patches.
"""

import numpy as np
from torch import Tensor


def patch_grid(height: int, width: int, P: int) -> tuple[int, int]:
    """Return (rows, columns) of the patches of an image."""
    if height % P or width % P:
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {P}; change the"
            " image or the patch size"
        )
    return height // P, width // P


def patchify(images: Tensor, P: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C*P*P)."""
    B, C, H, W = images.shape
    rows, columns = patch_grid(H, W, P)
    return (
        images.reshape(B, C, rows, P, columns, P)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(B, rows * columns, C * P * P)
    )


def unpatchify(patches: Tensor, P: int, grid_size: tuple[int, int]) -> Tensor:
    """(B, L, C*P*P) -> (B, C, H, W); grid_size is (rows, columns)."""
    B = patches.shape[0]
    rows, columns = grid_size
    return (
        patches.reshape(B, rows, columns, -1, P, P)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(B, -1, rows * P, columns * P)
    )


def patchify_visible(image: np.ndarray, P: int, keep: np.ndarray) -> np.ndarray:
    """Cut an image (H, W, C) at keep (K,) -> (K, C*P*P); reads the visible patches only."""
    height, width = image.shape[:2]
    rows, columns = patch_grid(height, width, P)
    # (rows, columns, C, P, P), no copy yet
    view = image.reshape(rows, P, columns, P, -1).transpose(0, 2, 4, 1, 3)
    return view[keep // columns, keep % columns].reshape(len(keep), -1)
