"""Text tower over packed captions: the tokens of a batch end to end, without padding.

Only attention pads the captions, to (B, N), and masks the padding (PackedSequences in
model/layers.py). For a model that attends to padding, such as FLIP's released weights, the caller
adds the padding tokens to the captions: every length is then the context, and nothing is copied.

Letters: B batch, T tokens of the packed batch, N tokens of the longest caption, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.init import WeightInit
from glimpse.model.layers import (
    ACTIVATIONS,
    Embedding,
    PackedSequences,
    Transformer,
    normal_parameter,
)


@dataclass(frozen=True)
class TextConfig:
    """Architecture of the text tower; the defaults are FLIP's.

    CLIP uses: causal, pool eot, activation gelu or quick_gelu, eps 1e-5.
    """

    # Use causal attention; it requires pool: eot.
    causal: bool = False
    # Token that represents the caption: first or eot (the last token).
    pool: str = "first"
    # Activation of the MLPs: gelu, gelu_tanh or quick_gelu.
    activation: str = "gelu_tanh"
    # Epsilon of every LayerNorm.
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for key, choices in (("pool", ("eot", "first")), ("activation", ACTIVATIONS)):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"model.text.{key}: unknown {getattr(self, key)!r}; known:"
                    f" {', '.join(sorted(choices))}"
                )
        if self.causal and self.pool == "first":
            raise ValueError(
                "model.text.pool: 'first' does not work with model.text.causal, because the first"
                " token attends only to itself; use pool: eot"
            )


class TextTower(nn.Module):
    """Transformer over captions of at most `context` tokens, with ids below `vocab`."""

    def __init__(
        self,
        cfg: TextConfig,
        vocab: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        init: WeightInit,
        checkpoint_activations: bool = False,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.cfg = cfg
        self.token = Embedding(vocab, width, init.token)
        self.positions = normal_parameter(context, width, std=init.positions)
        self.blocks = Transformer(
            depth, width, heads, cfg.activation, cfg.eps, init, checkpoint_activations, mlp_ratio
        )
        self.norm = nn.LayerNorm(width, cfg.eps)

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        longest: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return one vector per caption, (B, D).

        ids: (T,), the captions end to end. lengths: (B,), each from 1 to the context; their sum is
        T. longest: see PackedSequences.

        positions: (T,), the position of each token in its caption; needed if text masking dropped
        tokens, else they are 0, 1, ...
        """
        packed = PackedSequences(lengths, len(ids), longest, self.cfg.causal)
        positions = packed.positions if positions is None else positions.long()
        x = self.token(ids) + F.embedding(positions, self.positions)
        # eot is the last token, also of a truncated caption. OpenAI's code takes the token with the
        # largest id, which is right only for its own vocabulary.
        pooled = packed.last_token if self.cfg.pool == "eot" else packed.first_token
        return self.norm(self.blocks(x, packed, query_index=pooled))
