"""Read the weights of a DeepSpeed checkpoint, one tensor at a time, in any process.

    tensors = read_weights(path)             every parameter of the method, fp32, by its name
    tensors = read_averages(path, shapes)    a teacher's moving averages, by model/ema.py's names

Both return lazy Tensors. The checkpoint's files are unpickled without the data of their tensors,
only to learn where each tensor lies in its file. The bytes are read when a tensor is accessed, so
memory is that of one tensor for any number of ranks. No DeepSpeed engine is needed.

The unpickler accepts only the few types that DeepSpeed stores, so a run folder from an untrusted
source can be read safely.

The layouts are those of DeepSpeed's deepspeed/utils/zero_to_fp32.py, which itself loads the
checkpoints of stages 1 and 2 into memory.
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

from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.safe_unpickler import GETATTR, UNSAFE_MESSAGE, enum_member, first_line

# What DeepSpeed's files contain besides tensors and plain Python types.
ALLOWED_TYPES = [
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
    (enum_member, ".".join(GETATTR)),
]


@dataclass(frozen=True)
class StoredRange:
    """`count` contiguous elements of one dtype in a file, from a byte offset on."""

    file: Path
    offset: int
    count: int
    dtype: torch.dtype

    def slice(self, first: int, count: int) -> "StoredRange":
        """Return `count` of the elements, starting with element `first`."""
        return StoredRange(self.file, self.offset + first * self.dtype.itemsize, count, self.dtype)

    def read_into(self, out: torch.Tensor) -> None:
        """Read the elements into a flat tensor of the same size and dtype."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            size = file.readinto(out.view(torch.uint8).numpy().data)
        if size != self.count * self.dtype.itemsize:
            raise ValueError(f"{self.file}: truncated; copy the checkpoint again")


# {parameter's name: (shape, the ranges that hold its elements, in order)}
Layout = dict[str, tuple[torch.Size, list[StoredRange]]]


def read_structure(file: Path) -> dict:
    """Unpickle a file written by torch.save; its tensors are on the meta device, without data.

    Raises ValueError if the file is damaged or contains a type that DeepSpeed does not store.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED_TYPES):
            # With the meta device, torch records the offset of each storage in the file.
            return torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{file}: refused ({refused[1]}): {UNSAFE_MESSAGE}") from None
        raise ValueError(f"{file}: truncated, or not a checkpoint ({first_line(error)})") from None


def locate(tensor: torch.Tensor, file: Path) -> StoredRange:
    """Return the position in its file of a tensor from read_structure()."""
    storage_offset = tensor.untyped_storage()._checkpoint_offset
    if storage_offset is None:
        raise ValueError(f"{file}: it contains a tensor that torch.load did not read from it")
    offset = storage_offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredRange(file, offset, tensor.numel(), tensor.dtype)


def locate_all(tensors: dict[str, torch.Tensor], file: Path) -> Layout:
    """Return the layout of unsharded tensors from read_structure()."""
    return {name: (tensor.shape, [locate(tensor, file)]) for name, tensor in tensors.items()}


def slice_ranges(ranges: Iterable[StoredRange], first: int, count: int) -> list[StoredRange]:
    """Return `count` elements of concatenated ranges, starting with element `first`."""
    pieces = []
    for stored in ranges:
        # [begin, end) in this range; `first` is relative to its start and may be negative
        begin = max(0, first)
        end = min(stored.count, first + count)
        if begin < end:
            pieces.append(stored.slice(begin, end - begin))
        first -= stored.count
    return pieces


def build_tensors(layout: Layout) -> LazyTensors:
    """Return lazy fp32 tensors that are read from the ranges of a layout."""
    for name, (shape, ranges) in layout.items():
        stored_count = sum(stored.count for stored in ranges)
        if stored_count != shape.numel():
            source = ranges[0].file.parent if ranges else name
            raise ValueError(
                f"{source}: {stored_count} elements of {name} are stored, {tuple(shape)} has"
                f" {shape.numel()}"
            )

    def read(name: str) -> torch.Tensor:
        shape, ranges = layout[name]
        out = torch.empty(shape.numel())
        begin = 0
        for stored in ranges:
            target = out[begin : begin + stored.count]
            if stored.dtype == target.dtype:
                stored.read_into(target)
            else:
                piece = torch.empty(stored.count, dtype=stored.dtype)
                stored.read_into(piece)
                target.copy_(piece)
            begin += stored.count
        return out.view(shape)

    meta = {name: torch.empty(shape, device="meta") for name, (shape, _) in layout.items()}
    return LazyTensors(meta, read)


def rank_files(path: Path, kind: str) -> list[Path]:
    """Return the files *KIND.pt of all ranks, in rank order."""

    def numbers(file: Path) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", file.name)]

    matches = sorted(path.glob(f"*{kind}.pt"), key=numbers)
    if not matches:
        raise ValueError(f"{path}: no *{kind}.pt in it; it is not a complete checkpoint")
    return matches


def read_weights(path: Path) -> LazyTensors:
    """Return every parameter of a checkpoint's method in fp32.

    Trained parameters come from the optimizer's master copies, frozen ones from the module.
    """
    stage = json.loads((path / "manifest.json").read_text())["stage"]
    model_files = rank_files(path, "model_states")
    first = read_structure(model_files[0])
    if stage == 0:
        return build_tensors(locate_all(first["module"], model_files[0]))

    # 1. The flat master copies: groups[rank][parameter group].
    optimizer_files = rank_files(path, "optim_states")
    states = [read_structure(file)["optimizer_state_dict"] for file in optimizer_files]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = []
    for state, file in zip(states, optimizer_files):
        groups.append([locate(flat, file) for flat in state[key]])

    # 2. Stages 1 and 2: rank 0's module is complete; the master copies replace what was trained.
    if stage < 3:
        module = locate_all(first["module"], model_files[0])
        return build_tensors(module | stage12_layout(first["param_shapes"], groups, states[0]))

    # 3. Stage 3: frozen parameters are sharded over the ranks' model files.
    trained_layout = stage3_layout(first["param_shapes"], groups)
    frozen_shapes = first.get("frozen_param_shapes")
    if not frozen_shapes:
        return build_tensors(trained_layout)
    shards = [(read_structure(file)["frozen_param_fragments"], file) for file in model_files]
    return build_tensors(trained_layout | sharded_layout(frozen_shapes, shards))


def stage3_layout(shapes: list[dict[str, torch.Size]], groups: list[list[StoredRange]]) -> Layout:
    """Return the layout of the parameters of stage 3.

    Each parameter is split over the ranks into shards of equal size, the last one padded. A rank
    stores its shards of all parameters end to end.
    """
    layout: Layout = {}
    begin = 0  # of the current parameter's shard, in every rank's concatenated shards
    for group in shapes:
        for name, shape in group.items():
            shard_size = math.ceil(shape.numel() / len(groups))
            shards = []
            for rank_ranges in groups:
                shards += slice_ranges(rank_ranges, begin, shard_size)
            layout[name] = (shape, slice_ranges(shards, 0, shape.numel()))  # without the padding
            begin += shard_size
    return layout


def stage12_layout(
    shapes: list[dict[str, torch.Size]], groups: list[list[StoredRange]], state: dict
) -> Layout:
    """Return the layout of the trained parameters of stages 1 and 2.

    The parameters of a group are stored end to end, and the group is split evenly over the ranks.
    """
    layout: Layout = {}
    paddings = state.get("param_alignment_paddings")
    for i, group in enumerate(shapes):
        ranges = [rank_ranges[i] for rank_ranges in groups]
        begin = 0
        for j, (name, shape) in enumerate(group.items()):
            layout[name] = (shape, slice_ranges(ranges, begin, shape.numel()))
            begin += shape.numel()
            if paddings:
                begin += paddings[i][j]
    return layout


def sharded_layout(
    shapes: dict[str, torch.Size], shards: list[tuple[dict[str, torch.Tensor], Path]]
) -> Layout:
    """Return the layout of tensors that have a shard in each rank's file, the last one padded.

    shards: (the shards of a file, its path), in rank order.
    """
    layout: Layout = {}
    for name, shape in shapes.items():
        ranges = [locate(tensors[name], file) for tensors, file in shards]
        layout[name] = (shape, slice_ranges(ranges, 0, shape.numel()))
    return layout


def read_averages(path: Path, shapes: dict[str, torch.Size]) -> LazyTensors:
    """Return a teacher's moving averages, which run/train/checkpoint.py saves, in fp32.

    shapes: {name in model/ema.py: full shape}.
    """
    shards = [(read_structure(file), file) for file in rank_files(path, "average_rank_*")]
    return build_tensors(sharded_layout(shapes, shards))
