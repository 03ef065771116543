"""The weights in a checkpoint's files, read where they lie: a tensor at a time, by any process,
without DeepSpeed's optimizer.

    tensors = weights(path)             Tensors, fp32: every parameter of the method under its own
                                        name
    tensors = averages(path)            of a teacher's moving averages, under model/ema.py's names

What is pickled in the files is read with tensors left out, each of which tells where in its file it
lies; then bytes are read from there. So memory is that of one tensor, whatever the number of ranks,
and of what a pickle could do only DeepSpeed's own few types are let in:
a run folder from elsewhere can be read safely. The layout is that of DeepSpeed's
deepspeed/utils/zero_to_fp32.py, whose own reader holds stages 1 and 2 whole.
"""

import json
import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from glimpse.model.lazy_tensors import Tensors
from glimpse.model.safe_unpickler import GETATTR, UNSAFE, first_line, member

TYPES = [
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
    (member, ".".join(GETATTR)),
]


@dataclass(frozen=True)
class Run:
    """`count` elements of one type that lie end to end in a file, from a byte on."""

    file: Path
    begin: int
    count: int
    dtype: torch.dtype

    def part(self, first: int, count: int) -> "Run":
        return Run(self.file, self.begin + first * self.dtype.itemsize, count, self.dtype)


def structure(file: Path) -> dict:
    """What a file holds, its tensors without their values."""
    try:
        with torch.serialization.safe_globals(TYPES):
            # which notes where in the file each storage lies
            return torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{file}: refused ({wanted[1]}): {UNSAFE}") from None
        raise ValueError(f"{file}: truncated or no checkpoint ({first_line(error)})") from None


def run_of(tensor: torch.Tensor, file: Path) -> Run:
    storage = tensor.untyped_storage()
    return Run(
        file,
        storage._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize,
        tensor.numel(),
        tensor.dtype,
    )


def cut(runs: Iterable[Run], first: int, count: int) -> list[Run]:
    """`count` elements from the `first` of runs that are thought end to end."""
    found = []
    for run in runs:
        begin, end = max(0, first), min(run.count, first + count)
        if begin < end:
            found.append(run.part(begin, end - begin))
        first -= run.count
    return found


def made(where: dict[str, tuple[torch.Size, list[Run]]]) -> Tensors:
    """Tensors of these shapes, whose elements are in these runs, one after another; as fp32."""

    def get(name: str) -> torch.Tensor:
        shape, runs = where[name]
        out, at = torch.empty(shape.numel()), 0
        for run in runs:
            place = out[at : at + run.count]
            piece = place if run.dtype == place.dtype else torch.empty(run.count, dtype=run.dtype)
            with run.file.open("rb") as file:
                file.seek(run.begin)
                if (
                    file.readinto(memoryview(piece.view(torch.uint8).numpy()))
                    != run.count * run.dtype.itemsize
                ):
                    raise ValueError(f"{run.file}: truncated")
            if piece is not place:
                place.copy_(piece)
            at += run.count
        return out.view(shape)

    for name, (shape, runs) in where.items():
        if sum(run.count for run in runs) != shape.numel():
            raise ValueError(
                f"{runs[0].file.parent if runs else name}: the parts of {name} are not"
                f" {tuple(shape)}"
            )
    return Tensors(
        {name: torch.empty(shape, device="meta") for name, (shape, _) in where.items()}, get
    )


def files(path: Path, kind: str) -> list[Path]:
    """The ranks' files of a kind, in the order of ranks."""
    found = sorted(
        path.glob(f"*{kind}.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)]
    )
    if not found:
        raise ValueError(f"{path}: no *{kind}.pt in it")
    return found


def weights(path: Path) -> Tensors:
    """Every parameter of a checkpoint's method in fp32: the optimizer's own copy of what was
    trained, what is frozen as it is.
    """
    stage, model = (
        json.loads((path / "manifest.json").read_text())["stage"],
        files(path, "model_states"),
    )
    first = structure(model[0])
    if stage == 0:
        return made(
            {
                name: (tensor.shape, [run_of(tensor, model[0])])
                for name, tensor in first["module"].items()
            }
        )
    optim = files(path, "optim_states")
    states = [structure(file)["optimizer_state_dict"] for file in optim]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    # ranks x groups
    groups = [[run_of(part, file) for part in state[key]] for state, file in zip(states, optim)]
    if stage < 3:  # the module is whole on rank 0, what is frozen there alone
        kept = {
            name: (tensor.shape, [run_of(tensor, model[0])])
            for name, tensor in first["module"].items()
        }
        return made(kept | split_groups(first["param_shapes"], groups, states[0]))
    where, frozen = (
        whole_shards(first["param_shapes"], groups),
        first.get("frozen_param_shapes") or {},
    )
    holders = (
        [(structure(file)["frozen_param_fragments"], file) for file in model] if frozen else []
    )
    for name, shape in frozen.items():
        where[name] = (
            shape,
            cut([run_of(parts[name], file) for parts, file in holders], 0, shape.numel()),
        )
    return made(where)


def whole_shards(shapes: list[dict], groups: list[list[Run]]) -> dict:
    """Stage 3: each rank has an equal part of every parameter, the last padded; a rank's parts lie
    end to end.
    """
    where, at = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        part = math.ceil(shape.numel() / len(groups))
        pieces = [run for mine in groups for run in cut(mine, at, part)]
        where[name] = shape, cut(pieces, 0, shape.numel())
        at += part
    return where


def split_groups(shapes: list[dict], groups: list[list[Run]], state: dict) -> dict:
    """Stages 1 and 2: the parameters of a group lie end to end, and each rank has an equal part of
    the whole.
    """
    where, padding = {}, state.get("param_alignment_paddings")
    for i, group in enumerate(shapes):
        at = 0
        for j, (name, shape) in enumerate(group.items()):
            where[name] = shape, cut([mine[i] for mine in groups], at, shape.numel())
            at += shape.numel() + (padding[i][j] if padding else 0)
    return where


def averages(path: Path, shapes: dict[str, torch.Size]) -> Tensors:
    """The moving averages of these names and shapes, which run/train/checkpoint.py keeps beside
    DeepSpeed's files.
    """
    ranks = [(structure(file), file) for file in files(path, "average_rank_*")]
    return made(
        {
            name: (
                shape,
                cut([run_of(parts[name], file) for parts, file in ranks], 0, shape.numel()),
            )
            for name, shape in shapes.items()
        }
    )
