"""Evaluation sets in CLIP_benchmark's webdataset layout, read in shares over all ranks.

    SET/classnames.txt
        a class a line; NAME;OTHER NAME where it has several
    SET/zeroshot_classification_templates.txt
        a template a line, {c} is the class
    SET/class_subset.txt
        where only some of the classes compete: their numbers, a line each
    SET/test/0.tar ...
        key.webp|png|jpg with key.cls (the class's number) or key.txt (captions, one a line), or
        with key.seg.png (a label map), key.npy (0 or 1 for each class), or key.json that holds
        questions: [{question, answers, kind}], or anchor, offset and labels of a video frame
    SET/train/0.tar ...
        the same, for what is fitted before it is evaluated (probes, fine-tuning, heads)

Other layouts are classes of their own in data/evals/layouts.py. Names: n images on this rank in
this round, m of them assigned to it, L patches, P patch side.
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

IGNORE = 255  # in a label map: no class


@dataclass(frozen=True)
class Preprocess:
    """Size, patches, crop and interpolation of evaluation images."""

    image_size: Size
    patch: int
    crop: str  # one of data/transforms.py's CROPS
    interpolation: str


@dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered (VQAv2: ten of them)."""

    text: str
    answers: tuple[str, ...]
    kind: str = ""  # e.g. what, how many; accuracies are reported for each


@dataclass(frozen=True)
class Frame:
    """A video frame: its anchor frame, how many frames it is away from that, and its classes.

    offset 0: the anchor frame itself.
    """

    anchor: str
    offset: int
    labels: tuple[int, ...]


class Images(ABC):
    """Images by number, and what is known of each; there are `len(images)`.

    A method for something that the layout does not hold raises ValueError.
    """

    folder: Path
    split: str

    @property
    def name(self) -> str:
        """Name of the set in results."""
        return self.folder.name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> bytes:
        """Return the encoded bytes of image i."""

    @abstractmethod
    def key(self, i: int) -> str:
        """Return the name of image i in messages."""

    def location(self, i: int) -> str:
        """Describe where image i is: many sets have the same keys."""
        return f"{self.folder}: {self.key(i)} of {self.split}"

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        """Return image i as the tower sees it, (H, W, 3) uint8.

        ValueError: it cannot be read.
        """
        return center_view(self.image(i), pre.image_size, pre.crop, pre.interpolation)

    def read_lines(self, name: str) -> list[str]:
        """Return the lines of a text file of the set."""
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
        """Return all names of each class, from classnames.txt, or of the classes of `subset`."""
        names = [prompts.split_synonyms(line) for line in self.read_lines("classnames.txt")]
        if not all(names):
            empty = names.index([]) + 1
            raise ValueError(
                f"evals: {self.folder}: classnames.txt: line {empty} is empty; line i + 1 names"
                " class i"
            )
        if self.subset:
            return [names[number] for number in self.subset]
        return names

    def class_names(self) -> list[str]:
        """Return the first name of each class."""
        return [names[0] for names in self.class_synonyms()]

    @cached_property
    def subset(self) -> list[int]:
        """Content of class_subset.txt, lines of classnames.txt from 0; []: all classes compete.

        Class i of the set is the i-th of these.
        """
        if not (self.folder / "class_subset.txt").exists():
            return []
        count = len(self.read_lines("classnames.txt"))
        lines = self.read_lines("class_subset.txt")
        numbers = [int(line) if line.strip().isdecimal() else -1 for line in lines]
        repeated = len(set(numbers)) < len(numbers)
        if repeated or not all(0 <= number < count for number in numbers):
            raise ValueError(
                f"evals: {self.folder}: class_subset.txt: it holds lines of classnames.txt by"
                f" number, 0 to {count - 1}, each once"
            )
        return numbers

    def templates(self, which: str = "") -> list[str]:
        """Return a list of data/evals/prompts.py, or by default the set's own templates.

        Those are in its zeroshot_classification_templates.txt.
        """
        default = "zeroshot_classification_templates.txt"
        if not which and not (self.folder / default).exists():
            raise ValueError(
                f"evals: {self.folder}: no templates;"
                f" it needs {default}, or give templates=7, 80 or a file"
            )
        return prompts.load_templates(which or self.folder / default)

    def prompts(self, which: str = "") -> list[list[str]]:
        """Return for each class all of its names in every template."""
        templates = self.templates(which)
        return [
            [template.replace("{c}", name) for name in names for template in templates]
            for names in self.class_synonyms()
        ]

    def label(self, i: int) -> int:
        """Return the number of the class of image i."""
        raise self.missing_error("classes of images")

    def multi_hot(self, i: int) -> np.ndarray:
        """Return which classes are in image i, (C,) bool, where it may have several."""
        raise self.missing_error("lists of classes of images")

    def frame(self, i: int) -> Frame:
        """Return the position of image i in a video."""
        raise self.missing_error("video frames")

    def captions(self, i: int) -> list[str]:
        """Return the captions of image i, in order."""
        raise self.missing_error("captions")

    def label_map(self, i: int) -> np.ndarray:
        """Return the class of each pixel of image i at its full size, (H, W) uint8.

        IGNORE: a pixel of no class.
        """
        raise self.missing_error("label maps")

    def questions(self, i: int) -> list[Question]:
        """Return the questions about image i."""
        raise self.missing_error("questions")

    def group(self, i: int) -> str:
        """Return the part of the set that image i is in, or '' if the set has no parts.

        Each part has results of its own, like nocaps' domains.
        """
        return ""

    def missing_error(self, what: str) -> ValueError:
        """Return the error that the set has nothing of this kind."""
        return ValueError(
            f"evals: {self.folder}: no {what} in it, or none in a layout that is known"
            " (docs/evaluating.md)"
        )

    def open_split(self, split: str) -> "Images":
        """Return another split of the same set; ValueError if it has none of that name."""
        raise self.missing_error("other splits")

    def rounds(
        self, pre: Preprocess, batch: int, indices: Sequence[int], turns: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `turns` rounds over this rank's images, `indices`.

        A round is indices (m,), patches (n, L, 3*P*P) uint8 and positions (n, L); its first m <= n
        images are those of the indices. When this rank's images are used up, a round shows image 0
        and has m = 0: under ZeRO-3 all ranks must go through the tower in step.
        """
        rounds = _Rounds(self, pre, batch, indices, turns)
        start = init_worker if workers else None
        yield from DataLoader(rounds, batch_size=None, num_workers=workers, worker_init_fn=start)


class ClipBenchmarkSet(Images):
    """A set in that layout, in a folder or at a URL.

    It has classes and templates (none for retrieval) and images.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        self.source = folder
        self.folder = local_copy(folder, split)
        self.split = split
        if not (self.folder / split).is_dir():
            raise ValueError(
                f"evals: {folder} is no evaluation set; it needs {split}/*.tar in CLIP_benchmark's"
                " webdataset layout, or another layout of docs/evaluating.md"
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
        """Convert a class's number in the files of image i to its number in `names`."""
        if not self.subset:
            return label
        if label not in self.subset:
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)} is of class {label}, which class_subset.txt"
                " has not"
            )
        return self.subset.index(label)

    def multi_hot(self, i: int) -> np.ndarray:
        with self.explain_errors(i, "npy"):
            values = np.load(BytesIO(self.read_member(i, "npy")))  # refuses pickles
            present = values.reshape(-1) > 0
        return present[self.subset] if self.subset else present

    def frame(self, i: int) -> Frame:
        with self.explain_errors(i, "json"):
            row = json.loads(self.read_member(i, "json"))
            is_frame = isinstance(row, dict) and {"anchor", "offset", "labels"} <= row.keys()
            if not is_frame or not row["labels"]:
                raise self.missing_error("video frames (json with anchor, offset and labels)")
            anchor, offset = str(row["anchor"]), int(row["offset"])
            return Frame(
                anchor, offset, tuple(self.class_index(i, label) for label in row["labels"])
            )

    def captions(self, i: int) -> list[str]:
        with self.explain_errors(i, "captions"):
            texts = self.shards.read(i, extensions=CAPTION_EXTENSIONS).captions
            lines = [line for text in texts for line in text.splitlines()]
            captions = [line for line in lines if line.strip()]
            if not captions:
                raise ValueError("none but empty ones")
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
        """Turn whatever is wrong with a part of sample i into one ValueError that names it."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            if str(error).startswith("evals: "):
                raise
            # The message of a KeyError is the key alone: it needs its type to be understood.
            why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)}: its {what} cannot be read ({why})"
            ) from None

    def read_member(self, i: int, extension: str) -> bytes:
        """Return one file of sample i."""
        sample = self.shards.read(i, extensions=(extension,))
        if extension not in sample.files:
            available = ", ".join(sample.files)
            raise ValueError(
                f"evals: {self.folder}: {sample.shard} {sample.key} has no {extension}"
                f" (has {available})"
            )
        return sample.files[extension]


def decode_label_map(data: bytes) -> np.ndarray:
    """Return the numbers that a gray or palette PNG stores, (H, W) uint8.

    ValueError: it has colors, or numbers above 255.
    """
    with open_image(data) as image:
        stored = np.array(image)
    if stored.ndim != 2 or stored.max(initial=0) > 255:
        raise ValueError(
            f"a label map stores one number from 0 to 255 a pixel; this is of mode {image.mode}"
        )
    return stored.astype(np.uint8)


class _Rounds(Dataset):
    """The rounds of `Images.rounds`."""

    def __init__(
        self, images: Images, pre: Preprocess, batch: int, indices: Sequence[int], turns: int
    ):
        self.images = images
        self.pre = pre
        self.batch = batch
        self.indices = indices
        self.turns = turns
        rows, columns = patch_grid(*height_and_width(pre.image_size), pre.patch)
        self.everything = np.arange(rows * columns)

    def __len__(self) -> int:
        return self.turns

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        if turn >= self.turns:
            raise IndexError
        indices = list(self.indices[turn * self.batch : (turn + 1) * self.batch])
        patches = np.stack([self.patches(i) for i in indices or [0]])
        positions = torch.from_numpy(self.everything).expand(len(patches), -1)
        return torch.tensor(indices, dtype=torch.int64), torch.from_numpy(patches), positions

    def patches(self, i: int) -> np.ndarray:
        try:
            image = self.images.view(i, self.pre)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.location(i)}: {error}") from None
        return patchify_visible(image, self.pre.patch, self.everything)
