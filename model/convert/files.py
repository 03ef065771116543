"""Files of tensors: safetensors read lazily and written one tensor at a time, torch pickles read
without running what is in them.

    tensors = read("open_clip_model.safetensors")          Tensors; nothing is in memory yet
    write(Path("model.safetensors"), tensors, torch.bfloat16)
"""

import json
import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Collection
from enum import EnumMeta
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glimpse.model.convert.rules import Tensors

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
GETATTR = "builtins", "getattr"  # what Python 3.11.2, Debian 12's, makes of a member of an enum
UNSAFE = (
    "it is a pickle that would run code or make objects of its own when it is read, and tensors are"
    " all that is needed; ask for the weights as safetensors, or load it once where you trust it"
    " and save its state_dict() alone"
)


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


def read_pickle(path: Path) -> object:
    """What torch.save wrote, if it is tensors and plain containers alone; memory-mapped where the
    file permits.
    """
    if torchscript(path):  # as OpenAI released its models
        command = (
            f"import torch; torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(),"
            f" '{path.stem}-weights.pt')"
        )
        raise ValueError(
            f"{path}: refused: a TorchScript archive, which can run code when it is loaded. "
            f'If you trust it, keep its weights alone, and convert those: python -c "{command}"'
        )
    try:
        # trainers' arguments, as MAE and DeiT keep them beside the weights
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError:
        raise
    except Exception as error:  # a file that is no pickle may raise anything
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: refused ({wanted[1]}): {UNSAFE}") from None
        raise ValueError(
            f"{path}: truncated or no file of tensors ({first_line(error)}); fetch it again"
        ) from None


def member(kind: object, name: str) -> object:
    """Of an enum, by its name: the only getattr that pickles may do."""
    if isinstance(kind, EnumMeta) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind!r}")


def first_line(error: Exception) -> str:
    """The first sentence of what an error says, after what torch.load says first of every file."""
    said = str(error).strip()
    if said.startswith("Weights only load failed"):
        said = said.rpartition("WeightsUnpickler error:")[2].strip()
    return (said.splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]


def torchscript(path: Path) -> bool:
    """Is it an archive of code and constants?"""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:  # read_pickle says so
        return False


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
