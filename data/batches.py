"""The training loader: samples -> views -> masked patches -> batch.

A batch is a list of `accumulate` parts (one, unless GradCache is on), each a dict of what b images need:

    views: {name: {patches (b, K, 3*P*P) uint8, positions (b, K) int16}}     only the visible patches, as a mask left them
    text:  {ids (T,) int32, lengths (b,) int32, longest int}                 captions packed, no padding
    samples (b, 2) int64                                                     (epoch, sample), which Shards names
    bad: [(shard, key, why)]                                                 samples that could not be read, and were replaced

Everything drawn for a sample comes from a generator of (seed, epoch, sample, view): neither the number of workers or ranks nor a resume
changes a crop or a mask.  Names: B global batch, b a part's share on one rank, K visible patches, P patch side, T tokens.
"""
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import patches
from data.augment import View, random_view
from data.masking import Mask, parse
from data.shards import Order, Sample, Shards
from data.tokenizer import build as build_tokenizer
from data.tokenizer import pack

SUBSTITUTES = 20  # tries to replace a broken sample before the data are called broken


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...]  # folders of tar shards
    tokenizer: str  # clip_bpe, wordpiece(PATH) or sentencepiece(PATH)
    context: int  # tokens of a caption at most: FLIP 32, CLIP 77
    pad_text: bool = False  # fill every caption to the context and attend to the padding, as FLIP's released weights do
    window: int = 16  # shards whose samples are mixed with each other
    max_bad: float = 0.01  # share of unreadable samples above which a run stops
    workers: int = 4  # loader processes on each rank; 0: load in the training process
    prefetch: int = 2  # batches each worker prepares ahead
    trace: bool = False  # write the sample keys of every step to RUN/trace/

    def fill(self, ids: list[int], pad: int) -> list[int]:
        """A caption's tokens, filled to the context where pad_text asks."""
        return ids + [pad] * (self.context - len(ids)) if self.pad_text else ids

    def __post_init__(self):
        if not self.train:
            raise ValueError("data.train: none; name at least one folder of shards")
        if not 0 <= self.max_bad < 1:
            raise ValueError(f"data.max_bad: {self.max_bad}; a share from 0 to below 1")
        for name in ("context", "window", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: {getattr(self, name)}; it must be at least 1")


class Reader:
    """Samples into rows (tokens and visible patches), rows into a part of a batch."""

    def __init__(self, cfg: DataConfig, views: dict[str, View], *, image_size: int, patch: int, seed: int):
        self.cfg, self.image_size, self.patch, self.seed = cfg, image_size, patch, seed
        self.views = [(name, view, parse(view.mask)) for name, view in sorted(views.items())]
        self.tokenizer = build_tokenizer(cfg.tokenizer, cfg.context)
        self.grid = patches.grid(image_size, image_size, patch)
        for _, _, mask in self.views:
            mask.visible(self.grid[0] * self.grid[1])  # a mask that hides everything is refused here

    def row(self, sample: Sample, epoch: int, number: int) -> tuple[tuple[int, int], list[int], dict]:
        """((epoch, number), token ids, {view: (visible patches, positions)}) of a sample; ValueError or OSError if it cannot be read."""
        ids = self.cfg.fill(self.tokenizer(sample.caption), self.tokenizer.pad_id)
        seeds = (self.seed, epoch, number)
        views = {name: self.view(sample.image, view, mask, np.random.default_rng((*seeds, 1 + n)))
                 for n, (name, view, mask) in enumerate(self.views)}
        return (epoch, number), ids, views

    def view(self, data: bytes, view: View, mask: Mask, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, _ = random_view(data, self.image_size, view, rng)
        noise = torch.from_numpy(rng.random((1, self.grid[0] * self.grid[1]), dtype=np.float32))
        keep = mask(noise, self.grid)[0].numpy()
        return patches.visible(image, self.patch, keep), keep.astype(np.int16)

    def part(self, rows: list[tuple], bad: list[tuple]) -> dict:
        samples, ids, views = zip(*rows)
        packed, lengths = pack(ids)
        stacked = {name: dict(patches=torch.from_numpy(np.stack([v[name][0] for v in views])),
                              positions=torch.from_numpy(np.stack([v[name][1] for v in views]))) for name, _, _ in self.views}
        text = dict(ids=packed, lengths=lengths, longest=int(lengths.max()))
        return dict(views=stacked, text=text, samples=torch.tensor(samples), bad=bad)


def share(batch: int, world: int, accumulate: int) -> int:
    """The samples of a part on one rank, or ValueError."""
    parts = world * accumulate
    if batch % parts:
        below = batch // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise ValueError(f"batch: {batch} does not divide by {world} ranks x accumulate {accumulate}; nearest: {near}")
    return batch // parts


class Batches(Dataset):
    """One rank's share of every global batch of indexed shards; item `start` is the batch of the run's positions start .. start + B."""

    def __init__(self, reader: Reader, shards: Shards, *, batch: int, accumulate: int = 1, rank: int = 0, world: int = 1):
        self.reader, self.shards, self.rank = reader, shards, rank
        self.order = Order(shards.counts, reader.seed, reader.cfg.window)
        self.size, self.parts = share(batch, world, accumulate), accumulate

    def __getitem__(self, start: int) -> list[dict]:
        first = start + self.rank * self.size * self.parts
        return [self.part(range(first + i * self.size, first + (i + 1) * self.size)) for i in range(self.parts)]

    def part(self, positions: range) -> dict:
        bad: list[tuple] = []
        return self.reader.part([self.row(position, bad) for position in positions], bad)

    def row(self, position: int, bad: list[tuple]) -> tuple:
        """The row of a position or, when its sample cannot be read, of one drawn in its place: every rank needs a full batch."""
        epoch, i = self.order(position)
        for attempt in range(SUBSTITUTES):
            try:
                return self.reader.row(self.shards[i], epoch, i)
            except (ValueError, OSError) as error:
                bad.append((*self.shards.name(i), " ".join(str(error).split())))
            i = int(np.random.default_rng((self.reader.seed, epoch, position, attempt, 1)).integers(len(self.shards)))
        raise ValueError(f"data.train: {SUBSTITUTES} samples in a row cannot be read, the last {' '.join(bad[-1])}; "
                         "run: run/prepare.py check DIR")

    def keys(self, part: dict) -> list[tuple[int, str, str]]:
        """(epoch, shard, key) of each sample of a part."""
        return [(epoch, *self.shards.name(i)) for epoch, i in part["samples"].tolist()]

    def fingerprint(self) -> dict:
        """What the order of the samples follows from: a run that goes on must have the same."""
        names = [(path.name, count) for path, count in zip(self.shards.paths, self.shards.counts)]
        digest = f"{zlib.crc32(repr(names).encode()):08x}"
        return dict(seed=self.reader.seed, window=self.reader.cfg.window, pairs=len(self.shards), shards=digest)

    def begin(self, cursor: int) -> None:
        """Go on: the number of samples says where."""

    def position(self) -> int:
        """Nothing but the number of samples is needed to go on."""
        return 0

    def stream(self, starts: range, pin: bool) -> Iterator[list[dict]]:
        """The batches that begin at `starts`, prepared ahead by worker processes; pin: into page-locked memory, for a GPU."""
        return iter(DataLoader(self, batch_size=None, sampler=starts, pin_memory=pin, **ahead(self.reader.cfg)))


def ahead(cfg: DataConfig) -> dict:
    """DataLoader's settings for worker processes, none where workers is 0."""
    return dict(num_workers=cfg.workers, prefetch_factor=cfg.prefetch, worker_init_fn=quiet_worker) if cfg.workers else {}


def quiet_worker(_: int) -> None:
    """A worker computes on one thread, and leaves signals to its parent, which ends it after saving."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
