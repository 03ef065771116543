"""timm's vision transformers: a tower out, as a folder that timm.create_model("local-dir:FOLDER",
pretrained=True) opens; and in.

Only the tower has a place there: features are its pooled tokens, before the projection, which
belongs to the pair. In: such a folder, timm's own from the hub among them, or a file of tensors
under timm's names, as DeiT's and MAE's are. A file tells its architecture by shapes as far as they
go; the rest is `given`, or as most have it, and told: heads of 64, pooled by the class token, gelu,
eps 1e-6 and ImageNet's mean and std (after a norm before the blocks 1e-5 and OpenAI's). MAE's is
then complete: its fixed positions equal ours bit
for bit; its decoder is left out. Fine-tuned on pooled patches it has a norm after the pooling,
which is our pool mean_then_norm.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from glimpse.model import tensor_files
from glimpse.model.convert.common import MEAN, STD, crop_in, kept_crop, newer, origin, told_crop
from glimpse.model.convert.positions import is_fixed, position_rule, taken, write
from glimpse.model.convert.rules import Rule, as_kernel, as_matrix, as_tuple
from glimpse.model.convert.sizes import ratio, sized
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import INTERPOLATIONS, About, Portable, vision_only
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.out": "attn.proj",
    "norm2": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
POOLS = {
    "cls": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "mean_with_cls": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "mean_then_norm": {"global_pool": "avg", "fc_norm": True},
}
MODES = {"center": "resize_crop", "squash": "squash"}  # a crop_mode as we call it
# a config cannot say it: architectures with clip in their name have the latter
EPS = {1e-6: "", 1e-5: "_clip"}
# as its names say them: width, blocks, heads
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
NAMES = {width: name for name, (width, _, _) in SIZES.items()}
KNOWN = {
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
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # of timm's widths whose heads are not 64 wide
MARKS = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
LEFT_OUT = ("head.", "decoder_", "mask_token")  # a classifier; what MAE reconstructs with
REFUSED = {
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
class Given:
    """What a bare file does not say; it counts for more than what a folder says."""

    heads: int | None = None
    pool: str | None = None
    activation: str | None = None
    eps: float | None = None
    image_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def rules(cfg: ModelConfig) -> list[Rule]:
    v = cfg.vision
    # A patch embedding has no bias there where a norm follows, and always one where none does.
    table = position_rule(
        cfg if v.pre_norm else replace(cfg, vision=replace(v, patch_bias=False)), "pos_embed"
    )
    found = [
        Rule(("vision.patch.weight",), ("patch_embed.proj.weight",), as_kernel, as_matrix),
        Rule(
            table.ours,
            table.theirs,
            lambda *ours: as_tuple(table.out(*ours))[0][None],
            lambda theirs: table.back(theirs[0]),
            table.folded,
        ),
        Rule(
            ("vision.cls",), ("cls_token",), lambda cls: cls[None, None], lambda token: token[0, 0]
        ),
    ]
    if not v.pre_norm and v.patch_bias:
        found.append(Rule(("vision.patch.bias",), ("patch_embed.proj.bias",)))
    elif not v.pre_norm:
        found.append(
            Rule(
                (),
                ("patch_embed.proj.bias",),
                lambda: torch.zeros(cfg.shape.width),
                lambda bias: (),
            )
        )
    layers = {
        "vision.norm": "fc_norm" if v.pool == "mean_then_norm" else "norm",
        **({"vision.pre_norm": "norm_pre"} if v.pre_norm else {}),
    }
    for i in range(cfg.shape.depth):
        layers |= {
            f"vision.blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in BLOCK.items()
        }
    return found + [
        Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",))
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    ]


# ---- out


def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder; returns what of the model it does not hold.

    ValueError where timm cannot say this architecture.
    """
    cfg, v = model.cfg, model.cfg.vision
    name, args = described(cfg)
    folder.mkdir(parents=True)
    write(folder / WEIGHTS[0], vision_only(model.tensors), model, rules(cfg), dtype)
    mode = "squash" if model.about.crop == "squash" else "center"
    prepared = dict(
        input_size=[3, *cfg.sides],
        fixed_input_size=True,
        interpolation=model.about.interpolation,
        crop_pct=1.0,
        crop_mode=mode,
        mean=v.mean,
        std=v.std,
        num_classes=0,
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier="head",
    )
    tree = dict(
        architecture=name,
        num_classes=0,
        num_features=cfg.shape.width,
        global_pool=args["global_pool"],
        model_args=args,
        pretrained_cfg=prepared,
    )
    # timm passes over it
    kept = dict(init=cfg.init, patch_bias=v.patch_bias, freeze_patch=v.freeze_patch)
    tree["glimpse"] = kept | kept_crop(model.about.crop).get("glimpse", {})
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
    told = (
        [
            "left out: the text tower, the projections and the temperature; timm's models see"
            " images alone"
        ]
        if model.vocab
        else []
    )
    return told + told_crop(model.about.crop, "timm")


def described(cfg: ModelConfig) -> tuple[str, dict]:
    """The architecture's name in timm, and what create_model has to be told beside it: everything,
    so that the name is but a name.
    """
    v, s = cfg.vision, cfg.shape
    if v.eps not in EPS:
        raise ValueError(
            f"model.vision.eps {v.eps}: a config of timm's can say {' and '.join(map(str, EPS))}"
            " alone"
        )
    name = f"{NAMES.get(s.width, 'base')}_patch{cfg.patch}{EPS[v.eps]}"
    name = f"vit_{name if name in KNOWN else f'base_patch16{EPS[v.eps]}'}_224"
    return name, dict(
        img_size=cfg.sides,
        patch_size=cfg.patch,
        embed_dim=s.width,
        depth=s.depth,
        num_heads=s.heads,
        mlp_ratio=s.mlp,
        pre_norm=v.pre_norm,
        act_layer=v.activation,
        **POOLS[v.pool],
    )


# ---- in


def claims(path: Path) -> bool:
    """A folder with a config of timm's, or a file of tensors under timm's names."""
    try:
        if path.is_dir():
            return {"architecture", "pretrained_cfg"} <= json.loads(
                (path / CONFIG).read_text()
            ).keys()
        return MARKS <= tensor_files.metas(path).keys()
    except (OSError, ValueError, AttributeError):
        return False


def load(path: Path, **given) -> Portable:
    """given: as in Given."""
    if not path.is_dir():
        return portable(tensor_files.read(path), path, given)
    tree, weights = opened(path)
    name, args, prepared = (
        tree["architecture"],
        tree.get("model_args") or {},
        tree["pretrained_cfg"],
    )
    kind = (
        args.get("global_pool", tree.get("global_pool", "token")),
        args.get("pool_include_prefix", False),
        "norm.weight" in weights,
    )
    pools = {
        ("token", False, True): "cls",
        ("avg", False, True): "mean",
        ("avg", True, True): "mean_with_cls",
        ("avg", False, False): "mean_then_norm",
    }
    says = dict(
        pool=pools.get(kind, kind[0]),
        heads=args.get("num_heads"),
        activation=args.get("act_layer", "quick_gelu" if "quickgelu" in name else "gelu"),
        eps=1e-5 if "_clip" in name and "norm_layer" not in args else 1e-6,
        mean=prepared.get("mean"),
        std=prepared.get("std"),
        image_size=args.get("img_size", prepared.get("input_size", [None])[1:] or None),
    )
    cut = prepared.get("crop_pct") or 1.0
    if match := re.match(rf"vit_({'|'.join(SIZES)})_", name):
        says["heads"] = says["heads"] or SIZES[match[1]][2]
    notes = (
        [f"crop_pct {cut}: its images are cut from larger ones, ours resized to the very size"]
        if cut != 1.0
        else []
    )
    if (mode := prepared.get("crop_mode") or "center") not in MODES:
        notes.append(
            f"crop_mode {mode}: its images are made square otherwise; ours by resizing the short"
            " side, then cropping the middle"
        )
    if (interpolation := prepared.get("interpolation") or "bicubic") not in INTERPOLATIONS:
        notes.append(f"interpolation {interpolation}: ours is bicubic")
        interpolation = "bicubic"
    try:
        model = portable(weights, path, says | given, notes, tree.get("glimpse"))
    except ValueError as error:
        raise (
            error if str(error).startswith(str(path)) else ValueError(f"{path / CONFIG}: {error}")
        ) from None
    crop = crop_in(tree, path / CONFIG, MODES.get(mode, "resize_crop"))
    return replace(model, about=replace(model.about, crop=crop, interpolation=interpolation))


def opened(folder: Path) -> tuple[dict, Tensors]:
    """Its config and its tensors."""
    try:
        tree = json.loads((folder / CONFIG).read_text())
        tree["architecture"], tree["pretrained_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: no config of timm's ({type(error).__name__}: {error})"
        ) from None
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found:
        raise ValueError(f"{folder}: no weights in it; looked for {' and '.join(WEIGHTS)}")
    return tree, tensor_files.read(found[0])


def portable(
    theirs: Tensors, path: Path, says: dict, notes: Iterable[str] = (), kept: dict | None = None
) -> Portable:
    """Tensors under timm's names as ours.

    says: of `architecture`; kept: what `save` wrote down of ours.
    """
    theirs, left = encoder(theirs, path)
    cfg = architecture(
        theirs, path, **{key: value for key, value in says.items() if value is not None}
    )
    v = cfg.vision
    if is_fixed(theirs["pos_embed"][0], cfg):
        v = replace(v, positions="sincos")
    if kept:
        bias = v.patch_bias and (kept["patch_bias"] or bool(theirs["patch_embed.proj.bias"].any()))
        v = replace(v, patch_bias=bias, freeze_patch=kept["freeze_patch"])
        cfg = replace(cfg, init=kept["init"])
    cfg, tensors = taken(
        path if path.is_dir() else path.parent,
        replace(cfg, vision=v),
        rules,
        "pos_embed",
        theirs,
        str(path),
    )
    return Portable(
        cfg,
        0,
        0,
        tensors,
        About(
            source=origin(path, "timm", [*notes, *assumed(cfg, says)], [*left, *theirs.left_out])
        ),
    )


def assumed(cfg: ModelConfig, says: dict) -> list[str]:
    """What of an architecture neither shapes nor anybody says: timm's own model, run beside ours,
    is built of the same.
    """
    v = cfg.vision
    usual = dict(
        heads=cfg.shape.heads,
        pool=v.pool,
        activation=v.activation,
        eps=v.eps,
        mean=list(v.mean),
        std=list(v.std),
    )
    if v.pool == "mean_then_norm":  # its norm's name says so
        del usual["pool"]
    unsaid = [f"{key} {value}" for key, value in usual.items() if says.get(key) is None]
    return (
        [f"assumed, as nothing says it: {', '.join(unsaid)}; --given KEY=VALUE says otherwise"]
        if unsaid
        else []
    )


def encoder(theirs: Tensors, whose: Path) -> tuple[Tensors, list[str]]:
    """The tower's, and what else there is and is left out.

    ValueError naming a tensor that no tower of ours has.
    """
    for mark, what in REFUSED.items():
        if name := next((name for name in theirs if mark in name), None):
            raise ValueError(f"{whose}: {name}: {what}, which our vision tower has not")
    kept = {name: name for name in theirs if not name.startswith(LEFT_OUT)}
    return theirs.renamed(kept), sorted(
        {name.partition(".")[0] for name in theirs if name not in kept}
    )


def architecture(
    theirs: Tensors,
    whose: Path,
    heads: int | None = None,
    pool: str | None = None,
    activation: str = "gelu",
    eps: float | None = None,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ModelConfig:
    """What the shapes say, and the rest as given.

    ValueError naming the tensor that is missing or not of a tower of ours.
    """
    shapes = {name: tuple(meta.shape) for name, meta in theirs.meta.items()}
    for name in (
        "patch_embed.proj.weight",
        "cls_token",
        "pos_embed",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ):
        if name not in shapes:
            raise ValueError(f"{whose}: {name} is missing, which our vision tower needs")
    width, channels, side, across = shapes["patch_embed.proj.weight"]
    inside, places = shapes["blocks.0.mlp.fc1.weight"][0], shapes["pos_embed"][1] - 1
    if (channels, side) != (3, across):
        raise ValueError(
            f"{whose}: patch_embed.proj.weight {shapes['patch_embed.proj.weight']}: ours is (width,"
            " 3, side, side)"
        )
    if inside != shapes["blocks.0.mlp.fc2.weight"][1]:
        raise ValueError(
            f"{whose}: blocks.0.mlp.fc2.weight: gated MLPs, which our vision tower has not"
        )
    image_size = math.isqrt(places) * side if image_size is None else image_size
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size,) * 2
    if (sides[0] // side) * (sides[1] // side) != places:
        raise ValueError(
            f"{whose}: pos_embed {shapes['pos_embed']}: not the places of a class token and of the"
            f" patches of an image of {sides[0]} x {sides[1]}; say its height and width as"
            " image_size"
        )
    normed = "norm_pre.weight" in shapes  # as CLIP's towers have it
    usual = (MEAN, STD) if normed else (VisionConfig.mean, VisionConfig.std)
    size = sized(
        side,
        width=width,
        depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        heads=HEADS.get(width) if heads is None else heads,
        mlp=ratio(width, inside),
    )
    return ModelConfig(
        **size,
        image_size=sides[0] if sides[0] == sides[1] else sides,
        vision=VisionConfig(
            positions="learned",
            pool=pool or ("mean_then_norm" if "fc_norm.weight" in shapes else "cls"),
            pre_norm=normed,
            patch_bias="patch_embed.proj.bias" in shapes and not normed,
            activation=activation,
            eps=float((1e-5 if normed else 1e-6) if eps is None else eps),
            mean=tuple(mean or usual[0]),
            std=tuple(std or usual[1]),
        ),
    )


# ---- timm itself


def peer(path: Path, **given) -> Callable[[Tensor, None], tuple[Tensor, None]]:
    """timm's own model of what `load` takes: (images (B, 3, H, W), normalised, None) -> (features
    (B, D), None).
    """
    newer("timm", "1.0.16")
    import timm

    return run(
        timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
        if path.is_dir()
        else built(tensor_files.read(path), path, given)
    )


def built(theirs: Tensors, whose: Path, says: dict) -> nn.Module:
    """timm's model of these tensors."""
    import timm

    theirs, _ = encoder(theirs, whose)
    name, args = described(
        architecture(
            theirs, whose, **{key: value for key, value in says.items() if value is not None}
        )
    )
    model = timm.create_model(name, num_classes=0, **args)
    model.load_state_dict(dict(theirs))
    return model


def run(model: nn.Module) -> Callable[[Tensor, None], tuple[Tensor, None]]:
    model.eval()

    @torch.no_grad()
    def features(images: Tensor, ids: None = None) -> tuple[Tensor, None]:
        return model(images), None

    return features
