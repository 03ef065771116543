"""Formats that models come from and go to, a file each; portable.py is what passes between them.

    load(path, **given) -> Portable
        what lies there, read lazily; ValueError where this architecture is not ours
    Given
        a dataclass of what `given` may hold; nothing, where it is left out
    claims(path) -> bool
        is what lies there of this format? It looks at names and headers alone
    save(model, folder, dtype, **options)
        write it, and return what one should know of it, a line each, or nothing; ValueError
                                               naming the field that the format cannot express
    peer(path, **given) -> a function          the foreign library's own model (ImportError where it
                                               is not installed): images
                                               (B, 3, H, W) normalised, ids (B, context) padded ->
                                               unit embeddings of both

To add one: a file with what of these makes sense, mostly a table of rules (rules.py), and its row
in FORMATS.
"""

from pathlib import Path
from types import ModuleType

from glimpse.model.convert import flip_jax, hf, megatron, open_clip, timm

FORMATS: dict[str, ModuleType] = {
    "open_clip": open_clip,
    "hf": hf,
    "timm": timm,
    "megatron": megatron,
    "flip_jax": flip_jax,
}


def claimed(path: Path) -> str | None:
    """The format of what lies there; None if it is of none of these: a run, or a model in Glimpse's
    own format.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return next((name for name, module in FORMATS.items() if module.claims(path)), None)
