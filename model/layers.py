"""Transformer layers that the vision and text towers share.

Linear layers, self-attention, MLP, pre-norm block, stack of blocks, position embeddings, and
batches of packed sequences.

Letters: B batch, N tokens of a sequence, T tokens of a packed batch, D width, H heads, E = D / H.
To add an activation, add one row to ACTIVATIONS.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glimpse.model.init import InitSpec, WeightInit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # the default of flax, which FLIP uses
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
}


# The tokens that are queries: all (None), the first n of each sequence (int: a number, not an
# index), or, in a packed
# batch, one token of each sequence, given by its index among the T tokens, (B,).
QueryIndex = int | Tensor | None


class Linear(nn.Linear):
    """Linear layer, (..., inputs) -> (..., outputs), with a chosen initialization.

    weight: see InitSpec. bias: 'zeros', 'uniform' (PyTorch's default), or None for no bias.
    """

    def __init__(self, inputs: int, outputs: int, weight: InitSpec, bias: str | None = "zeros"):
        # Set before super().__init__, which calls reset_parameters.
        self.weight_init, self.bias_init = weight, bias
        super().__init__(inputs, outputs, bias=bias is not None)

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        if isinstance(self.weight_init, float):
            nn.init.normal_(self.weight, std=self.weight_init)
        elif self.weight_init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        elif self.weight_init == "uniform":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            raise ValueError(
                f"weight: unknown {self.weight_init!r}; use xavier, uniform or a float"
            )
        if self.bias_init == "zeros":
            nn.init.zeros_(self.bias)
        elif self.bias_init == "uniform":
            nn.init.uniform_(self.bias, -bound, bound)


class AttentionRecorder:
    """Collect the attention of the class token, (B, N) per layer, as the mean over heads.

    An object and not a plain list, because ZeRO-3's hooks pass a module copies of its lists.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []


class PackedSequences:
    """Layout of B sequences of different lengths that lie end to end, T tokens in all.

    Only attention needs them padded, as (B, N); all other layers run on the (T, D) tokens.

    `longest` is any int >= the greatest length. Pass it to avoid a device synchronization: without
    it the greatest length is read from the device.
    """

    def __init__(self, lengths: Tensor, num_tokens: int, longest: int | None, causal: bool):
        """lengths: (B,) int, each at least 1; their sum is num_tokens."""
        longest = int(lengths.max()) if longest is None else longest
        device = lengths.device
        self.padded_shape = len(lengths), longest
        self.causal = causal

        # (B,): index of the first and of the last token of each sequence.
        ends = lengths.cumsum(0)
        self.first_token, self.last_token = ends - lengths, ends - 1

        # (T,): position of each token in its sequence, and its index in the padded (B * N) layout.
        sequences = torch.arange(len(lengths), device=device)
        rows = torch.repeat_interleave(sequences, lengths, output_size=num_tokens)
        self.positions = torch.arange(num_tokens, device=device) - self.first_token[rows]
        self.padded_index = rows * longest + self.positions

        # Without padding, the packed and the padded layout are the same memory. With causal
        # attention every padding token comes after the real tokens, so no mask is needed when all
        # tokens are queries.
        self.has_no_padding = num_tokens == len(lengths) * longest
        self.key_mask = None if self.has_no_padding else key_padding_mask(lengths, longest)
        self.attention_mask = None if causal else self.key_mask

    def pad(self, x: Tensor) -> Tensor:
        """Return (T, D) as (B, N, D), with zeros in the padding."""
        if not self.has_no_padding:
            padded = x.new_zeros(self.padded_shape[0] * self.padded_shape[1], x.shape[1])
            x = padded.index_copy_(0, self.padded_index, x)
        return x.unflatten(0, self.padded_shape)

    def unpad(self, x: Tensor) -> Tensor:
        """Return (B, N, D) as (T, D), without the padding."""
        x = x.flatten(0, 1)
        return x if self.has_no_padding else x.index_select(0, self.padded_index)


def key_padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """Return a mask of the keys, (B,) -> (B, 1, 1, N): True for real tokens, False for padding."""
    positions = torch.arange(longest, device=lengths.device)
    return (positions < lengths[:, None])[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), or (T, D) -> (T, D) if packed."""

    def __init__(self, width: int, heads: int, init: WeightInit):
        super().__init__()
        self.head_dim = width // heads
        # Their biases start at zero in every initialization, see WeightInit.
        self.qkv = Linear(width, 3 * width, init.qkv)
        self.out = Linear(width, width, init.out)

    def forward(
        self,
        x: Tensor,
        packed: PackedSequences | None = None,
        query_index: QueryIndex = None,
        recorder: AttentionRecorder | None = None,
        value_attention_only: bool = False,
    ) -> Tensor:
        """Return the attention output of the queries.

        query_index: the tokens that are queries; the output has only these tokens.

        recorder: collects the attention of the class token.

        value_attention_only: each token attends only to itself, so that its output is its own
        value vector.
        """
        # 1. Queries, keys and values; packed sequences are padded here.
        x = self.qkv(x)
        x = x if packed is None else packed.pad(x)
        q, k, v = x.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, E)
        if recorder is not None:
            # Computed separately, because the fused kernel does not return its weights.
            scores = q[:, :, :1].float() @ k.float().transpose(2, 3) * self.head_dim**-0.5
            recorder.layers.append(scores.softmax(3).mean(1)[:, 0])

        # 2. Attention.
        if value_attention_only:
            x = v
        elif packed is None:
            x = F.scaled_dot_product_attention(q[:, :, :query_index], k, v)
        elif query_index is None:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=packed.attention_mask, is_causal=packed.causal
            )
        else:
            # One query per sequence: its first token (bidirectional attention only) or its last. It
            # may attend to all tokens of the sequence, so a causal mask is not needed.
            index = packed.positions[query_index].view(-1, 1, 1, 1)
            index = index.expand(-1, q.shape[1], 1, self.head_dim)
            x = F.scaled_dot_product_attention(q.gather(2, index), k, v, attn_mask=packed.key_mask)
            return self.out(x.flatten(1))

        # 3. Join the heads.
        x = x.transpose(1, 2).flatten(2)
        return self.out(x if packed is None else packed.unpad(x))


def mlp_width(width: int, mlp_ratio: float) -> int:
    """Return the hidden width of an MLP, rounded down as in open_clip."""
    return int(width * mlp_ratio)


class MLP(nn.Module):
    """Two linear layers with an activation between them, (..., D) -> (..., D).

    The hidden width is `mlp_ratio` times D.
    """

    def __init__(self, width: int, activation: str, init: WeightInit, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = mlp_width(width, mlp_ratio)
        self.up = Linear(width, hidden, init.up, init.bias)
        self.act = ACTIVATIONS[activation]
        self.down = Linear(hidden, width, init.down, init.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; shapes as in Attention.

    drop_path_mask: (2, B), the factors of the attention branch and of the MLP branch; see
    make_drop_path_mask.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str,
        eps: float,
        init: WeightInit,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, init)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, activation, init, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        packed: PackedSequences | None = None,
        query_index: QueryIndex = None,
        recorder: AttentionRecorder | None = None,
        value_attention_only: bool = False,
        drop_path_mask: Tensor | None = None,
    ) -> Tensor:
        attended = self.attn(self.norm1(x), packed, query_index, recorder, value_attention_only)
        # The residual stream keeps only the tokens that were queries.
        if isinstance(query_index, Tensor):
            x = x.index_select(0, query_index)
        elif query_index is not None:
            x = x[:, :query_index]

        attention_factor, mlp_factor = (None, None) if drop_path_mask is None else drop_path_mask
        x = x + scale_branch(attended, attention_factor)
        return x + scale_branch(self.mlp(self.norm2(x)), mlp_factor)


def scale_branch(branch: Tensor, factors: Tensor | None) -> Tensor:
    """Return the branch (B, N, D) times the factors (B,); None leaves it unchanged."""
    return branch if factors is None else branch * factors.to(branch.dtype)[:, None, None]


def make_drop_path_mask(noise: Tensor, rate: float) -> Tensor:
    """Return the drop-path mask for Transformer, uniform noise (B, depth, 2) -> (depth, 2, B).

    Stochastic depth (arXiv 1603.09382): a sample skips a branch with a probability that rises
    linearly from 0 in the first block to `rate` in the last. The mask is 0 where a branch is
    skipped, and 1 / (1 - probability) elsewhere, which keeps the expected value of the branch. The
    two branches of a block are independent, as in timm.
    """
    rates = torch.linspace(0, rate, noise.shape[1], device=noise.device)[None, :, None]
    return ((noise >= rates) / (1 - rates)).permute(1, 2, 0)


class Transformer(nn.ModuleList):
    """Stack of `depth` transformer blocks.

    checkpoint_activations: recompute each block in the backward pass, which saves memory and costs
    compute.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        activation: str,
        eps: float,
        init: WeightInit,
        checkpoint_activations: bool = False,
        mlp_ratio: float = 4.0,
    ):
        blocks = [
            TransformerBlock(width, heads, activation, eps, init, mlp_ratio) for _ in range(depth)
        ]
        super().__init__(blocks)
        self.checkpoint_activations = checkpoint_activations

    def forward(
        self,
        x: Tensor,
        packed: PackedSequences | None = None,
        query_index: QueryIndex = None,
        recorder: AttentionRecorder | None = None,
        value_attention_only: bool = False,
        drop_path_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens after the last block.

        query_index: the tokens to return; the last block computes only these.

        value_attention_only: in the last block each token attends only to itself.

        drop_path_mask: (depth, 2, B), from make_drop_path_mask; only for unpacked sequences.
        """
        for i, block in enumerate(self):
            is_last = i == len(self) - 1
            arguments = (
                x,
                packed,
                query_index if is_last else None,
                recorder,
                value_attention_only and is_last,
                None if drop_path_mask is None else drop_path_mask[i],
            )
            if self.checkpoint_activations and torch.is_grad_enabled():
                # No block draws random numbers (the drop-path mask is an input), so the state of
                # the generator need not be saved. DeepSpeed's own non-reentrant checkpointing fails
                # under ZeRO-3.
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return x


class Embedding(nn.Embedding):
    """Embedding table, ids (...) -> (..., D), initialized from a normal distribution."""

    def __init__(self, rows: int, width: int, std: float):
        self.std = std  # set before super().__init__, which calls reset_parameters
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Return a parameter with values from a normal distribution."""
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=std))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return MAE's fixed 2-D position embeddings of a (rows, columns) grid, (L, D) fp32.

    A row is [sin x, cos x, sin y, cos y], with D / 4 frequencies each.

    Computed in NumPy, because inside zero.Init (ZeRO-3) new PyTorch tensors get the training type,
    which may be bf16.
    """
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]  # 2 x (L, D / 4)
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(waves, axis=1).astype(np.float32))
