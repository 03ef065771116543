"""Each auxiliary loss, and the contrastive one with SLIP's released gradients, equals a plain
reference of a few lines, in values and gradients, on one process and on 2 gloo ranks, where
gradients averaged over ranks must be the reference's on the whole batch; A-CLIP's SimCLR compares
two views, not one with itself.

Letters: `b` samples a rank, `B` samples, `M` tokens of a sample, `E` width.
Run: pytest tests/model/test_auxiliary.py (-m "not slow" leaves out the ranks, which
tests/workers/ranks_worker.py
starts)
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from glimpse.model import losses, tiled_softmax
from glimpse.model.collectives import batch_mean, gather_with_grad, mean, rank
from glimpse.model.methods.aclip import Aclip, Options, between
from glimpse.model.towers import ModelConfig
from glimpse.tests.workers import ranks_worker

b, M, IN, E = 6, 3, 10, 8  # IN: the width before the towers, which are one linear layer each
B, TAU = b * ranks_worker.WORLD, 0.2
NEAR = {torch.float32: 2e-6, torch.float64: 1e-12}


# ---- the references


def plain_simclr(one, two, tau=TAU):
    views = torch.cat([one, two])
    cosines = F.cosine_similarity(views[:, None], views[None], dim=2)
    logits = (cosines / tau).masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    # i's positive is i + B, and i + B's is i
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(one)))


def plain_accuracy(one, two):
    views = F.normalize(torch.cat([one, two]))
    nearest = (views @ views.t()).fill_diagonal_(-2).argmax(1)
    return (nearest == torch.arange(len(views)).roll(len(one))).float().mean().item()


def plain_byol(made, target):
    target = target.detach()
    return (
        (made / made.norm(dim=1, keepdim=True) - target / target.norm(dim=1, keepdim=True))
        .square()
        .sum(1)
    )


def plain_simsiam(made, target):
    return -F.cosine_similarity(made, target.detach())


def plain_distillation(made, target, normalise=False):
    target = target.detach()
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
    d = (made - target).abs()
    return torch.where(d < 2, 0.25 * d**2, d - 1).mean((1, 2))


def plain_reconstruction(made, target, normalise=True):
    target = target.detach()
    if normalise:  # correction 1, as in MAE's code
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True, correction=1) + 1e-6
        ) ** 0.5
    return ((made - target) ** 2).mean(-1).mean(-1)


def plain_released(image, text, scale, columns=None, first=0):
    """SLIP's CLIPLoss: rows against detached columns, which are those of all ranks where they are
    given.
    """
    images, texts = columns or (image.detach(), text.detach())
    labels = first + torch.arange(len(image))
    return (
        F.cross_entropy(scale * image @ texts.t(), labels)
        + F.cross_entropy(scale * text @ images.t(), labels)
    ) / 2


def literal_released(image, text, scale):
    """The same as SLIP has it on real ranks: columns from an all_gather that carries no
    gradient.
    """
    columns = [[torch.empty_like(x) for _ in range(ranks_worker.WORLD)] for x in (image, text)]
    for parts, x in zip(columns, (image, text)):
        dist.all_gather(parts, x.detach())
    return plain_released(
        image, text, scale, [torch.cat(parts) for parts in columns], dist.get_rank() * b
    )


def gathered_sigmoid(image, text, scale):
    """A new loss across ranks as its author would write it: SigLIP's, this rank's rows against the
    gathered columns.
    """
    texts = gather_with_grad(text)
    own = torch.arange(len(image))
    sign = -torch.ones(len(image), len(texts), dtype=image.dtype)
    sign[own, own + len(image) * rank()] = 1
    return mean(-F.logsigmoid(sign * (scale * image @ texts.t() - 1)).sum(1).mean())


def plain_sigmoid(image, text, scale):
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(sign * (scale * image @ text.t() - 1)).sum(1).mean()


def simclr(one, two):
    return losses.simclr(one, two, TAU)[0]


def of_two(loss_of, **how):
    return lambda one, two, _: loss_of(one, two, **how)


def of_units(loss_of):
    return lambda image, text, scale: loss_of(F.normalize(image), F.normalize(text), scale)


# ours and the reference, functions of (one, two, scale), and what stands before the width of a
# sample
CASES = {
    "simclr": (of_two(simclr), of_two(plain_simclr), ()),
    "released": (
        of_units(lambda *x: losses.contrastive(*x, exact=False)[0]),
        of_units(plain_released),
        (),
    ),
    "gathered": (of_units(gathered_sigmoid), of_units(plain_sigmoid), ()),
    "byol": (of_two(losses.byol), of_two(plain_byol), ()),
    "simsiam": (of_two(losses.simsiam), of_two(plain_simsiam), ()),
    "distillation": (of_two(losses.distillation), of_two(plain_distillation), (M,)),
    "distillation, normalised": (
        of_two(losses.distillation, normalise=True),
        of_two(plain_distillation, normalise=True),
        (M,),
    ),
    "reconstruction": (of_two(losses.reconstruction), of_two(plain_reconstruction), (M,)),
    "reconstruction, plain": (
        of_two(losses.reconstruction, normalise=False),
        of_two(plain_reconstruction, normalise=False),
        (M,),
    ),
}
# a number a sample; what comes second is a target
TARGETS = [name for name in CASES if name not in ("simclr", "released", "gathered")]
# which are fp32
KINDS = [
    (name, kind)
    for name, (*_, shape) in CASES.items()
    for kind in NEAR
    if not (shape and kind is torch.float64)
]


def towers(kind):
    """Leaves, the same on every rank: the weights of two towers (IN, E) and the log of the scale
    (1,).
    """
    rng = torch.Generator().manual_seed(1)
    one = torch.randn(IN, E, generator=rng)
    return [
        x.to(kind).requires_grad_()
        for x in (one, one + 0.5 * torch.randn(IN, E, generator=rng), torch.tensor([1.5]))
    ]


def embed(weights, shape, rank=None):
    """What the towers make of the whole batch, or of a rank's share of it, and the scale."""
    inputs = torch.randn(2, B, *shape, IN, generator=torch.Generator().manual_seed(2)).to(
        weights[0].dtype
    )
    inputs[1] = inputs[0] + 0.3 * inputs[1]
    share = slice(None) if rank is None else slice(rank * b, rank * b + b)
    return [x[share] @ w for x, w in zip(inputs, weights)] + [weights[2].exp()]


def measured(loss_of, kind, shape, rank=None):
    """The loss (a number a sample where it is one), and its mean's gradients; on a rank, averaged
    over all as DeepSpeed does.
    """
    weights = towers(kind)
    loss = loss_of(*embed(weights, shape, rank))
    total = batch_mean(loss) if loss.ndim else loss
    total.backward()
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    if rank is not None:
        for grad in grads:
            dist.all_reduce(grad)
            grad.div_(ranks_worker.WORLD)
        loss = total
    return loss.detach(), grads


def check(got, expected, near):
    for x, y in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=near, atol=near)


# ---- on one process


@pytest.mark.parametrize("name, kind", KINDS)
def test_equals_the_reference(monkeypatch, name, kind):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    ours, plain, shape = CASES[name]
    got, expected = measured(ours, kind, shape), measured(plain, torch.float64, shape)
    assert got[0].dtype == kind and got[0].shape == ((B,) if name in TARGETS else ())
    assert expected[1][0].abs().max() > 1e-2, "gradients must be far above the tolerance"
    check(got, expected, NEAR[kind])


@pytest.mark.parametrize("name", ["simclr", *TARGETS])
def test_bf16_features_leave_fp32_inside(name):
    ours, plain, shape = CASES[name]
    one, two, scale = (
        x.detach().bfloat16().requires_grad_() for x in embed(towers(torch.float32), shape)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(one, two, scale)
    loss.mean().backward()
    assert loss.dtype == torch.float32 and one.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        loss.double(), plain(one.double(), two.double(), scale.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (7, 5), (13, 13), (512, 1024)])
@pytest.mark.parametrize("pairs", [13, 2, 1])
def test_simclr_over_tiles(monkeypatch, tile, pairs):
    monkeypatch.setattr(tiled_softmax, "TILE", tile)
    rng, results = torch.Generator().manual_seed(0), []
    views = torch.randn(2, pairs, E, generator=rng, dtype=torch.float64)
    for loss_of in (simclr, plain_simclr):
        leaves = [x.clone().requires_grad_() for x in views]
        loss = loss_of(*leaves)
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_simclr_accuracy(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(40, E, generator=rng)
    two = one + 0.6 * torch.randn(40, E, generator=rng)
    expected = plain_accuracy(one, two)
    got = losses.simclr(one, two.requires_grad_())[1]["simclr_accuracy"]
    assert 0.2 < expected < 0.9, "the case must be able to fail"
    assert got == pytest.approx(expected) and not got.requires_grad
    same = torch.ones(7, E)
    loss, metrics = losses.simclr(same, same)
    assert metrics["simclr_accuracy"] == 0, "a collapse is no accuracy"
    # of 13 others, alike
    assert loss.item() == pytest.approx(torch.tensor(13.0).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    "one, two, complaint",
    [
        ((4, 3), (5, 3), r"one \(4, 3\) and two \(5, 3\).*one row an image"),
        ((4, 3), (4, 2), "one row an image"),
        ((0, 3), (0, 3), "b > 0"),
        ((4,), (4,), r"must be \(b, E\)"),
        ((4, 2, 3), (4, 2, 3), r"must be \(b, E\)"),
    ],
)
def test_simclr_refuses(one, two, complaint):
    with pytest.raises(ValueError, match=complaint):
        losses.simclr(torch.ones(one), torch.ones(two))


@pytest.mark.parametrize("name", TARGETS)
def test_no_gradient_reaches_the_target(name):
    ours, _, shape = CASES[name]
    made, target = (torch.randn(B, *shape, E).requires_grad_() for _ in range(2))
    ours(made, target, None).sum().backward()
    assert target.grad is None and made.grad.abs().max() > 0


def test_released_gradients_are_not_the_exact_ones():
    """The same value, another direction: about half of each tower's gradient is lost, but none of
    the scale's.
    """
    exact = of_units(lambda *x: losses.contrastive(*x)[0])
    (loss, grads), (full, other) = (
        measured(loss_of, torch.float64, ()) for loss_of in (CASES["released"][0], exact)
    )
    assert loss == full and torch.equal(grads[2], other[2])
    assert all((x - y).norm() > 0.2 * y.norm() for x, y in zip(grads[:2], other[:2]))


@pytest.mark.parametrize(
    "beta, expected", [(2.0, [0.0, 0.25, 1.0, 2.0]), (1.0, [0.0, 0.5, 1.5, 2.5])]
)
def test_distillation_is_quadratic_below_beta(beta, expected):
    d = torch.tensor([0.0, 1.0, -2.0, 3.0])[:, None, None]
    assert losses.distillation(1 + d, torch.ones(4, 1, 1), beta).tolist() == expected


def test_patches_are_normalised_each_by_itself():
    rng = torch.Generator().manual_seed(0)
    made, target = torch.randn(2, 4, M, 48, generator=rng)
    contrast, brightness = (
        1 + torch.rand(4, M, 1, generator=rng),
        torch.randn(4, M, 1, generator=rng),
    )
    loss = losses.reconstruction(made, target)
    torch.testing.assert_close(
        losses.reconstruction(made, target * contrast + brightness), loss, rtol=1e-5, atol=1e-5
    )
    flat = losses.reconstruction(made, torch.full_like(target, 0.5))  # no deviation to divide by
    torch.testing.assert_close(flat, made.square().mean((1, 2)))


# ---- in A-CLIP


def aclip(**options):
    """A method, and its features of 4 samples with two views each, as leaves."""
    torch.manual_seed(0)
    method = Aclip(
        ModelConfig(size="nano/8", image_size=32),
        100,
        12,
        Options(block=16, simclr=0.7, hidden=32, out=16, **options),
    )
    views = {
        name: dict(
            patches=torch.randn(4, 16, 192),
            positions=torch.arange(16).expand(4, -1),
            noise=torch.rand(4, 16),
            box=torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(4, -1),
        )
        for name in ("view1", "view2", "teacher")
    }
    text = dict(
        ids=torch.arange(1, 13, dtype=torch.int32), lengths=torch.full((4,), 3, dtype=torch.int32)
    )
    return method, {
        name: x.detach().requires_grad_()
        for name, x in method(dict(views=views, text=text)).items()
    }


@pytest.mark.parametrize("as_released", [False, True])
def test_aclip_compares_two_views(as_released):
    method, features = aclip(as_released=as_released)
    one, two = features["simclr0"], features["simclr1"]
    loss, metrics = method.loss(features)
    loss.backward()
    different, itself = plain_simclr(one, two, 0.1).item(), plain_simclr(one, one, 0.1).item()
    expected = itself if as_released else different
    assert abs(different - itself) > 0.1, "the two must be told apart"
    assert metrics["simclr"].item() == pytest.approx(expected, abs=1e-5)
    assert (two.grad is None) == as_released
    contrast = [
        losses.dense_contrastive(features[f"image{i}"], features["text"], features["scale"]).item()
        for i in range(2)
    ]
    assert loss.item() == pytest.approx(sum(contrast) / 2 + 0.7 * expected, abs=1e-5)


def test_simsiam_meets_the_other_views():
    p, z = torch.randn(2, 3, 5, E).unbind()
    expected = (
        sum(plain_simsiam(p[i], z[j]) for i, j in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)))
        / 6
    )
    torch.testing.assert_close(between(p.unbind(), z.unbind()), expected)


# ---- on 2 ranks


def on_a_rank(rank):
    tiled_softmax.TILE = (4, 5)
    found = {
        (name, str(kind)): measured(CASES[name][0], kind, CASES[name][2], rank)
        for name, kind in KINDS
    }
    found["literal"] = measured(of_units(literal_released), torch.float64, (), rank)
    found["accuracy"] = losses.simclr(*embed(towers(torch.float32), (), rank)[:2])[1][
        "simclr_accuracy"
    ].item()
    if rank:  # alone: it must refuse without a collective, in which it would wait for the other
        with pytest.raises(ValueError) as refused:
            losses.simclr(torch.ones(b - 1, E), torch.ones(b - 1, E))
        found["refused"] = str(refused.value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", KINDS)
def test_ranks_average_to_the_global_gradient(name, kind):
    loss, grads = measured(CASES[name][1], torch.float64, CASES[name][2])
    for found in ranks_worker.found():
        check(found["auxiliary"][name, str(kind)], (loss.mean(), grads), NEAR[kind])


@pytest.mark.slow
def test_released_is_slip_literally():
    ranks = [found["auxiliary"] for found in ranks_worker.found()]
    loss = sum(found["literal"][0] for found in ranks) / len(ranks)  # a rank's own is of its rows
    for found in ranks:
        check(found["released", "torch.float64"], (loss, found["literal"][1]), 1e-12)


@pytest.mark.slow
def test_simclr_over_ranks():
    """Its accuracy is the whole batch's, and unequal batches are refused."""
    ranks, expected = (
        [found["auxiliary"] for found in ranks_worker.found()],
        plain_accuracy(*embed(towers(torch.float32), ())[:2]),
    )
    assert 0.1 < expected < 0.9, "the case must be able to fail"
    assert [found["accuracy"] for found in ranks] == pytest.approx([expected] * len(ranks))
    assert f"local batch {b - 1} on rank 1" in ranks[1]["refused"]
