"""The moving average of a student's weights, its teacher: kept in fp32, by each rank for its own
shard, without gathering.

    average = Average(parameters(modules), part, source, written)
    average.update(cosine(0.996, 1.0, progress))

Under ZeRO-3 a rank holds shards, which three functions hide: `part(teacher parameter)` returns the
tensor to write, `source(student parameter)` the student's newest values of the same elements in
fp32, and `written(teacher parameter)` is called after a change.

Where weights are fp32 the teacher's own memory is the average; under bf16, whose steps are coarser
than 1 - momentum, an fp32 copy stands beside it.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, progress 0 to 1 (BYOL, arXiv 2006.07733 section
    3.3).
    """
    return end - (end - start) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def linear_momentum(start: float, end: float, progress: float) -> float:
    """From start to end (MaskCLIP appendix B)."""
    return start + (end - start) * min(1.0, progress)


def check_momentum(momentum: tuple[float, float]) -> None:
    if not 0 <= momentum[0] <= momentum[1] <= 1:
        raise ValueError(f"options.momentum {momentum}: two numbers from 0 to 1, first <= last")


def pair_parameters(
    modules: Iterable[tuple[nn.Module, nn.Module]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """{i.name: (teacher's, student's)} of pairs of modules that are built alike."""
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for i, (teacher, student) in enumerate(modules):
        averages, sources = dict(teacher.named_parameters()), dict(student.named_parameters())
        differing = sorted(averages.keys() ^ sources.keys())
        assert not differing, f"teacher and student differ in {differing[0]}"
        for name, average in averages.items():
            assert full_shape(average) == full_shape(sources[name]), (
                "teacher and student differ in a shape"
            )
            assert not average.requires_grad, "a teacher's parameters are frozen"
            pairs[f"{i}.{name}"] = average, sources[name]
    return pairs


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # a sharded one's own is empty


class MovingAverages:
    """The averages of this rank, {name: flat fp32 tensor}."""

    def __init__(
        self,
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]],
        part: Callable[[nn.Parameter], Tensor],
        source: Callable[[nn.Parameter], Tensor],
        written: Callable[[nn.Parameter], None],
    ):
        self.pairs, self.part, self.source, self.written = pairs, part, source, written
        # the same memory where it is fp32
        self.values = {name: part(teacher).float() for name, (teacher, _) in pairs.items()}

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * student; momentum 0 copies."""
        for name, (_, student) in self.pairs.items():
            average = self.values[name]
            newest = self.source(student).view(-1)[: average.numel()].to(average)
            average.lerp_(newest, 1 - momentum)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Copy the averages into the teacher's weights."""
        for name, (teacher, _) in self.pairs.items():
            part = self.part(teacher)
            if part.data_ptr() != self.values[name].data_ptr():
                part.copy_(self.values[name])
            self.written(teacher)
