"""The vision tower as the backbone of a detector or a segmenter: images of any size into four
feature maps. docs/transfer.md uses it.

    maps = Backbone(method.towers.vision)(images)
        # {"0": stride P/4, "1": P/2, "2": P, "3": 2P}, each (B, D, rows, columns)

As BEiT and MAE do it for UperNet, and MaskCLIP for UperNet and Mask R-CNN (its appendix): the
outputs of four blocks, as they are, without the tower's last norm; the first map is made four times
finer by two transposed convolutions, the second twice by one, the third stays,
the fourth is max-pooled. Every token attends to all; positions are interpolated to the image's
grid.
Letters: B batch, H x W pixels, P patch side, D width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.layers import make_drop_path_mask
from glimpse.model.vision import VisionTower, normalize_pixels


class Backbone(nn.Module):
    """`taps`: the four blocks, counted from 1, whose outputs become the maps, the finest first. The
    default is the papers': 4, 6, 8, 12 of 12 and 8, 12, 16, 24 of 24. The last block four times is
    the pyramid of ViTDet (arXiv 2203.16527, section 3), all of width D.

    Trains and freezes like any module; what of the tower has no part in the maps (its norm, blocks
    after the last tap) is frozen here, so that every trainable parameter gets a gradient.
    `drop_path`: of the last block, in training; of those below it less.
    On several ranks convert the batch norm with nn.SyncBatchNorm, as BEiT does.
    """

    def __init__(
        self, tower: VisionTower, taps: Sequence[int] | None = None, drop_path: float = 0.0
    ):
        super().__init__()
        depth, width = len(tower.blocks), tower.patch.out_features
        self.tower, self.width, self.drop_path = tower, width, drop_path
        self.patch_size = math.isqrt(tower.patch.in_features // 3)
        if not taps:
            taps = [max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.taps = tuple(taps)
        if len(self.taps) != 4 or not all(1 <= tap <= depth for tap in self.taps):
            raise ValueError(
                f"taps {self.taps}: four of the tower's blocks, each a number from 1 to {depth}"
            )
        tower.norm.requires_grad_(False)
        for block in list(tower.blocks)[max(self.taps) :]:
            block.requires_grad_(False)

        def finer() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, 2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(finer(), nn.BatchNorm2d(width), nn.GELU(), finer()),
                finer(),
                nn.Identity(),
                # ceil: a grid of odd sides is covered to its edge
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), bytes, or floats that are normalised already by the tower's cfg.mean and
        cfg.std -> the maps, finest first.

        Where P does not divide H or W, the image goes on below and to the right in the mean colour
        to a whole patch; the maps cover that.
        """
        pairs = zip(self.scales, self.tokens(images), strict=True)
        return {str(i): scale(x) for i, (scale, x) in enumerate(pairs)}

    def tokens(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the patch tokens after the tapped blocks, 4 x (B, D, rows, columns)."""
        # 1. Normalize the pixels, pad them to whole patches, and cut these.
        cfg, P, blocks = self.tower.cfg, self.patch_size, self.tower.blocks
        pixels = images.flatten(1)[:, None]
        floats = normalize_pixels(pixels, cfg.mean, cfg.std, self.tower.cls.dtype).view(
            images.shape
        )
        floats = F.pad(floats, (0, -images.shape[3] % P, 0, -images.shape[2] % P))
        grid = floats.shape[2] // P, floats.shape[3] // P
        # (B, L, 3 P P), in the order of a convolution's weight
        patches = F.unfold(floats, P, stride=P).transpose(1, 2)
        places = torch.arange(grid[0] * grid[1], device=images.device).expand(len(images), -1)
        drop_path_mask = None
        if self.training and self.drop_path:
            noise = torch.rand(len(images), len(blocks), 2, device=images.device)
            drop_path_mask = make_drop_path_mask(noise, self.drop_path)

        # 2. Run the tower, and keep the outputs of the tapped blocks.
        outputs: dict[int, Tensor] = {}

        def keep(tap: int) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(block: nn.Module, inputs: object, output: Tensor) -> None:
                outputs[tap] = output

            return hook

        hooks = [blocks[tap - 1].register_forward_hook(keep(tap)) for tap in set(self.taps)]
        try:
            self.tower(patches, places, grid, drop_path_mask=drop_path_mask)
        finally:
            for hook in hooks:
                hook.remove()
        return [outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]
