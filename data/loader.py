"""The training loader: samples -> views -> masked patches -> micro-batches.

A batch on one rank is a list of `accumulate` micro-batches (one unless GradCache is on). A
MicroBatch holds b samples: the visible patches of each view, and the captions, concatenated
without padding.

Determinism. All random numbers of a sample come from generators seeded with
(seed, epoch, sample, n): n = 0 for the caption, n = 1, 2, ... for the views in alphabetical order.
Substitutes of unreadable samples are drawn with (seed, epoch, position, attempt, 1).
Crops and masks therefore do not depend on the number of workers or ranks, or on resuming.

Shapes: B global batch size, b samples of a micro-batch on one rank, L patches of a view, K visible
patches, P patch side, T tokens of all captions.
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

# Unreadable samples in a row after which the loader gives up.
MAX_SUBSTITUTES = 20
BadSample = tuple[str, str, str]  # (shard, key, reason) of a sample that could not be read


class ViewBatch(TypedDict):
    """One view of the samples of a micro-batch."""

    patches: Tensor  # (b, K, 3 P P) uint8: the visible patches
    positions: Tensor  # (b, K) int16: their indices in the grid
    # (b, 4) float32: top, left, height and width of the crop in pixels of the source image. Only
    # if the config has a view that encloses others.
    box: NotRequired[Tensor]
    # (b, L - K, 3 P P) uint8 and (b, L - K) int16: the masked patches and their indices, for
    # methods that predict them.
    hidden: NotRequired[Tensor]
    hidden_positions: NotRequired[Tensor]
    # (b, L) float32, uniform in [0, 1): for methods that choose patches on the device.
    noise: NotRequired[Tensor]


class TextBatch(TypedDict):
    """The captions of a micro-batch, concatenated."""

    ids: Tensor  # (T,) int32
    lengths: Tensor  # (b,) int32
    longest: int  # the largest length
    # (T,) int32: the position of each token in its caption; only if a text mask dropped some.
    positions: NotRequired[Tensor]


class MicroBatch(TypedDict):
    """The samples that a rank passes through the model at once."""

    views: dict[str, ViewBatch]
    text: TextBatch
    samples: Tensor  # (b, 2) int64: (epoch, sample)
    bad: list[BadSample]  # unreadable samples, which were replaced
    # Only from streams: (epoch, shard, key) of each sample, the worker that made the micro-batch,
    # and the oldest shard from which that worker still holds samples.
    keys: NotRequired[Sequence[tuple[int, str, str]]]
    worker: NotRequired[int]
    oldest: NotRequired[int]


class PreparedSample(NamedTuple):
    """One sample, ready to be stacked."""

    sample: tuple[int, int]  # (epoch, sample)
    ids: list[int]  # the tokens of the caption
    positions: list[int] | None  # their positions in the caption; None: 0, 1, ...
    views: dict[str, dict[str, np.ndarray]]  # the arrays of ViewBatch, without b


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
    # Number of shards whose samples are shuffled together.
    window: int = 16
    # Share of unreadable samples, from 0 to below 1, above which a rank stops the run. Early in
    # a run it is the share of 1,000 samples, so that a few bad ones do not stop it.
    max_bad: float = 0.01
    # Loader processes on each rank; 0 loads in the training process.
    workers: int = 4
    # Batches that each loader process prepares in advance.
    prefetch: int = 2
    # Write the keys of every step's samples to RUN/trace/.
    trace: bool = False

    def pad(self, ids: list[int], pad_id: int) -> list[int]:
        """Pad the tokens of a caption to the context length if pad_text is on."""
        if not self.pad_text:
            return ids
        return ids + [pad_id] * (self.context - len(ids))

    def __post_init__(self):
        if not self.train:
            raise ValueError("data.train: empty; give at least one folder of shards")
        mask = text_masking.parse_text_mask(self.text_mask)
        if isinstance(mask, text_masking.LengthMask) and mask.tokens >= self.context:
            raise ValueError(
                f"data.text_mask: {self.text_mask} cuts nothing from captions of at most"
                f" data.context {self.context} tokens; use a number below {self.context}"
            )
        if not 0 <= self.max_bad < 1:
            raise ValueError(f"data.max_bad: {self.max_bad}; it must be a share from 0 to below 1")
        for name in ("context", "window", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: {getattr(self, name)}; it must be at least 1")


class ViewSpec(NamedTuple):
    """One draw of a view: its name in a batch, and how to make it from an image."""

    name: str
    view: View
    mask: Mask
    grid: tuple[int, int]  # rows and columns of patches


def plan_views(views: dict[str, View], image_size: Size, patch: int) -> list[ViewSpec]:
    """Return the specs of every draw of every view, in alphabetical order of their names.

    Raise ValueError if a view cannot be divided into patches, or a mask hides all of them.
    """
    specs = []
    for name, view in expand_views(views).items():
        mask = parse_mask(view.mask)
        height, width = height_and_width(image_size)
        try:
            if view.size and height != width:
                raise ValueError(
                    f"size: {view.size}; it is the side of a square, but model.image_size is"
                    f" {[height, width]}; remove it"
                )
            grid = patches.patch_grid(*height_and_width(view.size or image_size), patch)
            mask.visible_count(grid[0] * grid[1])
        except ValueError as error:
            raise ValueError(f"views.{name}: {error}") from None
        specs.append(ViewSpec(name, view, mask, grid))
    return specs


class SampleReader:
    """Prepare samples (tokens and visible patches), and collate them into micro-batches.

    hidden, noise: names of the views for which the method needs the hidden patches, or noise.
    pool: first or eot, the token of the caption that the text tower pools; text masks keep it.
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
        self.cfg = cfg
        self.image_size = image_size
        self.patch = patch
        self.seed = seed
        self.views = plan_views(views, image_size, patch)
        self.with_boxes = any(view.encloses for view in views.values())
        self.hidden = names_of_draws(hidden, views)
        self.noise = names_of_draws(noise, views)
        self.tokenizer = build_tokenizer(cfg.tokenizer, cfg.context)
        self.text_mask = text_masking.parse_text_mask(cfg.text_mask)
        self.caption_format = text_masking.CaptionFormat(
            cfg.context,
            start=len(self.tokenizer.start),
            end=len(self.tokenizer.end),
            pooled=0 if pool == "first" else -1,
        )

    def prepare(self, sample: Sample, epoch: int, number: int) -> PreparedSample:
        """Prepare a sample.

        number: identifies the sample in the seeds of its generators. Raise ValueError or OSError
        if the sample cannot be read.
        """
        ids, token_positions = self.caption_tokens(sample.captions, epoch, number)

        # Crop and recolor. Each view has its own generator, so the number of draws in one view does
        # not affect another. (A new view does reseed the views that sort after it.)
        views = {}
        rngs = {}
        for n, spec in enumerate(self.views):
            views[spec.name] = spec.view
            rngs[spec.name] = np.random.default_rng((self.seed, epoch, number, 1 + n))
        images = random_views(sample.image, self.image_size, views, rngs)

        # Mask: the generator of a view continues after its crop.
        arrays = {}
        for spec in self.views:
            pixels, box = images[spec.name]
            arrays[spec.name] = self.view_arrays(spec, pixels, box, rngs[spec.name])
        return PreparedSample((epoch, number), ids, token_positions, arrays)

    def caption_tokens(
        self, captions: list[str], epoch: int, number: int
    ) -> tuple[list[int], list[int] | None]:
        """Return the token ids of a random caption, as in SLIP's code, and their positions.

        Positions are None for 0, 1, ...
        """
        rng = np.random.default_rng((self.seed, epoch, number, 0))
        # Draw only if there is a choice, so that the text mask of a sample does not depend on
        # whether its caption is stored as a string or as a list of one.
        choice = rng.integers(len(captions)) if len(captions) > 1 else 0
        tokens = self.tokenizer(captions[choice])
        ids = self.cfg.pad(tokens, self.tokenizer.pad_id)
        if self.text_mask is None:
            return ids, None
        return self.text_mask(ids, len(tokens), self.caption_format, rng)

    def view_arrays(
        self, spec: ViewSpec, image: np.ndarray, box: Box, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Mask one view of one image, and return the arrays that ViewBatch lists."""
        count = spec.grid[0] * spec.grid[1]
        mask_noise = torch.from_numpy(rng.random((1, count), dtype=np.float32))
        keep = spec.mask(mask_noise, spec.grid)[0].numpy()
        arrays = dict(
            patches=patches.patchify_visible(image, self.patch, keep),
            positions=keep.astype(np.int16),
        )

        # Optional inputs, only for methods that use them.
        if self.with_boxes:
            arrays["box"] = np.array(box, np.float32)
        if spec.name in self.hidden:
            masked = np.setdiff1d(np.arange(count), keep)
            arrays["hidden"] = patches.patchify_visible(image, self.patch, masked)
            arrays["hidden_positions"] = masked.astype(np.int16)
        if spec.name in self.noise:
            arrays["noise"] = rng.random(count, dtype=np.float32)
        return arrays

    def collate(self, samples: list[PreparedSample], bad: list[BadSample]) -> MicroBatch:
        """Stack the views of samples, and concatenate their captions."""
        views = {}
        for name in samples[0].views:
            views[name] = stack_views([sample.views[name] for sample in samples])

        ids, lengths = pack([sample.ids for sample in samples])
        text = TextBatch(ids=ids, lengths=lengths, longest=int(lengths.max()))
        # A text mask returns positions for all captions or for none.
        positions = [sample.positions for sample in samples if sample.positions is not None]
        if positions:
            text["positions"] = pack(positions)[0]

        numbers = torch.tensor([sample.sample for sample in samples])
        return MicroBatch(views=views, text=text, samples=numbers, bad=bad)


def names_of_draws(names: Sequence[str], views: dict[str, View]) -> set[str]:
    """Return the names of all draws of the given views."""
    return {draw for name in names for draw in view_names(name, views[name])}


def stack_views(samples: list[dict[str, np.ndarray]]) -> ViewBatch:
    """Stack one view of several samples, array by array."""
    batch = {key: np.stack([arrays[key] for arrays in samples]) for key in samples[0]}
    return cast(ViewBatch, {key: torch.from_numpy(array) for key, array in batch.items()})


def micro_batch_size(batch: int, world_size: int, accumulate: int) -> int:
    """Return the number of samples in a micro-batch of one rank.

    Raise ValueError if the global batch does not divide by ranks x accumulate.
    """
    divisor = world_size * accumulate
    if batch % divisor:
        below = batch // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else str(divisor)
        raise ValueError(
            f"batch: {batch} does not divide by {world_size} ranks x accumulate {accumulate};"
            f" nearest: {nearest}"
        )
    return batch // divisor


class Batches(Dataset):
    """One rank's share of every global batch from indexed shards.

    Item `start` is the share of the batch at positions start ... start + B - 1 of the run.
    Consecutive positions form a micro-batch, consecutive micro-batches a rank's share.
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
        self.reader = reader
        self.shards = shards
        self.rank = rank
        self.order = Order(shards.counts, reader.seed, reader.cfg.window)
        self.micro_batch_size = micro_batch_size(batch, world_size, accumulate)
        self.accumulate = accumulate

    def __getitem__(self, start: int) -> list[MicroBatch]:
        size = self.micro_batch_size
        first = start + self.rank * size * self.accumulate
        begins = [first + n * size for n in range(self.accumulate)]
        return [self.read_micro_batch(range(begin, begin + size)) for begin in begins]

    def read_micro_batch(self, positions: range) -> MicroBatch:
        """Read and collate the samples at some positions of the run."""
        bad: list[BadSample] = []
        samples = [self.prepare(position, bad) for position in positions]
        return self.reader.collate(samples, bad)

    def prepare(self, position: int, bad: list[BadSample]) -> PreparedSample:
        """Prepare the sample at a position, or a random substitute if it cannot be read.

        Every rank needs a full batch, so a sample is replaced, not skipped. Substitutes depend on
        (seed, epoch, position, attempt) only: all world sizes use the same. Unreadable samples
        are appended to `bad`.
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

    def keys(self, micro_batch: MicroBatch) -> list[tuple[int, str, str]]:
        """Return (epoch, shard, key) of each sample of a micro-batch."""
        return [(epoch, *self.shards.name(i)) for epoch, i in micro_batch["samples"].tolist()]

    def fingerprint(self) -> dict:
        """Return everything that determines the order of the samples.

        A run can only be resumed if its fingerprint is unchanged.
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
        """Ignore the cursor: the number of samples seen is enough to resume (see Stream.seek)."""

    def resume_cursor(self) -> int:
        """Return 0: the number of samples seen is enough to resume (see Stream.resume_cursor)."""
        return 0

    def iterate(self, starts: range, pin_memory: bool) -> Iterator[list[MicroBatch]]:
        """Return an iterator over the batches at `starts`; worker processes prefetch them.

        pin_memory: copy the tensors to page-locked memory, for a GPU.
        """
        workers = worker_kwargs(self.reader.cfg)
        return iter(
            DataLoader(self, batch_size=None, sampler=starts, pin_memory=pin_memory, **workers)
        )


def worker_kwargs(cfg: DataConfig) -> dict:
    """Return DataLoader's arguments for worker processes; none if data.workers is 0."""
    if not cfg.workers:
        return {}
    return dict(num_workers=cfg.workers, prefetch_factor=cfg.prefetch, worker_init_fn=init_worker)


def init_worker(_: int) -> None:
    """Use one thread, and ignore SIGTERM and SIGINT.

    The parent handles these signals: it saves a checkpoint first, and then ends its workers.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
