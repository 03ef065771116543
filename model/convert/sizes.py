"""Config fields for the dimensions of a foreign architecture: a row of SIZES if one matches, else a
custom size.

    fields = size_fields(14, width=1024, depth=24, mlp=mlp_ratio(1024, 4096))
    cfg = ModelConfig(**fields, image_size=224)
"""

import math
from typing import NotRequired, TypedDict

from glimpse.model.layers import mlp_width
from glimpse.model.towers import PATCH_SIZES, SIZES, Size


class SizeFields(TypedDict):
    """The fields of a ModelConfig that determine the dimensions of the towers."""

    size: str
    custom: NotRequired[Size]


def size_fields(
    patch: int,
    *,
    width: int,
    depth: int,
    heads: int | None = None,
    text_width: int | None = None,
    text_depth: int | None = None,
    text_heads: int | None = None,
    embed: int | None = None,
    mlp: float | None = None,
    text_mlp: float | None = None,
) -> SizeFields:
    """Return `size` and `custom` of a ModelConfig.

    patch: patch size in pixels. The other arguments are columns of Size; None matches any value. If
    no row of SIZES matches, the missing columns get defaults: heads of width 64, and text columns
    equal to those of the vision tower (a model without a text tower does not use them).
    """
    columns = dict(
        width=width,
        depth=depth,
        heads=heads,
        text_width=text_width,
        text_depth=text_depth,
        text_heads=text_heads,
        embed=embed,
        mlp=mlp,
        text_mlp=text_mlp,
    )
    known = {key: value for key, value in columns.items() if value is not None}
    if patch in PATCH_SIZES:
        for name, row in SIZES.items():
            if all(getattr(row, key) == value for key, value in known.items()):
                return {"size": f"{name}/{patch}"}

    # No row matches: fill in the missing columns.
    if heads is None:
        heads = max(1, width // 64)
    if text_width is None:
        text_width = width
    if text_depth is None:
        text_depth = depth
    if text_heads is None:
        text_heads = max(1, text_width // 64)
    if embed is None:
        embed = width
    if mlp is None:
        mlp = Size.mlp
    if text_mlp is None:
        text_mlp = Size.text_mlp
    custom = Size(
        width, depth, heads, text_width, text_depth, text_heads, embed, mlp=mlp, text_mlp=text_mlp
    )
    return {"size": f"custom/{patch}", "custom": custom}


def mlp_ratio(width: int, inside: int) -> float:
    """Return the `mlp` of a Size whose MLPs have `inside` hidden units.

    layers.mlp_width, which rounds down, turns the ratio into exactly `inside` again.
    """
    mlp = inside / width
    return mlp if mlp_width(width, mlp) == inside else math.nextafter(mlp, math.inf)
