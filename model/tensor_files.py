"""Files of tensors: safetensors are read lazily and written one tensor at a time; torch pickles are
read without running code in them.

    tensors = read(Path("open_clip_model.safetensors"))    Tensors; nothing is in memory yet
    write(Path("model.safetensors"), tensors, torch.bfloat16)
"""

import json
import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.safe_unpickler import first_line, read_pickle

SAFETENSORS_TYPES = {  # safetensors' own
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TORCH_TYPES = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DDP, of torch.compile


def read_tensors(path: Path) -> LazyTensors:
    """Return the tensors of a .safetensors file, of a pickle of tensors, or of the shards that a
    *.index.json lists.
    """
    if path.name.endswith(".index.json"):
        return read_sharded(path)
    if is_safetensors(path):
        return read_safetensors(path)
    return extract_state_dict(read_pickle(path), path)


def is_safetensors(path: Path) -> bool:
    """Return True if the suffix or the first bytes are those of safetensors.

    Caches of hubs name files by their hash. The first bytes are the size of the header, then json.
    """
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_json(path: Path) -> dict:
    """Return the content of a json file; ValueError if it is no mapping."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no json ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, and should hold keys")
    return tree


def read_meta_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return {name: meta tensor} of the tensors in a file; {} if it cannot be read."""
    try:
        return read_tensors(path).meta
    except (ValueError, OSError):
        return {}


def read_safetensors(path: Path) -> LazyTensors:
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or no safetensors file ({first_line(error)}); fetch it again"
        ) from None
    meta = {}
    for name in file.keys():
        part = file.get_slice(name)
        kind = part.get_dtype()
        if kind not in TORCH_TYPES:
            raise ValueError(
                f"{path}: {name} is stored as {kind}; save it as float32, float16 or bfloat16"
            )
        meta[name] = torch.empty(part.get_shape(), dtype=TORCH_TYPES[kind], device="meta")
    return LazyTensors(meta, file.get_tensor)


def read_sharded(index: Path) -> LazyTensors:
    """Read the shards of a Hugging Face index: {weight_map: {tensor: file beside it}}."""
    file_of = read_json(index).get("weight_map")
    if not is_weight_map(file_of):
        raise ValueError(
            f"{index}: no index: it should hold weight_map, {{tensor: name of a file beside it}}"
        )
    shards = {file: read_tensors(index.parent / file) for file in sorted(set(file_of.values()))}
    meta = {}
    for name, file in file_of.items():
        if name not in shards[file]:
            raise ValueError(f"{index}: {file} has no {name}; fetch it again")
        meta[name] = shards[file].meta[name]
    unused_entries = [
        f"{name} of {file}" for file, shard in shards.items() for name in shard.unused_entries
    ]
    return LazyTensors(meta, lambda name: shards[file_of[name]][name], unused_entries)


def is_weight_map(tree: object) -> TypeGuard[dict[str, str]]:
    """Return True for {tensor: name of a file}; names with a folder are not allowed."""
    if not isinstance(tree, dict):
        return False
    return all(name == Path(str(name)).name for name in tree.values())


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def extract_state_dict(tree: object, path: Path) -> LazyTensors:
    """Return the state dict in the content of a pickle.

    It is the tree itself, or an entry under one of the names that trainers use. Prefixes of DDP and
    torch.compile are removed.
    """
    # The entry of the state dict; other entries with tensors are left out.
    unused_entries = []
    for key in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            unused_entries += names_with_tensors(tree, but=[key])
            tree = tree[key]
    if not isinstance(tree, dict):
        tree = {}

    # Its tensors.
    tensors = {}
    for name, value in tree.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{path}: no tensors in it")
    unused_entries += names_with_tensors(tree, but=tensors)

    while prefix := common_prefix(tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return LazyTensors.from_dict(tensors, unused_entries)


def names_with_tensors(tree: dict, but: Collection[object]) -> list[str]:
    """Return the keys of the entries with tensors in them, except some."""
    return [str(key) for key, value in tree.items() if key not in but and contains_tensors(value)]


def common_prefix(names: Collection[str]) -> str:
    """Return a prefix of PREFIXES that all names have, or ""."""
    for prefix in WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def contains_tensors(tree: object) -> bool:
    if isinstance(tree, dict):
        return any(map(contains_tensors, tree.values()))
    if isinstance(tree, (list, tuple)):
        return any(map(contains_tensors, tree))
    return isinstance(tree, torch.Tensor)


def write_safetensors(
    path: Path,
    tensors: LazyTensors,
    dtype: torch.dtype | None = None,
    about: dict[str, str] | None = None,
    exact: Collection[str] = (),
) -> None:
    """Write a safetensors file. It appears under its name only when it is complete.

    dtype: of floats, except those named in `exact`; None leaves all types as they are. about:
    metadata for the header.

    One tensor is in memory at a time; two for a moment, if its type or memory layout changes.
    """
    types: dict[str, torch.dtype] = {}
    for name, meta in tensors.meta.items():
        if dtype is None or name in exact or not meta.is_floating_point():
            types[name] = meta.dtype
        else:
            types[name] = dtype

    # The header. Large elements come first, so that each tensor is aligned to its elements.
    order = sorted(tensors, key=lambda name: (-types[name].itemsize, name))
    header: dict = {"__metadata__": {"format": "pt", **(about or {})}}
    end = 0
    for name in order:
        meta = tensors.meta[name]
        begin, end = end, end + meta.numel() * types[name].itemsize
        header[name] = dict(
            dtype=SAFETENSORS_TYPES[types[name]], shape=list(meta.shape), data_offsets=[begin, end]
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            value = tensors[name].detach().to(types[name]).contiguous().cpu()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            del value  # before the next is read
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
