"""Embeddings of a gallery (data/evals/gallery.py) in part files.

The folders are those that clip-retrieval writes and autofaiss reads:

    OUT/embed.json                        the model and the source; --resume needs the same ones
    OUT/img_emb/img_emb_00000.npy         (n, E) unit vectors
    OUT/text_emb/text_emb_00000.npy       the same of the captions; zeros where an image has none
    OUT/metadata/metadata_00000.parquet   image_path and caption of each of the rows
    OUT/left_out/left_out_00000.tsv       images that cannot be read, which have no row, and why

or, as parquet, OUT/parquet/part_00000.parquet with all four columns. A part is a fixed number of
images of the gallery. All ranks embed it, a block each in turn, so that any number of ranks writes
the same bytes. A part's files are complete, or there are none.
Names: n rows of a part, m rows of a block, E embedding width.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BufferedWriter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from glimpse.data.evals.gallery import GalleryBlock, Gallery, TextGallery, read_blocks
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.cli import progress_bar
from glimpse.run.lib.distributed import all_gather_list, broadcast_from_rank0, rank, world_size

PART_SIZE = 65536  # images: 134 MB of ViT-B's embeddings in fp32, held by the rank that writes them
ROW_GROUP_SIZE = 8192  # rows of a row group of a parquet file, which readers load at once
MAX_BROKEN_SHARE = (
    0.5  # if more of a part's images cannot be read, it is not the images that are at fault
)
DTYPES = {"fp32": np.float32, "fp16": np.float16}
FORMATS = ("npy", "parquet")


class BlockRows(NamedTuple):
    """The embeddings of a block."""

    names: list[str]
    captions: list[str | None]
    images: np.ndarray | None  # (m, E); None of texts alone
    texts: np.ndarray | None  # (m, E); None where the gallery has no captions
    left_out: list[tuple[str, str]]


@dataclass(frozen=True)
class EmbeddingsInfo:
    """The model and the source of a folder of embeddings, and its format."""

    model: str  # its path
    weights: str
    checksum: str  # of weights, config and tokenizer: the path may hold another model by now
    source: str
    count: int  # images, or texts, of the source
    last: str  # the name of its last image or text
    format: str
    dtype: str
    part: int


def check_ranks_agree(about: EmbeddingsInfo) -> EmbeddingsInfo:
    """Return `about` if it is the same on all ranks, which must all call.

    ValueError: this rank sees other images than rank 0, which would shift rows.
    """
    text = json.dumps(asdict(about))
    if broadcast_from_rank0(lambda: text) != text:
        raise ValueError(
            f"{about.source}: {about.count} here, the last {about.last}; rank 0 sees others: is it"
            " still written to?"
        )
    return about


class EmbeddingFolder:
    """A folder of embeddings."""

    def __init__(self, folder: Path, about: EmbeddingsInfo):
        self.folder = folder
        self.about = about
        self.parts = math.ceil(about.count / about.part)

    def begin(self, resume: bool) -> list[int]:
        """Return the parts that are still to be made; only one rank must call.

        ValueError: the folder has content that must not be touched.
        """
        file = self.folder / "embed.json"
        about = asdict(self.about)
        empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if empty or not self.folder.exists():
            content = json.dumps(about, indent=1).encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.put(file, lambda opened: opened.write(content))
        elif not resume:
            raise ValueError(
                f"--out: {self.folder} exists;"
                " go on with it by --resume, remove it, or name another"
            )
        elif not file.is_file():
            raise ValueError(
                f"--out: {self.folder} has no embed.json, so nothing to go on with; name another"
            )

        # A resumed folder must hold embeddings of the same model and source.
        stored = json.loads(file.read_text())
        for key, value in about.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"--resume: {self.folder} was begun with {key} {stored.get(key)!r},"
                    f" not {value!r}; name another --out"
                )
        return [part for part in range(self.parts) if not self.file(part).exists()]

    def span(self, part: int) -> tuple[int, int]:
        """Return the images of a part: the first, and the one after the last."""
        first = part * self.about.part
        return first, min(first + self.about.part, self.about.count)

    def file(self, part: int, kind: str = "", suffix: str = "parquet") -> Path:
        """Return OUT/KIND/KIND_00000.SUFFIX; by default the file that a complete part ends with."""
        kind = kind or {"npy": "metadata", "parquet": "parquet"}[self.about.format]
        stem = "part" if kind == "parquet" else kind
        digits = max(5, len(str(self.parts - 1)))  # the same for all, so names sort as numbers do
        return self.folder / kind / f"{stem}_{part:0{digits}d}.{suffix}"

    def put(self, path: Path, write: Callable[[BufferedWriter], object]) -> None:
        """Write a file, completely or not at all.

        While it is unfinished it lies in OUT, where no reader of the folders sees it.
        """
        path.parent.mkdir(exist_ok=True)
        unfinished = self.folder / f".{path.name}.unfinished"
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)

    def write(self, part: int, every: Sequence[BlockRows]) -> None:
        """Write the rows of a part, given block by block in order."""
        names, captions, images, texts, left_out = zip(*every)
        table: dict[str, pa.Array] = {}
        embeddings: dict[str, np.ndarray] = {}
        if images[0] is not None:
            table["image_path"] = string_column(names)
            embeddings["image"] = np.concatenate(images)
        if texts[0] is not None:
            table["caption"] = string_column(captions)
            embeddings["text"] = np.concatenate(texts)

        # The images without a row.
        lines = [f"{name}\t{why}\n" for name, why in chain.from_iterable(left_out)]
        if lines:
            content = "".join(lines).encode()
            self.put(self.file(part, "left_out", "tsv"), lambda file: file.write(content))

        # The embeddings: a file each, or columns of the table.
        for what, values in embeddings.items():
            if self.about.format == "npy":
                folder = {"image": "img_emb", "text": "text_emb"}[what]
                self.put(self.file(part, folder, "npy"), partial(np.save, arr=values))
            else:
                missing = table["caption"].is_null() if what == "text" else None
                numbers = pa.array(values.reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(numbers, values.shape[1], mask=missing)
                table[f"{what}_embedding"] = column

        # The table last: its presence marks the part as complete.
        rows = pa.table(table)
        self.put(
            self.file(part),
            lambda file: parquet.write_table(rows, file, row_group_size=ROW_GROUP_SIZE),
        )

    def written(self) -> tuple[int, int]:
        """Count (rows, images left out) of all parts."""
        rows, left_out = 0, 0
        for part in range(self.parts):
            rows += parquet.read_metadata(self.file(part)).num_rows
            file = self.file(part, "left_out", "tsv")
            if file.exists():
                left_out += len(file.read_text().splitlines())
        return rows, left_out


def string_column(blocks: Iterable[list[str | None]]) -> pa.Array:
    """Return the strings of all blocks as one column."""
    return pa.array(list(chain.from_iterable(blocks)), pa.string())


def write_embeddings(
    model: Embedder,
    gallery: Gallery,
    out: EmbeddingFolder,
    todo: Sequence[int],
    batch: int,
    workers: int,
) -> None:
    """Embed and write the parts `todo`; all ranks must call.

    batch: images that a rank embeds at once. Blocks begin anew with each part, and are the same on
    any number of ranks. ValueError: most images of a part cannot be read.
    """
    if not todo:
        return

    # This rank's blocks of all parts: the blocks of each part are dealt out to the ranks in turn.
    starts_of: dict[int, np.ndarray] = {}  # by part: the first image of each of its blocks
    starts, ends = [], []
    for part in todo:
        first, last = out.span(part)
        starts_of[part] = np.arange(first, last, batch)
        share = starts_of[part][rank() :: world_size()]
        starts.append(share)
        ends.append(np.minimum(share + batch, last))
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    loaded = read_blocks(gallery, model.preprocess, starts, ends, workers)
    if rank() == 0:
        loaded = iter(
            progress_bar(loaded, "embedding", " rows", len(starts), scale=batch * world_size())
        )

    for part, firsts in starts_of.items():
        # Every rank embeds a block a turn; the rank that writes the part keeps them all.
        writes = part % world_size() == rank()
        rows: list[BlockRows] = []
        for turn in range(0, len(firsts), world_size()):
            has_block = turn + rank() < len(firsts)
            block = (
                [embed_block(model, next(loaded), gallery, out.about.dtype)] if has_block else []
            )
            for row in all_gather_list(block):
                rows.append(row if writes else row._replace(images=None, texts=None))

        # All ranks keep the images left out, so all of them stop here if any does.
        first, last = out.span(part)
        broken = [image for row in rows for image in row.left_out]
        if len(broken) > MAX_BROKEN_SHARE * (last - first):
            name, why = broken[0]
            raise ValueError(
                f"{out.about.source}: {len(broken):,} of {last - first:,} images cannot be read,"
                f" the first {name} ({why}); --resume goes on when that is mended"
            )
        if writes:
            out.write(part, rows)
    next(loaded, None)  # ends the progress bar


@torch.no_grad()
def embed_block(model: Embedder, block: GalleryBlock, gallery: Gallery, dtype: str) -> BlockRows:
    """Embed a block's images and captions; rows without a caption are zeros in `texts`."""
    shape = (len(block.captions), model.cfg.model.shape.embed)
    images = np.zeros(shape, DTYPES[dtype])
    texts = np.zeros(shape, DTYPES[dtype])

    if block.patches is not None:
        count, patches = block.patches.shape[:2]
        positions = torch.arange(patches).expand(count, -1)
        outputs = model.encode_images("embedded", torch.arange(count), block.patches, positions)
        images[:] = outputs.cpu().numpy()

    with_caption = [i for i, caption in enumerate(block.captions) if caption]
    if with_caption:
        captions = [block.captions[i] for i in with_caption]
        texts[with_caption] = model.embed_text_batch(captions).cpu().numpy()

    if isinstance(gallery, TextGallery):
        images = None
    if not gallery.captioned:
        texts = None
    return BlockRows(block.names, block.captions, images, texts, block.left_out)
