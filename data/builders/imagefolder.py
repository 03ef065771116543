"""Classified images of your own -> an evaluation set in CLIP_benchmark's layout: a tree with a
folder a class, or a table.

    build(Path("photos"), Path("datasets/mine")) -> {"classes": [...], "test": 120}

A tree is CLASS/image.jpg, or train/CLASS/image.jpg and test/CLASS/image.jpg. A table (csv, tsv) has
a column of images, paths from its
own folder, one of classes, and perhaps one called split. Classes are numbered in order of their
names, numbers in order of size. Folders called by WordNet numbers, as ImageNet's and its
relatives', get CLIP's class names (data/builders/imagenet.tsv: the names are open_clip's).
ImageNet-Vid-Robust's folder is known, too (data/builders/videos.py).
"""

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from glimpse.data.builders import videos
from glimpse.data.builders.packaged.build import write_split
from glimpse.data.builders.pairs import Csv, kind_of
from glimpse.data.evals.gallery import is_image
from glimpse.data.evals.prompts import templates
from glimpse.data.transforms import decode

CLASS_COLUMNS = ("class", "label", "category", "target", "class_name", "classname")
# what a folder or a row is called
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WORDNET = Path(__file__).parent / "imagenet.tsv"
PROMPT = "a photo of a {c}."  # CLIP section 3.1.4
Entries = dict[str, list[tuple[str, Path]]]  # split -> (class, image)


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
    """Write the set; the same source gives the same bytes. ValueError: an image cannot be read, or
    a class has no name.

    names: a file with a class's name a line, in order, or `FOLDER<tab>name`, which takes these
    folders alone (ObjectNet: those that ImageNet has, too). prompts: templates as
    data/evals/prompts.py
    knows them.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out: {out} exists and is not an empty folder; remove it or name another"
        )
    lines = templates(prompts) if prompts else [PROMPT]
    if videos.is_video_set(source):
        called, left_out, found, make = (
            videos.classes(source),
            0,
            {"test": videos.frames(source)},
            videos.samples,
        )
    else:
        found = tree(source) if source.is_dir() else table(source, image_column, class_column)
        every = {label for rows in found.values() for label, _ in rows}
        taken = named(
            sorted(every, key=int if all(label.isdecimal() for label in every) else str), names
        )
        called, left_out = list(taken.values()), len(every) - len(taken)
        found = {
            split: [(label, path) for label, path in rows if label in taken]
            for split, rows in found.items()
        }
        make = partial(samples, number={label: i for i, label in enumerate(taken)})
    out.parent.mkdir(parents=True, exist_ok=True)
    # broken off, it leaves no `out`
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        for split, rows in found.items():
            write_split(new / split, make(progress(rows, len(rows))))
        (new / "classnames.txt").write_text("".join(f"{name}\n" for name in called))
        (new / "zeroshot_classification_templates.txt").write_text(
            "".join(f"{line}\n" for line in lines)
        )
        os.rename(new, out)
    return dict(
        classes=called, left_out=left_out, **{split: len(rows) for split, rows in found.items()}
    )


def tree(root: Path) -> Entries:
    """The images below each class's folder, in order; with one folder a split above them, or all
    are test.
    """
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    splits = {SPLITS[path.name.lower()]: path for path in folders if path.name.lower() in SPLITS}
    if splits and len(splits) == len(folders):
        if "test" not in splits:
            splits["test"] = splits.pop("val", None) or splits.pop("train")
    else:
        splits = {"test": root}
    found = {
        split: [
            (folder.name, path)
            for folder in sorted(path.iterdir())
            if folder.is_dir()
            for path in below(folder)
        ]
        for split, path in sorted(splits.items())
    }
    for split, rows in found.items():
        if not rows:
            raise ValueError(
                f"{splits[split]}: no images in folders in it; it must be CLASS/image.jpg, or"
                " train/ and test/ with these"
            )
    return found


def below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path.name))


def table(path: Path, image_column: str | None, class_column: str | None) -> Entries:
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(
            f"{path}: not a source; it must be a folder with a folder a class, or a .csv or .tsv"
            " table"
        )
    source = Classes(path, image_column, class_column)
    found: Entries = {}
    for line, row in enumerate(source.read(csv.DictReader), start=1):
        image, label = (row[column] for column in source.columns)
        split = SPLITS.get((row.get("split") or "test").lower())
        if not image or not label or not split:
            raise ValueError(
                f"{path}: row {line}: it needs an image, a class and, where there is a column for"
                f" it, a split of {', '.join(SPLITS)}"
            )
        found.setdefault(split, []).append((label, path.parent / image))
    if "test" not in found:
        raise ValueError(f"{path}: no rows of the split test, on which is evaluated")
    return found


class Classes(Csv):
    second = ("class", CLASS_COLUMNS)


def named(classes: list[str], names: Path | None) -> dict[str, str]:
    """{class: what it is called in prompts} of those that are taken, in order."""
    if not names:
        wordnet = dict(line.split("\t") for line in WORDNET.read_text().splitlines())
        return {
            label: wordnet[label] if set(classes) <= set(wordnet) else label.replace("_", " ")
            for label in classes
        }
    lines = names.read_text().rstrip("\n").splitlines()
    if all("\t" in line for line in lines):
        known = dict(line.split("\t", 1) for line in lines)
        if unknown := [label for label in known if label not in classes]:
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
    if unnamed := [label for label, name in known.items() if not name.strip()]:
        raise ValueError(f"--names: {names} has no name for {', '.join(unnamed[:5])}")
    return {label: known[label].strip() for label in classes if label in known}


def samples(
    rows: Iterable[tuple[str, Path]], number: dict[str, int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts) of each image: as it is where it is a jpg, png or webp, else as a png."""
    for i, (label, path) in enumerate(rows):
        data = path.read_bytes()
        try:
            kind = kind_of(data)
        except ValueError:
            data, kind = as_png(path, data), "png"
        yield f"{i:07d}", {kind: data, "cls": str(number[label]).encode()}


def as_png(path: Path, data: bytes) -> bytes:
    out = io.BytesIO()
    try:
        Image.fromarray(decode(data)).save(out, "PNG")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return out.getvalue()
