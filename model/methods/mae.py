"""CLIP + MAE: the contrastive loss and MAE (arXiv 2111.06377) with the same vision tower.

Two papers report it, without code. `contrast: image` is a baseline of MaskCLIP (figure 1c): the
contrastive loss uses all patches in a second forward pass. `contrast: visible` is FLIP's table 1f:
one masked forward pass for both losses.

View: `image` with a mask; the masked patches are the targets.

Letters: B samples, L patches of the grid, K visible patches, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glimpse.model.collectives import batch_mean
from glimpse.model.heads import PatchDecoder, check_decoder_width
from glimpse.model.losses import contrastive, reconstruction
from glimpse.model.methods.base import (
    Method,
    MicroBatch,
    all_patches,
    require_above,
    require_at_least,
)
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import normalize_pixels


@dataclass(frozen=True)
class Options:
    # Input of the contrastive loss: image (the whole image, in a second forward pass) or
    # visible (the masked image).
    contrast: str = "image"
    # Weight of the reconstruction loss.
    weight: float = 1.0
    # Width of the decoder; a multiple of 4 and of heads.
    width: int = 512
    # Transformer blocks in the decoder.
    depth: int = 8
    # Attention heads in the decoder.
    heads: int = 16
    # Normalize the target pixels by the mean and standard deviation of their patch; false
    # normalizes them by color channel.
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.contrast not in ("image", "visible"):
            raise ValueError(f"options.contrast: unknown {self.contrast!r}; known: image, visible")
        require_at_least(1, depth=self.depth)
        require_above(0, weight=self.weight)


class Mae(Method):
    """Contrastive loss, and reconstruction of the masked patches by a decoder."""

    Options = Options
    hidden_patch_views = ("image",)

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__(cfg, vocab, context, options)
        self.decoder = PatchDecoder(
            cfg.shape.width,
            options.width,
            options.depth,
            options.heads,
            cfg.grid,
            out=3 * cfg.patch_size**2,
            checkpoint_activations=cfg.checkpoint_activations,
        )

    @staticmethod
    def check_options(options, cfg: ModelConfig, counts: Mapping[str, int]) -> None:
        check_decoder_width(options.width, options.heads)

    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        view, towers, vision = micro_batch["views"]["image"], self.towers, self.cfg.vision

        # 1. The visible patches, and the image features for the contrastive loss.
        tokens = towers.vision(view["patches"], view["positions"])  # (B, 1 + K, D)
        if self.options.contrast == "image":
            pooled = towers.image_features(*all_patches(view))
        else:
            pooled = towers.vision.pool(tokens)

        # 2. The masked patches, predicted and real: (B, L - K, 3 P P).
        prediction = self.decoder(tokens, view["positions"], view["hidden_positions"])
        target = normalize_pixels(view["hidden"], vision.mean, vision.std, torch.float32)
        error = reconstruction(prediction, target, self.options.normalise)

        features = self.pair_features(pooled, micro_batch["text"])
        return dict(features, reconstruction=error)

    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return contrastive + weight * squared error of the masked patches (FLIP section 4.1)."""
        loss, metrics = contrastive(features["image"], features["text"], features["scale"])
        auxiliary = batch_mean(features["reconstruction"])
        total = loss + self.options.weight * auxiliary
        return total, {
            **metrics,
            "contrastive": loss.detach(),
            "reconstruction": auxiliary.detach(),
            "temperature": 1 / features["scale"].detach(),
        }
