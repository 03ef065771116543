"""Embeddings of a gallery (data/evals/gallery.py), written in part files.

The folders are those that clip-retrieval writes and autofaiss reads:

    OUT/embed.json                        the model and the source; --resume needs the same ones
    OUT/img_emb/img_emb_00000.npy         (n, E) unit vectors of the images
    OUT/text_emb/text_emb_00000.npy       (n, E) those of the captions; zeros without a caption
    OUT/metadata/metadata_00000.parquet   image_path and caption of each row
    OUT/left_out/left_out_00000.tsv       images that cannot be read, which have no row, and why

With the parquet format, OUT/parquet/part_00000.parquet has all four as columns. A part is a fixed
number of images of the gallery. The ranks embed the blocks of each part in turn, so any number of
ranks writes the same bytes. The files of a part are written only when the part is complete.

Shapes: n rows of a part, m rows of a block, E embedding width.
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

from glimpse.data.evals.gallery import Gallery, GalleryBlock, TextGallery, read_blocks
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.cli import progress_bar
from glimpse.run.lib.distributed import all_gather_list, broadcast_from_rank0, rank, world_size

PART_SIZE = 65536  # images: 134 MB of ViT-B's embeddings in fp32, in the memory of one rank
ROW_GROUP_SIZE = 8192  # rows of a parquet file that readers load at once
MAX_BROKEN_SHARE = 0.5  # above this share of a part, probably the storage is at fault
DTYPES = {"fp32": np.float32, "fp16": np.float16}
FORMATS = ("npy", "parquet")


class BlockRows(NamedTuple):
    """The embeddings of a block."""

    names: list[str]
    captions: list[str | None]
    images: np.ndarray | None  # (m, E); None if the gallery has only texts
    texts: np.ndarray | None  # (m, E); None if the gallery has no captions
    left_out: list[tuple[str, str]]  # (name, reason) of each image that cannot be read


@dataclass(frozen=True)
class EmbeddingsInfo:
    """The content of embed.json: model, source and format of a folder of embeddings."""

    model: str  # path of the model
    weights: str
    checksum: str  # of weights, config and tokenizer, since another model may take the path
    source: str
    count: int  # number of images, or texts, of the source
    last: str  # name of the last image or text of the source
    format: str
    dtype: str
    part: int


def check_ranks_agree(info: EmbeddingsInfo) -> EmbeddingsInfo:
    """Return `info` if it is the same on all ranks, which must all call.

    Raises ValueError if this rank sees other images than rank 0, which would shift the rows.
    """
    text = json.dumps(asdict(info))
    if broadcast_from_rank0(lambda: text) != text:
        raise ValueError(
            f"{info.source}: this rank sees {info.count} entries, the last of them {info.last};"
            " rank 0 sees others. Wait until the source is complete on all machines"
        )
    return info


class EmbeddingFolder:
    """A folder of embeddings in parts."""

    def __init__(self, folder: Path, info: EmbeddingsInfo):
        self.folder = folder
        self.info = info
        self.part_count = math.ceil(info.count / info.part)

    def start(self, resume: bool) -> list[int]:
        """Create the folder, or check that it can be resumed; return the parts to be written.

        Only one rank must call. Raises ValueError if the folder has other content, or resume is
        False and it has any.
        """
        info_path = self.folder / "embed.json"
        info = asdict(self.info)
        is_empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if is_empty or not self.folder.exists():
            content = json.dumps(info, indent=1).encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write_file(info_path, lambda file: file.write(content))
        elif not resume:
            raise ValueError(
                f"--out: {self.folder} exists; continue with --resume, remove the folder, or choose"
                " another"
            )
        elif not info_path.is_file():
            raise ValueError(
                f"--out: {self.folder} has no embed.json, so it cannot be resumed; choose another"
                " folder"
            )

        # A resumed folder must hold embeddings of the same model and source.
        stored = json.loads(info_path.read_text())
        for key, value in info.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"--resume: {self.folder} was started with {key} {stored.get(key)!r}, not"
                    f" {value!r}; choose another --out"
                )
        return [part for part in range(self.part_count) if not self.file_path(part).exists()]

    def span(self, part: int) -> tuple[int, int]:
        """Return the index of the first image of a part, and of the one after its last."""
        first = part * self.info.part
        return first, min(first + self.info.part, self.info.count)

    def file_path(self, part: int, folder: str = "", suffix: str = "parquet") -> Path:
        """Return OUT/FOLDER/FOLDER_00000.SUFFIX; by default the file that is written last."""
        folder = folder or {"npy": "metadata", "parquet": "parquet"}[self.info.format]
        stem = "part" if folder == "parquet" else folder
        # All parts have the same number of digits, so that the names sort like the numbers.
        digits = max(5, len(str(self.part_count - 1)))
        return self.folder / folder / f"{stem}_{part:0{digits}d}.{suffix}"

    def write_file(self, path: Path, write: Callable[[BufferedWriter], object]) -> None:
        """Write a file atomically.

        The unfinished file is in OUT itself, where readers of the folders do not see it.
        """
        path.parent.mkdir(exist_ok=True)
        unfinished = self.folder / f".{path.name}.unfinished"
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)

    def write_part(self, part: int, blocks: Sequence[BlockRows]) -> None:
        """Write the rows of a part, whose blocks are in order."""
        names, captions, images, texts, left_out = zip(*blocks)
        table: dict[str, pa.Array] = {}
        embeddings: dict[str, np.ndarray] = {}
        if images[0] is not None:
            table["image_path"] = string_column(names)
            embeddings["image"] = np.concatenate(images)
        if texts[0] is not None:
            table["caption"] = string_column(captions)
            embeddings["text"] = np.concatenate(texts)

        # The list of images without a row.
        lines = [f"{name}\t{reason}\n" for name, reason in chain.from_iterable(left_out)]
        if lines:
            content = "".join(lines).encode()
            left_out_path = self.file_path(part, "left_out", "tsv")
            self.write_file(left_out_path, lambda file: file.write(content))

        # The embeddings: one file each, or columns of the table.
        for kind, values in embeddings.items():
            if self.info.format == "npy":
                folder = {"image": "img_emb", "text": "text_emb"}[kind]
                path = self.file_path(part, folder, "npy")
                self.write_file(path, partial(np.save, arr=values))
            else:
                missing = table["caption"].is_null() if kind == "text" else None
                numbers = pa.array(values.reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(numbers, values.shape[1], mask=missing)
                table[f"{kind}_embedding"] = column

        # The table is written last: `start` takes a part with a table as complete.
        rows = pa.table(table)
        write_table = partial(parquet.write_table, rows, row_group_size=ROW_GROUP_SIZE)
        self.write_file(self.file_path(part), write_table)

    def count_rows(self) -> tuple[int, int]:
        """Return the number of rows, and of images left out, of all parts."""
        rows, left_out = 0, 0
        for part in range(self.part_count):
            rows += parquet.read_metadata(self.file_path(part)).num_rows
            left_out_path = self.file_path(part, "left_out", "tsv")
            if left_out_path.exists():
                left_out += len(left_out_path.read_text().splitlines())
        return rows, left_out


def string_column(blocks: Iterable[list[str | None]]) -> pa.Array:
    """Return the strings of all blocks as one column."""
    return pa.array(list(chain.from_iterable(blocks)), pa.string())


def write_embeddings(
    model: Embedder,
    gallery: Gallery,
    out: EmbeddingFolder,
    parts: Sequence[int],
    batch: int,
    workers: int,
) -> None:
    """Embed and write these parts of a gallery. All ranks must call.

    batch: images that a rank embeds at once, which form a block. Each part starts a new block, so
    the blocks do not depend on the number of ranks.
    Raises ValueError if most images of a part cannot be read.
    """
    if not parts:
        return

    # 1. The blocks of each part are assigned to the ranks in turn; load those of this rank.
    block_starts: dict[int, np.ndarray] = {}  # {part: index of the first image of each block}
    starts, ends = [], []
    for part in parts:
        first, last = out.span(part)
        block_starts[part] = np.arange(first, last, batch)
        share = block_starts[part][rank() :: world_size()]
        starts.append(share)
        ends.append(np.minimum(share + batch, last))
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    loaded_blocks = read_blocks(gallery, model.preprocess, starts, ends, workers)
    if rank() == 0:
        scale = batch * world_size()
        bar = progress_bar(loaded_blocks, "embedding", " rows", len(starts), scale=scale)
        loaded_blocks = iter(bar)

    for part, part_starts in block_starts.items():
        # 2. Embed a block per rank at a time. The embeddings are sent to the rank that writes the
        #    part; the other ranks drop them.
        is_writer = part % world_size() == rank()
        part_rows: list[BlockRows] = []
        for block_number in range(0, len(part_starts), world_size()):
            rows = []
            if block_number + rank() < len(part_starts):
                block = next(loaded_blocks)
                rows.append(embed_block(model, block, gallery, out.info.dtype))
            for row in all_gather_list(rows):
                part_rows.append(row if is_writer else row._replace(images=None, texts=None))

        # 3. All ranks have the list of unreadable images, so either all of them stop or none does.
        first, last = out.span(part)
        broken = [entry for rows in part_rows for entry in rows.left_out]
        if len(broken) > MAX_BROKEN_SHARE * (last - first):
            name, reason = broken[0]
            raise ValueError(
                f"{out.info.source}: {len(broken):,} of {last - first:,} images cannot be read,"
                f" the first {name} ({reason}); repair the images or the storage and continue with"
                " --resume"
            )
        if is_writer:
            out.write_part(part, part_rows)
    next(loaded_blocks, None)  # ends the progress bar


@torch.no_grad()
def embed_block(model: Embedder, block: GalleryBlock, gallery: Gallery, dtype: str) -> BlockRows:
    """Embed the images and captions of a block; rows without a caption are zeros in `texts`."""
    shape = (len(block.captions), model.cfg.model.shape.embed)
    images = np.zeros(shape, DTYPES[dtype])
    texts = np.zeros(shape, DTYPES[dtype])

    if block.patches is not None:
        count, patches = block.patches.shape[:2]
        positions = torch.arange(patches).expand(count, -1)
        outputs = model.encode_images("embedded", torch.arange(count), block.patches, positions)
        images[:] = outputs.cpu().numpy()

    captioned = [i for i, caption in enumerate(block.captions) if caption]
    if captioned:
        captions = [block.captions[i] for i in captioned]
        texts[captioned] = model.embed_text_batch(captions).cpu().numpy()

    if isinstance(gallery, TextGallery):
        images = None
    if not gallery.captioned:
        texts = None
    return BlockRows(block.names, block.captions, images, texts, block.left_out)
