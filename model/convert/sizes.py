"""The numbers of a foreign architecture as fields of a config: a row of SIZES if one fits, else a
custom size.

    ModelConfig(**sized(14, width=1024, depth=24, mlp=ratio(1024, 4096)), image_size=224)
"""

import math

from glimpse.model.layers import hidden
from glimpse.model.towers import PATCHES, SIZES, Size


def sized(patch: int, **known: float | None) -> dict[str, object]:
    """Return `size` and `custom` of a ModelConfig.

    known: columns of Size. A column that is left out, or None, is that of the first row that fits.
    If no row fits, heads are 64 wide, and the text columns, which a vision tower alone does not
    have, are those of the vision tower.
    """
    known = {key: value for key, value in known.items() if value is not None}
    if patch in PATCHES:
        for name, row in SIZES.items():
            if all(getattr(row, key) == value for key, value in known.items()):
                return {"size": f"{name}/{patch}"}
    for tower in ("", "text_"):
        width = known.setdefault(f"{tower}width", known["width"])
        known.setdefault(f"{tower}depth", known["depth"])
        known.setdefault(f"{tower}heads", max(1, width // 64))
    known.setdefault("embed", known["width"])
    return {"size": f"custom/{patch}", "custom": Size(**known)}


def ratio(width: int, inside: int) -> float:
    """Return the `mlp` of a Size whose MLPs are `inside` wide.

    `hidden` turns it into `inside` again, although it rounds down.
    """
    mlp = inside / width
    return mlp if hidden(width, mlp) == inside else math.nextafter(mlp, math.inf)
