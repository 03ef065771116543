"""Files of tensors: safetensors read lazily and written one tensor at a time, torch pickles read
without running what is in them.

    tensors = read("open_clip_model.safetensors")          Tensors; nothing is in memory yet
    write(Path("model.safetensors"), tensors, torch.bfloat16)
"""

import json
import os
import struct
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glimpse.model.lazy_tensors import Tensors
from glimpse.model.safe_unpickler import first_line, read_pickle

NAMES = {
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
}  # safetensors' own
TYPES = {name: dtype for dtype, name in NAMES.items()}
PREFIXES = ("module.", "_orig_mod.")  # of DDP, of torch.compile


def read(path: Path) -> Tensors:
    """The tensors of a .safetensors file, of a pickle of tensors, or of the shards that a
    *.index.json names.
    """
    if path.name.endswith(".index.json"):
        return sharded(path)
    return read_safetensors(path) if is_safetensors(path) else tensors_of(read_pickle(path), path)


def is_safetensors(path: Path) -> bool:
    """By its name or, as caches of hubs name files by their hash, by its beginning: the size of the
    header, then json.
    """
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_json(path: Path) -> dict:
    """What a json file holds; ValueError where that is no mapping."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no json ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, and should hold keys")
    return tree


def metas(path: Path) -> dict[str, torch.Tensor]:
    """{name: shape and type} of the tensors in a file; none, where it cannot be read."""
    try:
        return read(path).meta
    except (ValueError, OSError):
        return {}


def read_safetensors(path: Path) -> Tensors:
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or no safetensors file ({first_line(error)}); fetch it again"
        ) from None
    slices = {name: file.get_slice(name) for name in file.keys()}
    if odd := next((name for name, part in slices.items() if part.get_dtype() not in TYPES), None):
        raise ValueError(
            f"{path}: {odd} is stored as {slices[odd].get_dtype()}; save it as float32, float16 or"
            " bfloat16"
        )
    return Tensors(
        {
            name: torch.empty(part.get_shape(), dtype=TYPES[part.get_dtype()], device="meta")
            for name, part in slices.items()
        },
        file.get_tensor,
    )


def sharded(index: Path) -> Tensors:
    """Of a Hugging Face index: {weight_map: {tensor: file beside it}}."""
    owner = read_json(index).get("weight_map")
    if not isinstance(owner, dict) or any(name != Path(str(name)).name for name in owner.values()):
        raise ValueError(
            f"{index}: no index: it should hold weight_map, {{tensor: name of a file beside it}}"
        )
    files = {name: read(index.parent / name) for name in sorted(set(owner.values()))}
    for name, file in owner.items():
        if name not in files[file]:
            raise ValueError(f"{index}: {file} has no {name}; fetch it again")
    return Tensors(
        {name: files[file].meta[name] for name, file in owner.items()},
        lambda name: files[owner[name]][name],
        [f"{name} of {file}" for file, tensors in files.items() for name in tensors.left_out],
    )


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def tensors_of(tree: object, path: Path) -> Tensors:
    """The state dict in what was pickled: the tree itself, or what lies under the name that
    trainers give it; their prefixes taken off.
    """
    left = []
    for key in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            left += [
                str(name) for name, value in tree.items() if name != key and holds_tensors(value)
            ]
            tree = tree[key]
    items = tree.items() if isinstance(tree, dict) else ()
    tensors = {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError(f"{path}: no tensors in it")
    left += [str(name) for name, value in items if name not in tensors and holds_tensors(value)]
    while prefix := next(
        (prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None
    ):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return Tensors.held(tensors, left)


def holds_tensors(tree: object) -> bool:
    if isinstance(tree, (dict, list, tuple)):
        return any(map(holds_tensors, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, torch.Tensor)


def write(
    path: Path,
    tensors: Tensors,
    dtype: torch.dtype | None = None,
    about: dict[str, str] | None = None,
    exact: Collection[str] = (),
) -> None:
    """A safetensors file, floats as `dtype`, but those in `exact` as they are. Nobody sees a part
    of it.

    It holds one tensor at a time; for a moment two, where its type or its order changes.
    """
    kinds = {
        name: dtype if dtype and name not in exact and meta.is_floating_point() else meta.dtype
        for name, meta in tensors.meta.items()
    }
    header, end = {"__metadata__": {"format": "pt", **(about or {})}}, 0
    # so that each begins at a multiple of its element
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    for name in order:
        begin, end = end, end + tensors.meta[name].numel() * kinds[name].itemsize
        header[name] = dict(
            dtype=NAMES[kinds[name]],
            shape=list(tensors.meta[name].shape),
            data_offsets=[begin, end],
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            value = tensors[name].detach().to(kinds[name]).contiguous().cpu()
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            del value  # before the next is read
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
