"""Evaluation sets that are folders of images, and of label maps with the images' names: ADE20K,
Pascal Context, COCO-Stuff, your own.

A layout is a class: what its label maps store, and which names the classes have.
data/evals/layouts.py
lists them.
Names: a map *stores* numbers, 0 to 255; the set's classes go from 0 without gaps, IGNORE is none.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glimpse.data.evals.clip_benchmark import IGNORE, Images, decode_map
from glimpse.data.evals.prompts import synonyms
from glimpse.data.shards import IMAGES
from glimpse.data.transforms import image_size

UNKNOWN = 254  # in a table from stored numbers to classes: the layout has no such number
# The order of SegmentationClassContext, which the Detail API's converters write: by name.
# 59_labels.txt has another one.
CONTEXT = """
aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat
ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse
keyboard light motorbike mountain mouse person plate platform pottedplant road rock sheep
shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall water window
wood
""".split()
# Things of COCO's list that no image has, by their line in labels.txt: street sign, hat, shoe, eye
# glasses, plate, mirror, window, desk, door, blender, hair brush.
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


class Files(Images):
    """A set whose images are files of their own."""

    holds: str  # the method of Images that the layout is for: label_map, captions, questions
    splits: dict[str, str]  # our name of a split -> the layout's own, which is known, too
    paths: list[Path]

    def __init__(self, folder: str | Path, split: str = "test"):
        self.folder, self.split = Path(folder), split
        if split not in self.splits and split not in self.splits.values():
            raise ValueError(
                f"evals: {folder}: no split {split!r} in it; it has {', '.join(self.splits)}"
            )
        self.open(self.splits.get(split, split))

    @classmethod
    @abstractmethod
    def fits(cls, folder: Path) -> bool:
        """Whether a folder is in this layout."""

    @abstractmethod
    def open(self, part: str) -> None:
        """Find what the layout's split `part` holds."""

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> bytes:
        return self.paths[i].read_bytes()

    def key(self, i: int) -> str:
        return str(self.paths[i].relative_to(self.folder))


class LabelMaps(Files):
    """Pairs of files; `table`: (256,) from what a map stores to classes."""

    holds = "label_map"
    maps: list[Path]
    table: np.ndarray
    named: list[str]

    def pair(self, images: Path, maps: Path, stems: Sequence[str] | None = None) -> None:
        """Take the images of a folder, or those of the stems given, and for each its map."""
        for place in (images, maps):
            if not place.is_dir():
                raise ValueError(
                    f"evals: {self.folder}: it needs {place.relative_to(self.folder)}/"
                )
        found = {
            path.stem: path
            for path in sorted(images.iterdir())
            if path.suffix[1:].lower() in IMAGES
        }
        known = {path.stem: path for path in maps.iterdir() if path.suffix.lower() == ".png"}
        stems = list(found) if stems is None else stems
        if not stems:
            raise ValueError(f"evals: {images}: no images in it")
        for place, there in ((images, found), (maps, known)):
            if missing := [stem for stem in stems if stem not in there]:
                raise ValueError(
                    f"evals: {place} has nothing for {len(missing):,} of {len(stems):,} images, the"
                    f" first is {missing[0]}"
                )
        self.paths, self.maps = [found[stem] for stem in stems], [known[stem] for stem in stems]

    def call(
        self, names: Sequence[str], stored: Sequence[int], none: Sequence[int] = (IGNORE,)
    ) -> None:
        """Class i is called names[i] and stored as stored[i]; `none`: what is stored for no
        class.
        """
        self.named, self.table = list(names), np.full(256, UNKNOWN, np.uint8)
        self.table[list(none)] = IGNORE
        self.table[list(stored)] = np.arange(len(stored))

    def names(self) -> list[list[str]]:
        return list(map(synonyms, self.named))

    def label_map(self, i: int) -> np.ndarray:
        try:
            stored, shape = decode_map(self.maps[i].read_bytes()), image_size(self.image(i))
        except ValueError as error:
            raise ValueError(f"evals: {self.maps[i]} or its image: {error}") from None
        if stored.shape != shape:
            raise ValueError(
                f"evals: {self.maps[i]} has {stored.shape[0]} x {stored.shape[1]} pixels, its image"
                f" {shape[0]} x {shape[1]}"
            )
        found = self.table[stored]
        if strange := sorted(set(stored[found == UNKNOWN].tolist())):
            raise ValueError(
                f"evals: {self.maps[i]} has pixels of class {', '.join(map(str, strange[:5]))}; the"
                f" {len(self.named)} classes of this layout are stored as {min(self.known)} to"
                f" {max(self.known)}"
            )
        return found

    @property
    def known(self) -> list[int]:
        return [
            number
            for number, label in enumerate(self.table.tolist())
            if label not in (IGNORE, UNKNOWN)
        ]

    def listed(self, path: Path) -> dict[int, str]:
        """The lines 'NUMBER: NAME' of a text file."""
        if not path.exists():
            raise ValueError(
                f"evals: {self.folder}: it needs {path.relative_to(self.folder)}, the data set's"
                " own list of classes"
            )
        rows = [
            re.fullmatch(r"\s*(\d+)\s*[:\t]\s*(.*\S)\s*", line)
            for line in path.read_text().splitlines()
            if line.strip()
        ]
        if not all(rows):
            raise ValueError(f"evals: {path}: line {rows.index(None) + 1} is no 'NUMBER: NAME'")
        return {int(row[1]): row[2] for row in rows}


class Ade20k(LabelMaps):
    """ADEChallengeData2016, the scene parsing benchmark's 150 classes; 0 is stored for none.

    Names: the first of objectInfo150.txt's.
    """

    splits = {"test": "validation", "train": "training"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return (folder / "annotations/validation").is_dir() and (
            folder / "images/validation"
        ).is_dir()

    def open(self, part: str) -> None:
        rows = [line.split("\t") for line in self.lines("objectInfo150.txt")[1:]]
        if [row[0].strip() for row in rows] != [str(i + 1) for i in range(150)]:
            raise ValueError(
                f"evals: {self.folder}/objectInfo150.txt: not the benchmark's table of classes 1"
                " to 150"
            )
        self.call([row[-1].split(",")[0].strip() for row in rows], range(1, 151), none=(0, IGNORE))
        self.pair(self.folder / "images" / part, self.folder / "annotations" / part)


class PascalContext(LabelMaps):
    """VOC2010 with Pascal Context's maps: 59 classes, 0 is stored for none; 60 where classnames.txt
    names as many, background first.
    """

    splits = {"test": "val", "train": "train"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return any(
            (folder / maps).is_dir() for maps in ("SegmentationClassContext", "59_context_labels")
        )

    def open(self, part: str) -> None:
        sorted_ones = self.folder / "SegmentationClassContext"
        if (self.folder / "classnames.txt").exists():
            names = self.lines("classnames.txt")
        elif sorted_ones.is_dir():
            names = CONTEXT
        else:
            names = list(self.listed(self.folder / "59_labels.txt").values())
        if len(names) not in (59, 60):
            raise ValueError(
                f"evals: {self.folder}: {len(names)} names of classes; Pascal Context has 59, or 60"
                " with the background"
            )
        self.call(names, range(60 - len(names), 60), none=(0, IGNORE))
        lists = [
            self.folder / "ImageSets" / kind / f"{part}.txt"
            for kind in ("SegmentationContext", "Main")
        ]
        if not any(path.exists() for path in lists):
            raise ValueError(
                f"evals: {self.folder}: it needs {lists[0].relative_to(self.folder)}, or VOC's own"
                f" {part}.txt in Main"
            )
        stems = next(path for path in lists if path.exists()).read_text().split()
        self.pair(
            self.folder / "JPEGImages",
            sorted_ones if sorted_ones.is_dir() else self.folder / "59_context_labels",
            stems,
        )


class CocoStuff(LabelMaps):
    """COCO-Stuff 164k: 80 things and 91 kinds of stuff, stored as one less than their lines in
    labels.txt.
    """

    splits = {"test": "val2017", "train": "train2017"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return any(
            (folder / maps / "val2017").is_dir() for maps in ("stuffthingmaps", "annotations")
        )

    def open(self, part: str) -> None:
        listed = self.listed(self.folder / "labels.txt")
        if sorted(listed) != list(range(183)):
            raise ValueError(
                f"evals: {self.folder}/labels.txt: not COCO-Stuff's list, whose lines go from 0"
                " to 182"
            )
        used = [number for number in range(1, 183) if number not in UNUSED]
        self.call([listed[number] for number in used], [number - 1 for number in used])
        images = self.folder / "images" / part
        maps = self.folder / "stuffthingmaps"
        self.pair(
            images if images.is_dir() else self.folder / part,
            (maps if maps.is_dir() else self.folder / "annotations") / part,
        )


class Folders(LabelMaps):
    """A set of your own: images/, labels/ and classnames.txt, whose line i + 1 names class i;
    several splits are folders in both.
    """

    splits = {"test": "test", "train": "train"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return all((folder / name).exists() for name in ("images", "labels", "classnames.txt"))

    def open(self, part: str) -> None:
        names = self.lines("classnames.txt")
        if "" in map(str.strip, names):
            raise ValueError(
                f"evals: {self.folder}: classnames.txt has an empty line; line i + 1 names class i"
            )
        if len(names) > UNKNOWN:
            raise ValueError(
                f"evals: {self.folder}: {len(names)} classes; a label map of bytes holds {UNKNOWN}"
            )
        self.call(names, range(len(names)))
        images, maps = self.folder / "images", self.folder / "labels"
        split = (images / part).is_dir() or part != "test"
        self.pair(images / part if split else images, maps / part if split else maps)
