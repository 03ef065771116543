"""The text tower. It reads packed captions: the tokens of a batch end to end, so that no layer runs
on padding.

Inside attention alone the sequences are spread over (B, N), which is exact: see Packed in
model/layers.py. A model whose tokens must
attend the pads (FLIP's released weights) is fed pads as tokens: every length is then the context,
and nothing is copied.
Letters: B batch, T tokens of the packed batch, N the longest caption, D width.
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
    """The defaults are FLIP's; CLIP's: causal, eot, gelu or quick_gelu, eps 1e-5."""

    # Use causal attention; it requires pool: eot.
    causal: bool = False
    # Token that represents the caption: first or eot (the last token).
    pool: str = "first"
    # Activation of the MLPs: gelu, gelu_tanh or quick_gelu.
    activation: str = "gelu_tanh"
    # Epsilon of every LayerNorm.
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for key, known in (("pool", ("eot", "first")), ("activation", ACTIVATIONS)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"model.text.{key} {getattr(self, key)!r}: unknown; known:"
                    f" {', '.join(sorted(known))}"
                )
        if self.causal and self.pool == "first":
            raise ValueError(
                "model.text.pool 'first' with model.text.causal: the first token would see nothing;"
                " use pool: eot"
            )


class TextTower(nn.Module):
    """`vocab` token ids, captions of at most `context` tokens."""

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
        """ids (T,) and lengths (B,) that sum to T, each from 1 to the context -> (B, D). `longest`:
        see Packed.

        positions (T,): the tokens' places in captions of which a mask dropped some.
        """
        packed = PackedSequences(lengths, len(ids), longest, self.cfg.causal)
        places = packed.positions if positions is None else positions.long()
        x = self.token(ids) + F.embedding(places, self.positions)
        # The last token, never the largest id: a caption that was cut, or another vocabulary, has
        # its EOT elsewhere.
        pooled = packed.last_token if self.cfg.pool == "eot" else packed.first_token
        return self.norm(self.blocks(x, packed, query_index=pooled))
