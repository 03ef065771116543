"""Evaluation sets: folders in CLIP_benchmark's webdataset layout, read in shares that cover every sample once.

    SET/classnames.txt, SET/zeroshot_classification_templates.txt    a class a line; a template a line, {c} is the class
    SET/test/0.tar ...          key.webp|png|jpg with key.cls (the class's number) or key.txt (captions, one a line), or with
                                key.seg.png (a label map), or key.json that holds questions: [{question, answers, kind}]
    SET/train/0.tar ...         the same, for what is fitted before it is evaluated (probes, fine-tuning, heads)

Other layouts are classes of their own in data/layouts.py.  Names: n images on this rank in this round, L patches, P patch side.
"""
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import center_view, opened
from data.batches import quiet_worker
from data.patches import visible
from data.shards import CAPTIONS, Shards

IGNORE = 255  # in a label map: no class


@dataclass(frozen=True)
class Preprocess:
    """How an evaluation image reaches the tower."""

    image_size: int
    patch: int
    how: str  # resize_crop (CLIP) or square (FLIP)
    interpolation: str


@dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered (VQAv2: ten of them)."""

    text: str
    answers: tuple[str, ...]
    kind: str = ""  # e.g. what, how many; accuracies are told for each


class Images(ABC):
    """Images by number, and what is known of each: `len(images)`; what a layout holds nothing of raises ValueError."""

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

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        """(S, S, 3) uint8: image i as the tower sees it.  ValueError: it cannot be read."""
        return center_view(self.image(i), pre.image_size, pre.how, pre.interpolation)

    def lines(self, name: str) -> list[str]:
        """The lines of a text file of the set."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"evals: {self.folder}: it needs {name}")
        return [line for line in path.read_text().splitlines() if line.strip()]

    def classes(self) -> list[str]:
        """The name of each class, from classnames.txt."""
        return self.lines("classnames.txt")

    def templates(self) -> list[str]:
        """The set's own templates, from zeroshot_classification_templates.txt; {c} is the class."""
        return self.lines("zeroshot_classification_templates.txt")

    def prompts(self) -> list[list[str]]:
        """For each class, its name in every template."""
        templates = self.templates()
        return [[template.replace("{c}", name) for template in templates] for name in self.classes()]

    def label(self, i: int) -> int:
        """The class's number of image i."""
        raise self.lacks("classes of images")

    def captions(self, i: int) -> list[str]:
        """The captions of image i, in order."""
        raise self.lacks("captions")

    def label_map(self, i: int) -> np.ndarray:
        """(H, W) uint8: the class's number of each pixel of image i, at its full size; IGNORE: of none."""
        raise self.lacks("label maps")

    def questions(self, i: int) -> list[Question]:
        """What is asked about image i."""
        raise self.lacks("questions")

    def lacks(self, what: str) -> ValueError:
        return ValueError(f"evals: {self.folder}: no {what} in it, or none in a layout that is known (docs/running.md)")

    def other(self, split: str) -> "Images":
        """Another split of the same set; ValueError if it has none of that name."""
        return type(self)(self.folder, split)

    def rounds(self, pre: Preprocess, batch: int, mine: Sequence[int], turns: int,
               workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`turns` rounds over the images `mine`: indices (m,), patches (n, L, 3*P*P) uint8, positions (n, L); the first m <= n are its own.

        Where its own are used up, a round shows image 0 and owns nothing: under ZeRO-3 all ranks must go through the tower in step.
        """
        yield from DataLoader(_Rounds(self, pre, batch, mine, turns), batch_size=None, num_workers=workers,
                              worker_init_fn=quiet_worker if workers else None)


class Benchmark(Images):
    """A set in that layout: its classes and templates (empty for retrieval) and its images."""

    def __init__(self, folder: str | Path, split: str = "test"):
        self.folder, self.split = Path(folder), split
        if not (self.folder / split).is_dir():
            raise ValueError(f"evals: {folder} is no evaluation set; it needs {split}/*.tar in CLIP_benchmark's webdataset layout")
        self.shards = Shards([self.folder / split], captions=False)

    def __len__(self) -> int:
        return len(self.shards)

    def image(self, i: int) -> bytes:
        return self.shards[i].image

    def key(self, i: int) -> str:
        return " ".join(self.shards.name(i))

    def label(self, i: int) -> int:
        return int(self.member(i, "cls"))

    def captions(self, i: int) -> list[str]:
        return [line for text in self.shards.read(i, only=CAPTIONS).captions for line in text.splitlines() if line.strip()]

    def label_map(self, i: int) -> np.ndarray:
        return decode_map(self.member(i, "seg.png"))

    def questions(self, i: int) -> list[Question]:
        rows = json.loads(self.member(i, "json")).get("questions")
        if rows is None:
            raise self.lacks("questions")
        return [Question(row["question"], tuple(row["answers"]), row.get("kind", "")) for row in rows]

    def member(self, i: int, extension: str) -> bytes:
        """One file of sample i."""
        sample = self.shards.read(i, only=(extension,))
        if extension not in sample.parts:
            raise ValueError(f"evals: {self.folder}: {sample.shard} {sample.key} has no {extension} (has {', '.join(sample.parts)})")
        return sample.parts[extension]


def decode_map(data: bytes) -> np.ndarray:
    """A grey or palette PNG -> (H, W) uint8 as it is stored."""
    with opened(data) as image:
        return np.array(image if image.mode in ("L", "P") else image.convert("L"))


class _Rounds(Dataset):
    def __init__(self, images: Images, pre: Preprocess, batch: int, mine: Sequence[int], turns: int):
        self.images, self.pre, self.batch, self.mine, self.turns = images, pre, batch, mine, turns
        self.everything = np.arange((pre.image_size // pre.patch) ** 2)

    def __len__(self) -> int:
        return self.turns

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        if turn >= self.turns:
            raise IndexError
        mine = list(self.mine[turn * self.batch:(turn + 1) * self.batch])
        patches = torch.from_numpy(np.stack([self.patches(i) for i in mine or [0]]))
        positions = torch.from_numpy(self.everything).expand(len(patches), -1)
        return torch.tensor(mine, dtype=torch.int64), patches, positions

    def patches(self, i: int) -> np.ndarray:
        try:
            image = self.images.view(i, self.pre)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.key(i)}: {error}") from None
        return visible(image, self.pre.patch, self.everything)
