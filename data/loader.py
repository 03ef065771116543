"""The training loader: samples -> views -> masked patches -> batch.

A batch is a list of `accumulate` parts (one, unless GradCache is on), each a dict of what b images
need:

    views: {name: {patches (b, K, 3*P*P) uint8, positions (b, K) int16}}
        only the visible patches, as a mask left them
                   box (b, 4) float32
                       (top, left, height, width) in the source's pixels, where one view encloses
                       others
                   hidden (b, L-K, 3*P*P), hidden_positions (b, L-K)
                       the other patches, for methods that predict them
                   noise (b, L) float32
                       uniform, for methods that choose patches themselves
    text:  {ids (T,) int32, lengths (b,) int32, longest int}
        captions packed, no padding
           positions (T,) int32    the tokens' places, where a text mask dropped some
    samples (b, 2) int64                                                     (epoch, sample), which
                                                                             Shards names
    bad: [(shard, key, why)]                                                 samples that could not
                                                                             be read, and were
                                                                             replaced

Everything drawn for a sample comes from a generator of (seed, epoch, sample, view): neither the
number of workers or ranks nor a resume changes a crop or a mask. Names: B global batch, b a part's
share on one rank, K visible patches, P patch side, T tokens.
"""

import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glimpse.data import patches, text_masking
from glimpse.data.masking import Mask, parse
from glimpse.data.shards import Order, Sample, Shards
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.data.tokenizer import pack
from glimpse.data.transforms import Box, Size, View, draws, expanded, random_views, sides

SUBSTITUTES = 20  # tries to replace a broken sample before the data are called broken


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...]  # folders of tar shards, or FOLDER/NAME-{00000..00008}.tar
    tokenizer: str  # clip_bpe, wordpiece(PATH) or sentencepiece(PATH)
    context: int  # tokens of a caption at most: FLIP 32, CLIP 77
    # fill every caption to the context and attend to the padding, as FLIP's released weights do
    pad_text: bool = False
    # which tokens are seen: none, random(0.5), prioritised(0.5), first(16), ...
    # (data/text_masking.py)
    text_mask: str = "none"
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
        mask = text_masking.parse(self.text_mask)
        if isinstance(mask, text_masking.Cut) and mask.tokens >= self.context:
            raise ValueError(
                f"data.text_mask: {self.text_mask} cuts nothing from captions of at most"
                f" data.context {self.context} tokens"
            )
        if not 0 <= self.max_bad < 1:
            raise ValueError(f"data.max_bad: {self.max_bad}; a share from 0 to below 1")
        for name in ("context", "window", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: {getattr(self, name)}; it must be at least 1")


def plan(
    views: dict[str, View], image_size: Size, patch: int
) -> list[tuple[str, View, Mask, tuple[int, int]]]:
    """(name, view, mask, grid) of every draw of every view; what cannot be cut into patches, or a
    mask that hides all, is refused.
    """
    found = []
    for name, view in expanded(views).items():
        mask, (height, width) = parse(view.mask), sides(image_size)
        try:
            if view.size and height != width:
                raise ValueError(
                    f"size: {view.size}; the side of a square, and model.image_size"
                    f" {[height, width]} is none; leave it out"
                )
            grid = patches.grid(*sides(view.size or image_size), patch)
            mask.visible(grid[0] * grid[1])
        except ValueError as error:
            raise ValueError(f"views.{name}: {error}") from None
        found.append((name, view, mask, grid))
    return found


class Reader:
    """Samples into rows (tokens and visible patches), rows into a part of a batch.

    hidden, noise: the names of the views of which a method wants the hidden patches, or noise.
    pool: first or eot, the caption's token that a text mask leaves.
    """

    def __init__(
        self,
        cfg: DataConfig,
        views: dict[str, View],
        *,
        image_size: Size,
        patch: int,
        seed: int,
        hidden: tuple[str, ...] = (),
        noise: tuple[str, ...] = (),
        pool: str = "first",
    ):
        self.cfg, self.image_size, self.patch, self.seed = cfg, image_size, patch, seed
        self.views = plan(views, image_size, patch)
        self.boxes = any(view.encloses for view in views.values())
        self.hidden, self.noise = (
            {draw for name in some for draw in draws(name, views[name])} for some in (hidden, noise)
        )
        self.tokenizer = build_tokenizer(cfg.tokenizer, cfg.context)
        self.text_mask = text_masking.parse(cfg.text_mask)
        special = len(self.tokenizer.start), len(self.tokenizer.end)
        self.caption = text_masking.Caption(
            cfg.context, *special, pooled=0 if pool == "first" else -1
        )

    def row(
        self, sample: Sample, epoch: int, number: int
    ) -> tuple[tuple[int, int], list[int], dict]:
        """((epoch, number), (token ids, their places), {view: its arrays}) of a sample; ValueError
        or OSError if it cannot be read.
        """
        rng, captions = np.random.default_rng((self.seed, epoch, number, 0)), sample.captions
        # one of several, as SLIP's code does
        ids = self.tokenizer(captions[rng.integers(len(captions)) if len(captions) > 1 else 0])
        text = self.cfg.fill(ids, self.tokenizer.pad_id), None
        if self.text_mask:
            text = self.text_mask(text[0], len(ids), self.caption, rng)
        rngs = {
            name: np.random.default_rng((self.seed, epoch, number, 1 + n))
            for n, (name, *_) in enumerate(self.views)
        }
        made = random_views(
            sample.image, self.image_size, {name: view for name, view, *_ in self.views}, rngs
        )
        return (
            (epoch, number),
            text,
            {
                name: self.view(name, mask, grid, *made[name], rngs[name])
                for name, _, mask, grid in self.views
            },
        )

    def view(
        self,
        name: str,
        mask: Mask,
        grid: tuple[int, int],
        image: np.ndarray,
        box: Box,
        rng: np.random.Generator,
    ) -> dict:
        """What travels of a view, by the names of the module's docstring."""
        count = grid[0] * grid[1]
        keep = mask(torch.from_numpy(rng.random((1, count), dtype=np.float32)), grid)[0].numpy()
        row = dict(
            patches=patches.visible(image, self.patch, keep), positions=keep.astype(np.int16)
        )
        if self.boxes:
            row["box"] = np.array(box, np.float32)
        if name in self.hidden:
            rest = np.setdiff1d(np.arange(count), keep)
            row |= dict(
                hidden=patches.visible(image, self.patch, rest),
                hidden_positions=rest.astype(np.int16),
            )
        if name in self.noise:
            row["noise"] = rng.random(count, dtype=np.float32)
        return row

    def part(self, rows: list[tuple], bad: list[tuple]) -> dict:
        samples, texts, views = zip(*rows)
        ids, places = zip(*texts)
        packed, lengths = pack(ids)
        stacked = {
            name: {
                key: torch.from_numpy(np.stack([row[name][key] for row in views])) for key in first
            }
            for name, first in views[0].items()
        }
        text = dict(ids=packed, lengths=lengths, longest=int(lengths.max()))
        if places[0] is not None:
            text["positions"] = pack(places)[0]
        return dict(views=stacked, text=text, samples=torch.tensor(samples), bad=bad)


def share(batch: int, world: int, accumulate: int) -> int:
    """The samples of a part on one rank, or ValueError."""
    parts = world * accumulate
    if batch % parts:
        below = batch // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise ValueError(
            f"batch: {batch} does not divide by {world} ranks x accumulate {accumulate}; nearest:"
            f" {near}"
        )
    return batch // parts


class Batches(Dataset):
    """One rank's share of every global batch of indexed shards; item `start` is the batch of the
    run's positions start .. start + B.
    """

    def __init__(
        self,
        reader: Reader,
        shards: Shards,
        *,
        batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.reader, self.shards, self.rank = reader, shards, rank
        self.order = Order(shards.counts, reader.seed, reader.cfg.window)
        self.size, self.parts = share(batch, world, accumulate), accumulate

    def __getitem__(self, start: int) -> list[dict]:
        first = start + self.rank * self.size * self.parts
        return [
            self.part(range(first + i * self.size, first + (i + 1) * self.size))
            for i in range(self.parts)
        ]

    def part(self, positions: range) -> dict:
        bad: list[tuple] = []
        return self.reader.part([self.row(position, bad) for position in positions], bad)

    def row(self, position: int, bad: list[tuple]) -> tuple:
        """The row of a position or, when its sample cannot be read, of one drawn in its place:
        every rank needs a full batch.
        """
        epoch, i = self.order(position)
        for attempt in range(SUBSTITUTES):
            try:
                return self.reader.row(self.shards[i], epoch, i)
            except (ValueError, OSError) as error:
                bad.append((*self.shards.name(i), " ".join(str(error).split())))
            i = int(
                np.random.default_rng((self.reader.seed, epoch, position, attempt, 1)).integers(
                    len(self.shards)
                )
            )
        raise ValueError(
            f"data.train: {SUBSTITUTES} samples in a row cannot be read, the last"
            f" {' '.join(bad[-1])}; run: run/prepare.py check DIR"
        )

    def keys(self, part: dict) -> list[tuple[int, str, str]]:
        """(epoch, shard, key) of each sample of a part."""
        return [(epoch, *self.shards.name(i)) for epoch, i in part["samples"].tolist()]

    def fingerprint(self) -> dict:
        """What the order of the samples follows from: a run that goes on must have the same."""
        names = [(path.name, count) for path, count in zip(self.shards.paths, self.shards.counts)]
        digest = f"{zlib.crc32(repr(names).encode()):08x}"
        return dict(
            seed=self.reader.seed,
            window=self.reader.cfg.window,
            pairs=len(self.shards),
            shards=digest,
        )

    def begin(self, cursor: int) -> None:
        """Go on: the number of samples says where."""

    def position(self) -> int:
        """Nothing but the number of samples is needed to go on."""
        return 0

    def stream(self, starts: range, pin: bool) -> Iterator[list[dict]]:
        """The batches that begin at `starts`, prepared ahead by worker processes; pin: into
        page-locked memory, for a GPU.
        """
        return iter(
            DataLoader(
                self, batch_size=None, sampler=starts, pin_memory=pin, **ahead(self.reader.cfg)
            )
        )


def ahead(cfg: DataConfig) -> dict:
    """DataLoader's settings for worker processes, none where workers is 0."""
    return (
        dict(num_workers=cfg.workers, prefetch_factor=cfg.prefetch, worker_init_fn=quiet_worker)
        if cfg.workers
        else {}
    )


def quiet_worker(_: int) -> None:
    """A worker computes on one thread, and leaves signals to its parent, which ends it after
    saving.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
