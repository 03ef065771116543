"""What several formats share: where a model comes from, how images are cropped."""

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from glimpse.model.lazy_tensors import more
from glimpse.model.portable import CROPS

# OpenAI's, the default of open_clip and HF
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


MOST = 20  # names of what was left out that are told


def origin(
    path: Path, format: str, notes: Iterable[str] = (), left_out: Sequence[str] = ()
) -> dict[str, str]:
    """The `source` of a model of another format.

    notes: what one should know of it. left_out: what of its files was not used.
    """
    if left_out:
        notes = *notes, f"left out: {', '.join(left_out[:MOST])}{more(left_out[MOST - 1 :])}"
    return dict(path=str(path), format=format, **({"notes": "; ".join(notes)} if notes else {}))


def newer(package: str, least: str) -> None:
    """ImportError where another library is not installed, or is older than what a `peer` has been
    run with.
    """
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed") from None
    if Version(found) < Version(least):
        raise ImportError(f"{package} {found} is installed, {least} or newer is needed")


def kept_crop(crop: str) -> dict[str, dict]:
    """What to write into a file of a format that has no field for `square`, so that `crop_in` finds
    it; libraries pass over it.
    """
    return {"glimpse": {"eval_crop": crop}} if crop == "square" else {}


def crop_in(tree: dict, file: Path, says: str = CROPS[0]) -> str:
    """What kept_crop wrote into the file's tree, if it did, else what the format's own fields
    say.
    """
    crop = (tree.get("glimpse") or {}).get("eval_crop", says)
    if crop not in CROPS:
        raise ValueError(f"{file}: glimpse.eval_crop {crop!r}: unknown; known: {', '.join(CROPS)}")
    return crop


def told_crop(crop: str, whose: str) -> list[str]:
    """What `save` says where a library prepares images otherwise."""
    return (
        []
        if crop != "square"
        else [
            f"eval_crop {crop}: {whose} resizes images before it crops them, so pixels differ by a"
            f" little; read again here, it is {crop}"
        ]
    )
