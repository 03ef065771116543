"""Convert classified images to an evaluation set in CLIP_benchmark's layout: a tree with a folder a
class, or a table.

    build(Path("photos"), Path("datasets/mine")) -> {"classes": [...], "test": 120}

A tree is CLASS/image.jpg, or train/CLASS/image.jpg and test/CLASS/image.jpg. A table (csv, tsv) has
a column of images, as paths from its folder, one of classes, and optionally one called split.
Classes are numbered in the order of their names; names that are numbers, in order of size. If all
folders are named by WordNet numbers, as in ImageNet and its relatives, the classes get CLIP's names
(data/builders/imagenet.tsv, from open_clip). ImageNet-Vid-Robust's folder is recognized, too
(data/builders/videos.py).
"""

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

from glimpse.data.builders import videos
from glimpse.data.builders.packaged.build import write_split
from glimpse.data.builders.pairs import Csv, kind_of
from glimpse.data.evals.gallery import is_image
from glimpse.data.evals.prompts import load_templates
from glimpse.data.transforms import decode

CLASS_COLUMNS = ("class", "label", "category", "target", "class_name", "classname")
# name of a folder, or in a row -> split
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WORDNET = Path(__file__).parent / "imagenet.tsv"
PROMPT = "a photo of a {c}."  # CLIP section 3.1.4
Entries = dict[str, list[tuple[str, Path]]]  # split -> [(class, image)]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Content(Generic[Row]):
    """The classes of a set, the rows of its splits, and the function that makes samples of rows."""

    classes: list[str]
    left_out: int  # number of classes
    splits: Mapping[str, Sequence[Row]]
    samples: Callable[[Iterable[Row]], Iterator[tuple[str, dict[str, bytes]]]]


def build(
    source: Path,
    out: Path,
    *,
    names: Path | None = None,
    prompts: str = "",
    image_column: str | None = None,
    class_column: str | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda rows, total: rows,
) -> dict:
    """Write the set; return its classes, and the numbers of classes left out and of images.

    The same source gives the same bytes. names: a file with a class's name a line, in order, or
    with `FOLDER<tab>name`, which takes these folders alone (ObjectNet: those that ImageNet has,
    too). prompts: templates as data/evals/prompts.py reads them. ValueError: an image cannot be
    read, or a class has no name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out: {out} exists and is not an empty folder; remove it or name another"
        )
    lines = load_templates(prompts) if prompts else [PROMPT]

    content: Content[tuple[Path, dict]] | Content[tuple[str, Path]]
    if videos.is_video_set(source):
        content = video_content(source)
    else:
        content = image_content(source, names, image_column, class_column)

    # Written to a temporary folder first: an interrupted build leaves no `out`.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        for split, rows in content.splits.items():
            write_split(new / split, content.samples(progress(rows, len(rows))))
        classnames = "".join(f"{name}\n" for name in content.classes)
        zeroshot_templates = "".join(f"{line}\n" for line in lines)
        (new / "classnames.txt").write_text(classnames)
        (new / "zeroshot_classification_templates.txt").write_text(zeroshot_templates)
        os.rename(new, out)
    counts = {split: len(rows) for split, rows in content.splits.items()}
    return dict(classes=content.classes, left_out=content.left_out, **counts)


def video_content(source: Path) -> Content[tuple[Path, dict]]:
    """Return the content of an ImageNet-Vid-Robust."""
    classes = videos.classes(source)
    splits = {"test": videos.frames(source)}
    return Content(classes, 0, splits, videos.samples)


def image_content(
    source: Path, names: Path | None, image_column: str | None, class_column: str | None
) -> Content[tuple[str, Path]]:
    """Return the content of a tree or a table, without the classes that `names` leaves out."""
    entries = tree(source) if source.is_dir() else table(source, image_column, class_column)
    every = sorted_classes(entries)
    name_of = named(every, names)
    left_out = len(every) - len(name_of)
    splits = {}
    for split, rows in entries.items():
        splits[split] = [(label, path) for label, path in rows if label in name_of]
    make = partial(samples, number={label: i for i, label in enumerate(name_of)})
    return Content(list(name_of.values()), left_out, splits, make)


def sorted_classes(entries: Entries) -> list[str]:
    """Return every class of any split, by name; by size if all are numbers."""
    classes = {label for rows in entries.values() for label, _ in rows}
    if all(label.isdecimal() for label in classes):
        return sorted(classes, key=int)
    return sorted(classes)


def tree(root: Path) -> Entries:
    """Return the images below each class's folder, in order.

    The classes are below a folder for each split, or else all are test.
    """
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    splits: dict[str, Path] = {}
    for folder in folders:
        if folder.name.lower() in SPLITS:
            splits[SPLITS[folder.name.lower()]] = folder
    if splits and len(splits) == len(folders):
        # Without a test split, the validation split is the test split, or else the train split.
        if "test" not in splits:
            substitute = "val" if "val" in splits else "train"
            splits["test"] = splits.pop(substitute)
    else:
        splits = {"test": root}

    entries: Entries = {split: classified_images(path) for split, path in sorted(splits.items())}
    for split, rows in entries.items():
        if not rows:
            raise ValueError(
                f"{splits[split]}: no images in folders in it; it must be CLASS/image.jpg, or"
                " train/ and test/ with these"
            )
    return entries


def classified_images(root: Path) -> list[tuple[str, Path]]:
    """Return (class, image) of the images below each class's folder."""
    rows = []
    for folder in sorted(root.iterdir()):
        if folder.is_dir():
            rows += [(folder.name, path) for path in below(folder)]
    return rows


def below(folder: Path) -> list[Path]:
    """Return the images in the folder and its subfolders, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path.name))


def table(path: Path, image_column: str | None, class_column: str | None) -> Entries:
    """Return the images of a table, in its order; ValueError if a row is incomplete."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(
            f"{path}: not a source; it must be a folder with a folder a class, or a .csv or .tsv"
            " table"
        )
    source = Classes(path, image_column, class_column)
    image_column, class_column = source.columns
    entries: Entries = {}
    for line, row in enumerate(source.read(csv.DictReader), start=1):
        image = row[image_column]
        label = row[class_column]
        split = SPLITS.get((row.get("split") or "test").lower())
        if not image or not label or not split:
            raise ValueError(
                f"{path}: row {line}: it needs an image, a class and, where there is a column for"
                f" it, a split of {', '.join(SPLITS)}"
            )
        entries.setdefault(split, []).append((label, path.parent / image))
    if "test" not in entries:
        raise ValueError(f"{path}: no rows of the split test, on which is evaluated")
    return entries


class Classes(Csv):
    """A table of images and classes."""

    second: tuple[str, tuple[str, ...]] = ("class", CLASS_COLUMNS)


def named(classes: list[str], names: Path | None) -> dict[str, str]:
    """Return {class: its name in prompts} of the classes to evaluate, in order.

    Without a file of names: those of ImageNet if all classes are WordNet numbers, or else the
    classes themselves.
    """
    if not names:
        wordnet = dict(line.split("\t") for line in WORDNET.read_text().splitlines())
        if set(classes) <= set(wordnet):
            return {label: wordnet[label] for label in classes}
        return {label: label.replace("_", " ") for label in classes}

    # The file has either a tab in every line, or a line for each class.
    lines = names.read_text().rstrip("\n").splitlines()
    if all("\t" in line for line in lines):
        known = dict(line.split("\t", 1) for line in lines)
        unknown = [label for label in known if label not in classes]
        if unknown:
            raise ValueError(
                f"--names: {names} names {', '.join(unknown[:5])}; there are no images of it"
            )
    elif len(lines) == len(classes):
        known = dict(zip(classes, lines))
    else:
        raise ValueError(
            f"--names: {names} has {len(lines)} lines; the classes are {len(classes)}:"
            f" {', '.join(classes[:5])}, ..."
        )

    unnamed = [label for label, name in known.items() if not name.strip()]
    if unnamed:
        raise ValueError(f"--names: {names} has no name for {', '.join(unnamed[:5])}")
    return {label: known[label].strip() for label in classes if label in known}


def samples(
    rows: Iterable[tuple[str, Path]], number: dict[str, int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, parts) of each image: a jpg, png or webp unchanged, others as a png."""
    for i, (label, path) in enumerate(rows):
        data = path.read_bytes()
        try:
            kind = kind_of(data)
        except ValueError:
            data = as_png(path, data)
            kind = "png"
        yield f"{i:07d}", {kind: data, "cls": str(number[label]).encode()}


def as_png(path: Path, data: bytes) -> bytes:
    """Return an image of any readable format as a PNG."""
    out = io.BytesIO()
    try:
        Image.fromarray(decode(data)).save(out, "PNG")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return out.getvalue()
