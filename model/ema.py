"""The moving average of a student's weights, which is its teacher: kept in fp32, by each rank for
its own shard, with no gathering.

    average = Average(parameters(modules), part, source, written)
    average.update(cosine(0.996, 1.0, progress))

Functions tell what this rank holds, since ZeRO-3 keeps shards: `part(teacher parameter)` the tensor
to write, `source(student parameter)` the student's newest values in fp32, of the same elements;
`written(teacher parameter)` hears that it has changed. Where weights are
fp32 the teacher's own memory is the average; under bf16, whose steps are coarser than 1 - momentum,
an fp32 copy stands beside it.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, progress 0 to 1 (BYOL, arXiv 2006.07733 section
    3.3).
    """
    return end - (end - start) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def linear(start: float, end: float, progress: float) -> float:
    """From start to end (MaskCLIP appendix B)."""
    return start + (end - start) * min(1.0, progress)


def check_momentum(momentum: tuple[float, float]) -> None:
    if not 0 <= momentum[0] <= momentum[1] <= 1:
        raise ValueError(f"options.momentum {momentum}: two numbers from 0 to 1, first <= last")


def parameters(
    modules: Iterable[tuple[nn.Module, nn.Module]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """{i.name: (teacher's, student's)} of pairs of modules that are built alike."""
    pairs = {}
    for i, (teacher, student) in enumerate(modules):
        mine, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
        assert mine.keys() == theirs.keys(), (
            f"teacher and student differ in {sorted(mine.keys() ^ theirs.keys())[0]}"
        )
        assert all(shape(mine[name]) == shape(theirs[name]) for name in mine), (
            "teacher and student differ in a shape"
        )
        assert not any(p.requires_grad for p in mine.values()), "a teacher's parameters are frozen"
        pairs |= {f"{i}.{name}": (mine[name], theirs[name]) for name in mine}
    return pairs


def shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # a sharded one's own is empty


class Average:
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
        self.kept = {name: part(teacher).float() for name, (teacher, _) in pairs.items()}

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * student; momentum 0 copies."""
        for name, (_, student) in self.pairs.items():
            kept = self.kept[name]
            kept.lerp_(self.source(student).view(-1)[: kept.numel()].to(kept), 1 - momentum)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """The averages into the teacher's weights."""
        for name, (teacher, _) in self.pairs.items():
            part = self.part(teacher)
            if part.data_ptr() != self.kept[name].data_ptr():
                part.copy_(self.kept[name])
            self.written(teacher)
