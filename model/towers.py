"""CLIP model: vision and text towers, projections, temperature; model sizes and configuration.

To add a size, add one row to SIZES. A model with other sizes, such as an imported one, lists them
in its config: `size: custom/14` and `custom:`.

Under ZeRO-3 a parameter is gathered only inside the forward of the module that owns it. The
projections and the temperature are therefore modules, and the encode_* methods only call modules.

Letters: B batch, L patches, K visible patches, P patch size, T packed tokens, D width, E width of
the shared embedding.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glimpse.model.init import text_init, vision_init
from glimpse.model.layers import Linear
from glimpse.model.losses import l2_normalize
from glimpse.model.text import TextConfig, TextTower
from glimpse.model.vision import VisionConfig, VisionTower


@dataclass(frozen=True)
class Size:
    """Sizes of both towers: one row of SIZES, or `model.custom` in a config."""

    # Width of the vision tower.
    width: int
    # Transformer blocks in the vision tower.
    depth: int
    # Attention heads in the vision tower; the width is a multiple of them.
    heads: int
    # Width of the text tower.
    text_width: int
    # Transformer blocks in the text tower.
    text_depth: int
    # Attention heads in the text tower; the text width is a multiple of them.
    text_heads: int
    # Width of the shared embedding.
    embed: int
    # Hidden width of the vision tower's MLPs as a multiple of its width.
    mlp: float = 4.0
    # Hidden width of the text tower's MLPs as a multiple of its width.
    text_mlp: float = 4.0

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "text_width", "text_depth", "text_heads", "embed"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"model.custom.{key}: {getattr(self, key)} is below 1; use 1 or more"
                )
        towers = (
            ("", self.width, self.heads, self.mlp),
            ("text_", self.text_width, self.text_heads, self.text_mlp),
        )
        for key, width, heads, ratio in towers:
            if width % heads:
                raise ValueError(
                    f"model.custom.{key}width: {width} is not a multiple of"
                    f" model.custom.{key}heads ({heads})"
                )
            if not 1 <= width * ratio < math.inf:
                raise ValueError(
                    f"model.custom.{key}mlp: {ratio} is out of range; the hidden width is mlp times"
                    f" the width of {width}, so use a finite number of at least 1 / {width}"
                )


SIZES = {
    "nano": Size(128, 4, 4, 128, 3, 4, 128),  # for tests and first runs on a CPU
    # DeiT-Ti. No CLIP of this size is standard; the text tower is as wide as the vision tower, as
    # in S.
    "Ti": Size(192, 12, 3, 192, 12, 3, 192),
    "S": Size(384, 12, 6, 384, 12, 6, 384),  # open_clip's ViT-S
    "B": Size(768, 12, 12, 512, 12, 8, 512),  # CLIP's and FLIP's
    "L": Size(1024, 24, 16, 768, 12, 12, 768),
    # L of SLIP and A-CLIP: the vision tower of L with the text tower of B
    "L512": Size(1024, 24, 16, 512, 12, 8, 512),
    "H": Size(1280, 32, 16, 1024, 24, 16, 1024),
}
PATCH_SIZES = (8, 14, 16, 32)
INITS = ("clip", "flip")


@dataclass(frozen=True)
class ModelConfig:
    """Section `model:` of a run's config."""

    # Model size and patch side in pixels, as in B/16: nano, Ti, S, B, L, L512 (L with B's
    # text tower) or H with 8, 14, 16 or 32, or custom with any patch side.
    size: str = "B/16"
    # Widths, depths and heads of a model of size custom/PATCH; the keys are listed below.
    custom: Size | None = None
    # Side of the square input image, or [height, width], in pixels; multiples of the patch
    # side.
    image_size: int | tuple[int, int] = 224
    # Weight initialization: flip (MAE's Xavier) or clip (open_clip's).
    init: str = "flip"
    # Recompute each transformer block in the backward pass, which saves memory and costs
    # about a third more compute.
    checkpoint_activations: bool = False
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        name, _, patch = self.size.partition("/")
        is_custom = name == "custom" and bool(re.fullmatch("[1-9][0-9]*", patch))
        is_standard = name in SIZES and patch in map(str, PATCH_SIZES)
        if not is_custom and not is_standard:
            raise ValueError(
                f"model.size: unknown {self.size!r}; use SIZE/PATCH as in 'B/16', with SIZE one of"
                f" {', '.join(SIZES)} and PATCH one of {', '.join(map(str, PATCH_SIZES))}, or"
                " custom/PATCH with any patch size"
            )
        if is_custom and not self.custom:
            raise ValueError(
                f"model.custom: missing; model.size {self.size!r} takes its numbers from there"
            )
        if self.custom and not is_custom:
            raise ValueError(
                f"model.custom: not used by model.size {self.size!r}; use size custom/PATCH, or"
                " remove model.custom"
            )
        if self.vision.positions == "sincos" and self.shape.width % 4:
            raise ValueError(
                f"model.custom.width: {self.shape.width} is not a multiple of 4, which"
                " model.vision.positions sincos needs; change the width, or use learned positions"
            )
        if any(side < self.patch_size or side % self.patch_size for side in self.image_shape):
            raise ValueError(
                f"model.image_size: {self.image_size} is not a multiple of the patch size of"
                f" model.size {self.size!r}"
            )
        if self.init not in INITS:
            raise ValueError(f"model.init: unknown {self.init!r}; known: {', '.join(INITS)}")

    @property
    def shape(self) -> Size:
        return self.custom or SIZES[self.size.partition("/")[0]]

    @property
    def patch_size(self) -> int:
        return int(self.size.partition("/")[2])

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        if isinstance(self.image_size, tuple):
            return self.image_size
        return self.image_size, self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size


class Temperature(nn.Module):
    """Scale of the logits, exp(min(logit_scale, ln 100)), (1,) fp32.

    The clamp is part of the forward pass, because an in-place clamp of the parameter would miss the
    optimizer's fp32 master copy.

    residual: fp32 master copy minus parameter. A bf16 parameter has steps of 1/64 at its initial
    value of 2.66, so that small updates would not reach the loss; the engine sets the residual
    after each step. It has no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        # (1,), because DeepSpeed does not support 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.residual: Tensor | float = 0.0

    def forward(self) -> Tensor:
        return (self.logit_scale.float() + self.residual).clamp(max=math.log(100)).exp()


def build_vision_tower(cfg: ModelConfig) -> VisionTower:
    """Build the vision tower of a model, or of its teacher."""
    size = cfg.shape
    return VisionTower(
        cfg.vision,
        cfg.grid,
        cfg.patch_size,
        size.width,
        size.depth,
        size.heads,
        vision_init(cfg.init, size.width),
        cfg.checkpoint_activations,
        size.mlp,
    )


class Towers(nn.Module):
    """Vision and text tower, their projections to the shared embedding, and the temperature."""

    def __init__(self, cfg: ModelConfig, vocab: int, context: int):
        super().__init__()
        size = cfg.shape
        vision_weights = vision_init(cfg.init, size.width)
        text_weights = text_init(cfg.init, size.text_width, size.text_depth)
        self.vision = build_vision_tower(cfg)
        self.text = TextTower(
            cfg.text,
            vocab,
            context,
            size.text_width,
            size.text_depth,
            size.text_heads,
            text_weights,
            cfg.checkpoint_activations,
            size.text_mlp,
        )
        self.image_projection = Linear(size.width, size.embed, vision_weights.projection, bias=None)
        self.text_projection = Linear(
            size.text_width, size.embed, text_weights.projection, bias=None
        )
        self.temperature = Temperature()

    def image_features(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the pooled tokens, patches (B, K, 3 P P) at positions (B, K) -> (B, D)."""
        only_cls = self.vision.cfg.pool == "cls"
        return self.vision.pool(self.vision(patches, positions, only_cls=only_cls))

    def embed_image(self, features: Tensor) -> Tensor:
        """Return the embeddings of pooled tokens, (B, D) -> (B, E), fp32 unit vectors."""
        return l2_normalize(self.image_projection(features))

    def encode_image(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the embeddings of images, (B, E), fp32 unit vectors.

        patches: (B, K, 3 P P). positions: (B, K).
        """
        return self.embed_image(self.image_features(patches, positions))

    def encode_text(
        self,
        ids: Tensor,
        lengths: Tensor,
        longest: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of captions, (B, E), fp32 unit vectors; see TextTower.forward."""
        return l2_normalize(self.text_projection(self.text(ids, lengths, longest, positions)))
