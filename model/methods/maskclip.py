"""MaskCLIP (arXiv 2208.12262v1): contrastive loss on full images, and masked self-distillation.

The teacher, a moving average of the vision tower, gets all patches of the image. The student gets a
quarter of them, and a decoder of one block predicts the teacher's features of the masked patches
(sections 3.1 and 3.2).

View: `image` with a mask; the targets are the teacher's features of the masked patches.

Letters: B samples, L patches of the grid, K visible patches, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glimpse.model.collectives import batch_mean
from glimpse.model.ema import check_momentum
from glimpse.model.ema import linear_momentum as linear_momentum
from glimpse.model.heads import PatchDecoder
from glimpse.model.losses import contrastive, distillation
from glimpse.model.methods.base import (
    EmaMethod,
    MicroBatch,
    all_patches,
    require_above,
    require_at_least,
)
from glimpse.model.towers import ModelConfig, build_vision_tower


@dataclass(frozen=True)
class Options:
    # Weight of the distillation loss, the paper's lambda.
    weight: float = 1.0
    # Combination of the two directions of the contrastive loss: sum (the paper's) or half
    # (their mean).
    convention: str = "sum"
    # Beta of the smooth L1 loss.
    beta: float = 2.0
    # Apply a LayerNorm without weights to the distillation targets.
    normalise: bool = False
    # Transformer blocks in the decoder.
    depth: int = 1
    # Teacher: average (a moving average of the student), student (the student itself, without
    # gradient), or a run folder whose frozen vision tower is the teacher.
    teacher: str = "average"
    # Train with the contrastive loss; false trains by distillation alone from a run folder's
    # tower (the second stage of the paper's table 3) and leaves the text tower and
    # projections at their initial weights.
    contrast: bool = True
    # Momentum of the moving average at the start and at the end; it rises linearly in
    # between.
    momentum: tuple[float, float] = (0.999, 0.9999)

    def __post_init__(self) -> None:
        if self.convention not in ("sum", "half"):
            raise ValueError(f"options.convention: unknown {self.convention!r}; known: half, sum")
        check_momentum(self.momentum)
        require_at_least(1, depth=self.depth)
        require_above(0, weight=self.weight, beta=self.beta)
        if not self.contrast and self.teacher in ("average", "student"):
            raise ValueError(
                f"options.contrast: false does not work with options.teacher {self.teacher!r},"
                " because the student would only learn to predict itself; set options.teacher to a"
                " run folder"
            )


class MaskClip(EmaMethod):
    """Contrastive loss on full images, and distillation of the masked patches."""

    Options = Options
    hidden_patch_views = ("image",)

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__(cfg, vocab, context, options)
        width = cfg.shape.width
        self.decoder = PatchDecoder(
            width,
            width,
            options.depth,
            cfg.shape.heads,
            cfg.grid,
            out=width,
            checkpoint_activations=cfg.checkpoint_activations,
        )
        if options.teacher != "student":
            self.teacher = nn.ModuleDict({"vision": build_vision_tower(cfg)}).requires_grad_(False)
        if not options.contrast:
            for module in (
                self.towers.text,
                self.towers.image_projection,
                self.towers.text_projection,
                self.towers.temperature,
            ):
                module.requires_grad_(False)

    def teacher_checkpoint(self) -> dict[str, str]:
        if self.options.teacher in ("average", "student"):
            return {}
        return {"teacher.": self.options.teacher}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.options.teacher != "average":
            return []
        return [(self.teacher["vision"], self.towers.vision)]

    def momentum(self, progress: float) -> float:
        start, end = self.options.momentum
        return linear_momentum(start, end, progress)

    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        view, towers, options = micro_batch["views"]["image"], self.towers, self.options
        patches, positions = all_patches(view)  # the masked patches last

        # 1. The full image, for the teacher's targets and the contrastive loss.
        features: dict[str, Tensor] = {}
        if options.teacher == "student":
            tokens = towers.vision(patches, positions)  # (B, 1 + L, D)
            target = tokens.detach()
            features = self.pair_features(towers.vision.pool(tokens), micro_batch["text"])
        else:
            with torch.no_grad():
                target = self.teacher["vision"](patches, positions)
            if options.contrast:
                pooled = towers.image_features(patches, positions)
                features = self.pair_features(pooled, micro_batch["text"])

        # 2. The visible patches, from which the decoder predicts the targets of the masked ones.
        tokens = towers.vision(view["patches"], view["positions"])  # (B, 1 + K, D)
        prediction = self.decoder(tokens, view["positions"], view["hidden_positions"])
        target = target[:, -prediction.shape[1] :]  # (B, L - K, D)
        error = distillation(prediction, target, options.beta, options.normalise)
        return dict(features, distillation=error)

    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_I + L_T + lambda L_dist (section 3.3)."""
        auxiliary = batch_mean(features["distillation"])
        if not self.options.contrast:
            return self.options.weight * auxiliary, {"distillation": auxiliary.detach()}
        # `contrastive` returns (L_I + L_T) / 2; the paper's loss is the sum.
        loss, metrics = contrastive(features["image"], features["text"], features["scale"])
        factor = 2 if self.options.convention == "sum" else 1
        total = loss * factor + self.options.weight * auxiliary
        return total, {
            **metrics,
            "contrastive": loss.detach(),
            "distillation": auxiliary.detach(),
            "temperature": 1 / features["scale"].detach(),
        }
