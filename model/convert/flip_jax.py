"""FLIP's checkpoints as its release (facebookresearch/flip: JAX, t5x) writes and reads them, in and
out; no JAX is needed for it.

    FOLDER/checkpoint                          msgpack: {version, optimizer: {target: tree of
                                               parameters, state: the optimizer's}}
    FOLDER/target.img_encoder.cls/.zarray ... a parameter to which the tree only refers, as zarr:
        all of them in what FLIP released

FOLDER is a checkpoint_STEP, or holds such; t5x.py reads and writes it. Dense kernels are (in, out),
a convolution's (P, P, 3, D).
The architecture is FLIP's, our default; sizes are read from shapes, but heads are in none. Facts of
the layout are that release's at 9bf6bf81. Letters: L patches, D width, P patch side.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model.convert import t5x
from glimpse.model.convert.positions import fixed, is_fixed
from glimpse.model.convert.rules import (
    Rule,
    as_kernel,
    exported,
    fused,
    imported,
    thirds,
    transposed,
)
from glimpse.model.convert.sizes import ratio, sized
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About, Portable
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

# ---- what FLIP calls its modules, by what we call ours: to be mended here should a checkpoint say
# otherwise

TOWERS = {"vision": "img_encoder", "text": "txt_encoder"}
PATCH, CLS = "img_encoder/embedding", "img_encoder/cls"
PLACES = {
    "vision": "img_encoder/posembed_encoder/pos_embedding",
    "text": "txt_encoder/posembed_encoder/pos_embedding",
}
TOKEN, SCALE = "txt_encoder/token_embedding/embedding", "logit_scale"
PROJECTIONS = {"image_projection": "img_mlp1", "text_projection": "txt_mlp1"}
BLOCK, LAST = "Transformer/encoderblock_{:02}", "Transformer/encoder_norm"
QKV = [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value")]
DENSE = {
    "attn.out": "MultiHeadDotProductAttention_0/out",
    "mlp.up": "MlpBlock_0/Dense_0",
    "mlp.down": "MlpBlock_0/Dense_1",
}
NORMS = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
VOCAB = 30523  # of BERT's uncased vocabulary, as data.tokenizer's wordpiece has it


@dataclass(frozen=True)
class Given:
    """Of a size that is no row of SIZES; else heads are 64 wide."""

    heads: int | None = None
    text_heads: int | None = None


def rules(depth: int, text_depth: int, sincos: Tensor | None) -> Iterator[Rule]:
    """sincos: the table (1 + L, D), where positions are fixed."""
    yield Rule(
        ("vision.patch.weight",),
        (f"{PATCH}/kernel",),
        lambda weight: as_kernel(weight).permute(2, 3, 1, 0),
        lambda kernel: kernel.permute(3, 2, 0, 1).flatten(1),
    )
    yield Rule(("vision.patch.bias",), (f"{PATCH}/bias",))
    yield Rule(("vision.cls",), (CLS,), lambda cls: cls[None, None], lambda token: token[0, 0])
    if sincos is not None:
        yield Rule((), (PLACES["vision"],), lambda: sincos[None], lambda table: ())
    else:  # the class token's row is there, but not used
        yield Rule(
            ("vision.positions",),
            (PLACES["vision"],),
            lambda table: table[None],
            lambda table: torch.cat([torch.zeros_like(table[0, :1]), table[0, 1:]]),
        )
    yield Rule(("text.token.weight",), (TOKEN,))
    yield Rule(
        ("text.positions",), (PLACES["text"],), lambda table: table[None], lambda table: table[0]
    )
    yield Rule(("temperature.logit_scale",), (SCALE,))
    for ours, theirs in PROJECTIONS.items():
        yield Rule((f"{ours}.weight",), (f"{theirs}/kernel",), transposed, transposed)
    for tower, blocks in (("vision", depth), ("text", text_depth)):
        norms = {f"{tower}.norm": f"{TOWERS[tower]}/{LAST}"}
        for i in range(blocks):
            block, theirs = f"{tower}.blocks.{i}", f"{TOWERS[tower]}/{BLOCK.format(i)}"
            norms |= {f"{block}.{name}": f"{theirs}/{norm}" for name, norm in NORMS.items()}
            yield Rule(
                (f"{block}.attn.qkv.weight",),
                tuple(f"{theirs}/{name}/kernel" for name in QKV),
                lambda weight: tuple(map(transposed, thirds(weight))),
                lambda *kernels: fused(*map(transposed, kernels)),
            )
            yield Rule(
                (f"{block}.attn.qkv.bias",),
                tuple(f"{theirs}/{name}/bias" for name in QKV),
                thirds,
                fused,
            )
            for name, dense in DENSE.items():
                yield Rule(
                    (f"{block}.{name}.weight",),
                    (f"{theirs}/{dense}/kernel",),
                    transposed,
                    transposed,
                )
                yield Rule((f"{block}.{name}.bias",), (f"{theirs}/{dense}/bias",))
        for ours, theirs in norms.items():
            yield Rule((f"{ours}.weight",), (f"{theirs}/scale",))
            yield Rule((f"{ours}.bias",), (f"{theirs}/bias",))


# ---- in


def claims(path: Path) -> bool:
    """A checkpoint's folder, one that holds such, or the msgpack file in it, which begins with a
    map.
    """
    file = newest(path)
    return file is not None and file.open("rb").read(1)[:1].hex().startswith("8")


def newest(path: Path) -> Path | None:
    """The msgpack file of what a path names, if it is of this format: the last step's, where there
    are several.
    """
    steps = [
        folder
        for folder in path.glob("checkpoint_*/checkpoint")
        if re.fullmatch("checkpoint_[0-9]+", folder.parent.name)
    ]
    options = [
        path if path.name == "checkpoint" else path / "checkpoint",
        *sorted(steps, key=lambda file: -int(file.parent.name.removeprefix("checkpoint_"))),
    ]
    return next((file for file in options if file.is_file()), None)


def load(path: Path, heads: int | None = None, text_heads: int | None = None) -> Portable:
    file = newest(path)
    if file is None:
        raise ValueError(
            f"{path}: no checkpoint of FLIP's: no file called checkpoint in it, nor in a"
            " checkpoint_STEP below it"
        )
    theirs = t5x.read(file)
    depths = [
        len(
            {
                name.split("/")[2]
                for name in theirs
                if name.startswith(f"{prefix}/{BLOCK.partition('{')[0]}")
            }
        )
        for prefix in TOWERS.values()
    ]
    check_names(theirs, {name for rule in rules(*depths, None) for name in rule.theirs}, file)
    cfg = architecture(theirs, *depths, file, heads, text_heads)
    sincos, source = fixed(cfg), dict(path=str(file.parent), format="flip_jax")
    if not is_fixed(theirs[PLACES["vision"]][0], cfg):
        sincos, cfg = None, replace(cfg, vision=replace(cfg.vision, positions="learned"))
        source["notes"] = (
            f"{PLACES['vision']}: other than the sin-cos positions, so it became learned ones"
        )
    vocab, context = theirs.meta[TOKEN].shape[0], theirs.meta[PLACES["text"]].shape[1]
    about = About(
        tokenizer="wordpiece" if vocab == VOCAB else "", pad_text=True, crop="square", source=source
    )
    return Portable(cfg, vocab, context, imported(rules(*depths, sincos), theirs, str(file)), about)


def check_names(theirs: Tensors, known: set[str], whose: Path) -> None:
    missing, unknown = sorted(known - theirs.keys()), sorted(theirs.keys() - known)
    if missing or unknown:
        found = "; ".join(
            f"{what}: {', '.join(names)}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        )
        raise ValueError(
            f"{whose}: not FLIP's parameters, {found}; if it calls the same modules otherwise, mend"
            " the names at the top of model/convert/flip_jax.py"
        )


def architecture(
    theirs: Tensors,
    depth: int,
    text_depth: int,
    whose: Path,
    heads: int | None,
    text_heads: int | None,
) -> ModelConfig:
    """What the shapes say; the flavour is FLIP's."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if len(found := theirs.meta[name].shape) != dimensions:
            raise ValueError(
                f"{whose}: {name} is {tuple(found)}; FLIP's has {dimensions} dimensions"
            )
        return found

    side, _, _, width = shape(f"{PATCH}/kernel", 4)
    places, text_width = shape(PLACES["vision"], 3)[1] - 1, shape(TOKEN, 2)[1]
    inside, text_inside = (
        shape(f"{TOWERS[tower]}/{BLOCK.format(0)}/{DENSE['mlp.up']}/bias", 1)[0]
        for tower in ("vision", "text")
    )
    shape(PLACES["text"], 3)
    if math.isqrt(places) ** 2 != places:
        raise ValueError(
            f"{whose}: {PLACES['vision']} is for {places} patches; FLIP's are a square"
        )
    size = sized(
        side,
        width=width,
        depth=depth,
        heads=heads,
        text_width=text_width,
        text_depth=text_depth,
        text_heads=text_heads,
        embed=shape(f"{PROJECTIONS['image_projection']}/kernel", 2)[1],
        mlp=ratio(width, inside),
        text_mlp=ratio(text_width, text_inside),
    )
    return ModelConfig(**size, image_size=math.isqrt(places) * side)


# ---- out


def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder, all in the msgpack file; returns what differs when FLIP's code runs it."""
    check_flavour(cfg := model.cfg, bool(model.vocab))
    if cfg.vision.positions == "learned" and model.tensors["vision.positions"][0].any():
        raise ValueError(
            "model.vision.positions learned: FLIP's code adds none to the class token, and this"
            " model's is not zero"
        )
    table = rules(
        cfg.shape.depth,
        cfg.shape.text_depth,
        fixed(cfg) if cfg.vision.positions == "sincos" else None,
    )
    folder.mkdir(parents=True)
    t5x.write(folder / "checkpoint", exported(table, model.tensors), dtype)
    told = (
        []
        if model.about.pad_text
        else [
            "attention between real tokens alone: FLIP's code fills captions up and attends the"
            " padding"
        ]
    )
    if model.about.crop != "square":
        told.append(
            f"eval_crop {model.about.crop}: FLIP's code crops images before it resizes them; read"
            " again here, it is square"
        )
    return told


def check_flavour(cfg: ModelConfig, text: bool) -> None:
    """ValueError naming what FLIP's code does not have."""
    if not text:
        raise ValueError("a vision tower alone: FLIP's checkpoints are of a pair")
    for part, ours, theirs in (
        ("vision", asdict(cfg.vision), asdict(VisionConfig())),
        ("text", asdict(cfg.text), asdict(TextConfig())),
    ):
        for key in theirs.keys() - {"positions", "freeze_patch"}:
            if ours[key] != theirs[key]:
                raise ValueError(
                    f"model.{part}.{key} {ours[key]}: FLIP's code knows {theirs[key]} alone"
                )
    if cfg.grid[0] != cfg.grid[1]:
        raise ValueError(
            f"model.image_size {list(cfg.sides)}: FLIP's code knows square images alone"
        )
