"""FLIP's checkpoints as its release (facebookresearch/flip: JAX, t5x) writes and reads them, in and out; no JAX is needed for it.

    FOLDER/checkpoint                          msgpack: {version, optimizer: {target: tree of parameters, state: the optimizer's}}
    FOLDER/target.img_encoder.cls/.zarray ...  a parameter to which the tree only refers, as zarr: all of them in what FLIP released

FOLDER is a checkpoint_STEP, or holds such.  A tensor in the tree is flax's extension 1 (or 3) of msgpack: (shape, type, bytes).  Dense
kernels are (in, out), a convolution's (P, P, 3, D).  The architecture is FLIP's, our default; sizes are read from shapes, but heads are
in none.  Facts of the layout are that release's at 9bf6bf81.  Letters: L patches, D width, P patch side.
"""
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from model.convert.portable import About, Portable
from model.convert.positions import fixed, is_fixed
from model.convert.rules import Rule, Tensors, as_kernel, exported, fused, imported, thirds, transposed
from model.convert.sizes import ratio, sized
from model.text import TextConfig
from model.towers import ModelConfig
from model.vision import VisionConfig

# ---- what FLIP calls its modules, by what we call ours: to be mended here should a checkpoint say otherwise

TOWERS = {"vision": "img_encoder", "text": "txt_encoder"}
PATCH, CLS = "img_encoder/embedding", "img_encoder/cls"
PLACES = {"vision": "img_encoder/posembed_encoder/pos_embedding", "text": "txt_encoder/posembed_encoder/pos_embedding"}
TOKEN, SCALE = "txt_encoder/token_embedding/embedding", "logit_scale"
PROJECTIONS = {"image_projection": "img_mlp1", "text_projection": "txt_mlp1"}
BLOCK, LAST = "Transformer/encoderblock_{:02}", "Transformer/encoder_norm"
QKV = [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value")]
DENSE = {"attn.out": "MultiHeadDotProductAttention_0/out", "mlp.up": "MlpBlock_0/Dense_0", "mlp.down": "MlpBlock_0/Dense_1"}
NORMS = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
LARGEST = 2**32 - 2**10  # bytes of a tensor, for msgpack counts in 32 bits, and its shape and type are counted too
VOCAB = 30523  # of BERT's uncased vocabulary, as data.tokenizer's wordpiece has it


@dataclass(frozen=True)
class Given:
    """Of a size that is no row of SIZES; else heads are 64 wide."""
    heads: int | None = None
    text_heads: int | None = None


def rules(depth: int, text_depth: int, sincos: Tensor | None) -> Iterator[Rule]:
    """sincos: the table (1 + L, D), where positions are fixed."""
    yield Rule(("vision.patch.weight",), (f"{PATCH}/kernel",), lambda weight: as_kernel(weight).permute(2, 3, 1, 0),
               lambda kernel: kernel.permute(3, 2, 0, 1).flatten(1))
    yield Rule(("vision.patch.bias",), (f"{PATCH}/bias",))
    yield Rule(("vision.cls",), (CLS,), lambda cls: cls[None, None], lambda token: token[0, 0])
    if sincos is not None:
        yield Rule((), (PLACES["vision"],), lambda: sincos[None], lambda table: ())
    else:  # the class token's row is there, but not used
        yield Rule(("vision.positions",), (PLACES["vision"],), lambda table: table[None],
                   lambda table: torch.cat([torch.zeros_like(table[0, :1]), table[0, 1:]]))
    yield Rule(("text.token.weight",), (TOKEN,))
    yield Rule(("text.positions",), (PLACES["text"],), lambda table: table[None], lambda table: table[0])
    yield Rule(("temperature.logit_scale",), (SCALE,))
    for ours, theirs in PROJECTIONS.items():
        yield Rule((f"{ours}.weight",), (f"{theirs}/kernel",), transposed, transposed)
    for tower, blocks in (("vision", depth), ("text", text_depth)):
        norms = {f"{tower}.norm": f"{TOWERS[tower]}/{LAST}"}
        for i in range(blocks):
            block, theirs = f"{tower}.blocks.{i}", f"{TOWERS[tower]}/{BLOCK.format(i)}"
            norms |= {f"{block}.{name}": f"{theirs}/{norm}" for name, norm in NORMS.items()}
            yield Rule((f"{block}.attn.qkv.weight",), tuple(f"{theirs}/{name}/kernel" for name in QKV),
                       lambda weight: tuple(map(transposed, thirds(weight))), lambda *kernels: fused(*map(transposed, kernels)))
            yield Rule((f"{block}.attn.qkv.bias",), tuple(f"{theirs}/{name}/bias" for name in QKV), thirds, fused)
            for name, dense in DENSE.items():
                yield Rule((f"{block}.{name}.weight",), (f"{theirs}/{dense}/kernel",), transposed, transposed)
                yield Rule((f"{block}.{name}.bias",), (f"{theirs}/{dense}/bias",))
        for ours, theirs in norms.items():
            yield Rule((f"{ours}.weight",), (f"{theirs}/scale",))
            yield Rule((f"{ours}.bias",), (f"{theirs}/bias",))


# ---- in

def claims(path: Path) -> bool:
    """A checkpoint's folder, one that holds such, or the msgpack file in it, which begins with a map."""
    file = newest(path)
    return file is not None and file.open("rb").read(1)[:1].hex().startswith("8")


def newest(path: Path) -> Path | None:
    """The msgpack file of what a path names, if it is of this format: the last step's, where there are several."""
    steps = [folder for folder in path.glob("checkpoint_*/checkpoint") if re.fullmatch("checkpoint_[0-9]+", folder.parent.name)]
    options = [path if path.name == "checkpoint" else path / "checkpoint",
               *sorted(steps, key=lambda file: -int(file.parent.name.removeprefix("checkpoint_")))]
    return next((file for file in options if file.is_file()), None)


def load(path: Path, heads: int | None = None, text_heads: int | None = None) -> Portable:
    """heads, text_heads: as in Given."""
    file = newest(path)
    if file is None:
        raise ValueError(f"{path}: no checkpoint of FLIP's: no file called checkpoint in it, nor in a checkpoint_STEP below it")
    theirs = read(file)
    depths = [len({name.split("/")[2] for name in theirs if name.startswith(f"{prefix}/{BLOCK.partition('{')[0]}")})
              for prefix in TOWERS.values()]
    check_names(theirs, {name for rule in rules(*depths, None) for name in rule.theirs}, file)
    cfg = architecture(theirs, *depths, file, heads, text_heads)
    sincos, source = fixed(cfg), dict(path=str(file.parent), format="flip_jax")
    if not is_fixed(theirs[PLACES["vision"]][0], cfg):
        sincos, cfg = None, replace(cfg, vision=replace(cfg.vision, positions="learned"))
        source["notes"] = f"{PLACES['vision']}: other than the sin-cos positions, so it became learned ones"
    vocab, context = theirs.meta[TOKEN].shape[0], theirs.meta[PLACES["text"]].shape[1]
    about = About(tokenizer="wordpiece" if vocab == VOCAB else "", pad_text=True, crop="square", source=source)
    return Portable(cfg, vocab, context, imported(rules(*depths, sincos), theirs, str(file)), about)


def check_names(theirs: Tensors, known: set[str], whose: Path) -> None:
    missing, unknown = sorted(known - theirs.keys()), sorted(theirs.keys() - known)
    if missing or unknown:
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names)
        raise ValueError(f"{whose}: not FLIP's parameters, {found}; if it calls the same modules otherwise, mend the names at the top of "
                         "model/convert/flip_jax.py")


def architecture(theirs: Tensors, depth: int, text_depth: int, whose: Path, heads: int | None, text_heads: int | None) -> ModelConfig:
    """What the shapes say; the flavour is FLIP's."""
    def shape(name: str, dimensions: int) -> torch.Size:
        if len(found := theirs.meta[name].shape) != dimensions:
            raise ValueError(f"{whose}: {name} is {tuple(found)}; FLIP's has {dimensions} dimensions")
        return found

    side, _, _, width = shape(f"{PATCH}/kernel", 4)
    places, text_width = shape(PLACES["vision"], 3)[1] - 1, shape(TOKEN, 2)[1]
    inside, text_inside = (shape(f"{TOWERS[tower]}/{BLOCK.format(0)}/{DENSE['mlp.up']}/bias", 1)[0] for tower in ("vision", "text"))
    shape(PLACES["text"], 3)
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"{whose}: {PLACES['vision']} is for {places} patches; FLIP's are a square")
    size = sized(side, width=width, depth=depth, heads=heads, text_width=text_width, text_depth=text_depth, text_heads=text_heads,
                 embed=shape(f"{PROJECTIONS['image_projection']}/kernel", 2)[1], mlp=ratio(width, inside),
                 text_mlp=ratio(text_width, text_inside))
    return ModelConfig(**size, image_size=math.isqrt(places) * side)


# ---- the file

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
    """The parameters by their names, a/b/c.  Those beside the file are read when they are asked for, those in it are in memory."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content = msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"{file}: truncated or no msgpack file ({type(error).__name__}: {str(error)[:80]}); fetch it again") from None
    tree = content.get("optimizer", content) if isinstance(content, dict) else {}
    if not isinstance(tree.get("target"), dict):
        raise ValueError(f"{file}: no parameters in it: it should hold optimizer.target, as t5x writes since its version 2")
    found = dict(leaves(tree["target"], file.parent))
    meta = {}
    for name, leaf in found.items():
        dtype = getattr(torch, leaf.dtype.decode(), None) if leaf else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{file}: {name} is {leaf.dtype.decode() if leaf else 'no tensor'}; parameters are floats")
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
            raise ValueError(f"{what} {tuple(leaf.shape)} {leaf.dtype.decode()} takes {size:,} bytes, and has {has:,}; fetch it again")
        return
    try:
        shape = json.loads((leaf.folder / ".zarray").read_text())["shape"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{what}: {leaf.folder} is incomplete or broken (.zarray, {type(error).__name__}); fetch it again") from None
    if shape != leaf.shape:
        raise ValueError(f"{what} is {tuple(leaf.shape)}, but {leaf.folder / '.zarray'} says {shape}; fetch both again")


def extension(code: int, data: bytes) -> object:
    return Packed(*msgpack.unpackb(data, raw=True)) if code in (1, 3) else msgpack.ExtType(code, data)


def leaves(tree: dict, folder: Path, prefix: str = "") -> Iterator[tuple[str, Packed | Zarr | None]]:
    """(name, tensor) of a tree; None for what is none."""
    for key, node in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(node, dict):
            yield name, node if isinstance(node, Packed) else None
        elif "kvstore" in node:  # what tensorstore calls a Spec: the path is relative, or a bucket's that is no more
            path = node["kvstore"].get("path") or node.get("path", name)
            yield name, Zarr(node["metadata"]["shape"], node["dtype"].encode(), folder / Path(path).name)
        elif "__msgpack_chunked_array__" in node:  # flax's form of arrays above 1 GiB
            shape, chunks = ([node[part][str(i)] for i in range(len(node[part]))] for part in ("shape", "chunks"))
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
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(leaf.folder)}, "dtype": leaf.dtype.decode(),
            "metadata": {"shape": leaf.shape}, "fill_missing_data_reads": False}  # a chunk that is not there is no chunk of zeros
    try:
        array = tensorstore.open(spec, open=True, read=True).result().read().result()
    except ValueError as error:  # of tensorstore: folder, description or chunk missing, or not what the tree says
        raise ValueError(f"{what}: {leaf.folder} is incomplete or broken ({str(error).split(' [')[0][:200]}); fetch it again") from None
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).view(dtype).reshape(leaf.shape)


# ---- out

def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder, all in the msgpack file; returns what differs when FLIP's code runs it.  ValueError where it cannot."""
    cfg = model.cfg
    if not model.vocab:
        raise ValueError("a vision tower alone: FLIP's checkpoints are of a pair")
    for part, ours, theirs in (("vision", asdict(cfg.vision), asdict(VisionConfig())), ("text", asdict(cfg.text), asdict(TextConfig()))):
        for key in theirs.keys() - {"positions", "freeze_patch"}:
            if ours[key] != theirs[key]:
                raise ValueError(f"model.{part}.{key} {ours[key]}: FLIP's code knows {theirs[key]} alone")
    if cfg.grid[0] != cfg.grid[1]:
        raise ValueError(f"model.image_size {list(cfg.sides)}: FLIP's code knows square images alone")
    if cfg.vision.positions == "learned" and model.tensors["vision.positions"][0].any():
        raise ValueError("model.vision.positions learned: FLIP's code adds none to the class token, and this model's is not zero")
    sincos = fixed(cfg) if cfg.vision.positions == "sincos" else None
    folder.mkdir(parents=True)
    write(folder / "checkpoint", exported(rules(cfg.shape.depth, cfg.shape.text_depth, sincos), model.tensors), dtype)
    told = [] if model.about.pad_text else ["attention between real tokens alone: FLIP's code fills captions up and attends the padding"]
    if model.about.crop != "square":
        told.append(f"eval_crop {model.about.crop}: FLIP's code crops images before it resizes them; read again here, it is square")
    return told


def write(path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    """The tree of parameters as t5x's version 3, with no optimizer's state, one tensor in memory at a time."""
    for name, meta in tensors.meta.items():
        if (size := meta.numel() * dtype.itemsize) > LARGEST:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} {tuple(meta.shape)} takes {size:,} bytes as {kind}: FLIP's file has room for {LARGEST:,}; "
                             "--dtype bf16 takes half of what fp32 does, and other formats have no such limit")
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
            head = pack.pack_array_header(3) + pack.pack(list(data.shape)) + pack.pack(str(dtype).removeprefix("torch."))
            head += b"\xc6" + struct.pack(">I", len(body))  # bytes, as many; msgpack itself would hold them several times over
            yield b"\xc9" + struct.pack(">IB", len(head) + len(body), 1) + head
            yield body
        else:
            yield pack.pack(node)

    part = path.with_name("checkpoint.part")
    with part.open("wb") as file:
        file.writelines(put({"version": 3, "optimizer": {"target": tree, "state": {"step": 0, "param_states": {}}}}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
