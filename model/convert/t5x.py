"""Checkpoints of t5x (JAX), a tree of tensors in a msgpack file or as zarr beside it, read and
written without JAX.

A tensor in the tree is flax's extension 1 (or 3) of msgpack: (shape, type, bytes).
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from glimpse.model.lazy_tensors import LazyTensors

# The most bytes of a tensor: msgpack counts them in 32 bits, together with its shape and type.
MAX_BYTES = 2**32 - 2**10


class PackedTensor(NamedTuple):
    """A tensor in the msgpack file."""

    shape: list[int]
    dtype: bytes
    data: bytes


class ZarrTensor(NamedTuple):
    """A tensor in a folder beside the msgpack file."""

    shape: list[int]
    dtype: bytes
    folder: Path


def read(file: Path) -> LazyTensors:
    """Return the parameters by their names, a/b/c.

    Tensors beside the file are read on demand; those in it are in memory.
    """
    content = unpack(file)
    tree = content.get("optimizer", content) if isinstance(content, dict) else {}
    if not isinstance(tree.get("target"), dict):
        raise ValueError(
            f"{file}: no parameters in it: it should hold optimizer.target, as t5x writes since its"
            " version 2"
        )
    parameters: dict[str, PackedTensor | ZarrTensor] = {}
    meta = {}
    for name, leaf in dict(leaves(tree["target"], file.parent)).items():
        if leaf is None:
            raise ValueError(f"{file}: {name} is no tensor; parameters are floats")
        kind = leaf.dtype.decode()
        dtype = getattr(torch, kind, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{file}: {name} is {kind}; parameters are floats")
        check_leaf(leaf, dtype, f"{file}: {name}")
        parameters[name] = leaf
        meta[name] = torch.empty(leaf.shape, dtype=dtype, device="meta")

    def get(name: str) -> Tensor:
        return read_leaf(parameters[name], meta[name].dtype, f"{file}: {name}")

    return LazyTensors(meta, get)


def unpack(file: Path) -> object:
    """Return the content of a msgpack file."""
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return msgpack.unpackb(data, ext_hook=decode_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{file}: truncated or no msgpack file ({type(error).__name__}: {str(error)[:80]});"
            " fetch it again"
        ) from None


def check_leaf(leaf: PackedTensor | ZarrTensor, dtype: torch.dtype, what: str) -> None:
    """Raise ValueError if the stored tensor does not have the shape that the tree gives."""
    if not is_shape(leaf.shape):
        raise ValueError(f"{what} has the shape {leaf.shape}, which is none; fetch it again")
    if isinstance(leaf, PackedTensor):
        size, stored = math.prod(leaf.shape) * dtype.itemsize, len(leaf.data)
        if size != stored:
            raise ValueError(
                f"{what} {tuple(leaf.shape)} {leaf.dtype.decode()} takes {size:,} bytes, and has"
                f" {stored:,}; fetch it again"
            )
        return
    try:
        shape = json.loads((leaf.folder / ".zarray").read_text())["shape"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{what}: {leaf.folder} is incomplete or broken (.zarray, {type(error).__name__});"
            " fetch it again"
        ) from None
    if shape != leaf.shape:
        raise ValueError(
            f"{what} is {tuple(leaf.shape)}, but {leaf.folder / '.zarray'} says {shape}; fetch both"
            " again"
        )


def is_shape(shape: object) -> bool:
    """Return True for a list of sizes."""
    if not isinstance(shape, list):
        return False
    return all(type(size) is int and size >= 0 for size in shape)


def decode_extension(code: int, data: bytes) -> object:
    """Decode an extension of msgpack: flax's arrays, others as they are."""
    if code in (1, 3):
        return PackedTensor(*msgpack.unpackb(data, raw=True))
    return msgpack.ExtType(code, data)


def leaves(
    tree: dict, folder: Path, prefix: str = ""
) -> Iterator[tuple[str, PackedTensor | ZarrTensor | None]]:
    """Yield (name, tensor) for each leaf of a tree; None for a leaf that is no tensor."""
    for key, node in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(node, dict):
            yield name, node if isinstance(node, PackedTensor) else None
        elif "kvstore" in node:  # tensorstore's Spec
            # The path is relative, or that of a bucket that no longer exists.
            path = node["kvstore"].get("path") or node.get("path", name)
            shape, dtype = node["metadata"]["shape"], node["dtype"].encode()
            yield name, ZarrTensor(shape, dtype, folder / Path(path).name)
        elif "__msgpack_chunked_array__" in node:  # flax's form of arrays above 1 GiB
            shape, chunks = values_in_order(node["shape"]), values_in_order(node["chunks"])
            yield (
                name,
                PackedTensor(shape, chunks[0].dtype, b"".join(chunk.data for chunk in chunks)),
            )
        else:
            yield from leaves(node, folder, f"{name}/")


def values_in_order(items: dict) -> list:
    """Return a list that flax stores as {"0": ..., "1": ...}."""
    return [items[str(i)] for i in range(len(items))]


def read_leaf(leaf: PackedTensor | ZarrTensor, dtype: torch.dtype, what: str) -> Tensor:
    """Read a tensor; `what` names it in errors."""
    if isinstance(leaf, PackedTensor):
        return torch.frombuffer(bytearray(leaf.data), dtype=dtype).reshape(leaf.shape)
    try:
        import tensorstore
    except ImportError:
        raise ValueError(f"{what} lies beside it as zarr: pip install tensorstore") from None
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(leaf.folder)},
        "dtype": leaf.dtype.decode(),
        "metadata": {"shape": leaf.shape},
        # a missing chunk is an error, not a chunk of zeros
        "fill_missing_data_reads": False,
    }
    try:
        array = tensorstore.open(spec, open=True, read=True).result().read().result()
    # of tensorstore: folder, description or chunk is missing or contradicts the tree
    except ValueError as error:
        raise ValueError(
            f"{what}: {leaf.folder} is incomplete or broken ({str(error).split(' [')[0][:200]});"
            " fetch it again"
        ) from None
    content = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
    return content.view(dtype).reshape(leaf.shape)


def write(path: Path, tensors: LazyTensors, dtype: torch.dtype) -> None:
    """Write the tree of parameters as t5x's version 3, without an optimizer's state.

    One tensor is in memory at a time.
    """
    check_sizes(tensors, dtype)
    target = nest_names(tensors)
    state = {"step": 0, "param_states": {}}
    tree = {"version": 3, "optimizer": {"target": target, "state": state}}
    part = path.with_name("checkpoint.part")
    with part.open("wb") as file:
        file.writelines(pack_tree(tree, tensors, dtype))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def check_sizes(tensors: LazyTensors, dtype: torch.dtype) -> None:
    """Raise ValueError naming the first tensor that is too large for msgpack."""
    for name, meta in tensors.meta.items():
        size = meta.numel() * dtype.itemsize
        if size > MAX_BYTES:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} {tuple(meta.shape)} takes {size:,} bytes as {kind}: FLIP's file has room"
                f" for {MAX_BYTES:,}; --dtype bf16 takes half of what fp32 does, and other formats"
                " have no such limit"
            )


def nest_names(names: Iterable[str]) -> dict:
    """Return the tree {a: {b: a/b}} of names a/b."""
    tree: dict = {}
    for name in names:
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = name
    return tree


def pack_tree(
    node: dict | str | int, tensors: LazyTensors, dtype: torch.dtype
) -> Iterator[bytes | memoryview]:
    """Yield the msgpack form of a tree, piece by piece; its strings are names of tensors."""
    packer = msgpack.Packer()
    if isinstance(node, dict):
        yield packer.pack_map_header(len(node))
        for key, below in node.items():
            yield packer.pack(key)
            yield from pack_tree(below, tensors, dtype)
    elif isinstance(node, str):
        yield from pack_tensor(tensors[node].detach().to(dtype).contiguous().cpu())
    else:
        yield packer.pack(node)


def pack_tensor(tensor: Tensor) -> Iterator[bytes | memoryview]:
    """Yield flax's extension 1: (shape, type, bytes).

    Its parts are put together here, because msgpack itself would hold the bytes several times.
    """
    packer = msgpack.Packer()
    body = tensor.reshape(-1).view(torch.uint8).numpy().data
    head = packer.pack_array_header(3)
    head += packer.pack(list(tensor.shape))
    head += packer.pack(str(tensor.dtype).removeprefix("torch."))
    head += b"\xc6" + struct.pack(">I", len(body))  # bytes, and their number
    yield b"\xc9" + struct.pack(">IB", len(head) + len(body), 1) + head
    yield body
