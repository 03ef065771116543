"""SLIP (arXiv 2112.12750): CLIP on one view of the image, SimCLR on two strongly augmented views.

Views: `image`, and two of `augmented`.
"""

from dataclasses import dataclass

from torch import Tensor

from glimpse.model.heads import simclr_head
from glimpse.model.losses import contrastive, simclr
from glimpse.model.methods.base import Method, MicroBatch, require_above, require_at_least
from glimpse.model.towers import ModelConfig


@dataclass(frozen=True)
class Options:
    # Weight of the SimCLR loss.
    weight: float = 1.0
    # Temperature of the SimCLR loss.
    temperature: float = 0.1
    # Hidden width of the SimCLR projection head.
    hidden: int = 4096
    # Output width of the SimCLR projection head.
    out: int = 256
    # Gather the embeddings for CLIP's loss without gradient, as SLIP's released code does;
    # this loses half of the gradient.
    as_released: bool = False

    def __post_init__(self) -> None:
        require_at_least(0, weight=self.weight)
        require_at_least(1, hidden=self.hidden, out=self.out)
        require_above(0, temperature=self.temperature)


class Slip(Method):
    """Contrastive loss with the caption, and SimCLR's loss between the augmented views."""

    Options = Options
    allowed_view_counts = {"image": (1,), "augmented": (2,)}

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__(cfg, vocab, context, options)
        self.head = simclr_head(cfg.shape.width, options.hidden, options.out)

    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        views = micro_batch["views"]
        image, first, second = self.pool_views(
            [views["image"], views["augmented1"], views["augmented2"]]
        )
        features = self.pair_features(image, micro_batch["text"])
        # One call of the head per view, so that each view has separate batch statistics.
        return dict(features, augmented1=self.head(first), augmented2=self.head(second))

    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return CLIP + weight * SimCLR (SLIP section 3.3)."""
        loss, metrics = contrastive(
            features["image"],
            features["text"],
            features["scale"],
            exact=not self.options.as_released,
        )
        auxiliary, simclr_metrics = simclr(
            features["augmented1"], features["augmented2"], self.options.temperature
        )
        total = loss + self.options.weight * auxiliary
        return total, {
            **metrics,
            **simclr_metrics,
            "contrastive": loss.detach(),
            "simclr": auxiliary.detach(),
            "temperature": 1 / features["scale"].detach(),
        }
