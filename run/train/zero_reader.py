"""Read the weights in a checkpoint's files: a tensor at a time, by any process.

DeepSpeed's optimizer is not needed.

    tensors = weights(path)             Tensors, fp32: every parameter of the method under its name
    tensors = averages(path, shapes)    a teacher's moving averages, under model/ema.py's names

The files are unpickled without their tensors, each of which is only located in its file; its bytes
are read from there when it is asked for. So memory is that of one tensor, whatever the number of
ranks. The unpickler allows only the few types that DeepSpeed stores: a run folder from elsewhere
can be read safely. The layout is that of DeepSpeed's deepspeed/utils/zero_to_fp32.py, whose own
reader holds stages 1 and 2 in memory.
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
class StoredRange:
    """`count` elements of one type that lie end to end in a file, from a byte on."""

    file: Path
    offset: int
    count: int
    dtype: torch.dtype

    def slice(self, first: int, count: int) -> "StoredRange":
        """Return `count` of the elements, from the `first` on."""
        return StoredRange(self.file, self.offset + first * self.dtype.itemsize, count, self.dtype)

    def read_into(self, out: torch.Tensor) -> None:
        """Read the elements into a flat tensor of their number and type."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            size = file.readinto(out.view(torch.uint8).numpy().data)
        if size != self.count * self.dtype.itemsize:
            raise ValueError(f"{self.file}: truncated")


# {name: (shape, the runs that hold its elements, one after another)}
Layout = dict[str, tuple[torch.Size, list[StoredRange]]]


def read_structure(file: Path) -> dict:
    """Return the contents of a file, its tensors without their values."""
    try:
        with torch.serialization.safe_globals(TYPES):
            # the meta device notes where in the file each storage lies
            return torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{file}: refused ({refused[1]}): {UNSAFE}") from None
        raise ValueError(f"{file}: truncated or no checkpoint ({first_line(error)})") from None


def locate(tensor: torch.Tensor, file: Path) -> StoredRange:
    """Locate a tensor that `structure` returned in its file."""
    storage_begin = tensor.untyped_storage()._checkpoint_offset
    if storage_begin is None:
        raise ValueError(f"{file}: a tensor in it was not read by torch.load")
    begin = storage_begin + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredRange(file, begin, tensor.numel(), tensor.dtype)


def locate_all(tensors: dict[str, torch.Tensor], file: Path) -> Layout:
    """Locate unsharded tensors that `structure` returned in their file."""
    return {name: (tensor.shape, [locate(tensor, file)]) for name, tensor in tensors.items()}


def slice_ranges(runs: Iterable[StoredRange], first: int, count: int) -> list[StoredRange]:
    """Return `count` elements of runs that lie end to end, from the `first` on."""
    pieces = []
    for run in runs:
        begin = max(0, first)
        end = min(run.count, first + count)
        if begin < end:
            pieces.append(run.slice(begin, end - begin))
        first -= run.count
    return pieces


def build_tensors(where: Layout) -> Tensors:
    """Return the tensors of a layout, read when they are asked for, as fp32."""
    for name, (shape, runs) in where.items():
        if sum(run.count for run in runs) != shape.numel():
            source = runs[0].file.parent if runs else name
            raise ValueError(f"{source}: the parts of {name} are not {tuple(shape)}")

    def get(name: str) -> torch.Tensor:
        shape, runs = where[name]
        out = torch.empty(shape.numel())
        at = 0
        for run in runs:
            place = out[at : at + run.count]
            if run.dtype == place.dtype:
                run.read_into(place)
            else:
                piece = torch.empty(run.count, dtype=run.dtype)
                run.read_into(piece)
                place.copy_(piece)
            at += run.count
        return out.view(shape)

    meta = {name: torch.empty(shape, device="meta") for name, (shape, _) in where.items()}
    return Tensors(meta, get)


def rank_files(path: Path, kind: str) -> list[Path]:
    """Return the ranks' files of a kind, in the order of ranks."""

    def numbers(file: Path) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", file.name)]

    matches = sorted(path.glob(f"*{kind}.pt"), key=numbers)
    if not matches:
        raise ValueError(f"{path}: no *{kind}.pt in it")
    return matches


def read_weights(path: Path) -> Tensors:
    """Return every parameter of a checkpoint's method in fp32.

    The optimizer's master copy of what was trained; frozen parameters as they are.
    """
    stage = json.loads((path / "manifest.json").read_text())["stage"]
    model_files = rank_files(path, "model_states")
    first = read_structure(model_files[0])
    if stage == 0:
        return build_tensors(locate_all(first["module"], model_files[0]))

    # The master copies, flat: groups[rank][group].
    optimizer_files = rank_files(path, "optim_states")
    states = [read_structure(file)["optimizer_state_dict"] for file in optimizer_files]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = []
    for state, file in zip(states, optimizer_files):
        groups.append([locate(part, file) for part in state[key]])

    # Stages 1 and 2: the module is unsharded on rank 0, which alone has what is frozen.
    if stage < 3:
        module = locate_all(first["module"], model_files[0])
        return build_tensors(module | stage12_layout(first["param_shapes"], groups, states[0]))

    # Stage 3: every rank has a part of what is frozen, too.
    trained_layout = stage3_layout(first["param_shapes"], groups)
    frozen_shapes = first.get("frozen_param_shapes")
    if not frozen_shapes:
        return build_tensors(trained_layout)
    shards = [(read_structure(file)["frozen_param_fragments"], file) for file in model_files]
    return build_tensors(trained_layout | sharded_layout(frozen_shapes, shards))


def stage3_layout(shapes: list[dict[str, torch.Size]], groups: list[list[StoredRange]]) -> Layout:
    """Locate the parameters of stage 3.

    Each rank has an equal part of every parameter, the last padded; a rank's parts lie end to end.
    """
    where: Layout = {}
    at = 0
    for group in shapes:
        for name, shape in group.items():
            size = math.ceil(shape.numel() / len(groups))
            pieces = []
            for rank_runs in groups:
                pieces += slice_ranges(rank_runs, at, size)
            where[name] = (shape, slice_ranges(pieces, 0, shape.numel()))
            at += size
    return where


def stage12_layout(
    shapes: list[dict[str, torch.Size]], groups: list[list[StoredRange]], state: dict
) -> Layout:
    """Locate the parameters of stages 1 and 2.

    Those of a group lie end to end, and each rank has an equal part of the group.
    """
    where: Layout = {}
    paddings = state.get("param_alignment_paddings")
    for i, group in enumerate(shapes):
        runs = [rank_runs[i] for rank_runs in groups]
        at = 0
        for j, (name, shape) in enumerate(group.items()):
            where[name] = (shape, slice_ranges(runs, at, shape.numel()))
            at += shape.numel()
            if paddings:
                at += paddings[i][j]
    return where


def sharded_layout(
    shapes: dict[str, torch.Size], shards: list[tuple[dict[str, torch.Tensor], Path]]
) -> Layout:
    """Locate tensors of which each rank's file has a part, the last padded.

    shards: (the parts, their file), in the order of ranks.
    """
    where: Layout = {}
    for name, shape in shapes.items():
        runs = [locate(parts[name], file) for parts, file in shards]
        where[name] = (shape, slice_ranges(runs, 0, shape.numel()))
    return where


def read_averages(path: Path, shapes: dict[str, torch.Size]) -> Tensors:
    """Return the moving averages of these names and shapes.

    run/train/checkpoint.py saves them beside DeepSpeed's files.
    """
    shards = [(read_structure(file), file) for file in rank_files(path, "average_rank_*")]
    return build_tensors(sharded_layout(shapes, shards))
