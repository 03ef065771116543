"""BatchNorm is torch's in train mode, on one process and over 2 gloo ranks; each head is built of
the layers that the papers name; the decoder is MAE's: it knows of a hidden patch nothing but its
place, and reads visible ones in any order.

Letters: B samples, D width, K visible patches, M hidden ones, L = K + M of the grid.
Run: pytest tests/model/test_heads.py (-m "not slow" leaves out the ranks, which
tests/workers/ranks_worker.py
starts)
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from glimpse.model import heads
from glimpse.model.collectives import batch_mean
from glimpse.model.layers import sincos
from glimpse.tests.workers import ranks_worker

b, D = 6, 5  # rows a rank, and their width
B = b * ranks_worker.WORLD


# ---- BatchNorm


def batch(offset=0.0):
    """Rows (B, D) whose columns differ in spread and whose halves, a rank's each, differ in mean;
    weight, bias, and a probe (B, D).
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=rng) * torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0]) + offset
    x[b:] += 1
    return (
        x,
        1 + torch.rand(D, generator=rng),
        torch.randn(D, generator=rng),
        torch.randn(B, D, generator=rng),
    )


def normed(norm, x, probe):
    """What a norm makes of x, and the gradients of the mean over the batch of its rows' products
    with the probe: x's, then parameters'.
    """
    x = x.clone().requires_grad_()
    out = norm(x)
    batch_mean((out * probe).sum(1)).backward()
    return [out.detach(), x.grad, *(p.grad for p in norm.parameters())]


def ours(x, weight, bias, probe, affine=True):
    norm = heads.BatchNorm(D, affine)
    if affine:
        norm.load_state_dict({"weight": weight, "bias": bias})
    return normed(norm, x, probe)


def torchs(x, weight, bias, probe, affine=True):
    norm = nn.BatchNorm1d(D, affine=affine).double()
    if affine:
        norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return normed(norm, x.double(), probe.double())


# 1e-4: a hundredth's rounding over the least spread
@pytest.mark.parametrize("offset, near", [(0.0, 2e-6), (100.0, 1e-4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(affine, offset, near):
    got, expected = ours(*batch(offset), affine), torchs(*batch(offset), affine)
    assert len(got) == (4 if affine else 2)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=near, atol=near)


def test_batch_norm_computes_in_fp32_and_returns_bf16():
    x = batch(100.0)[0].bfloat16()
    got = heads.BatchNorm(D).bfloat16()(x)
    assert got.dtype == torch.bfloat16
    # one rounding, at the end
    torch.testing.assert_close(got.float(), nn.BatchNorm1d(D)(x.float()), rtol=2**-8, atol=1e-3)


def on_a_rank(rank):
    x, weight, bias, probe = batch()
    share = slice(rank * b, rank * b + b)
    out, d_x, *grads = ours(x[share], weight, bias, probe[share])
    for grad in grads:
        dist.all_reduce(grad)
    return [out, *(grad / ranks_worker.WORLD for grad in (d_x, *grads))]


@pytest.mark.slow
def test_batch_norm_spans_the_ranks():
    """Values and inputs' gradients of a rank's rows, and the parameters' averaged over ranks, are
    those of torch on the whole batch.
    """
    ranks, expected = [found["heads"] for found in ranks_worker.found()], torchs(*batch())
    got = [torch.cat(x) for x in zip(*(found[:2] for found in ranks))]
    alone = torchs(batch()[0][:b], *batch()[1:3], batch()[3][:b])[0]
    assert (alone - expected[0][:b]).abs().max() > 0.1, "a rank's own statistics must be told apart"
    for parameters in (found[2:] for found in ranks):
        for x, y in zip([*got, *parameters], expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)


# ---- the heads

Bare = partial(nn.Linear, bias=False)


def between(width):
    return nn.BatchNorm1d(width), nn.ReLU()


# docs/methods.md: ours for widths D, H, E; its layers; its parameters at ViT-B and the papers'
# widths
HEADS = {
    "simclr_head": (
        lambda D, H, E: heads.simclr_head(D, H, E),
        20_996_352,
        lambda D, H, E: [
            nn.Linear(D, H),
            *between(H),
            nn.Linear(H, H),
            *between(H),
            nn.Linear(H, E),
        ],
    ),
    "byol_projector": (
        lambda D, H, E: heads.byol_projector(D, H, E),
        4_202_496,
        lambda D, H, E: [Bare(D, H), *between(H), Bare(H, E)],
    ),
    "byol_predictor": (
        lambda D, H, E: heads.byol_predictor(H, E),
        2_105_344,
        lambda D, H, E: [Bare(E, H), *between(H), Bare(H, E)],
    ),
    "simsiam_projector": (
        lambda D, H, E: heads.simsiam_projector(D, H // 2),
        9_973_760,
        lambda D, H, E: [
            Bare(D, H // 2),
            *between(H // 2),
            Bare(H // 2, H // 2),
            *between(H // 2),
            Bare(H // 2, H // 2),
            nn.BatchNorm1d(H // 2),
        ],
    ),
    "simsiam_predictor": (
        lambda D, H, E: heads.simsiam_predictor(H // 2),
        2_100_736,
        lambda D, H, E: [nn.Linear(H // 2, H // 8), *between(H // 8), nn.Linear(H // 8, H // 2)],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_layer_by_layer(name):
    torch.manual_seed(0)
    build, _, layers = HEADS[name]
    head, reference = build(6, 32, 10), nn.Sequential(*layers(6, 32, 10))
    reference.load_state_dict(head.state_dict(), strict=False)  # running statistics stay torch's
    assert [(n, p.shape) for n, p in head.named_parameters()] == [
        (n, p.shape) for n, p in reference.named_parameters()
    ]
    results, x = [], torch.randn(9, reference[0].in_features)
    probe = torch.randn(9, 32)
    for module in (head, reference):
        out = module(x)
        (out * probe[:, : out.shape[1]]).sum().backward()
        results.append([out.detach(), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_parameters_at_the_papers_widths(name):
    build, count, _ = HEADS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in build(768, 4096, 256).parameters()) == count


# ---- the decoder

GRID, K, INPUTS, WIDTH, OUT = (3, 4), 5, 10, 16, 7
L = GRID[0] * GRID[1]


def decoder(depth=2, attention=2):
    torch.manual_seed(0)
    made = heads.Decoder(INPUTS, WIDTH, depth, attention, GRID, OUT)
    nn.init.normal_(made.mask, std=1.0)  # as after some training: unlike nothing
    nn.init.normal_(made.inputs.bias)
    return made


def seen():
    """Tokens (2, 1 + K, INPUTS), the visible ones' positions (2, K), and the hidden ones' (2, M),
    of 2 different masks.
    """
    order = torch.rand(2, L, generator=torch.Generator().manual_seed(0)).argsort(1).short()
    return (
        torch.randn(2, 1 + K, INPUTS, generator=torch.Generator().manual_seed(1)),
        order[:, :K],
        order[:, K:],
    )


def test_decoder_is_maes():
    """As MAE writes it: mask tokens everywhere, visible ones put into their places, positions
    added, the class token's none.
    """
    made, (tokens, positions, hidden) = decoder(), seen()
    got = made(tokens, positions, hidden)
    assert got.shape == (2, L - K, OUT)
    for i in range(2):
        embedded = made.inputs(tokens[i])
        image = made.mask.expand(L, WIDTH).clone()
        image[positions[i].long()] = embedded[1:]
        x = torch.cat([embedded[:1], image + sincos(GRID, WIDTH)])[None]
        for block in made.blocks:
            x = block(x)
        torch.testing.assert_close(got[i], made.out(made.norm(x))[0, 1:][hidden[i].long()])


def test_decoder_positions_are_sincos_and_not_saved():
    made = decoder()
    assert torch.equal(made.positions, sincos(GRID, WIDTH))
    assert "positions" not in made.state_dict() and "positions" not in dict(made.named_parameters())


def test_decoder_knows_places():
    made, (tokens, positions, hidden) = decoder(), seen()
    straight, turned = made(tokens, positions, hidden), torch.arange(K).roll(1)
    torch.testing.assert_close(made(tokens, positions, hidden.roll(1, 1)), straight.roll(1, 1))
    assert (straight - straight.roll(1, 1)).abs().amax(2).min() > 1e-2, (
        "each hidden place has its own guess"
    )
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, turned]], dim=1)
    torch.testing.assert_close(made(shuffled, positions[:, turned], hidden), straight)
    assert (made(shuffled, positions, hidden) - straight).abs().max() > 1e-2, (
        "but not with other tokens in these places"
    )


def test_decoder_reads_every_visible_token():
    tokens, positions, hidden = seen()
    out = decoder()(tokens.requires_grad_(), positions, hidden)
    out[0].square().sum().backward()
    assert tokens.grad[0].abs().amax(1).min() > 1e-3, "the class token too"
    assert not tokens.grad[1].any(), "and of its own image alone"


def test_decoder_in_bf16():
    made, (tokens, positions, hidden) = decoder(), seen()
    exact = made(tokens, positions, hidden)
    rounded = made.bfloat16()(tokens.bfloat16(), positions, hidden)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "width, attention, multiple", [(20, 3, 12), (18, 3, 12), (0, 2, 4), (20, 0, 4)]
)
def test_decoder_refuses_a_width(width, attention, multiple):
    heads.check_decoder(96, 16)
    with pytest.raises(
        ValueError,
        match=(
            f"options.width {width}: a decoder of {attention} heads needs a multiple of {multiple}$"
        ),
    ):
        heads.check_decoder(width, attention)
