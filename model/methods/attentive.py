"""A-CLIP's selection of visible patches by a teacher's attention (arXiv 2212.08653, section 3.3).

It runs on the device, for all images of a batch at once:

    # The attention map of the teacher, read at the patches of any view.
    scores = scores_in_view(attention, teacher_grid, teacher_box, view_box, grid)
    keep = PatchSelector("low", block=32, patch_size=16, grid=(14, 14)).choose(scores, 0.5)
    patches = gather_patches(patches, keep)

A box is (top, left, height, width) in pixels of the source image. A view is the content
of its box, resized to the model's input.

Letters: B images, L = rows * columns patches of the grid, K kept patches, N blocks, n patches of a
block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

STRATEGIES = ("low", "high", "mixed", "random")
RANDOM_SHARE = 0.25  # share of the kept blocks that strategy `mixed` draws at random


class PatchSelector:
    """Selection of the patches to keep, by their scores.

    strategy: low drops the lowest scores, high drops the highest; mixed keeps the highest scores,
    but a quarter of the kept patches are random; random ignores the scores.

    Patches are kept or dropped in square blocks of `block` pixels, at least one patch.
    """

    def __init__(self, strategy: str, block: int, patch_size: int, grid: tuple[int, int]):
        if strategy not in STRATEGIES:
            raise ValueError(
                f"options.strategy: unknown {strategy!r}; known: {', '.join(STRATEGIES)}"
            )
        block_side = block // patch_size
        divides_grid = block_side > 0 and not any(length % block_side for length in grid)
        if block % patch_size or not divides_grid:
            sides = range(1, min(grid) + 1)
            allowed = [
                side * patch_size for side in sides if not any(length % side for length in grid)
            ]
            raise ValueError(
                f"options.block: {block} does not divide the grid of {grid[0]} x {grid[1]} patches"
                f" of {patch_size} pixels; use {', '.join(map(str, allowed))}"
            )
        self.strategy, self.block_side, self.grid = strategy, block_side, grid
        # (N, n): indices of the patches of each block.
        indices = torch.arange(grid[0] * grid[1])[None].double()
        self.patches_of_block = self.group_by_block(indices)[0].long()

    def group_by_block(self, scores: Tensor) -> Tensor:
        """Return the scores of each block, (B, L) -> (B, N, n)."""
        rows, columns = (length // self.block_side for length in self.grid)
        return (
            scores.view(-1, rows, self.block_side, columns, self.block_side)
            .transpose(2, 3)
            .flatten(3)
            .flatten(1, 2)
        )

    def count_blocks(self, share: float) -> int:
        """Return the number of blocks to keep for a share of the patches, rounded half up.

        With 196 patches in 49 blocks: a half keeps 25 blocks, which are 100 patches, as in A-CLIP's
        code; a third keeps 64 patches and a quarter 48. With single patches: 98, 65, 49. (Table 5
        of the paper has 98, 65, 48.)
        """
        # Rounding to 6 digits first, because a share such as 1 / 3 is not exact.
        count = int(round(len(self.patches_of_block) * share, 6) + 0.5)
        if not 0 < count <= len(self.patches_of_block):
            raise ValueError(
                f"options.keep: {share} keeps {count} of {len(self.patches_of_block)} blocks; use"
                " smaller blocks, or another share"
            )
        return count

    def choose(self, scores: Tensor, share: float, noise: Tensor | None = None) -> Tensor:
        """Return the indices of the patches to keep, (B, K), in ascending order.

        scores: (B, L). share: the share of patches to keep. noise: (B, L), uniform in [0, 1), for
        the strategies mixed and random.
        """
        # 1. The score of a block is the mean of its patches.
        block_scores, count = self.group_by_block(scores.float()).mean(2), self.count_blocks(share)

        # 2. Random blocks: blocks that are kept for their attention score 1 + noise, all others
        # only noise. Noise is below 1, so the former come first, and the others follow in random
        # order.
        if self.strategy in ("mixed", "random"):
            assert noise is not None, f"strategy {self.strategy} needs noise"
            random_count = count if self.strategy == "random" else round(RANDOM_SHARE * count)
            order = block_scores.argsort(dim=1, descending=True, stable=True)
            by_attention = order[:, : count - random_count]
            block_scores = torch.zeros_like(block_scores).scatter_(1, by_attention, 1.0)
            block_scores = block_scores + self.group_by_block(noise)[:, :, 0]

        # 3. Keep the first `count` blocks.
        order = block_scores.argsort(dim=1, descending=self.strategy != "high", stable=True)
        # Not a buffer, which would become part of a checkpoint: moved to the device at first use.
        self.patches_of_block = self.patches_of_block.to(order.device)
        kept_patches = self.patches_of_block[order[:, :count]]  # (B, count, n)
        return kept_patches.flatten(1).sort(dim=1).values


def scores_in_view(
    scores: Tensor,
    teacher_grid: tuple[int, int],
    teacher_box: Tensor,
    view_box: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Return the scores at the patches of a view, (B, L), from scores of the teacher's grid.

    scores: (B, patches of the teacher's grid). They are interpolated bilinearly at the centers of
    the view's patches. Boxes are (B, 4).
    """
    rows, columns = grid

    # The centers of the view's patches along each axis, first in pixels of the source image, then
    # scaled so that the teacher's box is -1 to 1: (B, rows) and (B, columns).
    axes = []
    for axis, count in enumerate(grid):
        begin, length = view_box[:, axis, None], view_box[:, 2 + axis, None]
        centers = (torch.arange(count, device=scores.device) + 0.5) / count
        pixels = begin + centers * length
        teacher_begin, teacher_length = teacher_box[:, axis, None], teacher_box[:, 2 + axis, None]
        axes.append((pixels - teacher_begin) / teacher_length * 2 - 1)
    y, x = axes
    # grid_sample takes (x, y) in this order.
    points = torch.stack(
        [x[:, None].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], dim=3
    )

    image = scores.float().unflatten(1, teacher_grid)[:, None]
    sampled = F.grid_sample(
        image, points, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.flatten(1)


def gather_patches(patches: Tensor, keep: Tensor) -> Tensor:
    """Return the patches to keep, (B, L, X) at indices keep (B, K) -> (B, K, X)."""
    return patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
