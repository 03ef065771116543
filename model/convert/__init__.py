"""Formats that models are converted from and to, one module each.

A conversion goes through portable.PortableModel. The module of a format defines those of the
following names that apply to it:

    load(path, **options) -> PortableModel
        Read the model at the path lazily. ValueError if Glimpse's towers cannot express its
        architecture.
    LoadOptions
        A dataclass of the options that `load` and `reference_model` take (`--given KEY=VALUE`).
        A format without it takes no options.
    recognizes(path) -> bool
        Return True if the path holds this format. Only names and headers are read.
    save(model, folder, dtype, **options) -> list[str]
        Write the model; return notes for the user, one line each. ValueError names the first
        setting that the format cannot express.
    reference_model(path, **options) -> Callable
        Load the model in the library of the format. Return a function: normalized images
        (B, 3, H, W) and padded ids (B, context) -> unit embeddings of both. ImportError if the
        library is missing.

To add a format, write such a module, which is mostly a table of rules (rules.py), and add it to
FORMATS.
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
    """Return the name of the foreign format at the path.

    None for a run, for a model in Glimpse's format, and for everything else. ValueError if the path
    does not exist.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for name, module in FORMATS.items():
        if module.recognizes(path):
            return name
    return None
