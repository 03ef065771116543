"""timm's vision transformers, as vision towers without text.

Export: a folder that timm.create_model("local-dir:FOLDER", pretrained=True) opens. timm's features
are the pooled tokens before the projection. The projection is not exported.

Import: such a folder, e.g. a model of timm on the Hugging Face hub, or a file of tensors with
timm's names, e.g. of DeiT or MAE. The architecture of a file is read from the shapes as far as
possible. The user gives the rest, or it is assumed, with a note: heads of width 64, class-token
pooling, gelu, eps 1e-6 and ImageNet's mean and std (with a norm before the blocks: 1e-5 and
OpenAI's). MAE's fixed positions equal Glimpse's bit for bit; its decoder is left out. MAE
fine-tuned on pooled patches has a norm after the pooling, which is Glimpse's pool mean_then_norm.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from glimpse.model import tensor_files
from glimpse.model.convert.common import (
    MEAN,
    STD,
    crop_entry,
    crop_notes,
    describe_source,
    read_crop,
    require_version,
)
from glimpse.model.convert.positions import (
    import_with_positions,
    is_sincos,
    position_rule,
    write_weights,
)
from glimpse.model.convert.rules import Rule, as_kernel, as_matrix, as_tuple
from glimpse.model.convert.sizes import mlp_ratio, size_fields
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import INTERPOLATIONS, ModelInfo, PortableModel, select_vision_weights
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.out": "attn.proj",
    "norm2": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
POOLS: dict[str, dict[str, str | bool]] = {
    "cls": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "mean_with_cls": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "mean_then_norm": {"global_pool": "avg", "fc_norm": True},
}
# (global_pool, pool_include_prefix, there is a norm before the pooling): our pool
POOLS_IN = {
    ("token", False, True): "cls",
    ("avg", False, True): "mean",
    ("avg", True, True): "mean_with_cls",
    ("avg", False, False): "mean_then_norm",
}
CROP_MODES = {"center": "resize_crop", "squash": "squash"}  # crop_mode: our crop
# A config has no field for it: architectures with clip in their name have 1e-5.
EPS = {1e-6: "", 1e-5: "_clip"}
# Names of sizes: width, blocks, heads
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
NAMES = {width: name for name, (width, _, _) in SIZES.items()}
KNOWN_NAMES = {
    "tiny_patch16",
    "small_patch8",
    "small_patch16",
    "small_patch32",
    "base_patch8",
    "base_patch16",
    "base_patch32",
    "large_patch14",
    "large_patch16",
    "large_patch32",
    "huge_patch14",
    "base_patch16_clip",
    "base_patch32_clip",
    "large_patch14_clip",
    "huge_patch14_clip",
}
HEADS_BY_WIDTH = {
    1152: 16,
    1280: 16,
    1408: 16,
    1664: 16,
}  # for timm's widths whose heads are not 64 wide
SIGNATURE_TENSORS = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
LEFT_OUT = ("head.", "decoder_", "mask_token")  # a classifier; MAE's decoder
# Tensors that every tower of ours needs
REQUIRED_TENSORS = (
    "patch_embed.proj.weight",
    "cls_token",
    "pos_embed",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc2.weight",
)
UNSUPPORTED = {
    "dist_token": "a distillation token",
    "reg_token": "register tokens",
    ".ls1.": "layer scale",
    ".gamma_1": "layer scale",
    ".q_norm": "norms of queries and keys",
    "attn_pool": "attention pooling",
    ".fc1_g": "gated MLPs",
    ".w12": "gated MLPs",
    "rope": "rotary positions",
    "rel_pos": "relative positions",
}


@dataclass(frozen=True)
class LoadOptions:
    """Settings that a bare file does not hold; they override those of a folder."""

    heads: int | None = None
    pool: str | None = None
    activation: str | None = None
    eps: float | None = None
    image_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def rules(cfg: ModelConfig) -> list[Rule]:
    """Return the rules of all tensors of a vision tower."""
    vision = cfg.vision
    table = [
        Rule(("vision.patch.weight",), ("patch_embed.proj.weight",), as_kernel, as_matrix),
        batched_position_rule(cfg),
        Rule(("vision.cls",), ("cls_token",), as_token, from_token),
    ]
    # timm's patch embedding has a bias, unless a norm follows.
    if not vision.pre_norm:
        bias = ("patch_embed.proj.bias",)
        if vision.patch_bias:
            table.append(Rule(("vision.patch.bias",), bias))
        else:
            zeros = partial(torch.zeros, cfg.shape.width)
            table.append(Rule((), bias, zeros, no_tensors))

    # Layers with a weight and a bias.
    layers = {"vision.norm": "fc_norm" if vision.pool == "mean_then_norm" else "norm"}
    if vision.pre_norm:
        layers["vision.pre_norm"] = "norm_pre"
    for i in range(cfg.shape.depth):
        for glimpse_name, foreign_name in BLOCK.items():
            layers[f"vision.blocks.{i}.{glimpse_name}"] = f"blocks.{i}.{foreign_name}"
    for glimpse_name, foreign_name in layers.items():
        for kind in ("weight", "bias"):
            table.append(Rule((f"{glimpse_name}.{kind}",), (f"{foreign_name}.{kind}",)))
    return table


def batched_position_rule(cfg: ModelConfig) -> Rule:
    """Return the rule of the positions, (1, 1 + L, D) in timm.

    A patch bias is folded into them if a norm follows; otherwise timm has a bias of its own.
    """
    if not cfg.vision.pre_norm:
        cfg = replace(cfg, vision=replace(cfg.vision, patch_bias=False))
    rule = position_rule(cfg, "pos_embed")

    def to_foreign(*terms: Tensor) -> Tensor:
        (table,) = as_tuple(rule.to_foreign(*terms))
        return table[None]

    def from_foreign(table: Tensor) -> Tensor | tuple[Tensor, ...]:
        return rule.from_foreign(table[0])

    return replace(rule, to_foreign=to_foreign, from_foreign=from_foreign)


def no_tensors(bias: Tensor) -> tuple[()]:
    """Return no tensors: the model has no patch bias."""
    return ()


def as_token(cls: Tensor) -> Tensor:
    """Return the class token (D,) as (1, 1, D)."""
    return cls[None, None]


def from_token(token: Tensor) -> Tensor:
    return token[0, 0]


# ---- out


def save(model: PortableModel, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder; return notes on what it does not hold of the model.

    ValueError if timm has no such architecture.
    """
    cfg, vision = model.cfg, model.cfg.vision
    name, args = timm_architecture(cfg)
    folder.mkdir(parents=True)
    write_weights(
        folder / WEIGHTS[0], select_vision_weights(model.tensors), model, rules(cfg), dtype
    )

    # The config, with an entry of ours that timm ignores.
    mode = "squash" if model.about.crop == "squash" else "center"
    pretrained_cfg = dict(
        input_size=[3, *cfg.image_shape],
        fixed_input_size=True,
        interpolation=model.about.interpolation,
        crop_pct=1.0,
        crop_mode=mode,
        mean=vision.mean,
        std=vision.std,
        num_classes=0,
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier="head",
    )
    glimpse = dict(init=cfg.init, patch_bias=vision.patch_bias, freeze_patch=vision.freeze_patch)
    glimpse |= crop_entry(model.about.crop).get("glimpse", {})
    tree = dict(
        architecture=name,
        num_classes=0,
        num_features=cfg.shape.width,
        global_pool=args["global_pool"],
        model_args=args,
        pretrained_cfg=pretrained_cfg,
        glimpse=glimpse,
    )
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")

    notes = []
    if model.vocab:
        notes.append(
            "left out: the text tower, the projections and the temperature; timm's models see"
            " images alone"
        )
    return notes + crop_notes(model.about.crop, "timm")


def timm_architecture(cfg: ModelConfig) -> tuple[str, dict]:
    """Return the architecture's name in timm, and the arguments of create_model.

    The arguments determine everything, so any known name with the right eps serves.
    """
    vision, shape = cfg.vision, cfg.shape
    if vision.eps not in EPS:
        allowed = " and ".join(map(str, EPS))
        raise ValueError(
            f"model.vision.eps {vision.eps}: a config of timm's can say {allowed} alone"
        )
    suffix = EPS[vision.eps]
    name = f"{NAMES.get(shape.width, 'base')}_patch{cfg.patch_size}{suffix}"
    if name not in KNOWN_NAMES:
        name = f"base_patch16{suffix}"
    args = dict(
        img_size=cfg.image_shape,
        patch_size=cfg.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.mlp,
        pre_norm=vision.pre_norm,
        act_layer=vision.activation,
        **POOLS[vision.pool],
    )
    return f"vit_{name}_224", args


# ---- in


def recognizes(path: Path) -> bool:
    """Return True for a folder with a config of timm's, or a file of tensors under timm's names."""
    try:
        if path.is_dir():
            tree = json.loads((path / CONFIG).read_text())
            return {"architecture", "pretrained_cfg"} <= tree.keys()
        return SIGNATURE_TENSORS <= tensor_files.read_meta_tensors(path).keys()
    except (OSError, ValueError, AttributeError):
        return False


def load(path: Path, **given: object) -> PortableModel:
    """Load a folder, or a file of weights; given: as in LoadOptions."""
    if not path.is_dir():
        return to_portable(tensor_files.read_tensors(path), path, given)
    tree, tensors = read_folder(path)
    settings = read_settings(tree, "norm.weight" in tensors)
    mode, interpolation, notes = read_preprocessing(tree["pretrained_cfg"])
    try:
        model = to_portable(tensors, path, settings | given, notes, tree.get("glimpse"))
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise error from None
        raise ValueError(f"{path / CONFIG}: {error}") from None
    crop = read_crop(tree, path / CONFIG, CROP_MODES.get(mode, "resize_crop"))
    return replace(model, about=replace(model.about, crop=crop, interpolation=interpolation))


def read_settings(tree: dict, has_norm: bool) -> dict:
    """Return the settings of a config that shapes do not give, as arguments of `architecture`.

    has_norm: there is a norm before the pooling.
    """
    name = tree["architecture"]
    args, prepared = tree.get("model_args") or {}, tree["pretrained_cfg"]

    pooling = args.get("global_pool", tree.get("global_pool", "token"))
    with_prefix = args.get("pool_include_prefix", False)
    pool = POOLS_IN.get((pooling, with_prefix, has_norm), pooling)

    eps = 1e-5 if "_clip" in name and "norm_layer" not in args else 1e-6
    activation = args.get("act_layer", "quick_gelu" if "quickgelu" in name else "gelu")
    heads = args.get("num_heads")
    if match := re.match(rf"vit_({'|'.join(SIZES)})_", name):
        _, _, usual_heads = SIZES[match[1]]
        heads = heads or usual_heads
    input_sides = prepared.get("input_size", [None])[1:] or None
    return dict(
        pool=pool,
        heads=heads,
        activation=activation,
        eps=eps,
        mean=prepared.get("mean"),
        std=prepared.get("std"),
        image_size=args.get("img_size", input_sides),
    )


def read_preprocessing(prepared: dict) -> tuple[str, str, list[str]]:
    """Return (crop_mode, interpolation, notes) of a pretrained_cfg.

    The notes say how our evaluation images differ.
    """
    notes = []
    cut = prepared.get("crop_pct") or 1.0
    if cut != 1.0:
        notes.append(
            f"crop_pct {cut}: its images are cut from larger ones, ours resized to the very size"
        )
    mode = prepared.get("crop_mode") or "center"
    if mode not in CROP_MODES:
        notes.append(
            f"crop_mode {mode}: its images are made square otherwise; ours by resizing the short"
            " side, then cropping the middle"
        )
    interpolation = prepared.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        notes.append(f"interpolation {interpolation}: ours is bicubic")
        interpolation = "bicubic"
    return mode, interpolation, notes


def read_folder(folder: Path) -> tuple[dict, LazyTensors]:
    """Return the folder's config and its tensors."""
    try:
        tree = json.loads((folder / CONFIG).read_text())
        tree["architecture"], tree["pretrained_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: no config of timm's ({type(error).__name__}: {error})"
        ) from None
    for name in WEIGHTS:
        if (folder / name).exists():
            return tree, tensor_files.read_tensors(folder / name)
    raise ValueError(f"{folder}: no weights in it; looked for {' and '.join(WEIGHTS)}")


def to_portable(
    tensors: LazyTensors,
    path: Path,
    settings: dict,
    notes: Iterable[str] = (),
    glimpse: dict | None = None,
) -> PortableModel:
    """Convert tensors with timm's names to a model of Glimpse.

    settings: arguments of `architecture`. glimpse: the entry that `save` wrote into the config.
    """
    tensors, left_out = select_encoder(tensors, path)
    cfg = read_architecture(tensors, path, **drop_none(settings))

    # Settings that only tensors, or our entry, determine.
    vision = cfg.vision
    if is_sincos(tensors["pos_embed"][0], cfg):
        vision = replace(vision, positions="sincos")
    if glimpse:
        # A bias of zeros stands for none, until it is trained.
        bias = vision.patch_bias and (
            glimpse["patch_bias"] or bool(tensors["patch_embed.proj.bias"].any())
        )
        vision = replace(vision, patch_bias=bias, freeze_patch=glimpse["freeze_patch"])
        cfg = replace(cfg, init=glimpse["init"])
    cfg = replace(cfg, vision=vision)

    left_out += tensors.unused_entries
    folder = path if path.is_dir() else path.parent
    cfg, tensors = import_with_positions(folder, cfg, rules, "pos_embed", tensors, str(path))
    source = describe_source(path, "timm", [*notes, *assumption_notes(cfg, settings)], left_out)
    return PortableModel(cfg, 0, 0, tensors, ModelInfo(source=source))


def drop_none(settings: dict) -> dict:
    """Return the settings that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


def assumption_notes(cfg: ModelConfig, settings: dict) -> list[str]:
    """Return a note on the settings that neither shapes nor the config or user determine.

    The comparison with timm's own model cannot verify them, because it is built from the same.
    """
    vision = cfg.vision
    values = dict(
        heads=cfg.shape.heads,
        pool=vision.pool,
        activation=vision.activation,
        eps=vision.eps,
        mean=list(vision.mean),
        std=list(vision.std),
    )
    if vision.pool == "mean_then_norm":  # the name of its norm determines it
        del values["pool"]
    missing = [f"{key} {value}" for key, value in values.items() if settings.get(key) is None]
    if not missing:
        return []
    return [f"assumed, as nothing says it: {', '.join(missing)}; --given KEY=VALUE says otherwise"]


def select_encoder(tensors: LazyTensors, whose: Path) -> tuple[LazyTensors, list[str]]:
    """Return the tensors of the tower, and the modules of the others, which are left out.

    ValueError naming a tensor that no tower of ours has.
    """
    for mark, what in UNSUPPORTED.items():
        for name in tensors:
            if mark in name:
                raise ValueError(
                    f"{whose}: {name}: {what}, which Glimpse's vision tower does not support"
                )
    names = [name for name in tensors if not name.startswith(LEFT_OUT)]
    others = {name.partition(".")[0] for name in tensors if name.startswith(LEFT_OUT)}
    return tensors.rename({name: name for name in names}), sorted(others)


def read_architecture(
    tensors: LazyTensors,
    whose: Path,
    heads: int | None = None,
    pool: str | None = None,
    activation: str = "gelu",
    eps: float | None = None,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ModelConfig:
    """Return the architecture that the shapes give; the rest is as given, or as usual.

    ValueError naming the tensor that is missing or not of a tower of ours.
    """
    # 1. Sizes, from the shapes.
    shapes = {name: tuple(meta.shape) for name, meta in tensors.meta.items()}
    width, side, inside = read_sizes(shapes, whose)
    if heads is None:
        heads = HEADS_BY_WIDTH.get(width)
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    sides = read_image_size(shapes["pos_embed"], side, image_size, whose)
    size = size_fields(side, width=width, depth=depth, heads=heads, mlp=mlp_ratio(width, inside))

    # 2. Settings: a norm before the blocks is that of CLIP's towers, whose other settings differ.
    pre_norm = "norm_pre.weight" in shapes
    usual_mean: tuple[float, ...]
    usual_std: tuple[float, ...]
    if pre_norm:
        usual_eps, usual_mean, usual_std = 1e-5, MEAN, STD
    else:
        usual_eps, usual_mean, usual_std = 1e-6, VisionConfig.mean, VisionConfig.std
    if not pool:
        pool = "mean_then_norm" if "fc_norm.weight" in shapes else "cls"
    if eps is None:
        eps = usual_eps
    mean, std = tuple(mean or usual_mean), tuple(std or usual_std)
    has_bias = "patch_embed.proj.bias" in shapes and not pre_norm
    vision = VisionConfig(
        positions="learned",
        pool=pool,
        pre_norm=pre_norm,
        patch_bias=has_bias,
        activation=activation,
        eps=float(eps),
        mean=mean,
        std=std,
    )
    is_square = sides[0] == sides[1]
    return ModelConfig(**size, image_size=sides[0] if is_square else sides, vision=vision)


def read_sizes(shapes: dict[str, tuple[int, ...]], whose: Path) -> tuple[int, int, int]:
    """Return (width, patch side, width of the MLPs).

    ValueError if a tensor is missing or not of a tower of ours.
    """
    for name in REQUIRED_TENSORS:
        if name not in shapes:
            raise ValueError(f"{whose}: {name} is missing, which our vision tower needs")
    kernel = shapes["patch_embed.proj.weight"]
    width, channels, side, across = kernel
    inside = shapes["blocks.0.mlp.fc1.weight"][0]
    if (channels, side) != (3, across):
        raise ValueError(
            f"{whose}: patch_embed.proj.weight {kernel}: ours is (width, 3, side, side)"
        )
    if inside != shapes["blocks.0.mlp.fc2.weight"][1]:
        raise ValueError(
            f"{whose}: blocks.0.mlp.fc2.weight: gated MLPs, which our vision tower has not"
        )
    return width, side, inside


def read_image_size(
    positions: tuple[int, ...], patch: int, image_size: int | Sequence[int] | None, whose: Path
) -> tuple[int, int]:
    """Return (height, width) of the images.

    positions: the shape (1, 1 + L, D) of pos_embed. image_size: as given; None: a square.
    """
    patches = positions[1] - 1
    if image_size is None:
        image_size = math.isqrt(patches) * patch
    if isinstance(image_size, Sequence):
        sides = image_size[0], image_size[1]
    else:
        sides = image_size, image_size
    if (sides[0] // patch) * (sides[1] // patch) != patches:
        raise ValueError(
            f"{whose}: pos_embed {positions}: not the places of a class token and of the patches of"
            f" an image of {sides[0]} x {sides[1]}; say its height and width as image_size"
        )
    return sides


# ---- timm itself


def reference_model(path: Path, **given: object) -> Callable[[Tensor, None], tuple[Tensor, None]]:
    """Load the model in timm; return a function from (normalized images (B, 3, H, W), None) to
    (features (B, D), None).
    """
    require_version("timm", "1.0.16")
    import timm

    if path.is_dir():
        return feature_function(
            timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
        )
    return feature_function(build_timm_model(tensor_files.read_tensors(path), path, given))


def build_timm_model(tensors: LazyTensors, whose: Path, settings: dict) -> nn.Module:
    """Build timm's model and load these tensors."""
    import timm

    tensors, _ = select_encoder(tensors, whose)
    name, args = timm_architecture(read_architecture(tensors, whose, **drop_none(settings)))
    model = timm.create_model(name, num_classes=0, **args)
    model.load_state_dict(dict(tensors))
    return model


def feature_function(model: nn.Module) -> Callable[[Tensor, None], tuple[Tensor, None]]:
    """Return a function from images (and ids, which it ignores) to features of a timm model."""
    model.eval()

    @torch.no_grad()
    def features(images: Tensor, ids: None = None) -> tuple[Tensor, None]:
        return model(images), None

    return features
