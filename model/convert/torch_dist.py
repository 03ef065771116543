"""Folders in torch.distributed.checkpoint's format, which megatron-core calls torch_dist: read
lazily, written a piece at a time.

    FOLDER/__R_0.distcp     the pieces that rank R wrote, or would have written
    FOLDER/.metadata        a pickle: which tensors there are, cut into which pieces, and where each
                            of these lies
    FOLDER/metadata.json    says that it is such a folder, and complete: it is written last
    FOLDER/common.pt        a pickle of what is no tensor

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
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from glimpse.model.lazy_tensors import Tensors
from glimpse.model.safe_unpickler import GETATTR, member

INDEX, SIGN, COMMON = ".metadata", "metadata.json", "common.pt"
# megatron-core 0.15's own, with attributes that no weight needs
OLDER = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes."""

    key: str  # the tensor that it is, or is a row of
    row: int | None = None  # which row of it; None: it is the whole
    rows: int = 1  # how many rows there are
    # along which of its own axes the ranks split it; None: rank 0 writes it whole
    axis: int | None = None


def write(
    folder: Path,
    tensors: Tensors,
    places: Mapping[str, Place],
    objects: Mapping[str, object],
    common: object,
    ranks: int,
    dtype: torch.dtype,
) -> None:
    """A folder as `ranks` ranks would have written it, each into a file of its own.

    It makes one tensor at a time; torch's writer keeps the last one meanwhile, so up to four of the
    largest are held.

    places: of each tensor. objects: {key: what is kept under it, for torch.save}. Split axes must
    divide by `ranks`.
    """
    pieces = Pieces(tensors, places, objects, ranks, dtype)
    # 0: one tensor after another, on machines with CUDA too
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, index = create_default_global_save_plan(
        [SavePlan(pieces.items(rank)) for rank in range(ranks)]
    )
    plans = writer.prepare_global_plan(plans)
    try:
        torch.save(common, folder / COMMON)
        writer.finish(index, [writer.write_data(plan, pieces).value() for plan in plans])
    except RuntimeError as error:  # of torch's archives, which know no OSError
        raise OSError(
            f"{folder}: cannot be written ({str(error).splitlines()[0]}); is the disk full?"
        ) from error
    sign = dict(
        sharded_backend="torch_dist",
        sharded_backend_version=1,
        common_backend="torch",
        common_backend_version=1,
    )
    (folder / SIGN).write_text(json.dumps(sign))


class Pieces(DefaultSavePlanner):
    """What each rank writes; a piece is made when it is written."""

    def __init__(
        self,
        tensors: Tensors,
        places: Mapping[str, Place],
        objects: Mapping[str, object],
        ranks: int,
        dtype: torch.dtype,
    ):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors, self.places, self.objects, self.ranks, self.dtype = (
            tensors,
            places,
            objects,
            ranks,
            dtype,
        )
        # of a piece: its tensor's name, and the rank
        self.origin: dict[MetadataIndex, tuple[str, int]] = {}

    def items(self, rank: int) -> list[WriteItem]:
        """The pieces of a rank."""
        written = [
            self.item(name, rank)
            for name, place in self.places.items()
            if rank == 0 or place.axis is not None
        ]
        return written + (
            [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
            if rank == 0
            else []
        )

    def item(self, name: str, rank: int) -> WriteItem:
        place, whole = self.places[name], list(self.tensors.meta[name].shape)
        sizes, offsets = list(whole), [0] * len(whole)
        if place.axis is not None:
            assert whole[place.axis] % self.ranks == 0, (
                f"{name} {whole} does not divide by {self.ranks}"
            )
            sizes[place.axis] //= self.ranks
            offsets[place.axis] = rank * sizes[place.axis]
        if place.row is not None:
            whole, sizes, offsets = [place.rows, *whole], [1, *sizes], [place.row, *offsets]
        index, chunk = (
            MetadataIndex(place.key, offsets),
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        )
        self.origin[index] = name, rank
        return WriteItem(
            index,
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), torch.Size(whole)),
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.transform_object(write_item, self.objects[write_item.index.fqn])
        name, rank = self.origin[write_item.index]
        place, value = self.places[name], self.tensors[name].detach().to("cpu", self.dtype)
        value = value if place.axis is None else value.chunk(self.ranks, place.axis)[rank]
        return value.reshape(write_item.tensor_data.chunk.sizes).contiguous()


def is_one(folder: Path) -> bool:
    """Is it a complete folder of this format?"""
    try:
        return (
            json.loads((folder / SIGN).read_text()).get("sharded_backend") == "torch_dist"
            and (folder / INDEX).is_file()
        )
    except (OSError, ValueError, AttributeError):
        return False


class Folder:
    """A folder to be read, whichever ranks wrote it.

    `meta`: {key: shape and type} of its tensors; its objects are left alone.
    """

    def __init__(self, path: Path):
        """ValueError where a file is missing or too short, or .metadata is not plain."""
        self.path, self.index = path, read_index(path / INDEX)
        kept = self.index.state_dict_metadata
        self.meta = {
            key: torch.empty(what.size, dtype=what.properties.dtype, device="meta")
            for key, what in kept.items()
            if not isinstance(what, BytesStorageMetadata)
        }
        ends: dict[str, int] = {}
        for place in self.index.storage_data.values():
            ends[place.relative_path] = max(
                ends.get(place.relative_path, 0), place.offset + place.length
            )
        for file, end in ends.items():
            size = (path / file).stat().st_size if (path / file).is_file() else 0
            if size < end:
                raise ValueError(
                    f"{path / file}: {size:,} bytes, its {INDEX} says {end:,}; missing or"
                    " truncated: fetch it again"
                )

    def read(self, key: str, row: int | None = None) -> Tensor:
        """The tensor, or a row of its first axis alone, put together from its pieces."""
        sizes, offsets = list(self.meta[key].shape), [0] * self.meta[key].dim()
        if row is not None:
            sizes[0], offsets[0] = 1, row
        target = torch.empty(sizes, dtype=self.meta[key].dtype)
        area = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self.index.state_dict_metadata[key], [area])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise ValueError(
                f"{self.path}: the pieces of {key} do not make it up; a rank's part is missing:"
                " save it again"
            )
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self.index, True)
        try:
            reader.read_data(LoadPlan(items), Into(target)).value()
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


class Into(DefaultLoadPlanner):
    """All that is read goes into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


class Plain(pickle.Unpickler):
    """Makes what describes a checkpoint, and nothing else: a pickle can call anything."""

    def find_class(self, module: str, name: str) -> object:
        if module in ("torch", "torch.serialization") and name != "_get_layout":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        elif (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        elif module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath
        elif (module.replace("__builtin__", "builtins"), name) == GETATTR:
            return member
        elif module == "megatron.core.dist_checkpointing.strategies.torch" and name in OLDER:
            return OLDER[name]
        for known in (metadata, planner, filesystem):
            found = vars(known).get(name)
            if module == known.__name__ and (
                isinstance(found, EnumMeta) or isinstance(found, type) and is_dataclass(found)
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_index(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            index = Plain(file).load()
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
