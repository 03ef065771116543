"""Images as they lie, with or without captions, to be embedded: a folder of any depth, or one of
tar shards; or lines of text alone.

    gallery = open_gallery(Path("photos"))
    len(gallery), gallery.name(i), gallery.read(i)      the image's bytes, and its caption or None
    for block in blocks(gallery, pre, starts, ...): ...

Images come in one order, whoever reads: a folder's by name (data/builders/pairs.py `Folder`), those
of
shards as they lie in them.
Names: m images of a block that can be read, L patches, P patch side.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glimpse.data.evals.clip_benchmark import Preprocess
from glimpse.data.loader import quiet_worker
from glimpse.data.patches import grid, visible
from glimpse.data.shards import CAPTIONS, IMAGES, Sample, Shards, read_index
from glimpse.data.tokenizer import without_surrogates
from glimpse.data.transforms import center_view, sides


class Photos:
    """The images below a folder; the caption of NAME.jpg is in NAME.txt or NAME.json beside it."""

    def __init__(self, root: Path):
        try:
            self.paths = image_paths(root)
        except ValueError as error:
            tars = next((os.path.dirname(path) for path in sorted(root.rglob("*.tar"))), "")
            raise ValueError(
                f"{error}; there are shards in {tars}" if tars else str(error)
            ) from None
        self.captioned = any(captions_among(names) for _, _, names in os.walk(root))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return without_surrogates(self.paths[i])

    def read(self, i: int) -> tuple[bytes, str | None]:
        path = Path(self.paths[i])
        return path.read_bytes(), caption(Sample("", "", captions_beside(path)))


class Tars:
    """The samples of a folder's shards; the first caption of each."""

    def __init__(self, folder: Path):
        self.shards = Shards([folder], captions=False)
        kinds = {kind for row in read_index(folder)["shards"] for kind in row["extensions"]}
        self.captioned = (
            "txt" in kinds
            or "json" in kinds
            and caption(self.shards.read(0, only=CAPTIONS)) is not None
        )

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, i: int) -> str:
        return without_surrogates("/".join(self.shards.name(i)))

    def read(self, i: int) -> tuple[bytes, str | None]:
        sample = self.shards[i]
        return sample.image, caption(sample)


class Texts:
    """The lines of a file, without images."""

    captioned = True

    def __init__(self, path: Path):
        try:
            self.lines = [
                line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")
            ]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--texts: {path}: not UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from None
        if "" in self.lines:
            raise ValueError(
                f"--texts: {path}: line {self.lines.index('') + 1} is empty; a text a line, so that"
                " line i is row i"
            )

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, i: int) -> str:
        return self.lines[i]


Gallery = Photos | Tars | Texts


def open_gallery(folder: Path) -> Photos | Tars:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images or shards")
    return Tars(folder) if any(folder.glob("*.tar")) else Photos(folder)


def captions_among(names: list[str]) -> bool:
    """Is there a caption's file beside an image, among the files of a folder?"""
    captions = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in CAPTIONS}
    return any(is_image(name) and name.rpartition(".")[0] in captions for name in names)


def caption(sample: Sample) -> str | None:
    """The first that is not empty; None where there is none, or what there is cannot be read."""
    try:
        return without_surrogates(sample.caption) or None
    except ValueError:
        return None


class Block(NamedTuple):
    names: list[str]  # of the m images that can be read
    captions: list[str | None]
    patches: Tensor | None  # (m, L, 3 P P) uint8; None of texts
    left_out: list[tuple[str, str]]  # (name, why) of those that cannot


def blocks(
    gallery: Gallery, pre: Preprocess, starts: Sequence[int], ends: Sequence[int], workers: int
) -> Iterator[Block]:
    """The images starts[n] to ends[n], exclusive, for each n in turn."""
    yield from DataLoader(
        _Blocks(gallery, pre, starts, ends),
        batch_size=None,
        num_workers=workers,
        collate_fn=same,
        worker_init_fn=quiet_worker if workers else None,
    )


def same(block: Block) -> Block:
    return block


class _Blocks(Dataset):
    def __init__(
        self, gallery: Gallery, pre: Preprocess, starts: Sequence[int], ends: Sequence[int]
    ):
        self.gallery, self.pre, self.starts, self.ends = gallery, pre, starts, ends
        self.everything = np.arange(math.prod(grid(*sides(pre.image_size), pre.patch)))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, n: int) -> Block:
        indices = range(self.starts[n], self.ends[n])
        if isinstance(self.gallery, Texts):
            return Block([], [self.gallery.name(i) for i in indices], None, [])
        found, left_out = [], []
        for i in indices:
            name = self.gallery.name(i)
            try:
                image, text = self.gallery.read(i)
                shown = center_view(
                    image, self.pre.image_size, self.pre.how, self.pre.interpolation
                )
            except (ValueError, OSError) as error:
                left_out.append((name, " ".join(str(error).split())))
            else:
                found.append((name, text, visible(shown, self.pre.patch, self.everything)))
        names, captions, patches = zip(*found) if found else ((), (), ())
        return Block(
            list(names),
            list(captions),
            torch.from_numpy(np.stack(patches)) if found else None,
            left_out,
        )


# skipped by name, not in silence
OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "jp2", "tif", "tiff")


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGES + OTHER_IMAGES


def captions_beside(path: Path) -> dict[str, bytes]:
    """The txt and json files of an image's own name."""
    beside = {kind: path.with_suffix(f".{kind}") for kind in CAPTIONS}
    return {
        kind: file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        for kind, file in beside.items()
        if file.exists()
    }


def image_paths(root: Path) -> list[str]:
    """The images of a folder, then those of the folders in it, each in order of names."""
    paths: list[str] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths += [os.path.join(folder, name) for name in sorted(names) if is_image(name)]
    if not paths:
        tables = sorted(
            p.name for p in root.iterdir() if p.suffix.lower() in (".csv", ".tsv", ".parquet")
        )
        hint = f"; it holds tables, name them instead, e.g. {root / tables[0]}" if tables else ""
        raise ValueError(f"{root}: no images below it (*.{', *.'.join(IMAGES)}){hint}")
    return paths
