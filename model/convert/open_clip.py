"""open_clip's CLIP, both ways: a folder that
`open_clip.create_model_and_transforms('local-dir:FOLDER')` takes; and OpenAI's state dicts.

    FOLDER/open_clip_config.json        {model_cfg, preprocess_cfg}
    FOLDER/open_clip_model.safetensors  (in: open_clip_pytorch_model.bin, too)

A file of weights alone tells no architecture but OpenAI's, whose own entries do; for another,
`given` names the config: a json file, or a name of open_clip's (ViT-B-32), looked up in the
installed package.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from glimpse.model import tensor_files
from glimpse.model.convert import open_clip_trunk as trunk
from glimpse.model.convert import positions
from glimpse.model.convert.common import MEAN, STD, crop_in, kept_crop, newer, origin, told_crop
from glimpse.model.convert.open_clip_config import RESNET, config_in, config_out, is_timms
from glimpse.model.convert.rules import Rule, as_kernel, as_matrix, one, scalar, transposed
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About, Portable
from glimpse.model.towers import ModelConfig

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
MARKS = {"visual.conv1.weight", f"{trunk.TRUNK}patch_embed.proj.weight"}
# entries of OpenAI's state dicts that are no weights
OPENAI = ("input_resolution", "context_length", "vocab_size")
PLACES = "visual.positional_embedding"
RESAMPLE = {"random": "bicubic"}  # drawn in training alone
RESIZE = {"shortest": "resize_crop", "squash": "squash"}  # a resize_mode as we call it


@dataclass(frozen=True)
class Given:
    """What a file of weights may be told; a folder tells it itself."""

    config: str = ""  # see the head of this file
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def claims(path: Path) -> bool:
    return (
        (path / CONFIG).is_file()
        or path.is_file()
        and not MARKS.isdisjoint(tensor_files.metas(path))
    )


# --- in


def load(path: Path, config: str = "", **statistics: tuple[float, ...]) -> Portable:
    """A folder as above, or a file of weights; the rest as in Given."""
    if path.is_dir():
        if config or statistics:
            raise ValueError(
                f"--given: {path / CONFIG} tells everything; leave it out, or name the file of"
                " weights"
            )
        tree, weights = (
            tensor_files.read_json(path / CONFIG),
            next((path / name for name in WEIGHTS if (path / name).is_file()), None),
        )
        if weights is None:
            raise ValueError(f"{path}: has {CONFIG}, but none of {', '.join(WEIGHTS)}")
    else:
        tree, weights = {}, path
    theirs = tensor_files.read(weights)
    if path.is_file():
        tree = config_of(theirs, path, config)
    model, preprocess = tree.get("model_cfg", tree), tree.get("preprocess_cfg", {}) | statistics
    cfg = config_in(model, preprocess, path)
    theirs = plain_names(theirs)
    timms = bool(model["vision_cfg"].get("timm_model_name"))
    if timms and trunk.is_fixed(theirs, cfg):
        cfg = replace(cfg, vision=replace(cfg.vision, positions="sincos"))
    cfg, tensors = positions.taken(
        weights.parent, cfg, partial(rules, timms=timms), PLACES, theirs, str(weights)
    )
    text = model["text_cfg"]
    if (mode := preprocess.get("resize_mode") or "shortest") not in RESIZE:
        raise ValueError(
            f"{path}: preprocess_cfg.resize_mode {mode!r}: ours are {' or '.join(RESIZE)}; write"
            " one of them"
        )
    # than CLIP's tokenizer
    other = any(
        text.get(key) for key in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    )
    about = About(
        tokenizer="" if other else "clip_bpe",
        eot=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
        pad_text=not cfg.text.causal,
        crop=crop_in(tree, path / CONFIG if path.is_dir() else Path(config), RESIZE[mode]),
        interpolation=RESAMPLE.get(
            resample := preprocess.get("interpolation") or "bicubic", resample
        ),
        source=origin(path, "open_clip", assumed(config, preprocess), theirs.left_out),
    )
    return Portable(
        cfg, text.get("vocab_size", 49408), text.get("context_length", 77), tensors, about
    )


def plain_names(theirs: Tensors) -> Tensors:
    """The weights by the names of open_clip's CLIP; CustomTextCLIP has `text.` before those of the
    text tower.
    """
    return theirs.renamed(
        {name.removeprefix("text."): name for name in theirs if name not in (*OPENAI, "attn_mask")}
    )


def assumed(config: str, preprocess: dict) -> list[str]:
    """What nobody says of a file of weights whose config is named: OpenAI's have their own numbers,
    LAION's not always.
    """
    lacking = [
        f"{key} {list(usual)}"
        for key, usual in (("mean", MEAN), ("std", STD))
        if not preprocess.get(key)
    ]
    return (
        [
            f"assumed, as config={config} does not say it: {', '.join(lacking)}; --given mean=..."
            " std=..."
        ]
        if config and lacking
        else []
    )


def config_of(theirs: Tensors, path: Path, config: str) -> dict:
    """The config of a file of weights."""
    own = set(OPENAI) <= theirs.meta.keys()
    if own and config:
        raise ValueError(
            f"--given config={config}: {path} is OpenAI's, which tells everything itself; leave"
            " it out"
        )
    return openai(theirs, path) if own or not config else named(config)


def named(config: str) -> dict:
    """A config by its file, or by its name in the installed package."""
    if Path(config).is_file():
        return tensor_files.read_json(Path(config))
    found = find_spec("open_clip")
    folder = Path(found.submodule_search_locations[0]) / "model_configs" if found else None
    if not folder or not (folder / f"{config}.json").is_file():
        known = (
            f"; its names: ls {folder}"
            if folder
            else ", which is not installed (pip install open-clip-torch)"
        )
        raise ValueError(
            f"--given config={config}: neither a json file nor a model of open_clip's{known}"
        )
    return tensor_files.read_json(folder / f"{config}.json")


def openai(theirs: Tensors, path: Path) -> dict:
    """The config of OpenAI's state dicts, read off the shapes."""
    if not set(OPENAI) <= theirs.meta.keys():
        raise ValueError(
            f"{path}: weights alone, which do not tell the activation; add --given config=NAME,"
            " e.g. ViT-B-32, or a json file"
        )

    if not any(name.startswith("visual.transformer.") for name in theirs):
        raise ValueError(f"{path}: {RESNET}")

    def depth(prefix: str) -> int:
        return 1 + max(
            int(name.split(".")[prefix.count(".")]) for name in theirs if name.startswith(prefix)
        )

    kernel, text = (
        theirs.meta["visual.conv1.weight"].shape,
        theirs.meta["token_embedding.weight"].shape,
    )
    return dict(
        embed_dim=theirs.meta["text_projection"].shape[1],
        quick_gelu=True,
        vision_cfg=dict(
            image_size=int(theirs["input_resolution"]),
            layers=depth("visual.transformer.resblocks."),
            width=kernel[0],
            patch_size=kernel[2],
        ),
        text_cfg=dict(
            context_length=int(theirs["context_length"]),
            vocab_size=text[0],
            width=text[1],
            heads=text[1] // 64,
            layers=depth("transformer.resblocks."),
        ),
    )


# --- out


def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """A folder as above; returns what differs when open_clip runs it.

    ValueError naming what open_clip's CLIP cannot be.
    """
    prepared = dict(
        mean=model.cfg.vision.mean,
        std=model.cfg.vision.std,
        interpolation=model.about.interpolation,
        resize_mode="squash" if model.about.crop == "squash" else "shortest",
    )
    tree = dict(model_cfg=config_out(model), preprocess_cfg=prepared, **kept_crop(model.about.crop))
    table = rules(model.cfg, is_timms(model.cfg))
    folder.mkdir(parents=True)
    positions.write(folder / WEIGHTS[0], model.tensors, model, table, dtype)
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
    return told_crop(model.about.crop, "open_clip")


# --- both


def rules(cfg: ModelConfig, timms: bool) -> list[Rule]:
    """What of our tensors is what of open_clip's; timms: the vision tower is one of timm's."""
    return [
        *(trunk.rules(cfg) if timms else tower(cfg)),
        Rule(("text.token.weight",), ("token_embedding.weight",)),
        Rule(("text.positions",), ("positional_embedding",)),
        *blocks("text.", "", cfg.shape.text_depth),
        *norm("text.norm", "ln_final"),
        Rule(("text_projection.weight",), ("text_projection",), transposed, transposed),
        Rule(("temperature.logit_scale",), ("logit_scale",), scalar, one),
    ]


def tower(cfg: ModelConfig) -> list[Rule]:
    """Of its own vision tower, and the image projection."""
    return [
        Rule(("vision.patch.weight",), ("visual.conv1.weight",), as_kernel, as_matrix),
        Rule(("vision.cls",), ("visual.class_embedding",)),
        positions.position_rule(cfg, PLACES),
        *(norm("vision.pre_norm", "visual.ln_pre") if cfg.vision.pre_norm else ()),
        *blocks("vision.", "visual.", cfg.shape.depth),
        *norm("vision.norm", "visual.ln_post"),
        Rule(("image_projection.weight",), ("visual.proj",), transposed, transposed),
    ]


def norm(ours: str, theirs: str) -> Iterator[Rule]:
    return (Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in ("weight", "bias"))


def blocks(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
    pairs = {
        "norm1.": "ln_1.",
        "attn.qkv.": "attn.in_proj_",
        "attn.out.": "attn.out_proj.",
        "norm2.": "ln_2.",
        "mlp.up.": "mlp.c_fc.",
        "mlp.down.": "mlp.c_proj.",
    }
    return (
        Rule((f"{ours}blocks.{i}.{a}{kind}",), (f"{theirs}transformer.resblocks.{i}.{b}{kind}",))
        for i in range(depth)
        for a, b in pairs.items()
        for kind in ("weight", "bias")
    )


def peer(path: Path, config: str = "", **_) -> Callable:
    """open_clip's own model: (images (B, 3, H, W) normalised, ids (B, context)) -> unit embeddings
    of both.
    """
    newer("open-clip-torch", "3.0")
    import open_clip

    if path.is_dir():
        model = open_clip.create_model(f"local-dir:{path}")
    else:
        theirs = tensor_files.read(path)
        tree = config_of(theirs, path, config)
        model = open_clip.CLIP(
            **{
                key: value
                for key, value in tree.get("model_cfg", tree).items()
                if key != "custom_text"
            }
        )
        model.load_state_dict(dict(plain_names(theirs)))
    model.eval()
    return lambda images, ids: (
        model.encode_image(images, normalize=True),
        model.encode_text(ids, normalize=True),
    )
