"""Features of a set's images, computed once by all ranks and kept on disk.

An evaluation that fits something to them can be interrupted and repeated without another pass
through the tower.

    RUN/features/TAG/SET-SPLIT-WHAT-DIGEST/00000.npy ...
        CHUNK images each, float32 or float16; 00000.label.npy their classes

TAG identifies the weights, DIGEST the set and how its images are shown. A chunk is complete or
absent, so any number of ranks can resume. The run's folder must be visible to all ranks.  Names: N
images, D width.
"""

import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.lib.distributed import barrier, broadcast_from_rank0, rank, rank0_first, world_size

CHUNK = 16 * BATCH
FEATURE_KINDS = (
    "pooled",
    "embedded",
    "grid",
    "pixels",
)  # a vector an image, see Embedder.iterate_features
FLOAT16_KINDS = ("tokens", "grid", "pixels")  # stored as float16: many numbers, of few bits


class Features:
    """The features of a set's images, (N, ...), by number.

    Every rank has all of them; they are read from disk when they are needed.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self.parts = [map_array(chunk_file(folder, c)) for c in range(chunk_count(count))]

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Iterable[int] | Tensor) -> Tensor:
        """Return the features of these images, (n, ...) float32, in the order of `indices`."""
        indices = np.asarray(indices)
        chunk_of = indices // CHUNK
        out = np.empty((len(indices), *self.parts[0].shape[1:]), np.float32)
        for chunk in np.unique(chunk_of):
            here = np.nonzero(chunk_of == chunk)[0]
            out[here] = self.parts[chunk][indices[here] % CHUNK]
        return torch.from_numpy(out)

    def all(self) -> Tensor:
        """Return the features of all images, (N, ...) float32."""
        return torch.from_numpy(np.concatenate(self.parts).astype(np.float32, copy=False))

    def labels(self) -> Tensor:
        """Return the classes of all images, (N,) int64."""
        files = [chunk_file(self.folder, c, ".label") for c in range(chunk_count(self.count))]
        return torch.from_numpy(np.concatenate([np.load(file) for file in files]))


def compute_features(model: Embedder, images: Images, what: str, labels: bool = False) -> Features:
    """Return the features of a set's images, computing those that are missing on disk.

    what: as in Embedder.iterate_features. labels: store the classes of the images too. All ranks must call.
    """
    folder = features_folder(model, images, what)
    rank0_first(lambda: folder.mkdir(parents=True, exist_ok=True))

    count = len(images)
    kinds = ("", ".label") if labels else ("",)

    def missing_chunks() -> str:
        missing = []
        for chunk in range(chunk_count(count)):
            if not all(chunk_file(folder, chunk, kind).exists() for kind in kinds):
                missing.append(str(chunk))
        return " ".join(missing)

    # Chunks still to be made, as rank 0 sees the folder; they are dealt out to the ranks in turn.
    missing = [int(chunk) for chunk in broadcast_from_rank0(missing_chunks).split()]
    share = missing[rank() :: world_size()]
    samples: list[int] = []
    for chunk in share:
        samples += range(chunk * CHUNK, min((chunk + 1) * CHUNK, count))
    most_chunks = math.ceil(len(missing) / world_size())  # of any rank
    turns = most_chunks * (CHUNK // BATCH)

    # Batches wait until they fill a chunk, or end with the set's last image.
    dtype = torch.float16 if what in FLOAT16_KINDS else torch.float32
    todo = iter(share)
    order: list[int] = []
    waiting: list[Tensor] = []
    for indices, batch in model.iterate_features(images, what, samples, turns):
        order += indices.tolist()
        waiting.append(batch.to(dtype).cpu())
        if order and (len(order) == CHUNK or order[-1] == count - 1):
            chunk = next(todo)
            if labels:
                write_array(chunk_file(folder, chunk, ".label"), read_labels(images, order))
            write_array(chunk_file(folder, chunk), torch.cat(waiting).numpy())
            order, waiting = [], []
    barrier()
    return Features(folder, count)


def features_folder(model: Embedder, images: Images, what: str) -> Path:
    """Return the folder of a set's features, whose name has a digest of all that they depend on."""
    last = images.key(len(images) - 1)
    place = str(images.folder.resolve())
    layout = type(images).__name__
    how = (model.preprocess, model.mask, model.ensemble, place, layout, len(images), last)
    digest = zlib.crc32(repr(how).encode())
    name = f"{images.name}-{images.split}-{what}-{digest:08x}"
    return model.results_folder / "features" / model.tag / name


def read_labels(images: Images, indices: list[int]) -> np.ndarray:
    """Return the classes of images, int64.

    ValueError: a class has no name; no labels are stored, so the set can be corrected.
    """
    labels = [images.label(i) for i in indices]
    classes = len(images.class_names())
    for i, label in zip(indices, labels):
        if not 0 <= label < classes:
            raise ValueError(
                f"evals: {images.folder}: {images.key(i)} of {images.split} is of class {label};"
                f" classnames.txt names {classes}, from 0"
            )
    return np.array(labels, np.int64)


def check_train_and_test(images: Images, options: object) -> None:
    """Raise ValueError unless the set has classes, and images of them in test and train."""
    images.class_names()
    images.label(0)
    images.open_split("train").label(0)


def check_visible_patches(model: Embedder, options: object) -> None:
    """Raise ValueError if options.features need all patches and the model sees only some."""
    if options.features in ("grid", "pixels") and not model.sees_all_patches:
        raise ValueError(
            f"--mask, --ensemble: features={options.features} are of whole images; leave them out"
        )


def train_test_features(model: Embedder, images: Images, what: str) -> tuple[Features, Features]:
    """Return (train, test) features of a set, with labels.  All ranks must call."""
    train = compute_features(model, images.open_split("train"), what, labels=True)
    test = compute_features(model, images, what, labels=True)
    return train, test


def map_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory.

    numpy's own map keeps the file open, and ImageNet's 1,252 are more than a process may have.
    """
    header = np.load(path, mmap_mode="r")
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
    return content[header.offset :].view(header.dtype).reshape(header.shape)


def chunk_count(count: int) -> int:
    """Return the number of chunks of so many images."""
    return math.ceil(count / CHUNK)


def chunk_file(folder: Path, chunk: int, kind: str = "") -> Path:
    """Return the file of a chunk."""
    return folder / f"{chunk:05d}{kind}.npy"


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file, completely or not at all."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        np.save(file, values)
    os.replace(unfinished, path)
