"""Helpers of several formats: the source of a model, and how evaluation images are cropped."""

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from glimpse.model.lazy_tensors import and_more
from glimpse.model.portable import EVAL_CROPS

# OpenAI's, the default of open_clip and HF
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_LISTED = 20  # the largest number of unused tensors that a note names


def describe_source(
    path: Path, format_name: str, notes: Iterable[str] = (), left_out: Sequence[str] = ()
) -> dict[str, str]:
    """Return the `source` of a model of another format.

    notes: remarks for the user. left_out: entries of its files that were not used.
    """
    notes = list(notes)
    if left_out:
        names = ", ".join(left_out[:MAX_LISTED])
        notes.append(f"left out: {names}{and_more(left_out[MAX_LISTED - 1 :])}")
    source = dict(path=str(path), format=format_name)
    if notes:
        source["notes"] = "; ".join(notes)
    return source


def require_version(package: str, least: str) -> None:
    """Raise ImportError if a package is missing or older than the version that `peer` needs."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed") from None
    if Version(version) < Version(least):
        raise ImportError(f"{package} {version} is installed, {least} or newer is needed")


def crop_entry(crop: str) -> dict[str, dict]:
    """Return the entry by which `crop_in` recognizes `square` in a config that has no field for it.

    Foreign libraries ignore the entry.
    """
    if crop != "square":
        return {}
    return {"glimpse": {"eval_crop": crop}}


def read_crop(tree: dict, file: Path, says: str = EVAL_CROPS[0]) -> str:
    """Return the crop that `kept_crop` wrote into the file's tree.

    says: the crop according to the format's own fields, returned if there is no such entry.
    """
    section = tree.get("glimpse") or {}
    crop = section.get("eval_crop", says)
    if crop not in EVAL_CROPS:
        raise ValueError(
            f"{file}: glimpse.eval_crop {crop!r}: unknown; known: {', '.join(EVAL_CROPS)}"
        )
    return crop


def crop_notes(crop: str, whose: str) -> list[str]:
    """Return the note of `save` on a library (`whose`) that prepares images differently."""
    if crop != "square":
        return []
    note = (
        f"eval_crop {crop}: {whose} resizes images before it crops them, so pixels differ by a"
        f" little; read again here, it is {crop}"
    )
    return [note]
