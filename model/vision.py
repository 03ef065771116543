"""Vision tower: patches and their positions in the grid -> tokens.

Masking happens before the tower: its input has only the visible patches of each image.

Letters: B batch, L patches of the grid, K visible patches, P patch size, D width.
To add a kind of pooling, add one row to POOLS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.init import WeightInit
from glimpse.model.layers import (
    ACTIVATIONS,
    AttentionRecorder,
    Linear,
    Transformer,
    normal_parameter,
    sincos_positions,
)

# Poolings of the tower's tokens, (B, 1 + K, D) -> (B, D).
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens[:, 1:].mean(1),
    "mean_with_cls": lambda tokens: tokens.mean(1),
    # VisionTower.forward has put the normalized mean in place of the class token. It cannot be
    # computed here: under ZeRO-3 the norm's parameters are gathered only inside that forward.
    "mean_then_norm": lambda tokens: tokens[:, 0],
}


@dataclass(frozen=True)
class VisionConfig:
    """Architecture of the vision tower; the defaults are FLIP's.

    CLIP uses: positions learned, pool cls, pre_norm, no patch_bias, activation gelu or quick_gelu,
    eps 1e-5, and another mean and std.
    """

    # Position embeddings: sincos (fixed) or learned.
    positions: str = "sincos"
    # Pooling: cls, mean, mean_with_cls (all after the final norm), or mean_then_norm (mean of
    # the patch tokens, then the norm, as in CLIPA).
    pool: str = "mean_with_cls"
    # Apply a LayerNorm between the embeddings and the first block, as CLIP does.
    pre_norm: bool = False
    # Give the patch embedding a bias.
    patch_bias: bool = True
    # Keep the patch embedding at its random initialization.
    freeze_patch: bool = False
    # Activation of the MLPs: gelu, gelu_tanh or quick_gelu.
    activation: str = "gelu_tanh"
    # Epsilon of every LayerNorm.
    eps: float = 1e-6
    # Mean of each color channel, for pixel values in 0 to 1; the default is ImageNet's.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    # Standard deviation of each color channel, for pixel values in 0 to 1; the default is
    # ImageNet's.
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for key, choices in (
            ("positions", ("learned", "sincos")),
            ("pool", POOLS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"model.vision.{key}: unknown {getattr(self, key)!r}; known:"
                    f" {', '.join(sorted(choices))}"
                )
        if not self.eps > 0:
            raise ValueError(f"model.vision.eps: {self.eps} is not positive; use a number above 0")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"model.vision.mean {self.mean}, model.vision.std {self.std}: give three numbers"
                " each, one per color channel; std must be above 0"
            )


class VisionTower(nn.Module):
    """Vision transformer over the visible patches of a (rows, columns) grid, L = rows * columns."""

    positions: Tensor  # (1 + L, D) if learned, with the class token's first; (L, D) if fixed

    def __init__(
        self,
        cfg: VisionConfig,
        grid: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        init: WeightInit,
        checkpoint_activations: bool = False,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.cfg, self.grid = cfg, grid
        bias = init.bias if cfg.patch_bias else None
        self.patch = Linear(3 * patch_size * patch_size, width, init.patch, bias)
        self.patch.requires_grad_(not cfg.freeze_patch)
        self.cls = normal_parameter(width, std=init.cls)
        if cfg.positions == "learned":
            self.positions = normal_parameter(1 + grid[0] * grid[1], width, std=init.positions)
        else:
            self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.pre_norm = nn.LayerNorm(width, cfg.eps) if cfg.pre_norm else nn.Identity()
        self.blocks = Transformer(
            depth, width, heads, cfg.activation, cfg.eps, init, checkpoint_activations, mlp_ratio
        )
        self.norm = nn.LayerNorm(width, cfg.eps)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        grid: tuple[int, int] | None = None,
        only_cls: bool = False,
        recorder: AttentionRecorder | None = None,
        value_attention_only: bool = False,
        drop_path_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens (B, 1 + K, D), the class token first.

        With pool mean_then_norm the normalized mean takes the place of the class token.

        patches: (B, K, 3 P P), uint8 pixels or normalized floats.

        positions: (B, K), the index of each patch in the grid.

        grid: the grid that `positions` refer to, if it is not the tower's; the position embeddings
        are interpolated to it.

        only_cls: compute only the class token, (B, 1, D). The result is exact and the last block
        is cheaper.

        recorder: collects the attention of the class token in each layer.

        value_attention_only: in the last block each token attends only to itself. With pool cls
        this makes patch tokens that describe their own patch (Zhou et al. 2022, Extract Free Dense
        Labels from CLIP, section 3.2).

        drop_path_mask: (depth, 2, B), from layers.make_drop_path_mask, for fine-tuning.
        """
        # 1. Embed the patches and add their position embeddings.
        learned = self.cfg.positions == "learned"
        x = self.patch(normalize_pixels(patches, self.cfg.mean, self.cfg.std, self.cls.dtype))
        table = self.positions[1:] if learned else self.positions
        if grid is not None and grid != self.grid:
            table = resize_positions(table, self.grid, grid)
        x = x + F.embedding(positions.long(), table).to(x.dtype)

        # 2. Put the class token first.
        cls = self.cls + self.positions[0] if learned else self.cls
        x = torch.cat([cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)

        # 3. Run the transformer, then the pooling that belongs before the norm.
        query_index = 1 if only_cls else None
        x = self.blocks(
            self.pre_norm(x),
            query_index=query_index,
            recorder=recorder,
            value_attention_only=value_attention_only,
            drop_path_mask=drop_path_mask,
        )
        if self.cfg.pool == "mean_then_norm" and not only_cls:
            x = torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], dim=1)
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled tokens, (B, 1 + K, D) -> (B, D).

        Uses no parameters, so that it may be called outside of forward under ZeRO-3.
        """
        return POOLS[self.cfg.pool](tokens)


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize the position embeddings (L, D) of one (rows, columns) grid to another, bicubic.

    As in A-CLIP, section 4.1.
    """
    image = table.t().unflatten(1, old_grid)[None].float()  # (1, D, rows, columns)
    image = F.interpolate(image, new_grid, mode="bicubic", align_corners=False)
    return image[0].flatten(1).t().to(table.dtype)


def normalize_pixels(
    patches: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """Return (x / 255 - mean) / std, computed in fp32; floats are only cast to `dtype`.

    patches: (B, K, 3 P P) uint8, with the values of a color channel next to each other.

    mean and std are Python numbers: as a tensor they would be copied to the device at every call,
    and as a buffer they would be cast to bf16.
    """
    if patches.dtype != torch.uint8:
        return patches.to(dtype)
    channels = patches.unflatten(2, (3, -1)).unbind(2)
    normalized = [
        ((x.float() / 255 - channel_mean) / channel_std).to(dtype)
        for x, channel_mean, channel_std in zip(channels, mean, std, strict=True)
    ]
    return torch.cat(normalized, dim=2)
