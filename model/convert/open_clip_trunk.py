"""open_clip's CLIP whose vision tower is one of timm's: the form of pairs whose towers differ in
their activation, out and in.

open_clip's own towers have quick_gelu both or neither; those of SLIP, A-CLIP and MaskCLIP have gelu
in the vision tower alone. timm's towers keep their gelu. But they are told by a name alone
(vit_base_patch16_224): no other numbers than its own, images of 224 pixels,
eps 1e-6, a patch bias, no norm before the blocks.

    visual.trunk.              the tower under timm's names (timm.py)
    visual.head.proj.weight    the projection
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from glimpse.model.convert import positions, timm
from glimpse.model.convert.rules import Rule
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.towers import ModelConfig

TRUNK, SIDE, EPS = "visual.trunk.", 224, 1e-6
POOLS = {"cls": "token", "mean": "avg"}  # as timm_pool names them
PROJECTION = dict(timm_proj="linear", timm_proj_bias=False)


def named(cfg: ModelConfig) -> str:
    """timm's name of the vision tower; ValueError naming what no name of timm's says."""
    v, s = cfg.vision, cfg.shape
    for key, value, has in (
        ("pool", v.pool, POOLS),
        ("activation", v.activation, ("gelu",)),
        ("eps", v.eps, (EPS,)),
        ("pre_norm", v.pre_norm, (False,)),
        ("patch_bias", v.patch_bias, (True,)),
    ):
        if value not in has:
            raise ValueError(
                f"none there has model.vision.{key} {value!r}, only {' or '.join(map(str, has))}"
            )
    if set(cfg.sides) != {SIDE}:
        raise ValueError(f"none there has model.image_size {cfg.image_size}, only {SIDE}")
    for name, numbers in timm.SIZES.items():
        if (
            numbers == (s.width, s.depth, s.heads)
            and s.mlp == 4
            and f"{name}_patch{cfg.patch}" in timm.KNOWN
        ):
            return f"vit_{name}_patch{cfg.patch}_{SIDE}"
    raise ValueError(
        f"none there has the width, depth, heads and patches of model.size {cfg.size!r}"
    )


def tower_out(cfg: ModelConfig) -> dict:
    """The vision_cfg."""
    return dict(
        timm_model_name=named(cfg),
        timm_model_pretrained=False,
        timm_pool=POOLS[cfg.vision.pool],
        **PROJECTION,
        image_size=SIDE,
    )


def tower_in(vision: dict, where: str) -> tuple[dict[str, float], dict]:
    """(columns of Size with the patch side, fields of VisionConfig) of a vision_cfg."""
    name, pools = vision["timm_model_name"], {theirs: ours for ours, theirs in POOLS.items()}
    match = re.fullmatch(rf"vit_({'|'.join(timm.SIZES)})_patch(\d+)_{SIDE}", name)
    if not match:
        raise ValueError(
            f"{where}.timm_model_name {name!r}: of timm's towers ours are"
            f" vit_{{{','.join(timm.SIZES)}}}_patchN_{SIDE}"
        )
    for key, value, has in (
        ("timm_pool", vision.get("timm_pool", "avg"), pools),
        ("image_size", vision.get("image_size", SIDE), (SIDE,)),
        *((key, vision.get(key, value), (value,)) for key, value in PROJECTION.items()),
    ):
        if value not in has:
            raise ValueError(f"{where}.{key} {value!r}: ours are {' or '.join(map(str, has))}")
    width, depth, heads = timm.SIZES[match[1]]
    return (
        dict(patch=int(match[2]), width=width, depth=depth, heads=heads, mlp=4.0),
        dict(
            pool=pools[vision.get("timm_pool", "avg")],
            pre_norm=False,
            patch_bias=True,
            activation="gelu",
            eps=EPS,
        ),
    )


def is_fixed(theirs: Tensors, cfg: ModelConfig) -> bool:
    """Are its positions the sin-cos ones?"""
    return f"{TRUNK}pos_embed" in theirs and positions.is_fixed(theirs[f"{TRUNK}pos_embed"][0], cfg)


def rules(cfg: ModelConfig) -> Iterator[Rule]:
    """Of the vision tower and the image projection."""
    for rule in timm.rules(cfg):
        yield replace(rule, theirs=tuple(TRUNK + name for name in rule.theirs))
    yield Rule(("image_projection.weight",), ("visual.head.proj.weight",))
