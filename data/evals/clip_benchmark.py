"""Evaluation sets: the interface `Images`, and CLIP_benchmark's webdataset layout.

    SET/classnames.txt
        one class per line; NAME;OTHER NAME if a class has several names
    SET/zeroshot_classification_templates.txt
        one template per line, with {c} for the class
    SET/class_subset.txt
        optional: the numbers of the classes that compete, one per line
    SET/test/0.tar ...
        key.webp|png|jpg with key.cls (the class number) or key.txt (captions, one per line), or
        with key.seg.png (a label map), key.npy (0 or 1 for each class), or key.json that contains
        questions: [{question, answers, kind}], or anchor, offset and labels of a video frame
    SET/train/0.tar ...
        the same, for evaluations that train something first (probes, fine-tuning, heads)

data/evals/layouts.py lists the other layouts. Shapes: n images of this rank in a batch, m <= n of
them to evaluate, H x W an image's sides, C classes, L patches, P patch side.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glimpse.data.evals import prompts
from glimpse.data.evals.remote import local_copy
from glimpse.data.loader import init_worker
from glimpse.data.patches import patch_grid, patchify_visible
from glimpse.data.shards import CAPTION_EXTENSIONS, Shards
from glimpse.data.transforms import Size, center_view, height_and_width, open_image

IGNORE = 255  # value of pixels without a class in a label map


@dataclass(frozen=True)
class Preprocess:
    """How to prepare evaluation images for a vision tower."""

    image_size: Size
    patch: int
    crop: str  # one of CROPS in data/transforms.py
    interpolation: str


@dataclass(frozen=True)
class Question:
    """A question about an image, and the answers of annotators (ten in VQAv2)."""

    text: str
    answers: tuple[str, ...]
    kind: str = ""  # e.g. "number"; accuracies are also reported for each kind


@dataclass(frozen=True)
class Frame:
    """A video frame, with its distance from an anchor frame."""

    anchor: str  # name of the anchor frame
    offset: int  # distance in frames; 0 is the anchor frame itself
    labels: tuple[int, ...]  # classes of the frame, from 0


class Images(ABC):
    """Base class of evaluation sets: `len(images)` images, with their annotations.

    Methods for annotations that a set does not contain raise ValueError.
    """

    folder: Path
    split: str

    @property
    def name(self) -> str:
        """The name of the set in results."""
        return self.folder.name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> bytes:
        """Return the encoded bytes of image i."""

    @abstractmethod
    def key(self, i: int) -> str:
        """Return the name of image i, for messages."""

    def location(self, i: int) -> str:
        """Describe image i uniquely, for messages; keys alone repeat in other sets."""
        return f"{self.folder}: {self.key(i)} of {self.split}"

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        """Return image i as the vision tower sees it, (H, W, 3) uint8.

        Raise ValueError if it cannot be read.
        """
        return center_view(self.image(i), pre.image_size, pre.crop, pre.interpolation)

    def read_lines(self, name: str) -> list[str]:
        """Return the lines of a text file of the set; ValueError if it is missing or not UTF-8."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"evals: {self.folder}: it needs {name}")
        try:
            return path.read_text(encoding="utf-8").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"evals: {path}: not UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from None

    def class_synonyms(self) -> list[list[str]]:
        """Return all names of each class, from classnames.txt; only those in `subset`, if any."""
        names = [prompts.split_synonyms(line) for line in self.read_lines("classnames.txt")]
        if not all(names):
            empty = names.index([]) + 1
            raise ValueError(
                f"evals: {self.folder}: classnames.txt: line {empty} is empty; line i + 1 must"
                " name class i"
            )
        if self.subset:
            return [names[number] for number in self.subset]
        return names

    def class_names(self) -> list[str]:
        """Return the first name of each class."""
        return [names[0] for names in self.class_synonyms()]

    @cached_property
    def subset(self) -> list[int]:
        """The class numbers in class_subset.txt, from 0; [] if all classes compete.

        They are line numbers of classnames.txt. Class i of the set is the i-th of them.
        """
        if not (self.folder / "class_subset.txt").exists():
            return []
        count = len(self.read_lines("classnames.txt"))
        lines = self.read_lines("class_subset.txt")
        numbers = [int(line) if line.strip().isdecimal() else -1 for line in lines]
        repeated = len(set(numbers)) < len(numbers)
        if repeated or not all(0 <= number < count for number in numbers):
            raise ValueError(
                f"evals: {self.folder}: class_subset.txt: it must list class numbers from 0 to"
                f" {count - 1}, each once"
            )
        return numbers

    def templates(self, name: str = "") -> list[str]:
        """Return prompt templates.

        name: a list or file, see data/evals/prompts.py. By default, those of the set, in
        zeroshot_classification_templates.txt.
        """
        default = "zeroshot_classification_templates.txt"
        if not name and not (self.folder / default).exists():
            raise ValueError(
                f"evals: {self.folder}: no templates;"
                f" it needs {default}, or give templates=7, 80 or a file"
            )
        return prompts.load_templates(name or self.folder / default)

    def prompts(self, name: str = "") -> list[list[str]]:
        """Return the prompts of each class: all of its names in every template.

        name: of the templates, as for `templates`.
        """
        templates = self.templates(name)
        return [
            [template.replace("{c}", synonym) for synonym in synonyms for template in templates]
            for synonyms in self.class_synonyms()
        ]

    def label(self, i: int) -> int:
        """Return the class number of image i."""
        raise self.missing_error("classes of images")

    def multi_hot(self, i: int) -> np.ndarray:
        """Return the classes of image i, which may have several, as (C,) bool."""
        raise self.missing_error("lists of classes of images")

    def frame(self, i: int) -> Frame:
        """Return image i as a frame of a video."""
        raise self.missing_error("video frames")

    def captions(self, i: int) -> list[str]:
        """Return the captions of image i, in order."""
        raise self.missing_error("captions")

    def label_map(self, i: int) -> np.ndarray:
        """Return the class of each pixel of image i at its full size, (H, W) uint8.

        Pixels without a class are IGNORE.
        """
        raise self.missing_error("label maps")

    def questions(self, i: int) -> list[Question]:
        """Return the questions about image i."""
        raise self.missing_error("questions")

    def group(self, i: int) -> str:
        """Return the group of image i, e.g. its domain in nocaps; "" if the set has no groups.

        Results are also reported for each group.
        """
        return ""

    def missing_error(self, what: str) -> ValueError:
        """Return the error for annotations that the set does not contain."""
        return ValueError(
            f"evals: {self.folder}: no {what} in it, or not in a known layout (docs/evaluating.md)"
        )

    def open_split(self, split: str) -> "Images":
        """Open another split of the same set; ValueError if it has no such split."""
        raise self.missing_error("other splits")

    def batches(
        self, pre: Preprocess, batch: int, indices: Sequence[int], count: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `count` batches of the images `indices`, which are those of this rank.

        A batch is indices (m,), patches (n, L, 3 P P) uint8 and positions (n, L). Its first m
        images are those at the indices. When this rank's images are used up, batches contain image
        0, with m = 0: under ZeRO-3 all ranks must call the tower equally often.
        """
        dataset = _ImageBatches(self, pre, batch, indices, count)
        init = init_worker if workers else None
        yield from DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=init)


class ClipBenchmarkSet(Images):
    """A set in CLIP_benchmark's webdataset layout, in a folder or at a URL.

    Sets for retrieval have no classes and no templates.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        self.source = folder
        self.folder = local_copy(folder, split)
        self.split = split
        if not (self.folder / split).is_dir():
            raise ValueError(
                f"evals: {folder} is not an evaluation set; it needs {split}/*.tar in"
                " CLIP_benchmark's webdataset layout, or another layout of docs/evaluating.md"
            )
        self.shards = Shards([self.folder / split], require_captions=False)

    def __len__(self) -> int:
        return len(self.shards)

    def image(self, i: int) -> bytes:
        return self.shards[i].image

    def key(self, i: int) -> str:
        return " ".join(self.shards.name(i))

    def open_split(self, split: str) -> "ClipBenchmarkSet":
        return type(self)(self.source, split)

    def label(self, i: int) -> int:
        text = self.read_member(i, "cls").decode(errors="replace").strip()
        if not text.isdecimal():
            raise ValueError(
                f"evals: {self.folder}: the class of {self.key(i)} is {text[:20]!r}; it must be a"
                " number"
            )
        return self.class_index(i, int(text))

    def class_index(self, i: int, label: int) -> int:
        """Convert a class number in the files of image i to an index into `class_names`."""
        if not self.subset:
            return label
        if label not in self.subset:
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)} is of class {label}, which is not in"
                " class_subset.txt"
            )
        return self.subset.index(label)

    def multi_hot(self, i: int) -> np.ndarray:
        with self.explain_errors(i, "npy"):
            values = np.load(BytesIO(self.read_member(i, "npy")))  # without allow_pickle: safe
            present = values.reshape(-1) > 0
        return present[self.subset] if self.subset else present

    def frame(self, i: int) -> Frame:
        with self.explain_errors(i, "json"):
            row = json.loads(self.read_member(i, "json"))
            is_frame = isinstance(row, dict) and {"anchor", "offset", "labels"} <= row.keys()
            if not is_frame or not row["labels"]:
                raise self.missing_error("video frames (json with anchor, offset and labels)")
            for label in row["labels"]:
                if not isinstance(label, int) or label < 0:
                    raise ValueError(f"labels: {label!r} is not a class number, 0 or more")
            labels = tuple(self.class_index(i, label) for label in row["labels"])
            return Frame(str(row["anchor"]), int(row["offset"]), labels)

    def captions(self, i: int) -> list[str]:
        with self.explain_errors(i, "captions"):
            texts = self.shards.read(i, extensions=CAPTION_EXTENSIONS).captions
            lines = [line for text in texts for line in text.splitlines()]
            captions = [line for line in lines if line.strip()]
            if not captions:
                raise ValueError("all of them are empty")
            return captions

    def label_map(self, i: int) -> np.ndarray:
        with self.explain_errors(i, "seg.png"):
            return decode_label_map(self.read_member(i, "seg.png"))

    def questions(self, i: int) -> list[Question]:
        with self.explain_errors(i, "json"):
            row = json.loads(self.read_member(i, "json"))
            if not isinstance(row, dict) or "questions" not in row:
                raise self.missing_error("questions")
            questions = []
            for entry in row["questions"]:
                answers = tuple(entry["answers"])
                questions.append(Question(entry["question"], answers, entry.get("kind", "")))
            return questions

    @contextmanager
    def explain_errors(self, i: int, what: str) -> Iterator[None]:
        """Convert errors about a file of sample i to a ValueError that names the sample."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            if str(error).startswith("evals: "):
                raise
            # The message of a KeyError is only the key: add the type.
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)}: its {what} cannot be read ({reason})"
            ) from None

    def read_member(self, i: int, extension: str) -> bytes:
        """Return the content of one file of sample i; ValueError if there is no such file."""
        sample = self.shards.read(i, extensions=(extension,))
        if extension not in sample.files:
            available = ", ".join(sample.files)
            raise ValueError(
                f"evals: {self.folder}: {sample.shard} {sample.key} has no {extension}"
                f" (has {available})"
            )
        return sample.files[extension]


def decode_label_map(data: bytes) -> np.ndarray:
    """Return the values that a grayscale or palette PNG stores, (H, W) uint8.

    Raise ValueError if it is a color image, or has values above 255.
    """
    with open_image(data) as image:
        values = np.array(image)
    if values.ndim != 2 or values.max(initial=0) > 255:
        raise ValueError(
            f"a label map stores one value from 0 to 255 per pixel, but this image has mode"
            f" {image.mode}"
        )
    return values.astype(np.uint8)


class _ImageBatches(Dataset):
    """The dataset of `Images.batches`: item n is batch n."""

    def __init__(
        self, images: Images, pre: Preprocess, batch: int, indices: Sequence[int], count: int
    ):
        self.images = images
        self.pre = pre
        self.batch = batch
        self.indices = indices
        self.count = count
        rows, columns = patch_grid(*height_and_width(pre.image_size), pre.patch)
        self.all_patches = np.arange(rows * columns)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        if n >= self.count:
            raise IndexError
        indices = list(self.indices[n * self.batch : (n + 1) * self.batch])
        patches = np.stack([self.patches(i) for i in indices or [0]])
        positions = torch.from_numpy(self.all_patches).expand(len(patches), -1)
        return torch.tensor(indices, dtype=torch.int64), torch.from_numpy(patches), positions

    def patches(self, i: int) -> np.ndarray:
        try:
            image = self.images.view(i, self.pre)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.location(i)}: {error}") from None
        return patchify_visible(image, self.pre.patch, self.all_patches)
