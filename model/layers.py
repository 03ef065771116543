"""Transformer parts shared by the towers: linear layers, attention, MLP, pre-norm block, stack of
blocks, positions, packed sequences.

Letters: B batch, N tokens of a sequence, T tokens of a packed batch, D width, H heads, E = D / H.
To add an activation: one row in ACTIVATIONS.
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
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # flax's default, so FLIP's
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
}


# The tokens that a block computes: all (None), the first n of each sequence (int), or, in a packed
# batch, these indices, one per sequence, (B,).
QueryIndex = int | Tensor | None


class Linear(nn.Linear):
    """(..., inputs) -> (..., outputs).

    `bias`: 'zeros', 'uniform' (torch's default) or None for no bias.
    """

    def __init__(self, inputs: int, outputs: int, weight: InitSpec, bias: str | None = "zeros"):
        # before super().__init__, which calls reset_parameters
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
            raise ValueError(f"weight {self.weight_init!r}: xavier, uniform or a float")
        if self.bias_init == "zeros":
            nn.init.zeros_(self.bias)
        elif self.bias_init == "uniform":
            nn.init.uniform_(self.bias, -bound, bound)


class AttentionRecorder:
    """Record the attention of the class token: `layers`, one (B, N) per layer, mean over heads.

    Not a list: ZeRO-3's hooks hand lists to a module as copies.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []


class PackedSequences:
    """B sequences of different lengths laid end to end, T tokens, which only attention sees padded,
    as (B, N).

    Nothing waits for the device when `longest` is given (any int >= the longest length); without it
    one read of `lengths` does.
    """

    def __init__(self, lengths: Tensor, tokens: int, longest: int | None, causal: bool):
        """`lengths` (B,): int, each at least 1, sum `tokens`."""
        longest = int(lengths.max()) if longest is None else longest
        device = lengths.device
        self.shape = len(lengths), longest
        self.causal = causal

        # (B,): the first and the last token of each sequence
        ends = lengths.cumsum(0)
        self.first_token, self.last_token = ends - lengths, ends - 1

        # (T,): the sequence of each token, its place in the sequence and in the padded layout
        sequences = torch.arange(len(lengths), device=device)
        rows = torch.repeat_interleave(sequences, lengths, output_size=tokens)
        self.positions = torch.arange(tokens, device=device) - self.first_token[rows]
        self.padded_index = rows * longest + self.positions

        # Without pads, packed and padded are the same memory. With causal attention every pad comes
        # after the real tokens, so that no mask is needed when all tokens are queries.
        self.has_no_padding = tokens == len(lengths) * longest
        self.key_mask = None if self.has_no_padding else key_padding_mask(lengths, longest)
        self.attention_mask = None if causal else self.key_mask

    def pad(self, x: Tensor) -> Tensor:
        """(T, D) -> (B, N, D), zeros in the pads."""
        if not self.has_no_padding:
            padded = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
            x = padded.index_copy_(0, self.padded_index, x)
        return x.unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (T, D)."""
        x = x.flatten(0, 1)
        return x if self.has_no_padding else x.index_select(0, self.padded_index)


def key_padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B,) -> (B, 1, 1, N): True where a padded sequence has a token, as a mask of keys."""
    places = torch.arange(longest, device=lengths.device)
    return (places < lengths[:, None])[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), or (T, D) -> (T, D) on packed
    sequences.
    """

    def __init__(self, width: int, heads: int, init: WeightInit):
        super().__init__()
        self.head_dim = width // heads
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
        """only: the tokens that are queries, and are returned.

        alone: each token attends to itself alone, so that it gets its own value.
        """
        x = self.qkv(x)
        x = x if packed is None else packed.pad(x)
        q, k, v = x.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, E)
        if recorder is not None:
            scores = q[:, :, :1].float() @ k.float().transpose(2, 3) * self.head_dim**-0.5
            recorder.layers.append(scores.softmax(3).mean(1)[:, 0])

        if value_attention_only:
            x = v
        elif packed is None:
            x = F.scaled_dot_product_attention(q[:, :, :query_index], k, v)
        elif query_index is None:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=packed.attention_mask, is_causal=packed.causal
            )
        else:
            # One query per sequence: its first token (not causal), or its last, which may attend to
            # all tokens in either case.
            place = (
                packed.positions[query_index]
                .view(-1, 1, 1, 1)
                .expand(-1, q.shape[1], 1, self.head_dim)
            )
            x = F.scaled_dot_product_attention(q.gather(2, place), k, v, attn_mask=packed.key_mask)
            return self.out(x.flatten(1))
        x = x.transpose(1, 2).flatten(2)
        return self.out(x if packed is None else packed.unpad(x))


def mlp_width(width: int, mlp_ratio: float) -> int:
    """The width inside an MLP, rounded down as open_clip does."""
    return int(width * mlp_ratio)


class MLP(nn.Module):
    """(..., D) -> (..., D) through `mlp_ratio` times D."""

    def __init__(self, width: int, activation: str, init: WeightInit, mlp_ratio: float = 4.0):
        super().__init__()
        self.up = Linear(width, mlp_width(width, mlp_ratio), init.up, init.bias)
        self.act = ACTIVATIONS[activation]
        self.down = Linear(mlp_width(width, mlp_ratio), width, init.down, init.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; shapes as Attention's.

    drop_path_mask: (2, B), by what its two branches are multiplied (see drop_path).
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
        if isinstance(query_index, Tensor):
            x = x.index_select(0, query_index)
        elif query_index is not None:
            x = x[:, :query_index]
        attention_path, mlp_path = (None, None) if drop_path_mask is None else drop_path_mask
        x = x + scale_branch(attended, attention_path)
        return x + scale_branch(self.mlp(self.norm2(x)), mlp_path)


def scale_branch(branch: Tensor, factors: Tensor | None) -> Tensor:
    """(B, N, D) times (B,)."""
    return branch if factors is None else branch * factors.to(branch.dtype)[:, None, None]


def make_drop_path_mask(noise: Tensor, rate: float) -> Tensor:
    """Uniform noise (B, depth, 2) -> drop_path_mask (depth, 2, B) for Blocks: stochastic depth (arXiv
    1603.09382).

    A sample goes round a branch with a probability that rises linearly from 0 in the first block to
    `rate` in the last; where it goes through, the branch counts for more, so that its mean stays.
    Each of a block's two branches is drawn by itself, as in timm.
    """
    rates = torch.linspace(0, rate, noise.shape[1], device=noise.device)[None, :, None]
    return ((noise >= rates) / (1 - rates)).permute(1, 2, 0)


class Transformer(nn.ModuleList):
    """`depth` blocks; `checkpoint_activations` drops a block's activations until its backward pass, the one
    place that trades compute for memory.
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
        super().__init__(
            TransformerBlock(width, heads, activation, eps, init, mlp_ratio) for _ in range(depth)
        )
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
        """only: the tokens that are needed: the last block computes these alone. alone: in the last
        block each token attends to itself.

        drop_path_mask: (depth, 2, B), of drop_path; for sequences of one length.
        """
        for i, block in enumerate(self):
            last = i == len(self) - 1
            arguments = (
                x,
                packed,
                query_index if last else None,
                recorder,
                value_attention_only and last,
                None if drop_path_mask is None else drop_path_mask[i],
            )
            if self.checkpoint_activations and torch.is_grad_enabled():
                # No layer draws random numbers (drop_path_mask are drawn before), so no generator is saved.
                # DeepSpeed's own non-reentrant form fails under ZeRO-3.
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return x


class Embedding(nn.Embedding):
    """(...) ids -> (..., D), drawn from a normal of the given std."""

    def __init__(self, rows: int, width: int, std: float):
        self.std = std  # before super().__init__, which calls reset_parameters
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from a normal."""
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=std))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's fixed 2-D positions of a (rows, columns) grid, (L, D) fp32: [sin x, cos x, sin y, cos
    y], D / 4 frequencies each.

    Computed in numpy: sharded construction turns torch's new tensors into the training type, bf16
    perhaps.
    """
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]  # 2 x (L, D / 4)
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(waves, axis=1).astype(np.float32))
