"""Embeddings of a gallery (data/evals/gallery.py) in part files, in the folders that clip-retrieval
writes and autofaiss reads.

    OUT/embed.json                        of what they are; --resume goes on with nothing else
    OUT/img_emb/img_emb_00000.npy         (n, E) unit vectors
    OUT/text_emb/text_emb_00000.npy       the same of the captions; zeros where an image has none
    OUT/metadata/metadata_00000.parquet   image_path and caption of each of the rows
    OUT/left_out/left_out_00000.tsv       images that cannot be read, which have no row, and why

or, as parquet, OUT/parquet/part_00000.parquet with all four columns. A part is so many images of
the gallery, whoever makes them: all ranks do, a block each in turn, so that any number of ranks
writes the same bytes. It is there whole or not at all.
Names: n rows of a part, m rows of a block, E embedding width.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from io import BufferedWriter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from glimpse.data.evals.gallery import Block, Gallery, Texts, blocks
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.cli import bar
from glimpse.run.lib.distributed import gathered, rank, told, world

PART = 65536  # images: 134 MB of ViT-B's embeddings in fp32, held by the rank that writes them
ROWS = 8192  # to a row group of a parquet file, which readers take at once
BROKEN = 0.5  # a share of a part's images above which it is not the images that are at fault
DTYPES = {"fp32": np.float32, "fp16": np.float16}
FORMATS = ("npy", "parquet")


class Rows(NamedTuple):
    names: list[str]
    captions: list[str | None]
    images: np.ndarray | None  # (m, E); None of texts alone
    texts: np.ndarray | None  # (m, E); None where the gallery has no captions
    left_out: list[tuple[str, str]]


@dataclass(frozen=True)
class About:
    """What a folder holds."""

    model: str  # its path
    weights: str
    checksum: str  # of them and of what else matters: another model may since lie at that path
    source: str
    count: int  # images, or texts, of the source
    last: str  # its last one's name
    format: str
    dtype: str
    part: int


def agree(about: About) -> About:
    """The same.  ValueError: this rank sees other images than rank 0, which would shift rows.

    All ranks must call.
    """
    mine = json.dumps(asdict(about))
    if told(lambda: mine) != mine:
        raise ValueError(
            f"{about.source}: {about.count} here, the last {about.last}; rank 0 sees others: is it"
            " still written to?"
        )
    return about


class Output:
    """A folder of embeddings."""

    def __init__(self, folder: Path, about: About):
        self.folder, self.about, self.parts = folder, about, -(-about.count // about.part)

    def begin(self, resume: bool) -> list[int]:
        """The parts that are still to be made.

        ValueError: something lies there that must not be touched. By one rank alone.
        """
        file, now = self.folder / "embed.json", asdict(self.about)
        if not self.folder.exists() or self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.put(file, lambda opened: opened.write(json.dumps(now, indent=1).encode()))
        elif not resume:
            raise ValueError(
                f"--out: {self.folder} exists; go on with it by --resume, remove it, or name"
                " another"
            )
        elif not file.is_file():
            raise ValueError(
                f"--out: {self.folder} has no embed.json, so nothing to go on with; name another"
            )
        was = json.loads(file.read_text())
        for key in now:
            if was.get(key) != now[key]:
                raise ValueError(
                    f"--resume: {self.folder} was begun with {key} {was.get(key)!r}, not"
                    f" {now[key]!r}; name another --out"
                )
        return [part for part in range(self.parts) if not self.file(part).exists()]

    def span(self, part: int) -> tuple[int, int]:
        """The images of a part: the first, and the one after the last."""
        return part * self.about.part, min((part + 1) * self.about.part, self.about.count)

    def file(self, part: int, kind: str = "", suffix: str = "parquet") -> Path:
        """OUT/KIND/KIND_00000.SUFFIX; by default the file whose presence says that the part is
        whole.
        """
        kind = kind or {"npy": "metadata", "parquet": "parquet"}[self.about.format]
        number = f"{part:0{max(5, len(str(self.parts - 1)))}d}"  # so that names sort as numbers do
        return self.folder / kind / f"{'part' if kind == 'parquet' else kind}_{number}.{suffix}"

    def put(self, path: Path, write: Callable[[BufferedWriter], object]) -> None:
        """A file, there whole or not at all; what is unfinished lies where no reader of a folder
        meets it.
        """
        path.parent.mkdir(exist_ok=True)
        unfinished = self.folder / f".{path.name}.unfinished"
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)

    def write(self, part: int, every: Sequence[Rows]) -> None:
        """The rows of a part, in order."""
        names, captions, images, texts, left_out = zip(*every)
        table, found = {}, {}
        if images[0] is not None:
            table["image_path"], found["image"] = strings(names), np.concatenate(images)
        if texts[0] is not None:
            table["caption"], found["text"] = strings(captions), np.concatenate(texts)
        if lines := [f"{name}\t{why}\n" for name, why in chain.from_iterable(left_out)]:
            self.put(
                self.file(part, "left_out", "tsv"), lambda file: file.write("".join(lines).encode())
            )
        for what, values in found.items():
            if self.about.format == "npy":
                short = {"image": "img_emb", "text": "text_emb"}[what]
                self.put(
                    self.file(part, short, "npy"), lambda file, values=values: np.save(file, values)
                )
            else:
                missing = table["caption"].is_null() if what == "text" else None
                table[f"{what}_embedding"] = pa.FixedSizeListArray.from_arrays(
                    pa.array(values.reshape(-1)), values.shape[1], mask=missing
                )
        self.put(
            self.file(part),
            lambda file: parquet.write_table(pa.table(table), file, row_group_size=ROWS),
        )

    def written(self) -> tuple[int, int]:
        """(rows, images left out) of all parts."""
        rows = sum(parquet.read_metadata(self.file(part)).num_rows for part in range(self.parts))
        left_out = [
            file
            for part in range(self.parts)
            if (file := self.file(part, "left_out", "tsv")).exists()
        ]
        return rows, sum(len(file.read_text().splitlines()) for file in left_out)


def strings(several: Iterable[list[str | None]]) -> pa.Array:
    return pa.array(list(chain.from_iterable(several)), pa.string())


def embeddings(
    model: Embedder, gallery: Gallery, out: Output, todo: Sequence[int], batch: int, workers: int
) -> None:
    """Make and write the parts `todo`. ValueError: most images of a part cannot be read. All ranks
    must call.

    batch: images that a rank embeds at once. Blocks begin anew with each part, and are the same
    ones on any number of ranks.
    """
    if not todo:
        return
    starts = {part: np.arange(*out.span(part), batch) for part in todo}
    mine = np.concatenate([some[rank() :: world()] for some in starts.values()])
    ends = np.concatenate(
        [
            np.minimum(some + batch, out.span(part)[1])[rank() :: world()]
            for part, some in starts.items()
        ]
    )
    made = blocks(gallery, model.pre, mine, ends, workers)
    if not rank():
        made = iter(bar(made, "embedding", " rows", len(mine), scale=batch * world()))
    for part, some in starts.items():
        writes, rows = part % world() == rank(), []
        for turn in range(0, len(some), world()):
            row = (
                [embedded(model, next(made), gallery, out.about.dtype)]
                if turn + rank() < len(some)
                else []
            )
            rows += [
                row if writes else row._replace(images=None, texts=None) for row in gathered(row)
            ]
        first, last = out.span(part)
        broken = [image for row in rows for image in row.left_out]
        if len(broken) > BROKEN * (last - first):
            raise ValueError(
                f"{out.about.source}: {len(broken):,} of {last - first:,} images cannot be read,"
                f" the first {broken[0][0]} ({broken[0][1]}); --resume goes on when that is mended"
            )
        if writes:
            out.write(part, rows)
    next(made, None)  # the bar's end


@torch.no_grad()
def embedded(model: Embedder, block: Block, gallery: Gallery, dtype: str) -> Rows:
    images, texts = (
        np.zeros((len(block.captions), model.cfg.model.shape.embed), DTYPES[dtype])
        for _ in range(2)
    )
    if block.patches is not None:
        m, count = block.patches.shape[:2]
        images[:] = (
            model.encode(
                "embedded", torch.arange(m), block.patches, torch.arange(count).expand(m, -1)
            )
            .cpu()
            .numpy()
        )
    if has := [i for i, caption in enumerate(block.captions) if caption]:
        texts[has] = model.read([block.captions[i] for i in has]).cpu().numpy()
    return Rows(
        block.names,
        block.captions,
        None if isinstance(gallery, Texts) else images,
        texts if gallery.captioned else None,
        block.left_out,
    )
