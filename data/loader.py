"""The training loader: samples -> views -> masked patches -> micro-batches.

A batch on one rank is a list of `accumulate` micro-batches (one, unless GradCache is on), each a
MicroBatch of b samples: only the visible patches of their views, as a mask left them, and their
captions, packed without padding.

Everything drawn for a sample comes from a generator of (seed, epoch, sample, view): neither the
number of workers or ranks nor a resume changes a crop or a mask.

Names: B global batch, b samples of a micro-batch on one rank, L patches of a grid, K visible
patches, P patch side, T tokens.
"""

import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glimpse.data import patches, text_masking
from glimpse.data.masking import Mask, parse_mask
from glimpse.data.shards import Order, Sample, Shards
from glimpse.data.tokenizer import build_tokenizer, pack
from glimpse.data.transforms import (
    Box,
    Size,
    View,
    expand_views,
    height_and_width,
    random_views,
    view_names,
)

MAX_SUBSTITUTES = 20  # tries to replace a broken sample before the data are called broken
BadSample = tuple[str, str, str]  # (shard, key, why): a sample that could not be read


class ViewBatch(TypedDict):
    """One view of the samples of a micro-batch."""

    patches: Tensor  # (b, K, 3 P P) uint8: the visible patches alone
    positions: Tensor  # (b, K) int16: their places in the grid
    # (b, 4) float32: top, left, height, width in pixels of the source, where one view encloses
    # others
    box: NotRequired[Tensor]
    # (b, L - K, 3 P P) uint8 and (b, L - K) int16: the other patches, for methods that predict them
    hidden: NotRequired[Tensor]
    hidden_positions: NotRequired[Tensor]
    noise: NotRequired[
        Tensor
    ]  # (b, L) float32, uniform: for methods that choose patches themselves


class TextBatch(TypedDict):
    """The captions of a micro-batch, end to end."""

    ids: Tensor  # (T,) int32
    lengths: Tensor  # (b,) int32
    longest: int
    positions: NotRequired[Tensor]  # (T,) int32: the tokens' places, where a text mask dropped some


class MicroBatch(TypedDict):
    views: dict[str, ViewBatch]
    text: TextBatch
    samples: Tensor  # (b, 2) int64: (epoch, sample), which Shards names
    bad: list[BadSample]  # samples that could not be read, and were replaced
    # of streams: (epoch, shard, key) of each sample, the worker, the oldest shard that it needs
    keys: NotRequired[Sequence[tuple[int, str, str]]]
    worker: NotRequired[int]
    oldest: NotRequired[int]


class PreparedSample(NamedTuple):
    """One sample, ready to be stacked."""

    sample: tuple[int, int]  # (epoch, number)
    ids: list[int]  # the caption's tokens
    places: list[int] | None  # their places; None: 0, 1, ...
    views: dict[str, dict[str, np.ndarray]]  # as ViewBatch, without the b


@dataclass(frozen=True)
class DataConfig:
    # Folders of tar shards, selected shards as FOLDER/NAME-{00000..00008}.tar, or streams
    # (URLs and pipe: commands).
    train: tuple[str, ...]
    # Tokenizer: clip_bpe, clip_bpe(PATH), wordpiece, wordpiece(PATH) or sentencepiece(PATH).
    tokenizer: str
    # Maximum number of tokens in a caption, special tokens included; FLIP uses 32, CLIP 77.
    context: int
    # Pad every caption to the context length and attend to the padding, as FLIP's released
    # weights do.
    pad_text: bool = False
    # Tokens that the text tower sees: none, random(RATIO), prioritised(RATIO), first(TOKENS),
    # block(TOKENS) or shuffled(TOKENS); RATIO is the share of the context to hide, TOKENS the
    # number to keep.
    text_mask: str = "none"
    # Shards that are mixed with each other at a time.
    window: int = 16
    # Share of unreadable samples, from 0 to below 1, above which a rank stops the run; the
    # first 1,000 samples count as a whole.
    max_bad: float = 0.01
    # Loader processes on each rank; 0 loads in the training process.
    workers: int = 4
    # Batches that each loader process prepares in advance.
    prefetch: int = 2
    # Write the keys of every step's samples to RUN/trace/.
    trace: bool = False

    def pad(self, ids: list[int], pad_id: int) -> list[int]:
        """Fill a caption's tokens to the context, where pad_text asks for it."""
        if not self.pad_text:
            return ids
        return ids + [pad_id] * (self.context - len(ids))

    def __post_init__(self):
        if not self.train:
            raise ValueError("data.train: none; name at least one folder of shards")
        mask = text_masking.parse_text_mask(self.text_mask)
        if isinstance(mask, text_masking.LengthMask) and mask.tokens >= self.context:
            raise ValueError(
                f"data.text_mask: {self.text_mask} cuts nothing from captions of at most"
                f" data.context {self.context} tokens"
            )
        if not 0 <= self.max_bad < 1:
            raise ValueError(f"data.max_bad: {self.max_bad}; a share from 0 to below 1")
        for name in ("context", "window", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: {getattr(self, name)}; it must be at least 1")


class ViewSpec(NamedTuple):
    """One draw of a view: what is made of each image under one name."""

    name: str
    view: View
    mask: Mask
    grid: tuple[int, int]


def plan_views(views: dict[str, View], image_size: Size, patch: int) -> list[ViewSpec]:
    """Every draw of every view; ValueError for what cannot be cut into patches, or a mask that
    hides all.
    """
    planned = []
    for name, view in expand_views(views).items():
        mask = parse_mask(view.mask)
        height, width = height_and_width(image_size)
        try:
            if view.size and height != width:
                raise ValueError(
                    f"size: {view.size}; the side of a square, and model.image_size"
                    f" {[height, width]} is none; leave it out"
                )
            grid = patches.patch_grid(*height_and_width(view.size or image_size), patch)
            mask.visible(grid[0] * grid[1])
        except ValueError as error:
            raise ValueError(f"views.{name}: {error}") from None
        planned.append(ViewSpec(name, view, mask, grid))
    return planned


class SampleReader:
    """Turn samples into rows (tokens and visible patches), and rows into micro-batches.

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
        self.views = plan_views(views, image_size, patch)
        self.boxes = any(view.encloses for view in views.values())
        self.hidden = names_of_draws(hidden, views)
        self.noise = names_of_draws(noise, views)
        self.tokenizer = build_tokenizer(cfg.tokenizer, cfg.context)
        self.text_mask = text_masking.parse_text_mask(cfg.text_mask)
        self.caption = text_masking.CaptionFormat(
            cfg.context,
            start=len(self.tokenizer.start),
            end=len(self.tokenizer.end),
            pooled=0 if pool == "first" else -1,
        )

    def prepare(self, sample: Sample, epoch: int, number: int) -> PreparedSample:
        """The row of a sample; ValueError or OSError if it cannot be read."""
        ids, places = self.text(sample.captions, epoch, number)
        views, rngs = {}, {}
        for n, draw in enumerate(self.views):
            views[draw.name] = draw.view
            rngs[draw.name] = np.random.default_rng((self.seed, epoch, number, 1 + n))
        images = random_views(sample.image, self.image_size, views, rngs)
        arrays = {}
        for draw in self.views:
            pixels, box = images[draw.name]
            arrays[draw.name] = self.view(draw, pixels, box, rngs[draw.name])
        return PreparedSample((epoch, number), ids, places, arrays)

    def text(
        self, captions: list[str], epoch: int, number: int
    ) -> tuple[list[int], list[int] | None]:
        """Token ids of one of the captions, drawn as SLIP's code does, and their places."""
        rng = np.random.default_rng((self.seed, epoch, number, 0))
        chosen = rng.integers(len(captions)) if len(captions) > 1 else 0
        real = self.tokenizer(captions[chosen])
        ids = self.cfg.pad(real, self.tokenizer.pad_id)
        if self.text_mask is None:
            return ids, None
        return self.text_mask(ids, len(real), self.caption, rng)

    def view(
        self, draw: ViewSpec, image: np.ndarray, box: Box, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The arrays of one view of one image, under the names of ViewBatch."""
        count = draw.grid[0] * draw.grid[1]
        noise = torch.from_numpy(rng.random((1, count), dtype=np.float32))
        keep = draw.mask(noise, draw.grid)[0].numpy()
        arrays = dict(
            patches=patches.patchify_visible(image, self.patch, keep),
            positions=keep.astype(np.int16),
        )
        if self.boxes:
            arrays["box"] = np.array(box, np.float32)
        if draw.name in self.hidden:
            rest = np.setdiff1d(np.arange(count), keep)
            arrays["hidden"] = patches.patchify_visible(image, self.patch, rest)
            arrays["hidden_positions"] = rest.astype(np.int16)
        if draw.name in self.noise:
            arrays["noise"] = rng.random(count, dtype=np.float32)
        return arrays

    def micro_batch(self, rows: list[PreparedSample], bad: list[BadSample]) -> MicroBatch:
        """Stack the views of rows, and pack their captions."""
        views = {name: stack_views([row.views[name] for row in rows]) for name in rows[0].views}
        ids, lengths = pack([row.ids for row in rows])
        text = TextBatch(ids=ids, lengths=lengths, longest=int(lengths.max()))
        places = [row.places for row in rows if row.places is not None]
        if places:  # a text mask gives places to all captions or to none
            text["positions"] = pack(places)[0]
        samples = torch.tensor([row.sample for row in rows])
        return MicroBatch(views=views, text=text, samples=samples, bad=bad)


def names_of_draws(names: Sequence[str], views: dict[str, View]) -> set[str]:
    """Names of all draws of some views."""
    return {draw for name in names for draw in view_names(name, views[name])}


def stack_views(samples: list[dict[str, np.ndarray]]) -> ViewBatch:
    """Stack one view of several samples, array by array."""
    batch = {key: np.stack([arrays[key] for arrays in samples]) for key in samples[0]}
    return cast(ViewBatch, {key: torch.from_numpy(array) for key, array in batch.items()})


def micro_batch_size(batch: int, world_size: int, accumulate: int) -> int:
    """The samples of a part on one rank, or ValueError."""
    parts = world_size * accumulate
    if batch % parts:
        below = batch // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise ValueError(
            f"batch: {batch} does not divide by {world_size} ranks x accumulate {accumulate}; nearest:"
            f" {near}"
        )
    return batch // parts


class Batches(Dataset):
    """One rank's share of every global batch of indexed shards; item `start` is the batch of the
    run's positions start .. start + B.
    """

    def __init__(
        self,
        reader: SampleReader,
        shards: Shards,
        *,
        batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.reader, self.shards, self.rank = reader, shards, rank
        self.order = Order(shards.counts, reader.seed, reader.cfg.window)
        self.size = micro_batch_size(batch, world_size, accumulate)
        self.accumulate = accumulate

    def __getitem__(self, start: int) -> list[MicroBatch]:
        first = start + self.rank * self.size * self.accumulate
        begins = [first + n * self.size for n in range(self.accumulate)]
        return [self.micro_batch(range(begin, begin + self.size)) for begin in begins]

    def micro_batch(self, positions: range) -> MicroBatch:
        bad: list[BadSample] = []
        rows = [self.prepare(position, bad) for position in positions]
        return self.reader.micro_batch(rows, bad)

    def prepare(self, position: int, bad: list[BadSample]) -> PreparedSample:
        """The row of a position or, when its sample cannot be read, of one drawn in its place:
        every rank needs a full batch.
        """
        epoch, i = self.order(position)
        for attempt in range(MAX_SUBSTITUTES):
            try:
                return self.reader.prepare(self.shards[i], epoch, i)
            except (ValueError, OSError) as error:
                bad.append((*self.shards.name(i), " ".join(str(error).split())))
            rng = np.random.default_rng((self.reader.seed, epoch, position, attempt, 1))
            i = int(rng.integers(len(self.shards)))
        raise ValueError(
            f"data.train: {MAX_SUBSTITUTES} samples in a row cannot be read, the last"
            f" {' '.join(bad[-1])}; run: run/prepare.py check DIR"
        )

    def keys(self, part: MicroBatch) -> list[tuple[int, str, str]]:
        """(epoch, shard, key) of each sample of a micro-batch."""
        return [(epoch, *self.shards.name(i)) for epoch, i in part["samples"].tolist()]

    def fingerprint(self) -> dict:
        """Everything that the order of the samples follows from: a run that is resumed must have
        the same.
        """
        names = [(path.name, count) for path, count in zip(self.shards.paths, self.shards.counts)]
        digest = f"{zlib.crc32(repr(names).encode()):08x}"
        return dict(
            seed=self.reader.seed,
            window=self.reader.cfg.window,
            pairs=len(self.shards),
            shards=digest,
        )

    def seek(self, cursor: int) -> None:
        """Do nothing: the number of samples says where to go on."""

    def resume_cursor(self) -> int:
        """Return 0: nothing but the number of samples is needed to go on."""
        return 0

    def iterate(self, starts: range, pin_memory: bool) -> Iterator[list[MicroBatch]]:
        """The batches that begin at `starts`, prepared ahead by worker processes; pin: into
        page-locked memory, for a GPU.
        """
        settings = worker_kwargs(self.reader.cfg)
        return iter(
            DataLoader(self, batch_size=None, sampler=starts, pin_memory=pin_memory, **settings)
        )


def worker_kwargs(cfg: DataConfig) -> dict:
    """DataLoader's settings for worker processes, none where workers is 0."""
    if not cfg.workers:
        return {}
    return dict(num_workers=cfg.workers, prefetch_factor=cfg.prefetch, worker_init_fn=init_worker)


def init_worker(_: int) -> None:
    """Compute on one thread, and leave signals to the parent, which ends its workers after
    saving.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
