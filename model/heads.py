"""Modules on top of the towers: the heads of SimCLR, BYOL and SimSiam, and a decoder of patches.

The decoder is that of MAE and MaskCLIP.
Letters: B samples, D width, E width of the vectors that are compared, K visible patches, M hidden
ones, L = K + M of the grid.
Every layer draws its own weights in its __init__, as model/init.py asks.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.collectives import mean_over_ranks
from glimpse.model.init import WeightInit
from glimpse.model.layers import Linear, Transformer, normal_parameter, sincos_positions


class CrossRankBatchNorm(nn.Module):
    """Batch normalization over all ranks, (B, D) -> (B, D), each with as many rows, in fp32.

    Beside torch's SyncBatchNorm, which refuses CPU tensors, it keeps no running statistics: a head
    is never evaluated, and universal checkpoints drop buffers. With `accumulate`, the batch is a
    part.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        kind, x = x.dtype, x.float()
        x = x - mean_over_ranks(x.mean(0))
        x = x * (mean_over_ranks(x.square().mean(0)) + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            x = x * self.weight + self.bias
        return x.to(kind)


def projection_mlp(*widths: int, bias: bool, last_norm: bool = False) -> nn.Sequential:
    """Return linear layers of these widths, with BatchNorm and ReLU between them.

    last_norm: a BatchNorm after the last, too.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        layers.append(Linear(inputs, outputs, "uniform", "uniform" if bias else None))
        if last_norm or not last:
            layers.append(CrossRankBatchNorm(outputs))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def simclr_head(width: int, hidden: int, out: int) -> nn.Module:
    """Return SLIP's and A-CLIP's head of SimCLR: D -> 4096 -> 4096 -> 256."""
    return projection_mlp(width, hidden, hidden, out, bias=True)


def byol_projector(width: int, hidden: int, out: int) -> nn.Module:
    """Return the projector of A-CLIP's release, D -> 4096 -> 256; the teacher has a copy of it."""
    return projection_mlp(width, hidden, out, bias=False)


def byol_predictor(hidden: int, out: int) -> nn.Module:
    """Return BYOL's predictor, 256 -> 4096 -> 256, which the student alone has."""
    return projection_mlp(out, hidden, out, bias=False)


def simsiam_projector(width: int, hidden: int) -> nn.Module:
    """Return the projector D -> 2048 -> 2048 -> 2048, the last normalized (SimSiam section 3)."""
    return projection_mlp(width, hidden, hidden, hidden, bias=False, last_norm=True)


def simsiam_predictor(hidden: int) -> nn.Module:
    """Return SimSiam's predictor, 2048 -> 512 -> 2048."""
    return projection_mlp(hidden, hidden // 4, hidden, bias=True)


def check_decoder_width(width: int, heads: int) -> None:
    """Raise ValueError if the width is no multiple of the heads, or of four, for the positions."""
    if heads < 1 or width < 1 or width % heads or width % 4:
        raise ValueError(
            f"options.width {width}: a decoder of {heads} heads needs a multiple of"
            f" {math.lcm(4, max(1, heads))}"
        )


class PatchDecoder(nn.Module):
    """Decoder of hidden patches, over visible and mask tokens with fixed sine-cosine positions.

    It is MAE's (arXiv 2111.06377 section 3); MaskCLIP's has one block.

    forward: tokens (B, 1 + K, inputs), the class token first, at positions (B, K), and the hidden
    patches' positions (B, M)
    -> (B, M, out). The decoder knows nothing of the hidden patches but their positions.
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
        init = WeightInit()
        self.inputs = Linear(inputs, width, "xavier")
        self.mask = normal_parameter(width, std=0.02)
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = Transformer(depth, width, heads, "gelu", 1e-6, init, checkpoint_activations)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.out = Linear(width, out, "xavier")

    def forward(self, tokens: Tensor, positions: Tensor, hidden_positions: Tensor) -> Tensor:
        x = self.inputs(tokens)
        visible = x[:, 1:] + self.embed_positions(positions, x)
        masked = self.mask + self.embed_positions(hidden_positions, x)
        # the class token has no position, as in MAE
        x = self.blocks(torch.cat([x[:, :1], visible, masked.to(x.dtype)], dim=1))
        return self.out(self.norm(x[:, -hidden_positions.shape[1] :]))

    def embed_positions(self, positions: Tensor, like: Tensor) -> Tensor:
        """Return the embeddings of positions, (B, K) -> (B, K, width)."""
        return F.embedding(positions.long(), self.positions).to(like.dtype)
