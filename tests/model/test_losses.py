"""The tiled contrastive loss is the exact InfoNCE of the global batch.

Values and gradients are compared with the dense loss in fp64, on one process, and on 2 and 4 gloo
ranks, where gradients averaged over ranks (as DeepSpeed averages them) must be the one-process
gradients.

Letters: `b` pairs a rank, `B` pairs, `E` width. The multi-rank tests run this file as a script,
once a rank: see `ranks`.
"""

import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glimpse.model import losses, tiled_softmax

EXACT = 1e-6
# The pairs of a rank, and the width before and after the towers of the multi-rank tests.
b, IN, E = 6, 10, 8


def features(B, E, noise, scale, seed=0):
    """Return fp32 leaves: unit image and text features (B, E), equal up to noise, and the scale."""
    rng = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(B, E, generator=rng), dim=1)
    text = F.normalize(image + noise * torch.randn(B, E, generator=rng), dim=1)
    return [x.requires_grad_() for x in (image, text, torch.tensor([scale]))]


def doubled(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


def both(leaves, kind=torch.float32):
    """Return losses and gradients: of the tiled loss on leaves of a dtype, of the dense one in
    fp64.
    """
    tiled_leaves = [x.detach().to(kind).requires_grad_() for x in leaves]
    dense_leaves = doubled(leaves)
    loss, metrics = losses.contrastive(*tiled_leaves)
    loss.backward()
    dense = losses.dense_contrastive(*dense_leaves)
    dense.backward()
    grads = [(x.grad, y.grad) for x, y in zip(tiled_leaves, dense_leaves)]
    return (loss, dense, metrics), grads


@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (7, 5), (37, 37), (16, 4), (512, 1024)])
@pytest.mark.parametrize(
    "B, noise, scale",
    [(37, 1.0, 14.3), (37, 0.1, 14.3), (36, 3.0, 1.0), (2, 1.0, 14.3), (1, 1.0, 14.3)],
)
def test_equals_the_dense_loss(monkeypatch, tile, B, noise, scale):
    monkeypatch.setattr(tiled_softmax, "TILE", tile)

    (loss, dense, _), grads = both(features(B, 19, noise, scale))

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - dense.item()) < EXACT
    for got, expected in grads:
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, rtol=EXACT, atol=EXACT)


def test_the_tile_in_use_is_crossed():
    B = tiled_softmax.TILE[1] + 3

    (loss, dense, _), grads = both(features(B, 16, 1.0, 14.3))

    assert abs(loss.item() - dense.item()) < EXACT
    for got, expected in grads:
        torch.testing.assert_close(got.double(), expected, rtol=EXACT, atol=EXACT)


def test_a_steeper_gradient_passes_through(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    tiled_leaves = features(13, 8, 1.0, 5.0)
    dense_leaves = doubled(tiled_leaves)

    loss, _ = losses.contrastive(*tiled_leaves)
    loss *= 3
    loss.backward()
    (3 * losses.dense_contrastive(*dense_leaves)).backward()

    for got, expected in zip(tiled_leaves, dense_leaves):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=EXACT, atol=EXACT)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (3, 4))
    leaves = doubled(features(7, 5, 1.0, 3.0))
    assert torch.autograd.gradcheck(lambda *x: losses.contrastive(*x)[0], leaves)


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-5])
def test_scale_100(monkeypatch, noise):
    """Logits to +-100, cosines near 1: fp64 is exact, fp32 has the rounding error of such logits
    (100 / 2^24).
    """
    monkeypatch.setattr(tiled_softmax, "TILE", (16, 24))
    leaves = features(50, 32, noise, 100.0)

    for kind, near in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        (loss, dense, _), grads = both(leaves, kind)
        assert abs(loss.item() - dense.item()) <= near * max(1, dense.item())
        for got, expected in grads:
            assert (got - expected).abs().max() <= near * max(1, expected.abs().max())


def test_all_alike_and_far_apart(monkeypatch):
    """Neither collapsed features nor opposite pairs overflow. The accuracy of a collapse is 0;
    with >= it would be 1.
    """
    monkeypatch.setattr(tiled_softmax, "TILE", (16, 24))
    collapsed = F.normalize(torch.ones(40, 8), dim=1)
    for text in (collapsed, -collapsed):
        (loss, _, metrics), grads = both([collapsed, text, torch.tensor([100.0])])
        assert abs(loss - torch.tensor(40.0).log()) < 1e-5
        assert metrics["accuracy"] == 0
        assert all(got.isfinite().all() for got, _ in grads)

    # Positives of -1000 among zeros.
    image = torch.eye(8)
    (loss, dense, _), grads = both([image, -image, torch.tensor([1000.0])])
    assert abs(loss.item() - dense.item()) < 1e-3
    for got, expected in grads:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_solved_batch_keeps_its_small_loss():
    """Loss and gradients near 1e-9 keep relative accuracy, where the dense loss in fp32 gives 0."""
    leaves = features(50, 32, 1e-2, 40.0)

    (loss, dense, _), grads = both(leaves)

    assert 0 < dense < 1e-6
    assert losses.dense_contrastive(*leaves) != loss
    assert abs(loss.item() / dense.item() - 1) < 1e-4
    for got, expected in grads:
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_accuracy(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (5, 7))
    leaves = features(60, 16, 0.5, 10.0)
    image, text, _ = leaves
    logits = image @ text.t()
    labels = torch.arange(60)
    image_accuracy = (logits.argmax(1) == labels).float().mean()
    text_accuracy = (logits.argmax(0) == labels).float().mean()
    expected = (image_accuracy + text_accuracy) / 2
    assert 0.2 < expected < 0.98, "the case must be able to fail"

    (_, _, metrics), _ = both(leaves)

    assert torch.allclose(metrics["accuracy"], expected)
    assert not metrics["accuracy"].requires_grad


def test_bf16_features_and_autocast_leave_fp32_inside():
    leaves = [x.detach().bfloat16().requires_grad_() for x in features(33, 16, 0.5, 14.0)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = losses.contrastive(*leaves)
        loss.backward()
    dense = losses.dense_contrastive(*doubled(leaves))

    assert loss.dtype == torch.float32
    assert leaves[0].grad.dtype == torch.bfloat16
    assert abs(loss.item() - dense.item()) < EXACT  # bf16 logits would be off by 1e-2


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out


def test_nothing_of_size_b_x_B_is_stored(monkeypatch):
    monkeypatch.setattr(tiled_softmax, "TILE", (32, 40))
    leaves = features(300, 4, 1.0, 10.0)

    with Largest() as tiled_largest:
        losses.contrastive(*leaves)[0].backward()
    with Largest() as dense_largest:
        losses.dense_contrastive(*leaves).backward()

    assert tiled_largest.size == 32 * 40
    assert dense_largest.size == 300 * 300


def test_a_nan_is_not_hidden():
    image, text, scale = (x.detach() for x in features(9, 4, 1.0, 3.0))
    image[4, 2] = torch.nan
    assert losses.contrastive(image, text, scale)[0].isnan()


@pytest.mark.parametrize(
    "image, text, scale, complaint",
    [
        ((4, 3), (5, 3), (1,), "one row per pair"),
        ((4, 3), (4, 2), (1,), "one row per pair"),
        ((0, 3), (0, 3), (1,), "b > 0"),
        ((4,), (4,), (1,), r"must have the shape \(b, E\)"),
        ((4, 3), (4, 3), (), r"must be \(1,\)"),
    ],
)
def test_refuses(image, text, scale, complaint):
    with pytest.raises(ValueError, match=complaint):
        losses.contrastive(torch.ones(image), torch.ones(text), torch.ones(scale))


def towers():
    """Return the weights of an image tower (IN, E), of a text tower (IN, E), and the log of the
    scale (1,); the same on every rank.
    """
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(IN, E, generator=rng)
    text = torch.randn(IN, E, generator=rng)
    log_scale = torch.tensor([1.5])
    return [x.requires_grad_() for x in (image, text, log_scale)]


def embed(weights, world, rank=None):
    """Return the features of the global batch, or of a rank's share of it, and the scale."""
    image_weight, text_weight, log_scale = weights
    rng = torch.Generator().manual_seed(2)
    inputs = torch.randn(2, b * world, IN, generator=rng).to(image_weight.dtype)
    if rank is not None:
        inputs = inputs[:, rank * b : rank * b + b]
    image = F.normalize(inputs[0] @ image_weight, dim=1)
    text = F.normalize(inputs[1] @ text_weight, dim=1)
    return [image, text, log_scale.exp()]


def detached(image, text, scale):
    """Compute a wrong loss, which the tests must detect: local rows against gathered columns that
    carry no gradient to the other ranks.
    """
    labels = dist.get_rank() * b + torch.arange(b)
    images = tiled_softmax.all_gather(image.detach())
    texts = tiled_softmax.all_gather(text.detach())
    image_loss = F.cross_entropy(scale * image @ texts.t(), labels)
    text_loss = F.cross_entropy(scale * text @ images.t(), labels)
    return (image_loss + text_loss) / 2


def averaged(loss_of, kind, world, rank):
    """Return the loss, and the parameter gradients averaged over ranks."""
    weights = [w.detach().to(kind).requires_grad_() for w in towers()]
    loss = loss_of(*embed(weights, world, rank))
    loss.backward()
    for w in weights:
        dist.all_reduce(w.grad)
    return loss.item(), [w.grad / world for w in weights]


def refusal(size):
    """Return the message with which a batch of that size is refused, None if it is not."""
    try:
        losses.contrastive(torch.ones(size, E), torch.ones(size, E), torch.ones(1))
    except ValueError as error:
        return str(error)
    return None


def worker(folder, world, rank):
    def start(name):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            world_size=world,
            rank=rank,
            timeout=timedelta(seconds=60),
        )

    start("store")
    tiled_softmax.TILE = (4, 5)
    accuracies = []

    def tiled(*features):
        loss, metrics = losses.contrastive(*features)
        accuracies.append(metrics["accuracy"].item())
        return loss

    results = {
        "fp32": averaged(tiled, torch.float32, world, rank),
        "fp64": averaged(tiled, torch.float64, world, rank),
        "detached": averaged(detached, torch.float64, world, rank),
        "accuracy": accuracies,
    }
    # A single rank, as at the end of an uneven epoch, must refuse without a collective, in which it
    # would wait for the others.
    results["later"] = refusal(b - 1) if rank == 1 else None
    dist.barrier()
    dist.destroy_process_group()
    # In a new group, unequal batches in the first call.
    start("store2")
    results["first"] = refusal(b + rank)
    torch.save(results, folder / f"{rank}.pt")
    sys.stderr.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads abort some of the processes that end through the interpreter


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Launch `worker` on 2 or 4 ranks, and return [results of each rank].

    A deprecated collective is an error in them.
    """
    folder = tmp_path_factory.mktemp("ranks")
    world = request.param
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = []
    for rank in range(world):
        command = [sys.executable, __file__, folder, str(world), str(rank)]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def global_oracle(world):
    weights = [w.detach().double().requires_grad_() for w in towers()]
    loss = losses.dense_contrastive(*embed(weights, world))
    loss.backward()
    return loss.item(), [w.grad for w in weights]


def apart(got, expected):
    differences = [(x - y).abs().max() for x, y in zip(got, expected)]
    return max(differences).item()


@pytest.mark.slow
def test_ranks_average_to_the_global_gradient(ranks):
    loss, grads = global_oracle(len(ranks))
    smallest = min(grad.abs().max() for grad in grads)
    assert smallest > 1e-2, "gradients must be far above the tolerance"

    for kind, near in (("fp32", EXACT), ("fp64", 1e-12)):
        for results in ranks:
            rank_loss, rank_grads = results[kind]
            assert abs(rank_loss - loss) < near
            assert apart(rank_grads, grads) < near
        rank_losses = {results[kind][0] for results in ranks}
        assert len(rank_losses) == 1, "every rank returns the same number"


@pytest.mark.slow
def test_a_detached_gather_would_be_caught(ranks):
    _, grads = global_oracle(len(ranks))

    for results in ranks:
        _, detached_grads = results["detached"]
        assert apart(detached_grads, grads) > 1000 * EXACT


@pytest.mark.slow
def test_accuracy_is_global(ranks):
    weights = [w.detach() for w in towers()]
    _, metrics = losses.contrastive(*embed(weights, len(ranks)))
    accuracy = metrics["accuracy"].item()
    assert 0 < accuracy < 1

    for results in ranks:
        assert results["accuracy"] == pytest.approx([accuracy] * 2)


@pytest.mark.slow
def test_unequal_batches_are_refused(ranks):
    sizes = [b + rank for rank in range(len(ranks))]

    for results in ranks:
        assert str(sizes) in results["first"]
    assert f"rank 1: batch of {b - 1} samples" in ranks[1]["later"]


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
