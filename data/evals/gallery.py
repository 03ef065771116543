"""Galleries: images to embed, with or without captions, or lines of text.

Images are in a folder of any depth, or in a folder of tar shards.

    gallery = open_gallery(Path("photos"))
    len(gallery), gallery.name(i), gallery.read(i)      the encoded image, and its caption or None
    for block in read_blocks(gallery, pre, starts, ends, workers): ...

The order of the images is always the same: by name in a folder (as in data/builders/pairs.py), and
the order of the shards. Shapes: m readable images of a block, L patches, P patch side.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glimpse.data.evals.clip_benchmark import Preprocess
from glimpse.data.loader import init_worker
from glimpse.data.patches import patch_grid, patchify_visible
from glimpse.data.shards import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, Sample, Shards, read_index
from glimpse.data.tokenizer import without_surrogates
from glimpse.data.transforms import center_view, height_and_width

T = TypeVar("T")


class FolderGallery:
    """The images in a folder and its subfolders.

    The caption of NAME.jpg is in NAME.txt or NAME.json next to it.
    """

    def __init__(self, root: Path):
        try:
            self.paths = list_images(root)
        except ValueError as error:
            tars = sorted(root.rglob("*.tar"))
            hint = f"; there are shards in {os.path.dirname(tars[0])}" if tars else ""
            raise ValueError(f"{error}{hint}") from None
        self.captioned = any(has_captions(names) for _, _, names in os.walk(root))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return without_surrogates(self.paths[i])

    def read(self, i: int) -> tuple[bytes, str | None]:
        path = Path(self.paths[i])
        return path.read_bytes(), first_caption(Sample("", "", read_captions_beside(path)))


class ShardGallery:
    """The samples in a folder of shards, with the first caption of each."""

    def __init__(self, folder: Path):
        self.shards = Shards([folder], require_captions=False)
        kinds = {kind for row in read_index(folder)["shards"] for kind in row["extensions"]}
        self.captioned = "txt" in kinds
        if not self.captioned and "json" in kinds:
            # A JSON file may contain other fields: check the first sample.
            self.captioned = (
                first_caption(self.shards.read(0, extensions=CAPTION_EXTENSIONS)) is not None
            )

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, i: int) -> str:
        return without_surrogates("/".join(self.shards.name(i)))

    def read(self, i: int) -> tuple[bytes, str | None]:
        sample = self.shards[i]
        return sample.image, first_caption(sample)


class TextGallery:
    """The lines of a text file, without images."""

    captioned = True

    def __init__(self, path: Path):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--texts: {path}: not UTF-8 ({error.reason} at byte {error.start}); convert it"
            ) from None
        self.lines = [line.strip() for line in text.rstrip().split("\n")]
        if "" in self.lines:
            empty = self.lines.index("") + 1
            raise ValueError(
                f"--texts: {path}: line {empty} is empty; write one text per line, so that line i"
                " is row i"
            )

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, i: int) -> str:
        return self.lines[i]


Gallery = FolderGallery | ShardGallery | TextGallery


def open_gallery(folder: Path) -> FolderGallery | ShardGallery:
    """Open a folder of images or of shards; ValueError if it does not exist."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images or shards")
    return ShardGallery(folder) if any(folder.glob("*.tar")) else FolderGallery(folder)


def has_captions(names: list[str]) -> bool:
    """Return True if the file names of a folder contain an image and its caption."""
    captions, images = set(), set()
    for name in names:
        stem, _, extension = name.rpartition(".")
        if extension in CAPTION_EXTENSIONS:
            captions.add(stem)
        if is_image(name):
            images.add(stem)
    return not captions.isdisjoint(images)


def first_caption(sample: Sample) -> str | None:
    """Return the first caption of a sample; None if it is missing, empty or unreadable."""
    try:
        return without_surrogates(sample.caption) or None
    except ValueError:
        return None


class GalleryBlock(NamedTuple):
    """Consecutive images, or texts, of a gallery."""

    names: list[str]  # names of the m readable images; empty for texts
    captions: list[str | None]  # captions of these images, or the texts
    patches: Tensor | None  # (m, L, 3 P P) uint8; None for texts
    left_out: list[tuple[str, str]]  # (name, reason) of the unreadable images


def read_blocks(
    gallery: Gallery, pre: Preprocess, starts: Sequence[int], ends: Sequence[int], workers: int
) -> Iterator[GalleryBlock]:
    """Yield the images starts[n] ... ends[n] - 1 for n = 0, 1, ..."""
    dataset = _Blocks(gallery, pre, starts, ends)
    init = init_worker if workers else None
    yield from DataLoader(
        dataset, batch_size=None, num_workers=workers, collate_fn=identity, worker_init_fn=init
    )


def identity(sample: T) -> T:
    """Return the argument; as a collate_fn it keeps DataLoader from converting a block's lists."""
    return sample


class _Blocks(Dataset):
    """The dataset of `read_blocks`: item n is block n."""

    def __init__(
        self, gallery: Gallery, pre: Preprocess, starts: Sequence[int], ends: Sequence[int]
    ):
        self.gallery = gallery
        self.pre = pre
        self.starts = starts
        self.ends = ends
        rows, columns = patch_grid(*height_and_width(pre.image_size), pre.patch)
        self.all_patches = np.arange(rows * columns)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, n: int) -> GalleryBlock:
        indices = range(self.starts[n], self.ends[n])

        # Texts: no images to read.
        if isinstance(self.gallery, TextGallery):
            return GalleryBlock([], [self.gallery.name(i) for i in indices], None, [])

        # Images: those that cannot be read are reported, not raised.
        names, captions, patches, left_out = [], [], [], []
        for i in indices:
            name = self.gallery.name(i)
            try:
                image, text = self.gallery.read(i)
                view = center_view(
                    image, self.pre.image_size, self.pre.crop, self.pre.interpolation
                )
            except (ValueError, OSError) as error:
                left_out.append((name, " ".join(str(error).split())))
                continue
            names.append(name)
            captions.append(text)
            patches.append(patchify_visible(view, self.pre.patch, self.all_patches))
        batch = torch.from_numpy(np.stack(patches)) if patches else None
        return GalleryBlock(names, captions, batch, left_out)


# Formats that cannot be read. Such files count as unreadable images, instead of being ignored.
UNREADABLE_EXTENSIONS = ("avif", "bmp", "gif", "heic", "jp2", "tif", "tiff")


def is_image(name: str) -> bool:
    """Return True if a file name is that of an image, also of one in an unreadable format."""
    return (
        not name.startswith(".")
        and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS + UNREADABLE_EXTENSIONS
    )


def read_captions_beside(path: Path) -> dict[str, bytes]:
    """Read the txt and json files with the name of an image, without a byte order mark."""
    contents = {}
    for kind in CAPTION_EXTENSIONS:
        file = path.with_suffix(f".{kind}")
        if file.exists():
            contents[kind] = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return contents


def list_images(root: Path) -> list[str]:
    """List the images in a folder and then those in its subfolders, each sorted by name.

    Raise ValueError if there are no images.
    """
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root):
        # os.walk visits the subfolders that remain in this list, in this order.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [os.path.join(folder, name) for name in sorted(names) if is_image(name)]
    if not paths:
        tables = [p for p in root.iterdir() if p.suffix.lower() in (".csv", ".tsv", ".parquet")]
        hint = f"; it contains tables, give them instead, e.g. {min(tables)}" if tables else ""
        extensions = ", *.".join(IMAGE_EXTENSIONS)
        raise ValueError(f"{root}: no images below it (*.{extensions}){hint}")
    return paths
