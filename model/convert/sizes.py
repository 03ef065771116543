"""The numbers of a foreign architecture as fields of a config: a row of SIZES if one fits, else a
custom size.

    ModelConfig(**sized(14, width=1024, depth=24, mlp=ratio(1024, 4096)), image_size=224)
"""

import math
from typing import NotRequired, TypedDict

from glimpse.model.layers import mlp_width
from glimpse.model.towers import PATCH_SIZES, SIZES, Size


class SizeFields(TypedDict):
    """Fields of a ModelConfig."""

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

    The arguments are columns of Size. A column that is left out, or None, is that of the first row
    that fits. If no row fits, heads are 64 wide, and the text columns, which a vision tower alone
    does not have, are those of the vision tower.
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

    # No row fits: fill in the columns that are not known.
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
    """Return the `mlp` of a Size whose MLPs are `inside` wide.

    `hidden` turns it into `inside` again, although it rounds down.
    """
    mlp = inside / width
    return mlp if mlp_width(width, mlp) == inside else math.nextafter(mlp, math.inf)
