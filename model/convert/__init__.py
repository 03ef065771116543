"""Formats that models are converted from and to, one module each.

Models pass between formats as portable.PortableModel. A module defines those of the following names
that make sense for its format:

    load(path, **given) -> PortableModel
        Read the model at the path lazily. ValueError if our towers cannot express its architecture.
    Given
        A dataclass of the options that `load` and `peer` take. Without it there are none.
    claims(path) -> bool
        Return True if the path holds this format. Only names and headers are read.
    save(model, folder, dtype, **options) -> list[str]
        Write the model; return notes for the user, one line each. ValueError naming the first field
        that the format cannot express.
    peer(path, **given) -> Callable
        Return the foreign library's own model as a function: normalized images (B, 3, H, W) and
        padded ids (B, context) -> unit embeddings of both. ImportError if the library is missing.

To add a format, write such a module, mostly a table of rules (rules.py), and add it to FORMATS.
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


def detect_format(path: Path) -> str | None:
    """Return the name of the format at the path.

    None for a run or a model in Glimpse's own format. ValueError if the path does not exist.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for name, module in FORMATS.items():
        if module.recognizes(path):
            return name
    return None
