"""FLIP's checkpoints, as its release (facebookresearch/flip: JAX, t5x) writes and reads them.

JAX is not needed.

    FOLDER/checkpoint                          msgpack: {version, optimizer: {target: tree of
                                               parameters, state: the optimizer's}}
    FOLDER/target.img_encoder.cls/.zarray ... a parameter to which the tree only refers, as zarr:
        all of them in what FLIP released

FOLDER is a checkpoint_STEP, or holds such folders; t5x.py reads and writes it. Dense kernels are
(in, out), a convolution's (P, P, 3, D).
The architecture is FLIP's, our default. Sizes are read from shapes; only the numbers of heads are
in no shape. The layout is that of the release at 9bf6bf81. Letters: L patches, D width, P patch
side.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model.convert import t5x
from glimpse.model.convert.positions import is_sincos, sincos_table
from glimpse.model.convert.rules import (
    Rule,
    as_kernel,
    export_tensors,
    fuse_qkv,
    import_tensors,
    split_qkv,
    transpose,
)
from glimpse.model.convert.sizes import mlp_ratio, size_fields
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

# ---- FLIP's names of our modules: correct them here if a checkpoint has others

TOWERS = {"vision": "img_encoder", "text": "txt_encoder"}
PATCH = "img_encoder/embedding"
CLS = "img_encoder/cls"
POSITIONS = {
    "vision": "img_encoder/posembed_encoder/pos_embedding",
    "text": "txt_encoder/posembed_encoder/pos_embedding",
}
TOKEN = "txt_encoder/token_embedding/embedding"
SCALE = "logit_scale"
PROJECTIONS = {"image_projection": "img_mlp1", "text_projection": "txt_mlp1"}
BLOCK = "Transformer/encoderblock_{:02}"
FINAL_NORM = "Transformer/encoder_norm"
QKV = [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value")]
DENSE = {
    "attn.out": "MultiHeadDotProductAttention_0/out",
    "mlp.up": "MlpBlock_0/Dense_0",
    "mlp.down": "MlpBlock_0/Dense_1",
}
NORMS = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
VOCAB = 30523  # of BERT's uncased vocabulary, as data.tokenizer's wordpiece has it


@dataclass(frozen=True)
class LoadOptions:
    """Numbers of heads, for a size that is no row of SIZES; by default heads are 64 wide."""

    heads: int | None = None
    text_heads: int | None = None


def rules(depth: int, text_depth: int, sincos: Tensor | None) -> Iterator[Rule]:
    """Yield the rule of each tensor; sincos: the table (1 + L, D) if positions are fixed."""
    # Patch embedding, class token and positions of the vision tower.
    yield Rule(("vision.patch.weight",), (f"{PATCH}/kernel",), as_flax_patch, from_flax_patch)
    yield Rule(("vision.patch.bias",), (f"{PATCH}/bias",))
    yield Rule(("vision.cls",), (CLS,), as_token, from_token)
    if sincos is None:
        yield Rule(("vision.positions",), (POSITIONS["vision"],), as_batch, patch_positions)
    else:
        yield Rule((), (POSITIONS["vision"],), lambda: sincos[None], lambda table: ())

    # Embeddings of the text tower, temperature and projections.
    yield Rule(("text.token.weight",), (TOKEN,))
    yield Rule(("text.positions",), (POSITIONS["text"],), as_batch, from_batch)
    yield Rule(("temperature.logit_scale",), (SCALE,))
    for glimpse_name, foreign_name in PROJECTIONS.items():
        yield Rule((f"{glimpse_name}.weight",), (f"{foreign_name}/kernel",), transpose, transpose)

    # Blocks, then all norms. The order of the rules is that of the file.
    for tower, blocks in (("vision", depth), ("text", text_depth)):
        norms = {f"{tower}.norm": f"{TOWERS[tower]}/{FINAL_NORM}"}
        for i in range(blocks):
            block, foreign_block = f"{tower}.blocks.{i}", f"{TOWERS[tower]}/{BLOCK.format(i)}"
            yield from block_rules(block, foreign_block)
            for name, norm in NORMS.items():
                norms[f"{block}.{name}"] = f"{foreign_block}/{norm}"
        for glimpse_name, foreign_name in norms.items():
            yield Rule((f"{glimpse_name}.weight",), (f"{foreign_name}/scale",))
            yield Rule((f"{glimpse_name}.bias",), (f"{foreign_name}/bias",))


def block_rules(glimpse_name: str, foreign_name: str) -> Iterator[Rule]:
    """Yield the rules of a block's linear layers, given its name here and in FLIP's tree."""
    kernels = tuple(f"{foreign_name}/{name}/kernel" for name in QKV)
    biases = tuple(f"{foreign_name}/{name}/bias" for name in QKV)
    yield Rule((f"{glimpse_name}.attn.qkv.weight",), kernels, qkv_kernels, qkv_weight)
    yield Rule((f"{glimpse_name}.attn.qkv.bias",), biases, split_qkv, fuse_qkv)
    for name, dense in DENSE.items():
        kernel = f"{foreign_name}/{dense}/kernel"
        yield Rule((f"{glimpse_name}.{name}.weight",), (kernel,), transpose, transpose)
        yield Rule((f"{glimpse_name}.{name}.bias",), (f"{foreign_name}/{dense}/bias",))


def as_flax_patch(weight: Tensor) -> Tensor:
    """Return the patch embedding (D, 3 P P) as flax's convolution (P, P, 3, D)."""
    return as_kernel(weight).permute(2, 3, 1, 0)


def from_flax_patch(kernel: Tensor) -> Tensor:
    """Invert `as_flax_patch`."""
    return kernel.permute(3, 2, 0, 1).flatten(1)


def as_token(cls: Tensor) -> Tensor:
    """Return the class token (D,) as (1, 1, D)."""
    return cls[None, None]


def from_token(token: Tensor) -> Tensor:
    return token[0, 0]


def as_batch(table: Tensor) -> Tensor:
    """Return positions (L, D) as (1, L, D)."""
    return table[None]


def from_batch(table: Tensor) -> Tensor:
    return table[0]


def patch_positions(table: Tensor) -> Tensor:
    """Return FLIP's learned positions (1, 1 + L, D) as ours (1 + L, D).

    FLIP's table has a row for the class token, but its code does not use it.
    """
    no_position = torch.zeros_like(table[0, :1])
    return torch.cat([no_position, table[0, 1:]])


def qkv_kernels(weight: Tensor) -> tuple[Tensor, ...]:
    """Return a fused weight (3 D, D) as the kernels (D, D) of q, k and v."""
    return tuple(map(transpose, split_qkv(weight)))


def qkv_weight(*kernels: Tensor) -> Tensor:
    """Invert `qkv_kernels`."""
    return fuse_qkv(*map(transpose, kernels))


# ---- in


def recognizes(path: Path) -> bool:
    """Return True for a checkpoint, a folder of checkpoints, or the msgpack file of one.

    The msgpack file must begin with a map.
    """
    file = find_newest_checkpoint(path)
    if file is None:
        return False
    return file.open("rb").read(1).hex().startswith("8")


def find_newest_checkpoint(path: Path) -> Path | None:
    """Return the msgpack file at a path, that of the last step if there are several; None if
    there is none.
    """
    options = [path if path.name == "checkpoint" else path / "checkpoint"]
    steps = [
        file
        for file in path.glob("checkpoint_*/checkpoint")
        if re.fullmatch("checkpoint_[0-9]+", file.parent.name)
    ]
    options += sorted(steps, key=step_of, reverse=True)
    return next((file for file in options if file.is_file()), None)


def step_of(file: Path) -> int:
    return int(file.parent.name.removeprefix("checkpoint_"))


def load(path: Path, heads: int | None = None, text_heads: int | None = None) -> PortableModel:
    file = find_newest_checkpoint(path)
    if file is None:
        raise ValueError(
            f"{path}: no checkpoint of FLIP's: no file called checkpoint in it, nor in a"
            " checkpoint_STEP below it"
        )

    # The architecture, from names and shapes.
    tensors = t5x.read(file)
    depth, text_depth = (count_blocks(tensors, tower) for tower in TOWERS.values())
    known = {name for rule in rules(depth, text_depth, None) for name in rule.foreign_names}
    check_names(tensors, known, file)
    cfg = read_architecture(tensors, depth, text_depth, file, heads, text_heads)

    # Positions: fixed ones are no parameter of ours.
    source = dict(path=str(file.parent), format="flip_jax")
    if is_sincos(tensors[POSITIONS["vision"]][0], cfg):
        sincos = sincos_table(cfg)
    else:
        sincos = None
        cfg = replace(cfg, vision=replace(cfg.vision, positions="learned"))
        source["notes"] = (
            f"{POSITIONS['vision']}: other than the sin-cos positions, so it became learned ones"
        )

    vocab = tensors.meta[TOKEN].shape[0]
    context = tensors.meta[POSITIONS["text"]].shape[1]
    tokenizer = "wordpiece" if vocab == VOCAB else ""
    about = ModelInfo(tokenizer=tokenizer, pad_text=True, crop="square", source=source)
    table = rules(depth, text_depth, sincos)
    return PortableModel(cfg, vocab, context, import_tensors(table, tensors, str(file)), about)


def count_blocks(tensors: LazyTensors, tower: str) -> int:
    """Return the number of blocks of a tower, named as in FLIP's tree."""
    prefix = f"{tower}/{BLOCK.partition('{')[0]}"
    return len({name.split("/")[2] for name in tensors if name.startswith(prefix)})


def check_names(tensors: LazyTensors, known: set[str], whose: Path) -> None:
    """Raise ValueError listing the parameters that are missing or unknown."""
    problems = []
    if missing := sorted(known - tensors.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - known):
        problems.append(f"unknown: {', '.join(unknown)}")
    if problems:
        raise ValueError(
            f"{whose}: not FLIP's parameters, {'; '.join(problems)}; if it calls the same modules"
            " otherwise, change the names at the top of model/convert/flip_jax.py"
        )


def read_architecture(
    tensors: LazyTensors,
    depth: int,
    text_depth: int,
    whose: Path,
    heads: int | None,
    text_heads: int | None,
) -> ModelConfig:
    """Return FLIP's architecture in the sizes that the shapes give."""

    def shape(name: str, dimensions: int) -> torch.Size:
        size = tensors.meta[name].shape
        if len(size) != dimensions:
            raise ValueError(
                f"{whose}: {name} is {tuple(size)}; FLIP's has {dimensions} dimensions"
            )
        return size

    def hidden_units(tower: str) -> int:
        return shape(f"{TOWERS[tower]}/{BLOCK.format(0)}/{DENSE['mlp.up']}/bias", 1)[0]

    side, _, _, width = shape(f"{PATCH}/kernel", 4)
    places = shape(POSITIONS["vision"], 3)[1] - 1
    text_width = shape(TOKEN, 2)[1]
    inside, text_inside = hidden_units("vision"), hidden_units("text")
    shape(POSITIONS["text"], 3)
    if math.isqrt(places) ** 2 != places:
        raise ValueError(
            f"{whose}: {POSITIONS['vision']} is for {places} patches; FLIP's are a square"
        )

    size = size_fields(
        side,
        width=width,
        depth=depth,
        heads=heads,
        text_width=text_width,
        text_depth=text_depth,
        text_heads=text_heads,
        embed=shape(f"{PROJECTIONS['image_projection']}/kernel", 2)[1],
        mlp=mlp_ratio(width, inside),
        text_mlp=mlp_ratio(text_width, text_inside),
    )
    return ModelConfig(**size, image_size=math.isqrt(places) * side)


# ---- out


def save(model: PortableModel, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder, all in the msgpack file; return what differs when FLIP's code runs it."""
    cfg = model.cfg
    check_settings(cfg, bool(model.vocab))
    if cfg.vision.positions == "learned" and model.tensors["vision.positions"][0].any():
        raise ValueError(
            "model.vision.positions learned: FLIP's code adds none to the class token, and this"
            " model's is not zero"
        )

    sincos = sincos_table(cfg) if cfg.vision.positions == "sincos" else None
    table = rules(cfg.shape.depth, cfg.shape.text_depth, sincos)
    folder.mkdir(parents=True)
    t5x.write(folder / "checkpoint", export_tensors(table, model.tensors), dtype)

    notes = []
    if not model.about.pad_text:
        notes.append(
            "attention between real tokens alone: FLIP's code fills captions up and attends the"
            " padding"
        )
    if model.about.crop != "square":
        notes.append(
            f"eval_crop {model.about.crop}: FLIP's code crops images before it resizes them; read"
            " again here, it is square"
        )
    return notes


def check_settings(cfg: ModelConfig, text: bool) -> None:
    """Raise ValueError naming the first setting that FLIP's code does not have."""
    if not text:
        raise ValueError("a vision tower alone: FLIP's checkpoints are of a pair")
    towers = (("vision", cfg.vision, VisionConfig()), ("text", cfg.text, TextConfig()))
    for tower, settings, reference in towers:
        values = asdict(settings)
        wanted = asdict(reference)
        for key, value in values.items():
            if key in ("positions", "freeze_patch"):
                continue
            if value != wanted[key]:
                raise ValueError(
                    f"model.{tower}.{key} {value}: FLIP's code supports only {wanted[key]}"
                )
    if cfg.grid[0] != cfg.grid[1]:
        raise ValueError(
            f"model.image_size {list(cfg.image_shape)}: FLIP's code supports only square images"
        )
