"""Each auxiliary loss, and the contrastive one with SLIP's released gradients, equals a plain
reference of a few lines in values and gradients.

They are compared on one process and on 2 gloo ranks, where gradients averaged over ranks must be
the reference's on the global batch. A-CLIP's SimCLR compares two views, not one with itself.

Letters: `b` samples a rank, `B` samples, `M` tokens of a sample, `E` width.
Run: pytest tests/model/test_auxiliary.py (-m "not slow" leaves out the ranks, which
tests/workers/ranks_worker.py starts)
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glimpse.model import losses, tiled_softmax
from glimpse.model.collectives import all_gather_with_grad, batch_mean, mean_over_ranks, rank
from glimpse.model.methods.aclip import Aclip, Options, pairwise_simsiam
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
    # The positive of i is i + B, and that of i + B is i.
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(one)))


def plain_accuracy(one, two):
    views = F.normalize(torch.cat([one, two]))
    nearest = (views @ views.t()).fill_diagonal_(-2).argmax(1)
    return (nearest == torch.arange(len(views)).roll(len(one))).float().mean().item()


def plain_byol(prediction, target):
    target = target.detach()
    prediction_direction = prediction / prediction.norm(dim=1, keepdim=True)
    target_direction = target / target.norm(dim=1, keepdim=True)
    return (prediction_direction - target_direction).square().sum(1)


def plain_simsiam(prediction, target):
    return -F.cosine_similarity(prediction, target.detach())


def plain_distillation(prediction, target, normalize=False):
    target = target.detach()
    if normalize:
        variance = target.var(-1, keepdim=True, correction=0)
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    d = (prediction - target).abs()
    return torch.where(d < 2, 0.25 * d**2, d - 1).mean((1, 2))


def plain_reconstruction(prediction, target, normalize=True):
    target = target.detach()
    if normalize:
        variance = target.var(-1, keepdim=True, correction=1)  # as in MAE's code
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6) ** 0.5
    return ((prediction - target) ** 2).mean(-1).mean(-1)


def plain_released(image, text, scale, columns=None, first=0):
    """SLIP's CLIPLoss: rows against detached columns.

    columns: images and texts of all ranks, by default those of the rows; first: the column of the
    first row's positive.
    """
    images, texts = columns or (image.detach(), text.detach())
    labels = first + torch.arange(len(image))
    image_loss = F.cross_entropy(scale * image @ texts.t(), labels)
    text_loss = F.cross_entropy(scale * text @ images.t(), labels)
    return (image_loss + text_loss) / 2


def gathered_without_grad(x):
    parts = [torch.empty_like(x) for _ in range(ranks_worker.WORLD)]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


def literal_released(image, text, scale):
    """SLIP's CLIPLoss on real ranks: columns from an all_gather that carries no gradient."""
    columns = (gathered_without_grad(image), gathered_without_grad(text))
    return plain_released(image, text, scale, columns, dist.get_rank() * b)


def gathered_sigmoid(image, text, scale):
    """A new loss across ranks as its author would write it: SigLIP's, this rank's rows against the
    gathered columns.
    """
    texts = all_gather_with_grad(text)
    rows = torch.arange(len(image))
    sign = -torch.ones(len(image), len(texts), dtype=image.dtype)
    sign[rows, rows + len(image) * rank()] = 1
    return mean_over_ranks(-F.logsigmoid(sign * (scale * image @ texts.t() - 1)).sum(1).mean())


def plain_sigmoid(image, text, scale):
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(sign * (scale * image @ text.t() - 1)).sum(1).mean()


def simclr(one, two):
    return losses.simclr(one, two, TAU)[0]


def exact(image, text, scale):
    return losses.contrastive(image, text, scale)[0]


def released(image, text, scale):
    return losses.contrastive(image, text, scale, exact=False)[0]


def of_two(loss_of, **options):
    return lambda one, two, _: loss_of(one, two, **options)


def of_units(loss_of):
    return lambda image, text, scale: loss_of(F.normalize(image), F.normalize(text), scale)


# Ours and the reference, functions of (one, two, scale), and the shape of a sample before its
# width.
CASES = {
    "simclr": (of_two(simclr), of_two(plain_simclr), ()),
    "released": (of_units(released), of_units(plain_released), ()),
    "gathered": (of_units(gathered_sigmoid), of_units(plain_sigmoid), ()),
    "byol": (of_two(losses.byol), of_two(plain_byol), ()),
    "simsiam": (of_two(losses.simsiam), of_two(plain_simsiam), ()),
    "distillation": (of_two(losses.distillation), of_two(plain_distillation), (M,)),
    "distillation, normalised": (
        of_two(losses.distillation, normalize=True),
        of_two(plain_distillation, normalize=True),
        (M,),
    ),
    "reconstruction": (of_two(losses.reconstruction), of_two(plain_reconstruction), (M,)),
    "reconstruction, plain": (
        of_two(losses.reconstruction, normalize=False),
        of_two(plain_reconstruction, normalize=False),
        (M,),
    ),
}
# Losses that return a number for each sample, and whose second argument is a target.
TARGETS = [name for name in CASES if name not in ("simclr", "released", "gathered")]
# Losses of tokens are computed in fp32.
KINDS = []
for case, (*_, case_shape) in CASES.items():
    KINDS.append((case, torch.float32))
    if not case_shape:
        KINDS.append((case, torch.float64))


def towers(kind):
    """Return leaves, the same on every rank: the weights of two towers (IN, E) and the log of the
    scale (1,).
    """
    rng = torch.Generator().manual_seed(1)
    one = torch.randn(IN, E, generator=rng)
    two = one + 0.5 * torch.randn(IN, E, generator=rng)
    log_scale = torch.tensor([1.5])
    return [x.to(kind).requires_grad_() for x in (one, two, log_scale)]


def embed(weights, shape, rank=None):
    """Return the outputs of the towers for the global batch, or for a rank's share, and the
    scale.
    """
    one_weight, two_weight, log_scale = weights
    rng = torch.Generator().manual_seed(2)
    inputs = torch.randn(2, B, *shape, IN, generator=rng).to(one_weight.dtype)
    inputs[1] = inputs[0] + 0.3 * inputs[1]
    share = slice(None) if rank is None else slice(rank * b, rank * b + b)
    one = inputs[0, share] @ one_weight
    two = inputs[1, share] @ two_weight
    return [one, two, log_scale.exp()]


def measured(loss_of, kind, shape, rank=None):
    """Return the loss (of each sample, for TARGETS), and the gradients of its mean; on a rank,
    averaged over all as DeepSpeed does.
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
    """Compare two (loss, gradients)."""
    loss, grads = got
    expected_loss, expected_grads = expected
    torch.testing.assert_close(loss.double(), expected_loss, rtol=near, atol=near)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=near, atol=near)


# ---- on one process


@pytest.mark.parametrize("name, kind", KINDS)
def test_equals_the_reference(monkeypatch, name, kind):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    ours, plain, shape = CASES[name]
    loss_shape = (B,) if name in TARGETS else ()

    loss, grads = measured(ours, kind, shape)
    expected_loss, expected_grads = measured(plain, torch.float64, shape)

    assert loss.dtype == kind
    assert loss.shape == loss_shape
    assert expected_grads[0].abs().max() > 1e-2, "gradients must be far above the tolerance"
    check((loss, grads), (expected_loss, expected_grads), NEAR[kind])


@pytest.mark.parametrize("name", ["simclr", *TARGETS])
def test_bf16_features_leave_fp32_inside(name):
    ours, plain, shape = CASES[name]
    embedded = embed(towers(torch.float32), shape)
    one, two, scale = (x.detach().bfloat16().requires_grad_() for x in embedded)

    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(one, two, scale)
    loss.mean().backward()

    expected = plain(one.double(), two.double(), scale.double())
    assert loss.dtype == torch.float32
    assert one.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (7, 5), (13, 13), (512, 1024)])
@pytest.mark.parametrize("pairs", [13, 2, 1])
def test_simclr_over_tiles(monkeypatch, tile, pairs):
    monkeypatch.setattr(tiled_softmax, "TILE", tile)
    rng = torch.Generator().manual_seed(0)
    views = torch.randn(2, pairs, E, generator=rng, dtype=torch.float64)
    results = []

    for loss_of in (simclr, plain_simclr):
        leaves = [x.clone().requires_grad_() for x in views]
        loss = loss_of(*leaves)
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])

    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_simclr_can_be_recomputed():
    """torch lets a checkpointed function read its saved tensors only once."""
    one, two = (torch.randn(4, E, requires_grad=True) for _ in range(2))

    checkpoint(simclr, one, two, use_reentrant=False).backward()

    assert one.grad.abs().max() > 0


def test_simclr_accuracy(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(40, E, generator=rng)
    two = one + 0.6 * torch.randn(40, E, generator=rng)
    expected = plain_accuracy(one, two)
    assert 0.2 < expected < 0.9, "the case must be able to fail"

    _, metrics = losses.simclr(one, two.requires_grad_())

    accuracy = metrics["simclr_accuracy"]
    assert accuracy == pytest.approx(expected)
    assert not accuracy.requires_grad

    # Equal features: the positive is one of 13 equal others.
    same = torch.ones(7, E)
    loss, metrics = losses.simclr(same, same)
    assert metrics["simclr_accuracy"] == 0, "a collapse is no accuracy"
    assert loss.item() == pytest.approx(torch.tensor(13.0).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    "one, two, complaint",
    [
        ((4, 3), (5, 3), r"first \(4, 3\), second \(5, 3\).*one row per image"),
        ((4, 3), (4, 2), "one row per image"),
        ((0, 3), (0, 3), "b > 0"),
        ((4,), (4,), r"must have the shape \(b, E\)"),
        ((4, 2, 3), (4, 2, 3), r"must have the shape \(b, E\)"),
    ],
)
def test_simclr_refuses(one, two, complaint):
    with pytest.raises(ValueError, match=complaint):
        losses.simclr(torch.ones(one), torch.ones(two))


@pytest.mark.parametrize("name", TARGETS)
def test_no_gradient_reaches_the_target(name):
    ours, _, shape = CASES[name]
    prediction = torch.randn(B, *shape, E).requires_grad_()
    target = torch.randn(B, *shape, E).requires_grad_()

    ours(prediction, target, None).sum().backward()

    assert target.grad is None
    assert prediction.grad.abs().max() > 0


def test_released_gradients_are_not_the_exact_ones():
    """The same value, another direction: about half of each tower's gradient is lost, but none of
    the scale's.
    """
    loss, grads = measured(of_units(released), torch.float64, ())
    exact_loss, exact_grads = measured(of_units(exact), torch.float64, ())

    assert loss == exact_loss
    assert torch.equal(grads[2], exact_grads[2])
    for grad, exact_grad in zip(grads[:2], exact_grads[:2]):
        assert (grad - exact_grad).norm() > 0.2 * exact_grad.norm()


@pytest.mark.parametrize(
    "beta, expected", [(2.0, [0.0, 0.25, 1.0, 2.0]), (1.0, [0.0, 0.5, 1.5, 2.5])]
)
def test_distillation_is_quadratic_below_beta(beta, expected):
    d = torch.tensor([0.0, 1.0, -2.0, 3.0])[:, None, None]
    assert losses.distillation(1 + d, torch.ones(4, 1, 1), beta).tolist() == expected


def test_patches_are_normalised_each_by_itself():
    rng = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, M, 48, generator=rng)
    contrast = 1 + torch.rand(4, M, 1, generator=rng)
    brightness = torch.randn(4, M, 1, generator=rng)
    constant = torch.full_like(target, 0.5)  # no deviation to divide by

    loss = losses.reconstruction(prediction, target)
    changed_loss = losses.reconstruction(prediction, target * contrast + brightness)
    constant_loss = losses.reconstruction(prediction, constant)

    torch.testing.assert_close(changed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(constant_loss, prediction.square().mean((1, 2)))


# ---- in A-CLIP


def aclip(**options):
    """Build a method, and its features of 4 samples with two views each, as leaves."""
    torch.manual_seed(0)
    cfg = ModelConfig(size="nano/8", image_size=32)
    method = Aclip(cfg, 100, 12, Options(block=16, simclr=0.7, hidden=32, out=16, **options))
    views = {}
    for name in ("view1", "view2", "teacher"):
        views[name] = dict(
            patches=torch.randn(4, 16, 192),
            positions=torch.arange(16).expand(4, -1),
            noise=torch.rand(4, 16),
            box=torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(4, -1),
        )
    ids = torch.arange(1, 13, dtype=torch.int32)
    lengths = torch.full((4,), 3, dtype=torch.int32)
    features = method(dict(views=views, text=dict(ids=ids, lengths=lengths)))
    return method, {name: x.detach().requires_grad_() for name, x in features.items()}


@pytest.mark.parametrize("as_released", [False, True])
def test_aclip_compares_two_views(as_released):
    method, features = aclip(as_released=as_released)
    one = features["simclr0"]
    two = features["simclr1"]
    of_different_views = plain_simclr(one, two, 0.1).item()
    of_the_same_view = plain_simclr(one, one, 0.1).item()
    expected = of_the_same_view if as_released else of_different_views
    difference = abs(of_different_views - of_the_same_view)
    assert difference > 0.1, "the two must be told apart"

    loss, metrics = method.loss(features)
    loss.backward()

    assert metrics["simclr"].item() == pytest.approx(expected, abs=1e-5)
    assert (two.grad is None) == as_released
    contrast = 0.0
    for image in (features["image0"], features["image1"]):
        contrast += losses.dense_contrastive(image, features["text"], features["scale"]).item()
    assert loss.item() == pytest.approx(contrast / 2 + 0.7 * expected, abs=1e-5)


def test_simsiam_meets_the_other_views():
    p, z = torch.randn(2, 3, 5, E).unbind()
    pairs = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))
    expected = sum(plain_simsiam(p[i], z[j]) for i, j in pairs) / 6

    torch.testing.assert_close(pairwise_simsiam(p.unbind(), z.unbind()), expected)


# ---- on 2 ranks


def run_on_rank(rank):
    tiled_softmax.TILE = (4, 5)
    results = {}
    for name, kind in KINDS:
        ours, _, shape = CASES[name]
        results[name, str(kind)] = measured(ours, kind, shape, rank)
    results["literal"] = measured(of_units(literal_released), torch.float64, (), rank)

    one, two, _ = embed(towers(torch.float32), (), rank)
    _, metrics = losses.simclr(one, two)
    results["accuracy"] = metrics["simclr_accuracy"].item()

    # A single rank must refuse without a collective, in which it would wait for the other.
    if rank:
        with pytest.raises(ValueError) as refused:
            losses.simclr(torch.ones(b - 1, E), torch.ones(b - 1, E))
        results["refused"] = str(refused.value)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", KINDS)
def test_ranks_average_to_the_global_gradient(name, kind):
    _, plain, shape = CASES[name]
    loss, grads = measured(plain, torch.float64, shape)

    for results in ranks_worker.rank_results():
        check(results["auxiliary"][name, str(kind)], (loss.mean(), grads), NEAR[kind])


@pytest.mark.slow
def test_released_is_slip_literally():
    ranks = [results["auxiliary"] for results in ranks_worker.rank_results()]
    # Each rank's literal loss is that of its rows.
    row_losses = [results["literal"][0] for results in ranks]
    loss = sum(row_losses) / len(ranks)

    for results in ranks:
        _, grads = results["literal"]
        check(results["released", "torch.float64"], (loss, grads), 1e-12)


@pytest.mark.slow
def test_simclr_over_ranks():
    """The accuracy is that of the global batch, and unequal batches are refused."""
    one, two, _ = embed(towers(torch.float32), ())
    expected = plain_accuracy(one, two)
    assert 0.1 < expected < 0.9, "the case must be able to fail"

    ranks = [results["auxiliary"] for results in ranks_worker.rank_results()]

    assert [results["accuracy"] for results in ranks] == pytest.approx([expected] * len(ranks))
    assert f"rank 1: batch of {b - 1} samples" in ranks[1]["refused"]
