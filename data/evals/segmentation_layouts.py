"""Evaluation sets stored as folders of images, and of label maps with the images' names.

ADE20K, Pascal Context, COCO-Stuff, and sets of your own. A layout is a class, which defines the
numbers that its label maps store and the names of the classes; data/evals/layouts.py lists them.
Names: a map *stores* numbers, 0 to 255; the set's classes go from 0 without gaps, IGNORE is none.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glimpse.data.evals.clip_benchmark import IGNORE, Images, decode_label_map
from glimpse.data.evals.prompts import split_synonyms
from glimpse.data.shards import IMAGE_EXTENSIONS
from glimpse.data.transforms import image_size

UNKNOWN_CLASS = 254  # in a table from stored numbers to classes: the layout has no such number
# The classes of SegmentationClassContext, which the Detail API's converters write, in its order: by
# name. 59_labels.txt has another order.
CONTEXT_CLASSES = """
aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat
ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse
keyboard light motorbike mountain mouse person plate platform pottedplant road rock sheep
shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall water window
wood
""".split()
# Things of COCO's list that no image has, by their number in labels.txt: street sign, hat, shoe,
# eye glasses, plate, mirror, window, desk, door, blender, hair brush.
UNUSED_THINGS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


class FileSet(Images):
    """A set whose images are single files."""

    content: str  # the method of Images that the layout is for: label_map, captions, questions
    splits: dict[str, str]  # our name of a split -> the layout's own, which is known, too
    paths: list[Path]

    def __init__(self, folder: str | Path, split: str = "test"):
        self.folder, self.split = Path(folder), split
        if split not in self.splits and split not in self.splits.values():
            raise ValueError(
                f"evals: {folder}: no split {split!r} in it; it has {', '.join(self.splits)}"
            )
        self.read_split(self.splits.get(split, split))

    @classmethod
    @abstractmethod
    def matches(cls, folder: Path) -> bool:
        """Return True if a folder is in this layout."""

    @abstractmethod
    def read_split(self, part: str) -> None:
        """Find the images of the layout's split `part`, and what is known of them."""

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> bytes:
        return self.paths[i].read_bytes()

    def key(self, i: int) -> str:
        return str(self.paths[i].relative_to(self.folder))

    def open_split(self, split: str) -> "FileSet":
        return type(self)(self.folder, split)


class LabelMaps(FileSet):
    """Pairs of files; `table`: (256,) from what a map stores to classes."""

    content = "label_map"
    maps: list[Path]
    table: np.ndarray
    class_lines: list[str]

    def pair_files(self, images: Path, maps: Path, stems: Sequence[str] | None = None) -> None:
        """Set `paths` and `maps` to the images of a folder, or those of `stems`, and their maps.

        ValueError: a folder, an image or a map is missing.
        """
        for place in (images, maps):
            if not place.is_dir():
                raise ValueError(
                    f"evals: {self.folder}: it needs {place.relative_to(self.folder)}/"
                )
        image_files = [
            path for path in images.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS
        ]
        map_files = [path for path in maps.iterdir() if path.suffix.lower() == ".png"]
        image_by_stem = {path.stem: path for path in sorted(image_files)}
        map_by_stem = {path.stem: path for path in map_files}

        if stems is None:
            stems = list(image_by_stem)
        if not stems:
            raise ValueError(f"evals: {images}: no images in it")
        for place, by_stem in ((images, image_by_stem), (maps, map_by_stem)):
            missing = [stem for stem in stems if stem not in by_stem]
            if missing:
                raise ValueError(
                    f"evals: {place} has nothing for {len(missing):,} of {len(stems):,} images, the"
                    f" first is {missing[0]}"
                )
        self.paths = [image_by_stem[stem] for stem in stems]
        self.maps = [map_by_stem[stem] for stem in stems]

    def set_classes(
        self, names: Sequence[str], stored: Sequence[int], none: Sequence[int] = (IGNORE,)
    ) -> None:
        """Set `named` and `table`: class i is called names[i] and stored as stored[i].

        none: the numbers that stand for no class.
        """
        self.class_lines = list(names)
        self.table = np.full(256, UNKNOWN_CLASS, np.uint8)
        self.table[list(none)] = IGNORE
        self.table[list(stored)] = np.arange(len(stored))

    def class_synonyms(self) -> list[list[str]]:
        return list(map(split_synonyms, self.class_lines))

    def label_map(self, i: int) -> np.ndarray:
        try:
            stored = decode_label_map(self.maps[i].read_bytes())
            height, width = image_size(self.image(i))
        except ValueError as error:
            raise ValueError(f"evals: {self.maps[i]} or its image: {error}") from None
        if stored.shape != (height, width):
            raise ValueError(
                f"evals: {self.maps[i]} has {stored.shape[0]} x {stored.shape[1]} pixels, its image"
                f" {height} x {width}"
            )
        labels = self.table[stored]
        strange = np.unique(stored[labels == UNKNOWN_CLASS]).tolist()
        if strange:
            some = ", ".join(map(str, strange[:5]))
            lowest, highest = min(self.stored_numbers), max(self.stored_numbers)
            raise ValueError(
                f"evals: {self.maps[i]} has pixels of class {some}; the {len(self.class_lines)} classes"
                f" of this layout are stored as {lowest} to {highest}"
            )
        return labels

    @property
    def stored_numbers(self) -> list[int]:
        """The numbers that stand for a class."""
        is_class = (self.table != IGNORE) & (self.table != UNKNOWN_CLASS)
        return np.flatnonzero(is_class).tolist()

    def read_class_list(self, path: Path) -> dict[int, str]:
        """Read the lines 'NUMBER: NAME' of a text file."""
        if not path.exists():
            name = path.relative_to(self.folder)
            raise ValueError(
                f"evals: {self.folder}: it needs {name}, the data set's own list of classes"
            )
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        names = {}
        for number, line in enumerate(lines, start=1):
            row = re.fullmatch(r"\s*(\d+)\s*[:\t]\s*(.*\S)\s*", line)
            if row is None:
                raise ValueError(f"evals: {path}: line {number} is no 'NUMBER: NAME'")
            names[int(row[1])] = row[2]
        return names


class Ade20k(LabelMaps):
    """ADEChallengeData2016, the scene parsing benchmark's 150 classes; 0 is stored for none.

    Names: the first of objectInfo150.txt's.
    """

    splits = {"test": "validation", "train": "training"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        places = ("annotations/validation", "images/validation")
        return all((folder / place).is_dir() for place in places)

    def read_split(self, part: str) -> None:
        rows = [line.split("\t") for line in self.read_lines("objectInfo150.txt")[1:]]
        numbers = [row[0].strip() for row in rows]
        if numbers != [str(number) for number in range(1, 151)]:
            raise ValueError(
                f"evals: {self.folder}/objectInfo150.txt:"
                " not the benchmark's table of classes 1 to 150"
            )
        names = [row[-1].split(",")[0].strip() for row in rows]
        self.set_classes(names, range(1, 151), none=(0, IGNORE))
        self.pair_files(self.folder / "images" / part, self.folder / "annotations" / part)


class PascalContext(LabelMaps):
    """VOC2010 with Pascal Context's maps: 59 classes, 0 is stored for none.

    60 classes, background first, if classnames.txt has as many names.
    """

    splits = {"test": "val", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        places = ("SegmentationClassContext", "59_context_labels")
        return any((folder / place).is_dir() for place in places)

    def read_split(self, part: str) -> None:
        # The classes: the user's names, else those of the kind of maps that is there.
        sorted_maps = self.folder / "SegmentationClassContext"  # of classes sorted by name
        if (self.folder / "classnames.txt").exists():
            names = self.read_lines("classnames.txt")
        elif sorted_maps.is_dir():
            names = CONTEXT_CLASSES
        else:
            names = list(self.read_class_list(self.folder / "59_labels.txt").values())
        if len(names) not in (59, 60):
            raise ValueError(
                f"evals: {self.folder}: {len(names)} names of classes; Pascal Context has 59, or 60"
                " with the background"
            )
        self.set_classes(names, range(60 - len(names), 60), none=(0, IGNORE))

        # The images of the split.
        context_list = self.folder / "ImageSets" / "SegmentationContext" / f"{part}.txt"
        main_list = self.folder / "ImageSets" / "Main" / f"{part}.txt"
        stem_list = context_list if context_list.exists() else main_list
        if not stem_list.exists():
            needed = context_list.relative_to(self.folder)
            raise ValueError(
                f"evals: {self.folder}: it needs {needed}, or VOC's own {part}.txt in Main"
            )
        stems = stem_list.read_text().split()
        maps = sorted_maps if sorted_maps.is_dir() else self.folder / "59_context_labels"
        self.pair_files(self.folder / "JPEGImages", maps, stems)


class CocoStuff(LabelMaps):
    """COCO-Stuff 164k: 80 things and 91 kinds of stuff.

    Each is stored as one less than its number in labels.txt.
    """

    splits = {"test": "val2017", "train": "train2017"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        places = ("stuffthingmaps/val2017", "annotations/val2017")
        return any((folder / place).is_dir() for place in places)

    def read_split(self, part: str) -> None:
        listed = self.read_class_list(self.folder / "labels.txt")
        if sorted(listed) != list(range(183)):
            raise ValueError(
                f"evals: {self.folder}/labels.txt:"
                " not COCO-Stuff's list, whose lines go from 0 to 182"
            )
        used = [number for number in range(1, 183) if number not in UNUSED_THINGS]
        self.set_classes([listed[number] for number in used], [number - 1 for number in used])

        images = self.folder / "images" / part
        if not images.is_dir():
            images = self.folder / part
        maps = self.folder / "stuffthingmaps"
        if not maps.is_dir():
            maps = self.folder / "annotations"
        self.pair_files(images, maps / part)


class CustomFolders(LabelMaps):
    """A set of your own: images/, labels/ and classnames.txt, whose line i + 1 names class i.

    Several splits are folders in images/ and labels/.
    """

    splits = {"test": "test", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return all((folder / name).exists() for name in ("images", "labels", "classnames.txt"))

    def read_split(self, part: str) -> None:
        names = self.read_lines("classnames.txt")
        if "" in map(str.strip, names):
            raise ValueError(
                f"evals: {self.folder}: classnames.txt has an empty line; line i + 1 names class i"
            )
        if len(names) > UNKNOWN_CLASS:
            raise ValueError(
                f"evals: {self.folder}: {len(names)} classes; a label map of bytes holds {UNKNOWN_CLASS}"
            )
        self.set_classes(names, range(len(names)))
        images, maps = self.folder / "images", self.folder / "labels"
        if (images / part).is_dir() or part != "test":
            images, maps = images / part, maps / part
        self.pair_files(images, maps)
