"""Modules on top of the towers: SimCLR, BYOL and SimSiam heads, decoder of MAE and MaskCLIP.

Every layer initializes its weights in its own __init__, as model/init.py requires.

Letters: B samples, D width, K visible patches, M masked patches, L = K + M patches of the grid.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.collectives import mean_over_ranks
from glimpse.model.init import WeightInit
from glimpse.model.layers import Linear, Transformer, normal_parameter, sincos_positions


class CrossRankBatchNorm(nn.Module):
    """Batch normalization over all ranks, in fp32, (B, D) -> (B, D) with the same B on every rank.

    It differs from nn.SyncBatchNorm, which does not run on a CPU, in that it has no running
    statistics: a head is not used in evaluations, and universal checkpoints drop buffers. With
    gradient accumulation the statistics are those of one micro-batch.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        x = x - mean_over_ranks(x.mean(0))
        x = x * (mean_over_ranks(x.square().mean(0)) + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            x = x * self.weight + self.bias
        return x.to(dtype)


def projection_mlp(*widths: int, bias: bool, last_norm: bool = False) -> nn.Sequential:
    """Build an MLP of these widths, with batch normalization and ReLU between the linear layers.

    last_norm: add a batch normalization after the last layer.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        is_last = i == len(widths) - 2
        layers.append(Linear(inputs, outputs, "uniform", "uniform" if bias else None))
        if last_norm or not is_last:
            layers.append(CrossRankBatchNorm(outputs))
        if not is_last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def simclr_head(width: int, hidden: int, out: int) -> nn.Module:
    """Build the SimCLR head of SLIP and A-CLIP: D -> hidden -> hidden -> out."""
    return projection_mlp(width, hidden, hidden, out, bias=True)


def byol_projector(width: int, hidden: int, out: int) -> nn.Module:
    """Build the BYOL projector of A-CLIP's code, D -> hidden -> out."""
    return projection_mlp(width, hidden, out, bias=False)


def byol_predictor(hidden: int, out: int) -> nn.Module:
    """Build the BYOL predictor, out -> hidden -> out, which only the student has."""
    return projection_mlp(out, hidden, out, bias=False)


def simsiam_projector(width: int, hidden: int) -> nn.Module:
    """Build the SimSiam projector (arXiv 2011.10566, section 3): three layers and a norm."""
    return projection_mlp(width, hidden, hidden, hidden, bias=False, last_norm=True)


def simsiam_predictor(hidden: int) -> nn.Module:
    """Build the SimSiam predictor, hidden -> hidden / 4 -> hidden."""
    return projection_mlp(hidden, hidden // 4, hidden, bias=True)


def check_decoder_width(width: int, heads: int) -> None:
    """Raise ValueError unless a decoder of this width can be split into heads.

    The position embeddings also need a multiple of 4.
    """
    if heads < 1 or width < 1 or width % heads or width % 4:
        raise ValueError(
            f"options.width: {width} does not fit a decoder of options.heads {heads}; use a"
            f" multiple of {math.lcm(4, max(1, heads))}"
        )


class PatchDecoder(nn.Module):
    """Transformer that predicts the masked patches from the visible tokens.

    Its input is the visible tokens and one mask token per masked patch, with fixed sine-cosine
    position embeddings. It is MAE's decoder (arXiv 2111.06377, section 3); MaskCLIP uses one block.
    """

    positions: Tensor

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        out: int,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.inputs = Linear(inputs, width, "xavier")
        self.mask = normal_parameter(width, std=0.02)
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = Transformer(
            depth, width, heads, "gelu", 1e-6, WeightInit(), checkpoint_activations
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        self.out = Linear(width, out, "xavier")

    def forward(self, tokens: Tensor, positions: Tensor, hidden_positions: Tensor) -> Tensor:
        """Return predictions for the masked patches, (B, M, out).

        tokens: (B, 1 + K, inputs), the class token first. positions: (B, K), of the visible
        patches. hidden_positions: (B, M), of the masked patches.
        """
        x = self.inputs(tokens)
        visible = x[:, 1:] + self.embed_positions(positions, x)
        masked = self.mask + self.embed_positions(hidden_positions, x)
        # The class token has no position embedding, as in MAE.
        x = self.blocks(torch.cat([x[:, :1], visible, masked.to(x.dtype)], dim=1))
        return self.out(self.norm(x[:, -hidden_positions.shape[1] :]))

    def embed_positions(self, positions: Tensor, like: Tensor) -> Tensor:
        """Return the position embeddings of patches, (B, K) -> (B, K, width)."""
        return F.embedding(positions.long(), self.positions).to(like.dtype)
