"""open_clip's CLIP with one of timm's vision towers, out and in: the form of pairs whose towers
differ in their activation.

open_clip's own towers have quick_gelu both or neither; those of SLIP, A-CLIP and MaskCLIP have gelu
in the vision tower alone. timm's towers keep their gelu. But a config has only their name
(vit_base_patch16_224), which fixes all else: the width, depth and heads of that name, images of
224 pixels, eps 1e-6, a patch bias, no norm before the blocks.

    visual.trunk.              the tower under timm's names (timm.py)
    visual.head.proj.weight    the projection
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

from glimpse.model.convert import positions, timm
from glimpse.model.convert.rules import Rule
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.towers import ModelConfig

TRUNK = "visual.trunk."
IMAGE_SIZE, EPS = 224, 1e-6
POOLS = {"cls": "token", "mean": "avg"}  # as timm_pool names them
PROJECTION = dict(timm_proj="linear", timm_proj_bias=False)


class TowerSize(TypedDict):
    """The patch side and the columns of Size of a vision tower."""

    patch: int
    width: int
    depth: int
    heads: int
    mlp: float


class TowerSettings(TypedDict):
    """Fields of a VisionConfig."""

    pool: str
    pre_norm: bool
    patch_bias: bool
    activation: str
    eps: float


def timm_name(cfg: ModelConfig) -> str:
    """Return timm's name of the vision tower.

    ValueError naming the first setting that no name of timm's stands for.
    """
    vision, shape = cfg.vision, cfg.shape
    for key, value, allowed in (
        ("pool", vision.pool, POOLS),
        ("activation", vision.activation, ("gelu",)),
        ("eps", vision.eps, (EPS,)),
        ("pre_norm", vision.pre_norm, (False,)),
        ("patch_bias", vision.patch_bias, (True,)),
    ):
        if value not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"none there has model.vision.{key} {value!r}, only {choices}")
    if set(cfg.image_shape) != {IMAGE_SIZE}:
        raise ValueError(f"none there has model.image_size {cfg.image_size}, only {IMAGE_SIZE}")

    numbers = (shape.width, shape.depth, shape.heads)
    for name, size in timm.SIZES.items():
        is_known = f"{name}_patch{cfg.patch_size}" in timm.KNOWN_NAMES
        if size == numbers and shape.mlp == 4 and is_known:
            return f"vit_{name}_patch{cfg.patch_size}_{IMAGE_SIZE}"
    raise ValueError(
        f"none there has the width, depth, heads and patches of model.size {cfg.size!r}"
    )


def make_vision_config(cfg: ModelConfig) -> dict:
    """Return the vision_cfg."""
    return dict(
        timm_model_name=timm_name(cfg),
        timm_model_pretrained=False,
        timm_pool=POOLS[cfg.vision.pool],
        **PROJECTION,
        image_size=IMAGE_SIZE,
    )


def read_vision_config(vision: dict, where: str) -> tuple[TowerSize, TowerSettings]:
    """Return the size and the settings in a vision_cfg.

    where: its place, for errors.
    """
    name = vision["timm_model_name"]
    match = re.fullmatch(rf"vit_({'|'.join(timm.SIZES)})_patch(\d+)_{IMAGE_SIZE}", name)
    if not match:
        sizes = ",".join(timm.SIZES)
        raise ValueError(
            f"{where}.timm_model_name {name!r}: of timm's towers ours are"
            f" vit_{{{sizes}}}_patchN_{IMAGE_SIZE}"
        )

    # Settings beside the name.
    pools = {timm_pool: pool for pool, timm_pool in POOLS.items()}
    pool = vision.get("timm_pool", "avg")
    image_size = vision.get("image_size", IMAGE_SIZE)
    checks = [("timm_pool", pool, pools), ("image_size", image_size, (IMAGE_SIZE,))]
    for key, value in PROJECTION.items():
        checks.append((key, vision.get(key, value), (value,)))
    for key, value, allowed in checks:
        if value not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"{where}.{key} {value!r}: ours are {choices}")

    width, depth, heads = timm.SIZES[match[1]]
    size = TowerSize(patch=int(match[2]), width=width, depth=depth, heads=heads, mlp=4.0)
    settings = TowerSettings(
        pool=pools[pool], pre_norm=False, patch_bias=True, activation="gelu", eps=EPS
    )
    return size, settings


def has_sincos_positions(tensors: LazyTensors, cfg: ModelConfig) -> bool:
    """Return True if the tower's positions are the sin-cos ones."""
    name = f"{TRUNK}pos_embed"
    return name in tensors and positions.is_sincos(tensors[name][0], cfg)


def rules(cfg: ModelConfig) -> Iterator[Rule]:
    """Yield the rules of the vision tower and of the image projection."""
    for rule in timm.rules(cfg):
        trunk_names = tuple(TRUNK + name for name in rule.foreign_names)
        yield replace(rule, foreign_names=trunk_names)
    yield Rule(("image_projection.weight",), ("visual.head.proj.weight",))
