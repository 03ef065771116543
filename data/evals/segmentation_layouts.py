"""Layouts of evaluation sets with folders of images and folders of label maps.

ADE20K, Pascal Context, COCO-Stuff and custom sets. Each layout is a class, which defines the class
names and how the label maps store them; data/evals/layouts.py lists the layouts.

A label map stores values from 0 to 255. `LabelMaps.table` converts them to classes, which are
numbered from 0 without gaps; IGNORE stands for no class.
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

UNKNOWN_CLASS = 254  # in LabelMaps.table: the layout does not use this value
# Classes of SegmentationClassContext, in the order of its label maps, which is alphabetical. (The
# Detail API's converters write these maps; 59_labels.txt has another order.)
CONTEXT_CLASSES = """
aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat
ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse
keyboard light motorbike mountain mouse person plate platform pottedplant road rock sheep
shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall water window
wood
""".split()
# Line numbers of labels.txt of things that occur in no image: street sign, hat, shoe, eye glasses,
# plate, mirror, window, desk, door, blender, hair brush.
UNUSED_THINGS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


class FileSet(Images):
    """Base class of layouts whose images are single files."""

    content: str  # method of Images for its annotations: label_map, captions or questions
    splits: dict[str, str]  # test, train or val -> name in the layout; both names are accepted
    paths: list[Path]

    def __init__(self, folder: str | Path, split: str = "test"):
        self.folder, self.split = Path(folder), split
        if split not in self.splits and split not in self.splits.values():
            raise ValueError(
                f"evals: {folder}: no split {split!r}; it has {', '.join(self.splits)}"
            )
        self.read_split(self.splits.get(split, split))

    @classmethod
    @abstractmethod
    def matches(cls, folder: Path) -> bool:
        """Return True if a folder has this layout."""

    @abstractmethod
    def read_split(self, name: str) -> None:
        """Locate the images of a split and read their annotations.

        name: of the split in this layout.
        """

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> bytes:
        return self.paths[i].read_bytes()

    def key(self, i: int) -> str:
        return str(self.paths[i].relative_to(self.folder))

    def open_split(self, split: str) -> "FileSet":
        return type(self)(self.folder, split)


class LabelMaps(FileSet):
    """Base class of layouts with label maps.

    `table` (256,) converts stored values to classes.
    """

    content = "label_map"
    maps: list[Path]
    table: np.ndarray
    class_lines: list[str]

    def pair_files(self, images: Path, maps: Path, stems: Sequence[str] | None = None) -> None:
        """Set `paths` and `maps` to the images in a folder, and their label maps in another.

        stems: file names without extension of the images to use; None uses all. Raise ValueError if
        a folder, an image or a map is missing.
        """
        for folder in (images, maps):
            if not folder.is_dir():
                raise ValueError(
                    f"evals: {self.folder}: it needs {folder.relative_to(self.folder)}/"
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
        for folder, by_stem in ((images, image_by_stem), (maps, map_by_stem)):
            missing = [stem for stem in stems if stem not in by_stem]
            if missing:
                raise ValueError(
                    f"evals: {folder}: {len(missing):,} of {len(stems):,} images have no file in"
                    f" it, the first is {missing[0]}"
                )
        self.paths = [image_by_stem[stem] for stem in stems]
        self.maps = [map_by_stem[stem] for stem in stems]

    def set_classes(
        self, names: Sequence[str], stored: Sequence[int], none: Sequence[int] = (IGNORE,)
    ) -> None:
        """Set `class_lines` and `table`: class i is called names[i] and stored as stored[i].

        none: stored values that stand for no class.
        """
        self.class_lines = list(names)
        self.table = np.full(256, UNKNOWN_CLASS, np.uint8)
        self.table[list(none)] = IGNORE
        self.table[list(stored)] = np.arange(len(stored))

    def class_synonyms(self) -> list[list[str]]:
        return list(map(split_synonyms, self.class_lines))

    def label_map(self, i: int) -> np.ndarray:
        try:
            values = decode_label_map(self.maps[i].read_bytes())
            height, width = image_size(self.image(i))
        except ValueError as error:
            raise ValueError(f"evals: {self.maps[i]} or its image: {error}") from None
        if values.shape != (height, width):
            raise ValueError(
                f"evals: {self.maps[i]} has {values.shape[0]} x {values.shape[1]} pixels, its image"
                f" {height} x {width}"
            )
        labels = self.table[values]
        unknown = np.unique(values[labels == UNKNOWN_CLASS]).tolist()
        if unknown:
            examples = ", ".join(map(str, unknown[:5]))
            lowest, highest = min(self.stored_numbers), max(self.stored_numbers)
            raise ValueError(
                f"evals: {self.maps[i]} has pixels of class {examples}; this layout stores its"
                f" {len(self.class_lines)} classes as {lowest} to {highest}"
            )
        return labels

    @property
    def stored_numbers(self) -> list[int]:
        """The stored values that stand for a class."""
        is_class = (self.table != IGNORE) & (self.table != UNKNOWN_CLASS)
        return np.flatnonzero(is_class).tolist()

    def read_class_list(self, path: Path) -> dict[int, str]:
        """Read the lines 'NUMBER: NAME' of a text file."""
        if not path.exists():
            name = path.relative_to(self.folder)
            raise ValueError(
                f"evals: {self.folder}: it needs {name}, the data set's list of classes"
            )
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        names = {}
        for number, line in enumerate(lines, start=1):
            match = re.fullmatch(r"\s*(\d+)\s*[:\t]\s*(.*\S)\s*", line)
            if match is None:
                raise ValueError(f"evals: {path}: line {number} is not 'NUMBER: NAME'")
            names[int(match[1])] = match[2]
        return names


class Ade20k(LabelMaps):
    """ADE20K: ADEChallengeData2016, the 150 classes of the scene parsing benchmark.

    0 is stored for no class. Of the names of a class in objectInfo150.txt, the first is used.
    """

    splits = {"test": "validation", "train": "training"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        required = ("annotations/validation", "images/validation")
        return all((folder / name).is_dir() for name in required)

    def read_split(self, name: str) -> None:
        rows = [line.split("\t") for line in self.read_lines("objectInfo150.txt")[1:]]
        numbers = [row[0].strip() for row in rows]
        if numbers != [str(number) for number in range(1, 151)]:
            raise ValueError(
                f"evals: {self.folder}/objectInfo150.txt: it is not the benchmark's table of the"
                " classes 1 to 150"
            )
        names = [row[-1].split(",")[0].strip() for row in rows]
        self.set_classes(names, range(1, 151), none=(0, IGNORE))
        self.pair_files(self.folder / "images" / name, self.folder / "annotations" / name)


class PascalContext(LabelMaps):
    """Pascal Context: VOC2010 with label maps of 59 classes; 0 is stored for no class.

    If classnames.txt has 60 names, 0 is the class `background`, the first.
    """

    splits = {"test": "val", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        map_folders = ("SegmentationClassContext", "59_context_labels")
        return any((folder / name).is_dir() for name in map_folders)

    def read_split(self, name: str) -> None:
        # Class names: from classnames.txt, else those that belong to the kind of label maps.
        sorted_maps = self.folder / "SegmentationClassContext"  # classes in alphabetical order
        if (self.folder / "classnames.txt").exists():
            names = self.read_lines("classnames.txt")
        elif sorted_maps.is_dir():
            names = CONTEXT_CLASSES
        else:
            names = list(self.read_class_list(self.folder / "59_labels.txt").values())
        if len(names) not in (59, 60):
            raise ValueError(
                f"evals: {self.folder}: {len(names)} class names; Pascal Context has 59, or 60 with"
                " the background"
            )
        self.set_classes(names, range(60 - len(names), 60), none=(0, IGNORE))

        # The images of the split.
        context_list = self.folder / "ImageSets" / "SegmentationContext" / f"{name}.txt"
        main_list = self.folder / "ImageSets" / "Main" / f"{name}.txt"
        stem_list = context_list if context_list.exists() else main_list
        if not stem_list.exists():
            missing = context_list.relative_to(self.folder)
            raise ValueError(
                f"evals: {self.folder}: it needs {missing}, or VOC's {name}.txt in ImageSets/Main"
            )
        stems = stem_list.read_text().split()
        maps = sorted_maps if sorted_maps.is_dir() else self.folder / "59_context_labels"
        self.pair_files(self.folder / "JPEGImages", maps, stems)


class CocoStuff(LabelMaps):
    """COCO-Stuff 164k: 80 classes of things and 91 of stuff.

    Each is stored as its number in labels.txt minus one.
    """

    splits = {"test": "val2017", "train": "train2017"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        map_folders = ("stuffthingmaps/val2017", "annotations/val2017")
        return any((folder / name).is_dir() for name in map_folders)

    def read_split(self, name: str) -> None:
        labels = self.read_class_list(self.folder / "labels.txt")
        if sorted(labels) != list(range(183)):
            raise ValueError(
                f"evals: {self.folder}/labels.txt: it is not COCO-Stuff's list, which has the"
                " numbers 0 to 182"
            )
        used_numbers = [number for number in range(1, 183) if number not in UNUSED_THINGS]
        self.set_classes(
            [labels[number] for number in used_numbers], [number - 1 for number in used_numbers]
        )

        images = self.folder / "images" / name
        if not images.is_dir():
            images = self.folder / name
        maps = self.folder / "stuffthingmaps"
        if not maps.is_dir():
            maps = self.folder / "annotations"
        self.pair_files(images, maps / name)


class CustomFolders(LabelMaps):
    """A custom set: images/, labels/ and classnames.txt, whose line i + 1 names class i.

    If it has several splits, they are subfolders of images/ and labels/.
    """

    splits = {"test": "test", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return all((folder / name).exists() for name in ("images", "labels", "classnames.txt"))

    def read_split(self, name: str) -> None:
        names = self.read_lines("classnames.txt")
        if "" in map(str.strip, names):
            raise ValueError(
                f"evals: {self.folder}: classnames.txt has an empty line; line i + 1 must name"
                " class i"
            )
        if len(names) > UNKNOWN_CLASS:
            raise ValueError(
                f"evals: {self.folder}: {len(names)} classes; label maps can store at most"
                f" {UNKNOWN_CLASS}"
            )
        self.set_classes(names, range(len(names)))

        # A set with only a test split needs no subfolders.
        images, maps = self.folder / "images", self.folder / "labels"
        if (images / name).is_dir() or name != "test":
            images, maps = images / name, maps / name
        self.pair_files(images, maps)
