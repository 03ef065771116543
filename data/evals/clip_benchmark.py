"""Evaluation sets: folders in CLIP_benchmark's webdataset layout, read in shares that cover every
sample once.

    SET/classnames.txt
        a class a line; NAME;OTHER NAME where it has several
    SET/zeroshot_classification_templates.txt
        a template a line, {c} is the class
    SET/class_subset.txt
        where only some of the classes compete: their numbers, a line each
    SET/test/0.tar ...
        key.webp|png|jpg with key.cls (the class's number) or key.txt (captions, one a line), or
        with
                                key.seg.png (a label map), key.npy (0 or 1 for each class), or
                                key.json that holds
                                questions: [{question, answers, kind}], or anchor, offset and labels
                                of a video frame
    SET/train/0.tar ...         the same, for what is fitted before it is evaluated (probes,
                                fine-tuning, heads)

Other layouts are classes of their own in data/evals/layouts.py. Names: n images on this rank in
this
round, L patches, P patch side.
"""

import json
import math
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
from glimpse.data.evals.remote import local
from glimpse.data.loader import quiet_worker
from glimpse.data.patches import grid, visible
from glimpse.data.shards import CAPTIONS, Shards
from glimpse.data.transforms import Size, center_view, opened, sides

IGNORE = 255  # in a label map: no class


@dataclass(frozen=True)
class Preprocess:
    """How an evaluation image reaches the tower."""

    image_size: Size
    patch: int
    how: str  # one of data/transforms.py's CROPS
    interpolation: str


@dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered (VQAv2: ten of them)."""

    text: str
    answers: tuple[str, ...]
    kind: str = ""  # e.g. what, how many; accuracies are told for each


@dataclass(frozen=True)
class Frame:
    """A video frame: the anchor frame that it belongs to, how many frames it is away from it (0:
    that itself), and its classes.
    """

    anchor: str
    offset: int
    labels: tuple[int, ...]


class Images(ABC):
    """Images by number, and what is known of each: `len(images)`; what a layout holds nothing of
    raises ValueError.
    """

    folder: Path
    split: str

    @property
    def name(self) -> str:
        """What results go by."""
        return self.folder.name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> bytes:
        """Image i, encoded."""

    @abstractmethod
    def key(self, i: int) -> str:
        """What a message calls it."""

    def place(self, i: int) -> str:
        """Where image i is: keys are alike in many sets."""
        return f"{self.folder}: {self.key(i)} of {self.split}"

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        """(H, W, 3) uint8: image i as the tower sees it.  ValueError: it cannot be read."""
        return center_view(self.image(i), pre.image_size, pre.how, pre.interpolation)

    def lines(self, name: str) -> list[str]:
        """The lines of a text file of the set."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"evals: {self.folder}: it needs {name}")
        try:
            return path.read_text(encoding="utf-8").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"evals: {path}: not UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from None

    def names(self) -> list[list[str]]:
        """All names of each class, from classnames.txt; where class_subset.txt names some, of these
        alone.
        """
        found = [prompts.synonyms(line) for line in self.lines("classnames.txt")]
        if not all(found):
            raise ValueError(
                f"evals: {self.folder}: classnames.txt: line {found.index([]) + 1} is empty; line i"
                " + 1 names class i"
            )
        return [found[number] for number in self.subset] if self.subset else found

    def classes(self) -> list[str]:
        """The first name of each class."""
        return [names[0] for names in self.names()]

    @cached_property
    def subset(self) -> list[int]:
        """What class_subset.txt holds, lines of classnames.txt from 0: class i of the set is the
        i-th of these. []: all compete.
        """
        if not (self.folder / "class_subset.txt").exists():
            return []
        count, lines = len(self.lines("classnames.txt")), self.lines("class_subset.txt")
        found = [int(line) if line.strip().isdecimal() else -1 for line in lines]
        if len(set(found)) < len(found) or not all(0 <= number < count for number in found):
            raise ValueError(
                f"evals: {self.folder}: class_subset.txt: it holds lines of classnames.txt by"
                f" number, 0 to {count - 1}, each once"
            )
        return found

    def templates(self, which: str = "") -> list[str]:
        """A list of data/evals/prompts.py; by default the set's own, from
        zeroshot_classification_templates.txt.
        """
        own = "zeroshot_classification_templates.txt"
        if not which and not (self.folder / own).exists():
            raise ValueError(
                f"evals: {self.folder}: no templates; it needs {own}, or give templates=7, 80 or a"
                " file"
            )
        return prompts.templates(which or self.folder / own)

    def prompts(self, which: str = "") -> list[list[str]]:
        """For each class, each of its names in every template."""
        templates = self.templates(which)
        return [
            [template.replace("{c}", name) for name in names for template in templates]
            for names in self.names()
        ]

    def label(self, i: int) -> int:
        """The class's number of image i."""
        raise self.lacks("classes of images")

    def present(self, i: int) -> np.ndarray:
        """(C,) bool: which classes are in image i, where it may have several."""
        raise self.lacks("lists of classes of images")

    def frame(self, i: int) -> Frame:
        """Where image i lies in a video."""
        raise self.lacks("video frames")

    def captions(self, i: int) -> list[str]:
        """The captions of image i, in order."""
        raise self.lacks("captions")

    def label_map(self, i: int) -> np.ndarray:
        """(H, W) uint8: the class's number of each pixel of image i, at its full size; IGNORE: of
        none.
        """
        raise self.lacks("label maps")

    def questions(self, i: int) -> list[Question]:
        """What is asked about image i."""
        raise self.lacks("questions")

    def group(self, i: int) -> str:
        """The part of the set that image i is in, where each has results of its own, as nocaps'
        domains; '' where there are none.
        """
        return ""

    def lacks(self, what: str) -> ValueError:
        return ValueError(
            f"evals: {self.folder}: no {what} in it, or none in a layout that is known"
            " (docs/evaluating.md)"
        )

    def other(self, split: str) -> "Images":
        """Another split of the same set; ValueError if it has none of that name."""
        return type(self)(self.folder, split)

    def rounds(
        self, pre: Preprocess, batch: int, mine: Sequence[int], turns: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`turns` rounds over the images `mine`: indices (m,), patches (n, L, 3*P*P) uint8,
        positions (n, L); the first m <= n are its own.

        Where its own are used up, a round shows image 0 and owns nothing: under ZeRO-3 all ranks
        must go through the tower in step.
        """
        yield from DataLoader(
            _Rounds(self, pre, batch, mine, turns),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=quiet_worker if workers else None,
        )


class Benchmark(Images):
    """A set in that layout, in a folder or at a URL: its classes and templates (none for retrieval)
    and its images.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        self.source, self.folder, self.split = folder, local(folder, split), split
        if not (self.folder / split).is_dir():
            raise ValueError(
                f"evals: {folder} is no evaluation set; it needs {split}/*.tar in CLIP_benchmark's"
                " webdataset layout, or another layout of docs/evaluating.md"
            )
        self.shards = Shards([self.folder / split], captions=False)

    def __len__(self) -> int:
        return len(self.shards)

    def image(self, i: int) -> bytes:
        return self.shards[i].image

    def key(self, i: int) -> str:
        return " ".join(self.shards.name(i))

    def other(self, split: str) -> "Benchmark":
        return type(self)(self.source, split)

    def label(self, i: int) -> int:
        text = self.member(i, "cls").decode(errors="replace").strip()
        if not text.isdecimal():
            raise ValueError(
                f"evals: {self.folder}: the class of {self.key(i)} is {text[:20]!r}; it must be a"
                " number"
            )
        return self.numbered(i, int(text))

    def numbered(self, i: int, label: int) -> int:
        """A class's number as image i has it -> as it competes."""
        if self.subset and label not in self.subset:
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)} is of class {label}, which class_subset.txt"
                " has not"
            )
        return self.subset.index(label) if self.subset else label

    def present(self, i: int) -> np.ndarray:
        with self.reading(i, "npy"):
            found = np.load(BytesIO(self.member(i, "npy"))).reshape(-1) > 0  # refuses pickles
        return found[self.subset] if self.subset else found

    def frame(self, i: int) -> Frame:
        with self.reading(i, "json"):
            row = json.loads(self.member(i, "json"))
            if (
                not isinstance(row, dict)
                or not {"anchor", "offset", "labels"} <= row.keys()
                or not row["labels"]
            ):
                raise self.lacks("video frames (json with anchor, offset and labels)")
            return Frame(
                str(row["anchor"]),
                int(row["offset"]),
                tuple(self.numbered(i, label) for label in row["labels"]),
            )

    def captions(self, i: int) -> list[str]:
        with self.reading(i, "captions"):
            found = [
                line
                for text in self.shards.read(i, only=CAPTIONS).captions
                for line in text.splitlines()
                if line.strip()
            ]
            if not found:
                raise ValueError("none but empty ones")
            return found

    def label_map(self, i: int) -> np.ndarray:
        with self.reading(i, "seg.png"):
            return decode_map(self.member(i, "seg.png"))

    def questions(self, i: int) -> list[Question]:
        with self.reading(i, "json"):
            row = json.loads(self.member(i, "json"))
            if not isinstance(row, dict) or "questions" not in row:
                raise self.lacks("questions")
            return [
                Question(q["question"], tuple(q["answers"]), q.get("kind", ""))
                for q in row["questions"]
            ]

    @contextmanager
    def reading(self, i: int, what: str) -> Iterator[None]:
        """Whatever is wrong with a part of sample i becomes one ValueError that names it."""
        try:
            yield
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            if str(error).startswith("evals: "):
                raise
            why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
            raise ValueError(
                f"evals: {self.folder}: {self.key(i)}: its {what} cannot be read ({why})"
            ) from None

    def member(self, i: int, extension: str) -> bytes:
        """One file of sample i."""
        sample = self.shards.read(i, only=(extension,))
        if extension not in sample.parts:
            raise ValueError(
                f"evals: {self.folder}: {sample.shard} {sample.key} has no {extension} (has"
                f" {', '.join(sample.parts)})"
            )
        return sample.parts[extension]


def decode_map(data: bytes) -> np.ndarray:
    """A grey or palette PNG -> (H, W) uint8 as it is stored.

    ValueError: it has colours, or numbers above 255.
    """
    with opened(data) as image:
        stored = np.array(image)
    if stored.ndim != 2 or stored.max(initial=0) > 255:
        raise ValueError(
            f"a label map stores one number from 0 to 255 a pixel; this is of mode {image.mode}"
        )
    return stored.astype(np.uint8)


class _Rounds(Dataset):
    def __init__(
        self, images: Images, pre: Preprocess, batch: int, mine: Sequence[int], turns: int
    ):
        self.images, self.pre, self.batch, self.mine, self.turns = images, pre, batch, mine, turns
        self.everything = np.arange(math.prod(grid(*sides(pre.image_size), pre.patch)))

    def __len__(self) -> int:
        return self.turns

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        if turn >= self.turns:
            raise IndexError
        mine = list(self.mine[turn * self.batch : (turn + 1) * self.batch])
        patches = torch.from_numpy(np.stack([self.patches(i) for i in mine or [0]]))
        positions = torch.from_numpy(self.everything).expand(len(patches), -1)
        return torch.tensor(mine, dtype=torch.int64), patches, positions

    def patches(self, i: int) -> np.ndarray:
        try:
            image = self.images.view(i, self.pre)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.place(i)}: {error}") from None
        return visible(image, self.pre.patch, self.everything)
