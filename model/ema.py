"""Moving average of a student's weights (its teacher), in fp32; each rank averages its shard.

    averages = MovingAverages(pair_parameters(modules), local_shard, student_shard, after_write)
    averages.update(cosine_momentum(0.996, 1.0, progress))

Under ZeRO-3 a rank holds only shards of the parameters, and nothing is gathered. Three functions
hide this: `local_shard(teacher parameter)` returns the tensor to write to, `student_shard(student
parameter)` returns the newest values of the same elements (of the fp32 master copy if it is local,
as under ZeRO-3), and `after_write(teacher
parameter)` is called after each change.

If the weights are fp32, the teacher's own tensors hold the average. In bf16 an update by
(1 - momentum) times a difference would be rounded away, so the average is a separate fp32 copy.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """Return the momentum that goes from start to end along half a cosine.

    progress: the fraction of the run that is done (BYOL, arXiv 2006.07733, section 3.3).
    """
    return end - (end - start) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def linear_momentum(start: float, end: float, progress: float) -> float:
    """Return the momentum that goes linearly from start to end (MaskCLIP, appendix B)."""
    return start + (end - start) * min(1.0, progress)


def check_momentum(momentum: tuple[float, float]) -> None:
    """Raise ValueError unless 0 <= start <= end <= 1."""
    if not 0 <= momentum[0] <= momentum[1] <= 1:
        raise ValueError(
            f"options.momentum: {momentum} is invalid; give the momentum at the start and at the"
            " end, from 0 to 1, the first not above the second"
        )


def pair_parameters(
    modules: Iterable[tuple[nn.Module, nn.Module]],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return {i.name: (teacher parameter, student parameter)} for (teacher, student) modules.

    i is the index of the pair; the modules of a pair must have the same parameters.
    """
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for i, (teacher, student) in enumerate(modules):
        teachers, students = dict(teacher.named_parameters()), dict(student.named_parameters())
        differing = sorted(teachers.keys() ^ students.keys())
        assert not differing, f"teacher and student differ in {differing[0]}"
        for name, parameter in teachers.items():
            shapes_match = full_shape(parameter) == full_shape(students[name])
            assert shapes_match, f"teacher and student differ in the shape of {name}"
            assert not parameter.requires_grad, f"{name} of the teacher is not frozen"
            pairs[f"{i}.{name}"] = parameter, students[name]
    return pairs


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the full parameter; under ZeRO-3 the local tensor is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


class MovingAverages:
    """Moving averages of this rank's shards; `values`: {name: flat fp32 tensor}."""

    def __init__(
        self,
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]],
        local_shard: Callable[[nn.Parameter], Tensor],
        student_shard: Callable[[nn.Parameter], Tensor],
        after_write: Callable[[nn.Parameter], None],
    ):
        self.pairs = pairs
        self.local_shard, self.student_shard = local_shard, student_shard
        self.after_write = after_write
        # For fp32 weights .float() returns the teacher's own memory.
        self.values = {name: local_shard(teacher).float() for name, (teacher, _) in pairs.items()}

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Set average = momentum * average + (1 - momentum) * student; momentum 0 copies."""
        for name, (_, student) in self.pairs.items():
            average = self.values[name]
            # The student's shard may be padded at its end.
            student_values = self.student_shard(student).view(-1)[: average.numel()].to(average)
            average.lerp_(student_values, 1 - momentum)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Copy the averages to the weights of the teacher."""
        for name, (teacher, _) in self.pairs.items():
            shard = self.local_shard(teacher)
            if shard.data_ptr() != self.values[name].data_ptr():
                shard.copy_(self.values[name])
            self.after_write(teacher)
