"""Checkpoints of t5x (JAX), a tree of tensors in a msgpack file or as zarr beside it, read and
written without JAX.

A tensor in the tree is flax's extension 1 (or 3) of msgpack: (shape, type, bytes).
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from glimpse.model.lazy_tensors import Tensors

# bytes of a tensor, for msgpack counts in 32 bits, and its shape and type are counted too
LARGEST = 2**32 - 2**10


class Packed(NamedTuple):
    """A tensor as it stands in the msgpack file."""

    shape: list[int]
    dtype: bytes
    data: bytes


class Zarr(NamedTuple):
    """A tensor in a folder beside it."""

    shape: list[int]
    dtype: bytes
    folder: Path


def read(file: Path) -> Tensors:
    """The parameters by their names, a/b/c.

    Those beside the file are read when they are asked for, those in it are in memory.
    """
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            content = msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{file}: truncated or no msgpack file ({type(error).__name__}: {str(error)[:80]});"
            " fetch it again"
        ) from None
    tree = content.get("optimizer", content) if isinstance(content, dict) else {}
    if not isinstance(tree.get("target"), dict):
        raise ValueError(
            f"{file}: no parameters in it: it should hold optimizer.target, as t5x writes since its"
            " version 2"
        )
    found = dict(leaves(tree["target"], file.parent))
    meta = {}
    for name, leaf in found.items():
        dtype = getattr(torch, leaf.dtype.decode(), None) if leaf else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"{file}: {name} is {leaf.dtype.decode() if leaf else 'no tensor'}; parameters are"
                " floats"
            )
        check(leaf, dtype, f"{file}: {name}")
        meta[name] = torch.empty(leaf.shape, dtype=dtype, device="meta")
    return Tensors(meta, lambda name: value(found[name], meta[name].dtype, f"{file}: {name}"))


def check(leaf: Packed | Zarr, dtype: torch.dtype, what: str) -> None:
    """ValueError where a tensor is not of the shape that the tree says."""
    if not isinstance(leaf.shape, list) or not all(type(n) is int and n >= 0 for n in leaf.shape):
        raise ValueError(f"{what} has the shape {leaf.shape}, which is none; fetch it again")
    if isinstance(leaf, Packed):
        size, has = math.prod(leaf.shape) * dtype.itemsize, len(leaf.data)
        if size != has:
            raise ValueError(
                f"{what} {tuple(leaf.shape)} {leaf.dtype.decode()} takes {size:,} bytes, and has"
                f" {has:,}; fetch it again"
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


def extension(code: int, data: bytes) -> object:
    return (
        Packed(*msgpack.unpackb(data, raw=True)) if code in (1, 3) else msgpack.ExtType(code, data)
    )


def leaves(
    tree: dict, folder: Path, prefix: str = ""
) -> Iterator[tuple[str, Packed | Zarr | None]]:
    """(name, tensor) of a tree; None for what is none."""
    for key, node in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(node, dict):
            yield name, node if isinstance(node, Packed) else None
        # what tensorstore calls a Spec: the path is relative, or a bucket's that is no more
        elif "kvstore" in node:
            path = node["kvstore"].get("path") or node.get("path", name)
            yield (
                name,
                Zarr(node["metadata"]["shape"], node["dtype"].encode(), folder / Path(path).name),
            )
        elif "__msgpack_chunked_array__" in node:  # flax's form of arrays above 1 GiB
            shape, chunks = (
                [node[part][str(i)] for i in range(len(node[part]))] for part in ("shape", "chunks")
            )
            yield name, Packed(shape, chunks[0].dtype, b"".join(chunk.data for chunk in chunks))
        else:
            yield from leaves(node, folder, f"{name}/")


def value(leaf: Packed | Zarr, dtype: torch.dtype, what: str) -> Tensor:
    if isinstance(leaf, Packed):
        return torch.frombuffer(bytearray(leaf.data), dtype=dtype).reshape(leaf.shape)
    try:
        import tensorstore
    except ImportError:
        raise ValueError(f"{what} lies beside it as zarr: pip install tensorstore") from None
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(leaf.folder)},
        "dtype": leaf.dtype.decode(),
        # a chunk that is not there is no chunk of zeros
        "metadata": {"shape": leaf.shape},
        "fill_missing_data_reads": False,
    }
    try:
        array = tensorstore.open(spec, open=True, read=True).result().read().result()
    # of tensorstore: folder, description or chunk missing, or not what the tree says
    except ValueError as error:
        raise ValueError(
            f"{what}: {leaf.folder} is incomplete or broken ({str(error).split(' [')[0][:200]});"
            " fetch it again"
        ) from None
    return (
        torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).view(dtype).reshape(leaf.shape)
    )


def write(path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    """The tree of parameters as t5x's version 3, with no optimizer's state, one tensor in memory at
    a time.
    """
    for name, meta in tensors.meta.items():
        if (size := meta.numel() * dtype.itemsize) > LARGEST:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} {tuple(meta.shape)} takes {size:,} bytes as {kind}: FLIP's file has room"
                f" for {LARGEST:,}; --dtype bf16 takes half of what fp32 does, and other formats"
                " have no such limit"
            )
    tree: dict = {}
    for name in tensors:
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = name
    pack = msgpack.Packer()

    def put(node: dict | str | int) -> Iterator[bytes]:
        if isinstance(node, dict):
            yield pack.pack_map_header(len(node))
            for key, below in node.items():
                yield pack.pack(key)
                yield from put(below)
        elif isinstance(node, str):
            data = tensors[node].detach().to(dtype).contiguous().cpu()
            body = memoryview(data.reshape(-1).view(torch.uint8).numpy())
            head = (
                pack.pack_array_header(3)
                + pack.pack(list(data.shape))
                + pack.pack(str(dtype).removeprefix("torch."))
            )
            # bytes, as many; msgpack itself would hold them several times over
            head += b"\xc6" + struct.pack(">I", len(body))
            yield b"\xc9" + struct.pack(">IB", len(head) + len(body), 1) + head
            yield body
        else:
            yield pack.pack(node)

    part = path.with_name("checkpoint.part")
    with part.open("wb") as file:
        file.writelines(
            put(
                {
                    "version": 3,
                    "optimizer": {"target": tree, "state": {"step": 0, "param_states": {}}},
                }
            )
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
