"""Communication between ranks inside a forward or backward pass.

One process without a process group is a world of one.

Letters: `k` rows on this rank, `b` pairs.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two and deprecated the names that 2.11 knows
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# process group -> the b all its ranks brought to the first step
_batch_sizes: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


_is_single_process = False  # see single_process


@contextmanager
def single_process() -> Iterator[None]:
    """Make this rank a world of one, for computations without the other ranks."""
    global _is_single_process
    before, _is_single_process = _is_single_process, True
    try:
        yield
    finally:
        _is_single_process = before


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _is_single_process else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _is_single_process else 0


def all_gather(x: Tensor) -> Tensor:
    """Gather x (k, ...) of each rank: (k x ranks, ...), in rank order; no gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(len(x) * world_size(), *x.shape[1:])
    _all_gather(out, x.contiguous())  # NCCL refuses any other
    return out


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """Return this rank's rows (k, ...) of the sum over ranks of x (k x ranks, ...); no gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(len(x) // world_size(), *x.shape[1:])
    _reduce_scatter(out, x)
    return out


def all_reduce(x: Tensor, largest: bool = False) -> Tensor:
    """Reduce x in place to the sum over ranks, or to the largest; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return reduce_scatter_sum(grad.contiguous())


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather x (k, ...) of each rank, (k x ranks, ...) in rank order, with a gradient.

    The gradient of a rank's rows is the sum of the gradients of all ranks' losses.

    For a new loss across ranks: compute it from gathered features as a mean over the global batch.
    If every rank computes the same loss the summed gradient is `ranks` times that of the loss, and
    DeepSpeed's average over ranks makes it exact.
    """
    return _AllGatherWithGrad.apply(x) if world_size() > 1 else x


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce(x.clone()) / world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce(grad.clone()) / world_size()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean over ranks, the same on each.

    Its gradient is that of the sum of all ranks' losses, which DeepSpeed then averages.
    """
    return _MeanOverRanks.apply(x) if world_size() > 1 else x


def batch_mean(x: Tensor) -> Tensor:
    """Return the mean over all samples of the batch, (b,) -> ().

    x: a number per sample, as many on each rank.
    """
    return mean_over_ranks(x.mean())


def check_equal_batches(image: Tensor) -> None:
    """Refuse ranks with unequal batches: they would hang or corrupt the collectives.

    The sizes are compared over ranks once, at the first step; afterwards each rank holds its own to
    that number, with no communication.
    """
    if world_size() == 1:
        return
    b, group = len(image), dist.group.WORLD
    assert group is not None
    if group not in _batch_sizes:
        sizes = all_gather(torch.tensor([b], device=image.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"local batches {sizes} differ over the ranks: the contrastive loss needs the same"
                " number on every rank"
            )
        _batch_sizes[group] = b
    if b != _batch_sizes[group]:
        raise ValueError(
            f"local batch {b} on rank {rank()}, {_batch_sizes[group]} at the first step: bring that"
            " number at every step"
        )
