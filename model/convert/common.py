"""Helpers that several formats share: the source of a model, and the crop of evaluation images."""

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from glimpse.model.lazy_tensors import and_more
from glimpse.model.portable import EVAL_CROPS

# OpenAI's statistics, the default of open_clip and Hugging Face
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_LISTED = 20  # unused tensors that a note lists by name


def describe_source(
    path: Path, format_name: str, notes: Iterable[str] = (), left_out: Sequence[str] = ()
) -> dict[str, str]:
    """Return the `source` entry of a model that is loaded from a foreign format.

    notes: remarks for the user. left_out: entries of the files that were not used.
    """
    notes = list(notes)
    if left_out:
        names = ", ".join(left_out[:MAX_LISTED])
        notes.append(f"left out: {names}{and_more(left_out[MAX_LISTED - 1 :])}")
    source = dict(path=str(path), format=format_name)
    if notes:
        source["notes"] = "; ".join(notes)
    return source


def require_version(package: str, minimum: str) -> None:
    """Raise ImportError if a package is missing or older than `reference_model` needs."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed") from None
    if Version(version) < Version(minimum):
        raise ImportError(f"{package} {version} is installed; version {minimum} or newer is needed")


def crop_entry(crop: str) -> dict[str, dict]:
    """Return a config entry that records the crop `square`; {} for other crops.

    Foreign configs have no field for this crop. Foreign libraries ignore the entry, and `read_crop`
    reads it.
    """
    if crop != "square":
        return {}
    return {"glimpse": {"eval_crop": crop}}


def read_crop(tree: dict, file: Path, default: str = EVAL_CROPS[0]) -> str:
    """Return the crop that `crop_entry` wrote into a config.

    tree, file: the content and the path of the config. default: the crop according to the format's
    other fields, returned if the entry is missing.
    """
    section = tree.get("glimpse") or {}
    crop = section.get("eval_crop", default)
    if crop not in EVAL_CROPS:
        raise ValueError(
            f"{file}: glimpse.eval_crop: {crop!r} is unknown; use {', '.join(EVAL_CROPS)}"
        )
    return crop


def crop_notes(crop: str, library: str) -> list[str]:
    """Return the note of `save` if the library of the format crops images differently."""
    if crop != "square":
        return []
    note = (
        f"eval_crop {crop}: {library} resizes images before it crops them, so its pixels differ"
        f" slightly; converted back to Glimpse, the model has eval_crop {crop} again"
    )
    return [note]
