"""CLIP (arXiv 2103.00020) and, with masked images, FLIP (2212.00794) and GLIP (2403.15837).

The three differ only in the `mask:` of the view `image`: none, random(0.5) or gaussian(0.5).
"""

from torch import Tensor

from glimpse.model.losses import contrastive
from glimpse.model.methods.base import Method, MicroBatch


class Clip(Method):
    """Contrastive loss between the visible patches of an image and its caption."""

    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Return the unit embeddings image and text (b, E), and scale (1,)."""
        view = micro_batch["views"]["image"]
        pooled = self.towers.image_features(view["patches"], view["positions"])
        return self.pair_features(pooled, micro_batch["text"])

    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss over the pairs of all ranks (FLIP section 3)."""
        loss, metrics = contrastive(features["image"], features["text"], features["scale"])
        return loss, {**metrics, "temperature": 1 / features["scale"].detach()}
