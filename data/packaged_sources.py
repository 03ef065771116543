"""What is in the packages of data/packaged.py: one function a name, from a folder of packages to evaluation sets.

    fashion_mnist   Debian dataset-fashion-mnist   IDX files

Names: N images, H, W their sides.
"""
import gzip
import hashlib
import io
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data.packages import copyright_of, debian

Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: its samples by split; classes and templates, or neither where the samples carry captions."""

    name: str
    splits: dict[str, list[Sample]]
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a name brings: its sets, and whose they are."""

    sets: list[EvalSet]
    package: str
    version: str
    licence: str
    text: str  # of the licence
    notes: dict[str, object] = field(default_factory=dict)


def png(pixels: np.ndarray) -> bytes:
    """(H, W) uint8 grey -> a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def labelled(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: object) -> list[Sample]:
    """(N, H, W) uint8 and (N,) -> samples; ValueError where they do not belong together."""
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images):,} images and {len(labels):,} labels")
    if set(np.unique(labels).tolist()) != set(range(len(classes))):
        raise ValueError(f"{where}: labels {np.unique(labels).tolist()[:20]}; they should be 0 to {len(classes) - 1}")
    return [(f"{i:06d}", {"png": png(x), "cls": str(int(y)).encode()}) for i, (x, y) in enumerate(zip(images, labels))]


# ----------------------------------------------------------------------------------------------------------- Fashion-MNIST

FASHION = ("t-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")  # its README
FASHION_SHA256 = {  # of what is inside the .gz: packagers compress again
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(cache: Path) -> Found:
    """Xiao et al. 2017: 60,000 and 10,000 grey product pictures of 28 pixels, light on black."""
    package = "dataset-fashion-mnist"
    folder, version = debian(cache / "debian", package)
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        files = [f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        images, labels = (read_idx(folder / "usr/share/datasets/fashion-mnist" / f"{f}.gz", FASHION_SHA256[f]) for f in files)
        splits[split] = labelled(images, labels, FASHION, folder)
    templates = ("a photo of a {c}.", "a photo of a {c}, a type of clothing.", "a black and white photo of a {c}.", "{c}")
    sets = [EvalSet("fashion_mnist", splits, FASHION, templates)]
    return Found(sets, f"Debian {package}", version, "Expat", copyright_of(cache / "debian", package))


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """A gzipped IDX file of bytes (LeCun's format: two zeros, 8 for uint8, the number of sizes, the sizes, the values) -> (sizes) uint8."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: truncated or no gzip file ({error}); remove its package's folder to fetch it again") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: no IDX file of bytes (starts with {data[:4]!r})")
    sizes = struct.unpack_from(f">{data[3]}I", data, 4) if len(data) >= 4 + 4 * data[3] else ()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes))
    if not sizes or len(values) != math.prod(sizes):
        raise ValueError(f"{path}: {len(values):,} values for sizes {sizes}; it is truncated")
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path}: sha256 {found[:12]}..., not {sha256[:12]}...; it was altered, or is another release")
    return values.reshape(sizes)
