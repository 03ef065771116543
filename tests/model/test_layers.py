"""Compare model/layers.py and model/init.py with formulas written out here.

Attention on packed sequences equals attention sequence by sequence (values and gradients),
recomputed activations change no bit, positions and initial weights are those of the papers.

Run: pytest tests/model/test_layers.py
"""

import math

import pytest
import torch
from torch.nn import functional as F

from glimpse.model.init import WeightInit
from glimpse.model.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    PackedSequences,
    Transformer,
    make_drop_path_mask,
    sincos_positions,
)
from glimpse.model.towers import ModelConfig, Towers

LENGTHS = torch.tensor([3, 1, 7, 4])
WIDTH, HEADS = 24, 3


def blocks(checkpoint_activations: bool = False, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    return Transformer(2, WIDTH, HEADS, "gelu", 1e-6, WeightInit(), checkpoint_activations).to(
        dtype
    )


def tokens(count: int = int(LENGTHS.sum())) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=rng).requires_grad_()


def plain(stack: Transformer, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Run the blocks on one sequence (N, D), with attention written out."""
    for block in stack:
        attn = block.attn
        mlp = block.mlp
        qkv = F.linear(block.norm1(x), attn.qkv.weight, attn.qkv.bias).view(len(x), 3, HEADS, -1)
        query, key, value = qkv.unbind(1)
        scores = torch.einsum("qhe,khe->hqk", query, key) / math.sqrt(WIDTH / HEADS)
        if causal:
            future = torch.ones(len(x), len(x)).triu(1).bool()
            scores = scores.masked_fill(future, -math.inf)
        mixed = torch.einsum("hqk,khe->qhe", scores.softmax(-1), value).flatten(1)
        x = x + F.linear(mixed, attn.out.weight, attn.out.bias)
        hidden = F.gelu(F.linear(block.norm2(x), mlp.up.weight, mlp.up.bias))
        x = x + F.linear(hidden, mlp.down.weight, mlp.down.bias)
    return x


def gradients(stack: Transformer, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((y * weights).sum(), [x, *stack.parameters()]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("longest", [None, 7, 9])
def test_packed_equals_one_sequence_at_a_time(causal, longest):
    stack = blocks()
    x = tokens()

    y = stack(x, PackedSequences(LENGTHS, len(x), longest, causal))
    grads = gradients(stack, y, x)

    expected = torch.cat([plain(stack, part, causal) for part in x.split(LENGTHS.tolist())])
    expected_grads = gradients(stack, expected, x)
    torch.testing.assert_close(y, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_lengths_need_no_padding(causal):
    stack = blocks()
    x = tokens(12)

    packed = PackedSequences(torch.full((3,), 4, dtype=torch.int32), 12, None, causal)

    assert packed.has_no_padding
    assert packed.attention_mask is None
    expected = torch.cat([plain(stack, part, causal) for part in x.split(4)])
    torch.testing.assert_close(stack(x, packed), expected)


def test_without_packing_blocks_take_a_batch_of_sequences():
    stack = blocks()
    x = tokens(12)

    expected = torch.stack([plain(stack, part, causal=False) for part in x.split(4)])
    torch.testing.assert_close(stack(x.view(3, 4, WIDTH)), expected)


def test_packed_knows_where_sequences_are():
    packed = PackedSequences(LENGTHS.int(), 15, None, causal=True)
    x = tokens()

    padded = packed.pad(x)

    assert packed.first_token.tolist() == [0, 3, 4, 11]
    assert packed.last_token.tolist() == [2, 3, 10, 14]
    assert packed.positions.tolist() == [n for length in LENGTHS for n in range(length)]
    assert padded.shape == (4, 7, WIDTH)
    assert torch.equal(packed.unpad(padded), x)
    assert torch.equal(padded[1, :1], x[3:4])
    assert not padded[1, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_change_no_bit(dtype):
    results = []
    for checkpoint_activations in (False, True):
        stack = blocks(checkpoint_activations, dtype)
        x = tokens().detach().to(dtype).requires_grad_()
        y = stack(x, PackedSequences(LENGTHS, len(x), None, causal=False))
        results.append([y, *gradients(stack, y, x)])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_numbers(checkpoint_activations: bool) -> int:
    """Count the numbers that a forward pass of the blocks saves for the backward pass."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        blocks(checkpoint_activations)(tokens(12).view(3, 4, WIDTH))
    return sum(sizes)


def test_recompute_keeps_fewer_activations():
    assert (
        saved_numbers(checkpoint_activations=True)
        < saved_numbers(checkpoint_activations=False) / 10
    )


def test_sincos_on_a_grid_that_is_not_square():
    rows, columns, width = 3, 5, 16
    frequencies = [10_000 ** (-i / 4) for i in range(4)]

    table = sincos_positions((rows, columns), width)

    assert table.shape == (rows * columns, width)
    assert table.dtype == torch.float32
    for y in range(rows):
        for x in range(columns):
            expected = []
            for place in (x, y):
                expected += [math.sin(place * frequency) for frequency in frequencies]
                expected += [math.cos(place * frequency) for frequency in frequencies]
            torch.testing.assert_close(table[y * columns + x], torch.tensor(expected))


def test_activations():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = {
        "gelu": x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(x), expected[name])


def test_draws():
    torch.manual_seed(0)
    # A fused qkv: FLIP draws q, k and v so that they equal Xavier on the fused weight.
    wide = Linear(200, 600, "xavier")
    assert wide.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 800), rel=1e-3)
    assert not wide.bias.any()
    torch_default = Linear(200, 600, "uniform", "uniform")
    for part in (torch_default.weight, torch_default.bias):
        assert part.abs().max().item() == pytest.approx(200**-0.5, rel=1e-2)
        assert part.std().item() == pytest.approx(200**-0.5 / math.sqrt(3), rel=0.05)
    assert Linear(200, 600, 0.3, None).weight.std().item() == pytest.approx(0.3, rel=0.01)
    assert Linear(200, 600, 0.3, None).bias is None
    assert Embedding(300, 200, 0.02).weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_flip_draws():
    torch.manual_seed(0)
    towers = Towers(ModelConfig(size="nano/8", image_size=32), 100, 12)
    for name, p in towers.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        # Xavier, also for the fused qkv and the patch kernel.
        elif p.ndim == 2 and name not in ("text.token.weight", "text.positions"):
            bound = math.sqrt(6 / sum(p.shape))
            assert p.abs().max().item() == pytest.approx(bound, rel=0.01), name
        elif name != "temperature.logit_scale":
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
            assert p.abs().max() > 0.04, name  # a normal's tail


def test_drop_path_by_hand():
    # one sample, three blocks at rates 0, 0.1, 0.2
    noise = torch.tensor([[[0.0, 0.9], [0.05, 0.1], [0.1, 0.3]]])
    expected = torch.tensor([[1, 1], [0, 1 / 0.9], [0, 1 / 0.8]])

    torch.testing.assert_close(make_drop_path_mask(noise, 0.2)[..., 0], expected)


def test_drop_path_keeps_the_mean():
    """The mean factor of every branch is 1, and each is dropped at its rate; the first block's
    never.
    """
    noise = torch.rand(20_000, 4, 2, generator=torch.Generator().manual_seed(0))
    rates = torch.linspace(0, 0.3, 4)[:, None].expand(4, 2)

    drop_path_mask = make_drop_path_mask(noise, 0.3)

    dropped = (drop_path_mask == 0).float().mean(2)
    assert drop_path_mask.shape == (4, 2, 20_000)
    assert (drop_path_mask[0] == 1).all()
    torch.testing.assert_close(drop_path_mask.mean(2), torch.ones(4, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(dropped, rates, atol=0.015, rtol=0)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_paths_multiply_the_branches(checkpoint_activations):
    """Zeros leave a sample unchanged, ones change nothing, and factors act on gradients, too."""
    stack = blocks(checkpoint_activations)
    x = tokens(6).detach().view(2, 3, WIDTH).requires_grad_()

    # Ones.
    drop_path_mask = torch.ones(2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(stack(x, drop_path_mask=drop_path_mask), stack(x), rtol=0, atol=0)

    # Zeros for the second sample.
    drop_path_mask[:, :, 1] = 0
    y = stack(x, drop_path_mask=drop_path_mask)
    torch.testing.assert_close(y[1], x[1], rtol=0, atol=0)
    torch.testing.assert_close(y[0], stack(x)[0])

    # 3 and 2 for the branches of the first block, 0 for the second block.
    block = stack[0]
    factor = torch.tensor([[3.0], [2.0]], dtype=torch.float64)
    half = x[:1] + 3 * block.attn(block.norm1(x[:1]))
    expected = half + 2 * block.mlp(block.norm2(half))
    factors = torch.stack([factor, torch.zeros_like(factor)])
    output = Transformer.forward(stack, x[:1], drop_path_mask=factors)
    (grad,) = torch.autograd.grad(output.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grad, expected_grad)
