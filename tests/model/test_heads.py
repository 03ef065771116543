"""BatchNorm equals torch's in train mode, on one process and over 2 gloo ranks. Each head has the
layers of its paper. The decoder is MAE's: its input for a hidden patch is the position alone, and
it reads visible ones in any order.

Letters: B samples, D width, K visible patches, M hidden ones, L = K + M of the grid.
Run: pytest tests/model/test_heads.py (-m "not slow" leaves out the ranks, which
tests/workers/ranks_worker.py starts)
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from glimpse.model import heads
from glimpse.model.collectives import batch_mean
from glimpse.model.layers import sincos_positions
from glimpse.tests.workers import ranks_worker

b, D = 6, 5  # rows a rank, and their width
B = b * ranks_worker.WORLD


# ---- BatchNorm


def batch(offset=0.0):
    """Return rows (B, D), weight, bias, and a probe (B, D).

    The columns differ in spread, and the halves, one for each rank, differ in mean.
    """
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0])
    x = torch.randn(B, D, generator=rng) * spread + offset
    x[b:] += 1
    weight = 1 + torch.rand(D, generator=rng)
    bias = torch.randn(D, generator=rng)
    probe = torch.randn(B, D, generator=rng)
    return x, weight, bias, probe


def normed(norm, x, probe):
    """Return the output of a norm, and the gradients of its mean product with the probe: that of x,
    then those of the parameters.
    """
    x = x.clone().requires_grad_()
    out = norm(x)
    batch_mean((out * probe).sum(1)).backward()
    return [out.detach(), x.grad, *(p.grad for p in norm.parameters())]


def ours(x, weight, bias, probe, affine=True):
    norm = heads.CrossRankBatchNorm(D, affine)
    if affine:
        norm.load_state_dict({"weight": weight, "bias": bias})
    return normed(norm, x, probe)


def torchs(x, weight, bias, probe, affine=True):
    norm = nn.BatchNorm1d(D, affine=affine).double()
    if affine:
        norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return normed(norm, x.double(), probe.double())


# 1e-4: the rounding of 100 over the smallest spread.
@pytest.mark.parametrize("offset, near", [(0.0, 2e-6), (100.0, 1e-4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(affine, offset, near):
    got = ours(*batch(offset), affine)
    expected = torchs(*batch(offset), affine)

    assert len(got) == (4 if affine else 2)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=near, atol=near)


def test_batch_norm_computes_in_fp32_and_returns_bf16():
    x = batch(100.0)[0].bfloat16()
    got = heads.CrossRankBatchNorm(D).bfloat16()(x)
    assert got.dtype == torch.bfloat16
    # one rounding, at the end
    torch.testing.assert_close(got.float(), nn.BatchNorm1d(D)(x.float()), rtol=2**-8, atol=1e-3)


def run_on_rank(rank):
    x, weight, bias, probe = batch()
    share = slice(rank * b, rank * b + b)
    out, d_x, *grads = ours(x[share], weight, bias, probe[share])
    for grad in grads:
        dist.all_reduce(grad)
    return [out, *(grad / ranks_worker.WORLD for grad in (d_x, *grads))]


@pytest.mark.slow
def test_batch_norm_spans_the_ranks():
    """The values and input gradients of each rank's rows, and the parameter gradients averaged over
    ranks, are those of torch on the global batch.
    """
    ranks = [results["heads"] for results in ranks_worker.rank_results()]
    x, weight, bias, probe = batch()
    expected = torchs(x, weight, bias, probe)
    local_output = torchs(x[:b], weight, bias, probe[:b])[0]
    difference = (local_output - expected[0][:b]).abs().max()
    assert difference > 0.1, "a rank's own statistics must be told apart"

    outputs = torch.cat([results[0] for results in ranks])
    input_gradients = torch.cat([results[1] for results in ranks])

    for results in ranks:
        got = [outputs, input_gradients, *results[2:]]
        for actual, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(actual.double(), reference, rtol=2e-6, atol=2e-6)


# ---- the heads

Bare = partial(nn.Linear, bias=False)


def between(width):
    return nn.BatchNorm1d(width), nn.ReLU()


def simclr_head(D, H, E):
    return [nn.Linear(D, H), *between(H), nn.Linear(H, H), *between(H), nn.Linear(H, E)]


def byol_projector(D, H, E):
    return [Bare(D, H), *between(H), Bare(H, E)]


def byol_predictor(D, H, E):
    return [Bare(E, H), *between(H), Bare(H, E)]


def simsiam_projector(D, H, E):
    width = H // 2
    return [
        Bare(D, width),
        *between(width),
        Bare(width, width),
        *between(width),
        Bare(width, width),
        nn.BatchNorm1d(width),
    ]


def simsiam_predictor(D, H, E):
    return [nn.Linear(H // 2, H // 8), *between(H // 8), nn.Linear(H // 8, H // 2)]


# The layers of docs/methods.md for widths D, H, E.
LAYERS = {
    "simclr_head": simclr_head,
    "byol_projector": byol_projector,
    "byol_predictor": byol_predictor,
    "simsiam_projector": simsiam_projector,
    "simsiam_predictor": simsiam_predictor,
}
# The parameters at ViT-B and the papers' widths.
PARAMETERS = {
    "simclr_head": 20_996_352,
    "byol_projector": 4_202_496,
    "byol_predictor": 2_105_344,
    "simsiam_projector": 9_973_760,
    "simsiam_predictor": 2_100_736,
}


def build_head(name, D, H, E):
    """Build the head of model/heads.py from the widths that it takes."""
    widths = {
        "simclr_head": (D, H, E),
        "byol_projector": (D, H, E),
        "byol_predictor": (H, E),
        "simsiam_projector": (D, H // 2),
        "simsiam_predictor": (H // 2,),
    }
    return getattr(heads, name)(*widths[name])


def shapes(module):
    return [(name, p.shape) for name, p in module.named_parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_head_layer_by_layer(name):
    torch.manual_seed(0)
    head = build_head(name, 6, 32, 10)
    reference = nn.Sequential(*LAYERS[name](6, 32, 10))
    reference.load_state_dict(head.state_dict(), strict=False)  # running statistics stay torch's
    x = torch.randn(9, reference[0].in_features)
    probe = torch.randn(9, 32)

    results = []
    for module in (head, reference):
        out = module(x)
        (out * probe[:, : out.shape[1]]).sum().backward()
        results.append([out.detach(), *(p.grad for p in module.parameters())])

    assert shapes(head) == shapes(reference)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_the_papers_widths(name):
    with torch.device("meta"):
        head = build_head(name, 768, 4096, 256)

    assert sum(p.numel() for p in head.parameters()) == PARAMETERS[name]


# ---- the decoder

GRID, K, INPUTS, WIDTH, OUT = (3, 4), 5, 10, 16, 7
L = GRID[0] * GRID[1]


def decoder(depth=2, attention=2):
    torch.manual_seed(0)
    module = heads.PatchDecoder(INPUTS, WIDTH, depth, attention, GRID, OUT)
    # As after some training: a mask token and a bias that differ from every default.
    nn.init.normal_(module.mask, std=1.0)
    nn.init.normal_(module.inputs.bias)
    return module


def seen():
    """Return tokens (2, 1 + K, INPUTS), and the positions of visible (2, K) and hidden (2, M)
    patches, of 2 different masks.
    """
    order = torch.rand(2, L, generator=torch.Generator().manual_seed(0)).argsort(1).short()
    tokens = torch.randn(2, 1 + K, INPUTS, generator=torch.Generator().manual_seed(1))
    return tokens, order[:, :K], order[:, K:]


def test_decoder_is_maes():
    """MAE's code: mask tokens everywhere, visible tokens at their places, positions added, but none
    to the class token.
    """
    module = decoder()
    tokens, positions, hidden = seen()

    got = module(tokens, positions, hidden)

    assert got.shape == (2, L - K, OUT)
    for i in range(2):
        embedded = module.inputs(tokens[i])
        image = module.mask.expand(L, WIDTH).clone()
        image[positions[i].long()] = embedded[1:]
        x = torch.cat([embedded[:1], image + sincos_positions(GRID, WIDTH)])[None]
        for block in module.blocks:
            x = block(x)
        outputs = module.out(module.norm(x))[0, 1:]
        torch.testing.assert_close(got[i], outputs[hidden[i].long()])


def test_decoder_positions_are_sincos_and_not_saved():
    module = decoder()

    assert torch.equal(module.positions, sincos_positions(GRID, WIDTH))
    assert "positions" not in module.state_dict()
    assert "positions" not in dict(module.named_parameters())


def test_decoder_knows_places():
    module = decoder()
    tokens, positions, hidden = seen()
    turned = torch.arange(K).roll(1)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, turned]], dim=1)

    straight = module(tokens, positions, hidden)
    rolled = module(tokens, positions, hidden.roll(1, 1))
    consistent = module(shuffled, positions[:, turned], hidden)
    misplaced = module(shuffled, positions, hidden)

    torch.testing.assert_close(rolled, straight.roll(1, 1))
    differences = (straight - straight.roll(1, 1)).abs().amax(2)
    assert differences.min() > 1e-2, "each hidden place has its own guess"
    torch.testing.assert_close(consistent, straight)
    difference = (misplaced - straight).abs().max()
    assert difference > 1e-2, "but not with other tokens in these places"


def test_decoder_reads_every_visible_token():
    tokens, positions, hidden = seen()
    out = decoder()(tokens.requires_grad_(), positions, hidden)
    out[0].square().sum().backward()
    assert tokens.grad[0].abs().amax(1).min() > 1e-3, "the class token too"
    assert not tokens.grad[1].any(), "and of its own image alone"


def test_decoder_in_bf16():
    module = decoder()
    tokens, positions, hidden = seen()

    exact = module(tokens, positions, hidden)
    rounded = module.bfloat16()(tokens.bfloat16(), positions, hidden)

    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "width, attention, multiple", [(20, 3, 12), (18, 3, 12), (0, 2, 4), (20, 0, 4)]
)
def test_decoder_refuses_a_width(width, attention, multiple):
    message = (
        f"options.width: {width} does not fit a decoder of options.heads {attention}; use a"
        f" multiple of {multiple}$"
    )

    heads.check_decoder_width(96, 16)

    with pytest.raises(ValueError, match=message):
        heads.check_decoder_width(width, attention)
