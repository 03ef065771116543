"""Conversion from and to open_clip's CLIP, and from OpenAI's state dicts, which use the same names.

A folder has the layout that `open_clip.create_model_and_transforms('local-dir:FOLDER')` reads:

    FOLDER/open_clip_config.json        {model_cfg, preprocess_cfg}
    FOLDER/open_clip_model.safetensors  (or, to read, open_clip_pytorch_model.bin)

OpenAI's state dicts also determine the architecture. For other files of weights, `--given config=`
gives the config: a json file, or a name of open_clip's (ViT-B-32) that the installed package knows.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model import tensor_files
from glimpse.model.convert import open_clip_trunk as trunk
from glimpse.model.convert import positions
from glimpse.model.convert.common import (
    MEAN,
    STD,
    crop_entry,
    crop_notes,
    describe_source,
    read_crop,
    require_version,
)
from glimpse.model.convert.open_clip_config import (
    RESNET,
    make_config,
    needs_timm_tower,
    read_config,
)
from glimpse.model.convert.rules import (
    Rule,
    as_kernel,
    as_matrix,
    as_scalar,
    from_scalar,
    transpose,
)
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.towers import ModelConfig

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SIGNATURE_TENSORS = {"visual.conv1.weight", f"{trunk.TRUNK}patch_embed.proj.weight"}
# entries of OpenAI's state dicts that are not weights
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")
POSITIONS = "visual.positional_embedding"
INTERPOLATION_NAMES = {"random": "bicubic"}  # random only in training
RESIZE_MODES = {"shortest": "resize_crop", "squash": "squash"}  # resize_mode: eval_crop


@dataclass(frozen=True)
class LoadOptions:
    """Options for a file of weights; a folder needs none."""

    config: str = ""  # a json file, or a name of open_clip's
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def recognizes(path: Path) -> bool:
    if (path / CONFIG).is_file():
        return True
    return path.is_file() and not SIGNATURE_TENSORS.isdisjoint(tensor_files.read_meta_tensors(path))


# --- in


def load(path: Path, config: str = "", **statistics: tuple[float, ...]) -> PortableModel:
    """Load a folder as above, or a file of weights.

    config, statistics (mean, std): as in LoadOptions.
    """
    # 1. The config and the weights.
    if path.is_dir():
        if config or statistics:
            raise ValueError(
                f"--given: {path / CONFIG} tells everything; leave it out, or name the file of"
                " weights"
            )
        tree = tensor_files.read_json(path / CONFIG)
        file, config_file = find_weights(path), path / CONFIG
        tensors = tensor_files.read_tensors(file)
    else:
        file, config_file = path, Path(config)
        tensors = tensor_files.read_tensors(file)
        tree = find_config(tensors, path, config)
    left_out = tensors.unused_entries

    # 2. The architecture.
    model = tree.get("model_cfg", tree)
    preprocess = tree.get("preprocess_cfg", {}) | statistics
    cfg = read_config(model, preprocess, path)
    tensors = plain_names(tensors)
    timms = bool(model["vision_cfg"].get("timm_model_name"))
    if timms and trunk.has_sincos_positions(tensors, cfg):
        cfg = replace(cfg, vision=replace(cfg.vision, positions="sincos"))
    table = partial(rules, timms=timms)
    cfg, tensors = positions.import_with_positions(
        file.parent, cfg, table, POSITIONS, tensors, str(file)
    )

    # 3. The tokenizer and the preparation of images.
    text = model["text_cfg"]
    mode = preprocess.get("resize_mode") or "shortest"
    if mode not in RESIZE_MODES:
        raise ValueError(
            f"{path}: preprocess_cfg.resize_mode {mode!r}: Glimpse supports"
            f" {' or '.join(RESIZE_MODES)}"
        )
    interpolation = preprocess.get("interpolation") or "bicubic"
    eot = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
    attends_padding = not cfg.text.causal
    about = ModelInfo(
        tokenizer=read_tokenizer(text),
        eot=eot,
        pad_text=attends_padding,
        crop=read_crop(tree, config_file, RESIZE_MODES[mode]),
        interpolation=INTERPOLATION_NAMES.get(interpolation, interpolation),
        source=describe_source(path, "open_clip", assumption_notes(config, preprocess), left_out),
    )
    vocab, context = text.get("vocab_size", 49408), text.get("context_length", 77)
    return PortableModel(cfg, vocab, context, tensors, about)


def find_weights(folder: Path) -> Path:
    """Return the path of the folder's weights."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: has {CONFIG}, but none of {', '.join(WEIGHTS)}")


def read_tokenizer(text: dict) -> str:
    """Return the tokenizer of a text_cfg: clip_bpe, or "" if it names another."""
    keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    return "" if any(text.get(key) for key in keys) else "clip_bpe"


def plain_names(tensors: LazyTensors) -> LazyTensors:
    """Rename the weights to the names of open_clip's CLIP.

    CustomTextCLIP prefixes the names of the text tower with `text.`.
    """
    unused = (*OPENAI_ENTRIES, "attn_mask")
    names = [name for name in tensors if name not in unused]
    return tensors.rename({name.removeprefix("text."): name for name in names})


def assumption_notes(config: str, preprocess: dict) -> list[str]:
    """Return a note if a named config has no mean or std, so that OpenAI's are assumed.

    Some of LAION's models were trained with others.
    """
    missing = []
    for key, usual in (("mean", MEAN), ("std", STD)):
        if not preprocess.get(key):
            missing.append(f"{key} {list(usual)}")
    if not config or not missing:
        return []
    note = (
        f"assumed, as config={config} does not say it: {', '.join(missing)}; --given mean=..."
        " std=..."
    )
    return [note]


def find_config(tensors: LazyTensors, path: Path, config: str) -> dict:
    """Return the config of a file of weights; config: its file or name, for all but OpenAI's."""
    is_openais = set(OPENAI_ENTRIES) <= tensors.meta.keys()
    if is_openais and config:
        raise ValueError(
            f"--given config={config}: {path} is OpenAI's, which tells everything itself; leave"
            " it out"
        )
    if is_openais or not config:
        return openai_config(tensors, path)
    return find_named_config(config)


def find_named_config(config: str) -> dict:
    """Read a config from a file, or by its name from the installed package."""
    if Path(config).is_file():
        return tensor_files.read_json(Path(config))
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        hint = ", which is not installed (pip install open-clip-torch)"
    else:
        folder = Path(package.submodule_search_locations[0]) / "model_configs"
        if (folder / f"{config}.json").is_file():
            return tensor_files.read_json(folder / f"{config}.json")
        hint = f"; its names: ls {folder}"
    raise ValueError(
        f"--given config={config}: neither a json file nor a model of open_clip's{hint}"
    )


def openai_config(tensors: LazyTensors, path: Path) -> dict:
    """Return the config of OpenAI's state dicts, from the shapes."""
    if not set(OPENAI_ENTRIES) <= tensors.meta.keys():
        raise ValueError(
            f"{path}: weights alone, which do not tell the activation; add --given config=NAME,"
            " e.g. ViT-B-32, or a json file"
        )
    if not any(name.startswith("visual.transformer.") for name in tensors):
        raise ValueError(f"{path}: {RESNET}")

    kernel = tensors.meta["visual.conv1.weight"].shape
    tokens = tensors.meta["token_embedding.weight"].shape
    vision = dict(
        image_size=int(tensors["input_resolution"]),
        layers=count_layers(tensors, "visual.transformer.resblocks."),
        width=kernel[0],
        patch_size=kernel[2],
    )
    text = dict(
        context_length=int(tensors["context_length"]),
        vocab_size=tokens[0],
        width=tokens[1],
        heads=tokens[1] // 64,
        layers=count_layers(tensors, "transformer.resblocks."),
    )
    embed = tensors.meta["text_projection"].shape[1]
    return dict(embed_dim=embed, quick_gelu=True, vision_cfg=vision, text_cfg=text)


def count_layers(tensors: LazyTensors, prefix: str) -> int:
    """Count the layers, whose names begin with the prefix and an index."""
    layers = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    return 1 + max(int(name.partition(".")[0]) for name in layers)


# --- out


def save(model: PortableModel, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write a folder; return notes on differences in open_clip.

    ValueError names the first setting that open_clip's CLIP does not support.
    """
    cfg, crop = model.cfg, model.about.crop
    resize_mode = "squash" if crop == "squash" else "shortest"
    preprocess = dict(
        mean=cfg.vision.mean,
        std=cfg.vision.std,
        interpolation=model.about.interpolation,
        resize_mode=resize_mode,
    )
    tree = dict(model_cfg=make_config(model), preprocess_cfg=preprocess, **crop_entry(crop))
    table = rules(cfg, needs_timm_tower(cfg))
    folder.mkdir(parents=True)
    positions.write_weights(folder / WEIGHTS[0], model.tensors, model, table, dtype)
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
    return crop_notes(crop, "open_clip")


# --- both


def rules(cfg: ModelConfig, timms: bool) -> list[Rule]:
    """Return the rules for all tensors; timms: the vision tower is one of timm's."""
    table = list(trunk.rules(cfg)) if timms else tower_rules(cfg)
    table.append(Rule(("text.token.weight",), ("token_embedding.weight",)))
    table.append(Rule(("text.positions",), ("positional_embedding",)))
    table += block_rules("text.", "", cfg.shape.text_depth)
    table += norm_rules("text.norm", "ln_final")
    projection = ("text_projection.weight",), ("text_projection",)
    table.append(Rule(*projection, transpose, transpose))
    table.append(Rule(("temperature.logit_scale",), ("logit_scale",), as_scalar, from_scalar))
    return table


def tower_rules(cfg: ModelConfig) -> list[Rule]:
    """Return the rules of open_clip's own vision tower and of the image projection."""
    table = [
        Rule(("vision.patch.weight",), ("visual.conv1.weight",), as_kernel, as_matrix),
        Rule(("vision.cls",), ("visual.class_embedding",)),
        positions.position_rule(cfg, POSITIONS),
    ]
    if cfg.vision.pre_norm:
        table += norm_rules("vision.pre_norm", "visual.ln_pre")
    table += block_rules("vision.", "visual.", cfg.shape.depth)
    table += norm_rules("vision.norm", "visual.ln_post")
    projection = ("image_projection.weight",), ("visual.proj",)
    table.append(Rule(*projection, transpose, transpose))
    return table


def norm_rules(glimpse_name: str, foreign_name: str) -> Iterator[Rule]:
    """Yield the rules of the weight and the bias of a layer norm."""
    for kind in ("weight", "bias"):
        yield Rule((f"{glimpse_name}.{kind}",), (f"{foreign_name}.{kind}",))


def block_rules(glimpse_prefix: str, foreign_prefix: str, depth: int) -> Iterator[Rule]:
    """Yield the rules of a tower's blocks, given the prefixes of the tower's names."""
    pairs = {
        "norm1.": "ln_1.",
        "attn.qkv.": "attn.in_proj_",
        "attn.out.": "attn.out_proj.",
        "norm2.": "ln_2.",
        "mlp.up.": "mlp.c_fc.",
        "mlp.down.": "mlp.c_proj.",
    }
    for i in range(depth):
        block = f"{glimpse_prefix}blocks.{i}."
        foreign_block = f"{foreign_prefix}transformer.resblocks.{i}."
        for layer, foreign_layer in pairs.items():
            for kind in ("weight", "bias"):
                glimpse_name = f"{block}{layer}{kind}"
                foreign_name = f"{foreign_block}{foreign_layer}{kind}"
                yield Rule((glimpse_name,), (foreign_name,))


def reference_model(path: Path, config: str = "", **_: object) -> Callable:
    """Load the model in open_clip; return a function from normalized images (B, 3, H, W) and ids
    (B, context) to unit embeddings of both.
    """
    require_version("open-clip-torch", "3.0")
    import open_clip

    if path.is_dir():
        model = open_clip.create_model(f"local-dir:{path}")
    else:
        tensors = tensor_files.read_tensors(path)
        tree = find_config(tensors, path, config)
        options = dict(tree.get("model_cfg", tree))
        options.pop("custom_text", None)
        model = open_clip.CLIP(**options)
        model.load_state_dict(dict(plain_names(tensors)))
    model.eval()

    def embed(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return (
            model.encode_image(images, normalize=True),
            model.encode_text(ids, normalize=True),
        )

    return embed
