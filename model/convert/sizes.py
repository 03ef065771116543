"""The numbers of a foreign architecture as a config states them: a row of SIZES where one fits,
else a size of its own.

    ModelConfig(**sized(14, width=1024, depth=24, mlp=ratio(1024, 4096)), image_size=224)
"""

import math

from glimpse.model.layers import hidden
from glimpse.model.towers import PATCHES, SIZES, Size


def sized(patch: int, **known: float | None) -> dict[str, object]:
    """`size` and `custom` of a ModelConfig. known: columns of Size; one that is left out, or None,
    is as in the first row that fits.

    Where none fits: heads of 64, and text columns, which a vision tower alone has not, like the
    vision tower's.
    """
    known = {key: value for key, value in known.items() if value is not None}
    for name, row in SIZES.items():
        if patch in PATCHES and all(getattr(row, key) == value for key, value in known.items()):
            return {"size": f"{name}/{patch}"}
    for text in ("", "text_"):
        known.setdefault(f"{text}width", known["width"])
        known.setdefault(f"{text}depth", known["depth"])
        known.setdefault(f"{text}heads", max(1, known[f"{text}width"] // 64))
    known.setdefault("embed", known["width"])
    return {"size": f"custom/{patch}", "custom": Size(**known)}


def ratio(width: int, inside: int) -> float:
    """The `mlp` of a Size whose MLPs are `inside` wide: what `hidden` turns into it again, though
    it rounds down.
    """
    found = inside / width
    return found if hidden(width, found) == inside else math.nextafter(found, math.inf)
