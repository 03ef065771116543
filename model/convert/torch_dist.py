"""Folders in torch.distributed.checkpoint's format, which megatron-core calls torch_dist: read
lazily, written a piece at a time.

    FOLDER/__R_0.distcp     the pieces that rank R wrote, or would have written
    FOLDER/.metadata        a pickle: the tensors, the pieces they are cut into, and where each of
                            these lies
    FOLDER/metadata.json    marks such a folder as complete: it is written last
    FOLDER/common.pt        a pickle of everything that is no tensor

torch reads and writes them; neither a process group nor megatron-core nor CUDA is needed. A
.metadata that would run code is refused.
"""

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import EnumMeta
from pathlib import Path, PurePath

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    filesystem,
    metadata,
    planner,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.safe_unpickler import GETATTR, enum_member

INDEX, MARKER, COMMON = ".metadata", "metadata.json", "common.pt"
# megatron-core 0.15's own, with attributes that no weight needs
MEGATRON_CLASSES = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor in the checkpoint."""

    key: str  # the stored tensor
    row: int | None = None  # its row that this tensor is; None: all of it
    rows: int = 1  # the number of its rows
    # the axis of this tensor along which the ranks split it; None: rank 0 writes all of it
    axis: int | None = None


def write(
    folder: Path,
    tensors: LazyTensors,
    places: Mapping[str, TensorPlace],
    objects: Mapping[str, object],
    common: object,
    ranks: int,
    dtype: torch.dtype,
) -> None:
    """Write a folder as `ranks` ranks would have written it, each into a separate file.

    One tensor is computed at a time; torch's writer keeps the last one meanwhile, so up to four of
    the largest are in memory.

    places: of each tensor. objects: {key: value for torch.save}. Split axes must divide by `ranks`.
    """
    pieces = PieceSavePlanner(tensors, places, objects, ranks, dtype)
    # 0: one tensor after another, on machines with CUDA too
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans = [SavePlan(pieces.items(rank)) for rank in range(ranks)]
    plans, index = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    try:
        torch.save(common, folder / COMMON)
        writer.finish(index, [writer.write_data(plan, pieces).value() for plan in plans])
    except RuntimeError as error:  # of torch's archives, which do not raise OSError
        raise OSError(
            f"{folder}: cannot be written ({str(error).splitlines()[0]}); is the disk full?"
        ) from error
    sign = dict(
        sharded_backend="torch_dist",
        sharded_backend_version=1,
        common_backend="torch",
        common_backend_version=1,
    )
    (folder / MARKER).write_text(json.dumps(sign))


class PieceSavePlanner(DefaultSavePlanner):
    """The pieces that each rank writes; a piece is computed when it is written."""

    def __init__(
        self,
        tensors: LazyTensors,
        places: Mapping[str, TensorPlace],
        objects: Mapping[str, object],
        ranks: int,
        dtype: torch.dtype,
    ):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors
        self.places = places
        self.objects = objects
        self.ranks = ranks
        self.dtype = dtype
        # for each piece, the name of its tensor and the rank
        self.origin: dict[MetadataIndex, tuple[str, int]] = {}

    def items(self, rank: int) -> list[WriteItem]:
        """Return the pieces of a rank."""
        items = []
        for name, place in self.places.items():
            if rank == 0 or place.axis is not None:
                items.append(self.item(name, rank))
        if rank == 0:
            for key in self.objects:
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        return items

    def item(self, name: str, rank: int) -> WriteItem:
        """Return a rank's piece of a tensor."""
        place = self.places[name]
        shape = list(self.tensors.meta[name].shape)
        sizes, offsets = list(shape), [0] * len(shape)

        # A rank's share along the split axis.
        axis = place.axis
        if axis is not None:
            divides = shape[axis] % self.ranks == 0
            assert divides, f"{name} {shape} does not divide by {self.ranks}"
            sizes[axis] //= self.ranks
            offsets[axis] = rank * sizes[axis]

        # A row of the stored tensor.
        if place.row is not None:
            shape = [place.rows, *shape]
            sizes = [1, *sizes]
            offsets = [place.row, *offsets]

        index = MetadataIndex(place.key, offsets)
        self.origin[index] = name, rank
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(self.dtype), torch.Size(shape))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.transform_object(write_item, self.objects[write_item.index.fqn])
        name, rank = self.origin[write_item.index]
        axis = self.places[name].axis
        piece = write_item.tensor_data
        assert piece is not None, f"{name}: an item without the place of its piece"
        value = self.tensors[name].detach().to("cpu", self.dtype)
        if axis is not None:
            value = value.chunk(self.ranks, axis)[rank]
        return value.reshape(piece.chunk.sizes).contiguous()


def is_complete_folder(folder: Path) -> bool:
    """Return True for a complete folder of this format."""
    try:
        sign = json.loads((folder / MARKER).read_text())
        return sign.get("sharded_backend") == "torch_dist" and (folder / INDEX).is_file()
    except (OSError, ValueError, AttributeError):
        return False


class DistCheckpoint:
    """A folder to be read, whatever number of ranks wrote it.

    `meta`: {key: shape and type} of its tensors; its objects are ignored.
    """

    def __init__(self, path: Path):
        """ValueError if a file is missing or too short, or .metadata is not plain."""
        self.path = path
        self.index = read_index(path / INDEX)
        self.meta: dict[str, Tensor] = {}
        self.entries: dict[str, TensorStorageMetadata] = {}
        for key, entry in self.index.state_dict_metadata.items():
            if not isinstance(entry, BytesStorageMetadata):
                dtype = entry.properties.dtype
                self.entries[key] = entry
                self.meta[key] = torch.empty(entry.size, dtype=dtype, device="meta")

        # Each file must reach to the end of its last piece.
        ends: dict[str, int] = {}
        for place in self.index.storage_data.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        for file, end in ends.items():
            size = (path / file).stat().st_size if (path / file).is_file() else 0
            if size < end:
                raise ValueError(
                    f"{path / file}: {size:,} bytes, its {INDEX} says {end:,}; missing or"
                    " truncated: fetch it again"
                )

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Return the tensor, or a row of its first axis alone, put together from its pieces."""
        meta = self.meta[key]
        sizes, offsets = list(meta.shape), [0] * meta.dim()
        if row is not None:
            sizes[0], offsets[0] = 1, row
        target = torch.empty(sizes, dtype=meta.dtype)
        area = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self.entries[key], [area])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise ValueError(
                f"{self.path}: the pieces of {key} do not make it up; a rank's part is missing:"
                " save it again"
            )
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self.index, True)
        try:
            reader.read_data(LoadPlan(items), SingleTensorPlanner(target)).value()
        except (
            RuntimeError,
            KeyError,
            EOFError,
            OSError,
            AssertionError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(
                f"{self.path}: {key} cannot be read ({str(error).splitlines()[0][:120]}); fetch the"
                " folder again"
            ) from None
        return target if row is None else target[0]


class SingleTensorPlanner(DefaultLoadPlanner):
    """A plan that reads everything into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


class CheckpointUnpickler(pickle.Unpickler):
    """Unpickle descriptions of checkpoints and nothing else, because a pickle can call anything."""

    def find_class(self, module: str, name: str) -> object:
        """Return an allowed class or function; pickle.UnpicklingError for all others."""
        if module in ("torch", "torch.serialization") and name != "_get_layout":
            attribute = getattr(torch, name, None)
            if attribute is torch.Size or isinstance(attribute, torch.dtype):
                return attribute
        elif (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        elif module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath
        elif (module.replace("__builtin__", "builtins"), name) == GETATTR:
            return enum_member
        elif (
            module == "megatron.core.dist_checkpointing.strategies.torch"
            and name in MEGATRON_CLASSES
        ):
            return MEGATRON_CLASSES[name]
        for known in (metadata, planner, filesystem):
            if module == known.__name__ and is_enum_or_dataclass(vars(known).get(name)):
                return vars(known)[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


def is_enum_or_dataclass(kind: object) -> bool:
    """Return True for an enum or a dataclass."""
    if isinstance(kind, EnumMeta):
        return True
    return isinstance(kind, type) and is_dataclass(kind)


def read_index(path: Path) -> Metadata:
    """Read a .metadata; ValueError if it is damaged or not plain."""
    try:
        with path.open("rb") as file:
            index = CheckpointUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused ({error}): it is damaged, or would make objects that describe no"
            " checkpoint"
        ) from None
    except (
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); fetch it again") from None
    if not isinstance(index, Metadata):
        raise ValueError(
            f"{path}: holds a {type(index).__name__}, no index of a distributed checkpoint"
        )
    return index
