"""Collectives for forward and backward passes, with and without a gradient.

A process without a process group is a world of size 1, where they return their input.

Letters: `k` rows on this rank, `b` samples on this rank.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed these two and deprecated the names of 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# {process group: the b of all its ranks at the first step}, see check_equal_batches.
_batch_sizes: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_is_single_process = False  # see single_process


@contextmanager
def single_process() -> Iterator[None]:
    """Run the body as a world of size 1, for a computation that other ranks do not take part in."""
    global _is_single_process
    previous, _is_single_process = _is_single_process, True
    try:
        yield
    finally:
        _is_single_process = previous


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() and not _is_single_process else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() and not _is_single_process else 0


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x (k, ...) of all ranks in rank order, (k x ranks, ...); no gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(len(x) * world_size(), *x.shape[1:])
    _all_gather(out, x.contiguous())  # NCCL refuses non-contiguous tensors
    return out


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """Sum x (k x ranks, ...) over ranks and return this rank's rows (k, ...); no gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(len(x) // world_size(), *x.shape[1:])
    _reduce_scatter(out, x)
    return out


def all_reduce(x: Tensor, maximum: bool = False) -> Tensor:
    """Replace x in place by its sum, or its maximum, over ranks; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return x


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return reduce_scatter_sum(grad.contiguous())


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate x (k, ...) of all ranks in rank order, (k x ranks, ...), with a gradient.

    The gradient of a rank's rows is the sum over ranks of the gradients of their losses.

    To write a loss across ranks, compute it from gathered features as a mean over the global batch.
    If every rank computes the same loss, the summed gradient is `ranks` times the gradient of the
    loss, and averaging over ranks, which DeepSpeed does, makes it exact.
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
    """Return the mean of x over ranks, the same value on every rank, with a gradient.

    Backward returns the gradient of the sum of all ranks' losses. DeepSpeed then averages parameter
    gradients over ranks, so a loss that is equal on all ranks gets its exact gradient.
    """
    return _MeanOverRanks.apply(x) if world_size() > 1 else x


def batch_mean(x: Tensor) -> Tensor:
    """Return the mean over the samples of all ranks, (b,) -> (), with the same b on every rank."""
    return mean_over_ranks(x.mean())


def check_equal_batches(rows: Tensor) -> None:
    """Raise ValueError if ranks have different batch sizes, with which collectives would hang.

    The sizes are compared over ranks once, at the first step. Later each rank compares its batch
    size with that of the first step, without communication.
    """
    if world_size() == 1:
        return
    b, group = len(rows), dist.group.WORLD
    assert group is not None
    if group not in _batch_sizes:
        sizes = all_gather(torch.tensor([b], device=rows.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"batch sizes differ between ranks: {sizes}; the contrastive loss needs the same"
                " number of samples on every rank"
            )
        _batch_sizes[group] = b
    if b != _batch_sizes[group]:
        raise ValueError(
            f"rank {rank()}: batch of {b} samples, but {_batch_sizes[group]} at the first step; the"
            " contrastive loss needs the same number at every step"
        )
