"""Evaluation sets: folders in CLIP_benchmark's webdataset layout, read in shares that cover every sample once.

    SET/classnames.txt, SET/zeroshot_classification_templates.txt    a class a line; a template a line, {c} is the class
    SET/test/0.tar ...          key.webp|png|jpg with key.cls (the class's number) or key.txt (captions, one a line)

Names: n images on this rank in this round, L patches, P patch side.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import center_view
from data.batches import quiet_worker
from data.patches import visible
from data.shards import CAPTIONS, Shards


@dataclass(frozen=True)
class Preprocess:
    """How an evaluation image reaches the tower."""

    image_size: int
    patch: int
    how: str  # resize_crop (CLIP) or square (FLIP)
    interpolation: str


class Benchmark:
    """A set in that layout: its classes and templates (empty for retrieval) and its images."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "test").is_dir():
            raise ValueError(f"evals: {folder} is no evaluation set; it needs test/*.tar in CLIP_benchmark's webdataset layout")
        self.name = self.folder.name
        self.shards = Shards([self.folder / "test"], captions=False)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"evals: {self.folder}: a classification set needs {name}")
        return [line for line in path.read_text().splitlines() if line.strip()]

    def prompts(self) -> list[list[str]]:
        """For each class, its name in every template."""
        templates = self.lines("zeroshot_classification_templates.txt")
        return [[template.replace("{c}", name) for template in templates] for name in self.lines("classnames.txt")]

    def label(self, i: int) -> int:
        """The class's number of image i."""
        sample = self.shards.read(i, only=("cls",))
        if "cls" not in sample.parts:
            raise ValueError(f"evals: {self.folder}: {sample.shard} {sample.key} has no cls (has {', '.join(sample.parts)})")
        return int(sample.parts["cls"])

    def captions(self, i: int) -> list[str]:
        """The captions of image i, in order."""
        return [line for text in self.shards.read(i, only=CAPTIONS).captions for line in text.splitlines() if line.strip()]

    def rounds(self, pre: Preprocess, batch: int, rank: int, world: int, workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rounds in which every rank has a batch: indices (m,), patches (n, L, 3*P*P) uint8, positions (n, L); m <= n are its own.

        A rank whose share ran out repeats image 0 and owns nothing of it: under ZeRO-3 all ranks must go through the tower in step.
        """
        yield from DataLoader(_Rounds(self.shards, pre, batch, rank, world), batch_size=None, num_workers=workers,
                              worker_init_fn=quiet_worker if workers else None)


class _Rounds(Dataset):
    def __init__(self, shards: Shards, pre: Preprocess, batch: int, rank: int, world: int):
        self.shards, self.pre, self.batch, self.rank, self.world = shards, pre, batch, rank, world
        self.everything = np.arange((pre.image_size // pre.patch) ** 2)

    def __len__(self) -> int:
        return -(-len(self.shards) // (self.batch * self.world))

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        if turn >= len(self):
            raise IndexError
        first = (turn * self.world + self.rank) * self.batch
        mine = range(first, min(first + self.batch, len(self.shards)))
        patches = torch.from_numpy(np.stack([self.patches(i) for i in mine or [0]]))
        positions = torch.from_numpy(self.everything).expand(len(patches), -1)
        return torch.tensor(list(mine), dtype=torch.int64), patches, positions

    def patches(self, i: int) -> np.ndarray:
        sample = self.shards[i]
        try:
            image = center_view(sample.image, self.pre.image_size, self.pre.how, self.pre.interpolation)
        except ValueError as error:
            raise ValueError(f"evals: {sample.shard} {sample.key}: {error}") from None
        return visible(image, self.pre.patch, self.everything)
