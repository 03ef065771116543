"""A-CLIP's choice of visible patches from a teacher's attention (arXiv 2212.08653 section 3.3).

It is made on the device, for all images at once.

    scores = scores_at(attention, teacher_grid, teacher_box, view_box, grid)     one map, read off
    at the patches of any view
    keep = Attentive("low", block=32, patch=16, grid=(14, 14)).choose(scores, 0.5)
    patches = take(patches, keep)

A box is (top, left, height, width) in pixels of the source image; a view is its box squeezed into
the grid.
Letters: B images, L = rows * columns patches of the grid, K kept ones, N blocks, n patches of a
block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

STRATEGIES = ("low", "high", "mixed", "random")
RANDOM_SHARE = 0.25  # of what the strategy mixed keeps


class PatchSelector:
    """Choice of the patches that stay, by their scores.

    strategy: low (the lowest scores go), high (the highest go), mixed (a quarter of the patches
    that stay is drawn, the others have the highest scores), random. Patches stay or go in squares
    of `block` pixels, 1 x 1 patch or more.
    """

    def __init__(self, strategy: str, block: int, patch_size: int, grid: tuple[int, int]):
        if strategy not in STRATEGIES:
            raise ValueError(
                f"options.strategy {strategy!r}: unknown; known: {', '.join(STRATEGIES)}"
            )
        side = block // patch_size
        if block < patch_size or block % patch_size or any(length % side for length in grid):
            divisors = [
                k for k in range(1, min(grid) + 1) if not any(length % k for length in grid)
            ]
            fits = [k * patch_size for k in divisors]
            raise ValueError(
                f"options.block {block}: a grid of {grid[0]} x {grid[1]} patches of {patch_size} pixels"
                f" divides into blocks of {', '.join(map(str, fits))}"
            )
        self.strategy, self.block_side, self.grid = strategy, side, grid
        # (N, n): the patches of each block
        self.patches_of_block = self.group_by_block(torch.arange(grid[0] * grid[1])[None].double())[
            0
        ].long()

    def group_by_block(self, scores: Tensor) -> Tensor:
        """Return scores (B, L) by blocks, (B, N, n)."""
        rows, columns = (length // self.block_side for length in self.grid)
        return (
            scores.view(-1, rows, self.block_side, columns, self.block_side)
            .transpose(2, 3)
            .flatten(3)
            .flatten(1, 2)
        )

    def count_blocks(self, share: float) -> int:
        """Return how many blocks stay for a share of the patches; half a block counts as one.

        Of 196 patches in 49 blocks: 25 blocks, 100 patches, at a half, as in A-CLIP's release; 64
        at a third and 48 at a quarter. One by one: 98, 65, 49. (Table 5 has 98, 65, 48.)
        """
        count = int(round(len(self.patches_of_block) * share, 6) + 0.5)
        if not 0 < count <= len(self.patches_of_block):
            raise ValueError(
                f"options.keep {share}: keeps {count} of {len(self.patches_of_block)} blocks; use smaller"
                " blocks, or another share"
            )
        return count

    def choose(self, scores: Tensor, share: float, noise: Tensor | None = None) -> Tensor:
        """Return the patches to keep, (B, K), ascending.

        scores (B, L). share: of the patches. noise (B, L), uniform: for mixed and random.
        """
        score, count = (
            self.group_by_block(scores.float()).mean(2),
            self.count_blocks(share),
        )  # (B, N)
        if self.strategy in ("mixed", "random"):
            assert noise is not None, f"strategy {self.strategy} draws by noise"
            drawn = count if self.strategy == "random" else round(RANDOM_SHARE * count)
            noise = self.group_by_block(noise)[
                :, :, 0
            ]  # below 1, where a rank from the top is at least 1
            order = score.argsort(dim=1, descending=True, stable=True)
            score = torch.zeros_like(score).scatter_(1, order[:, : count - drawn], 1.0) + noise
        order = score.argsort(dim=1, descending=self.strategy != "high", stable=True)
        self.patches_of_block = self.patches_of_block.to(order.device)  # copied once
        chosen = self.patches_of_block[order[:, :count]]  # (B, count, n)
        return chosen.flatten(1).sort(dim=1).values


def scores_in_view(
    scores: Tensor,
    teacher_grid: tuple[int, int],
    teacher_box: Tensor,
    view_box: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Return scores (B, L') of the teacher's grid at the patches of a view, (B, L).

    They are interpolated bilinearly at the centers of the patches. Boxes are (B, 4).
    """
    rows, columns = grid

    # The centers of the view's patches, in pixels of the source and then from -1 to 1 in the
    # teacher's box: (B, rows) or (B, columns).
    places = []
    for axis, count in enumerate(grid):
        begin, length = view_box[:, axis, None], view_box[:, 2 + axis, None]
        centers = (torch.arange(count, device=scores.device) + 0.5) / count
        pixels = begin + centers * length
        teacher_begin, teacher_length = teacher_box[:, axis, None], teacher_box[:, 2 + axis, None]
        places.append((pixels - teacher_begin) / teacher_length * 2 - 1)
    y, x = places
    # grid_sample wants x before y
    at = torch.stack(
        [x[:, None].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], dim=3
    )

    image = scores.float().unflatten(1, teacher_grid)[:, None]
    sampled = F.grid_sample(image, at, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.flatten(1)


def gather_patches(patches: Tensor, keep: Tensor) -> Tensor:
    """Return the patches to keep: (B, L, X), keep (B, K) -> (B, K, X)."""
    return patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
