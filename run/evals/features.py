"""Features of a set's images, computed by all ranks together and stored on disk.

An evaluation that trains on features can be interrupted and repeated without encoding the images
again.

    RUN/features/TAG/SET-SPLIT-KIND-DIGEST/00000.npy ...
        CHUNK images each, float32 or float16; 00000.label.npy has their classes

TAG identifies the weights, DIGEST the set and the preprocessing. A chunk is written atomically, so
any number of ranks can resume. All ranks must see the run's folder.

Shapes: N images of a split, D feature width.
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
# Kinds of features (see Embedder.iterate_features) that are one vector per image.
FEATURE_KINDS = ("pooled", "embedded", "grid", "pixels")
FLOAT16_KINDS = ("tokens", "grid", "pixels")  # large, and need little precision


class Features:
    """The stored features of a split, (N, ...), indexed by image.

    They are memory-mapped, so every rank can read all of them.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self.chunks = [map_array(chunk_file(folder, i)) for i in range(chunk_count(count))]

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Iterable[int] | Tensor) -> Tensor:
        """Return the features of these images, (n, ...) float32, in the order of `indices`."""
        indices = np.asarray(indices)
        chunk_of_index = indices // CHUNK
        result = np.empty((len(indices), *self.chunks[0].shape[1:]), np.float32)
        for chunk in np.unique(chunk_of_index):
            places = np.nonzero(chunk_of_index == chunk)[0]
            result[places] = self.chunks[chunk][indices[places] % CHUNK]
        return torch.from_numpy(result)

    def all_rows(self) -> Tensor:
        """Return the features of all images, (N, ...) float32."""
        return torch.from_numpy(np.concatenate(self.chunks).astype(np.float32, copy=False))

    def labels(self) -> Tensor:
        """Return the classes of all images, (N,) int64."""
        files = [chunk_file(self.folder, i, ".label") for i in range(chunk_count(self.count))]
        return torch.from_numpy(np.concatenate([np.load(file) for file in files]))


def compute_features(model: Embedder, images: Images, kind: str, labels: bool = False) -> Features:
    """Return the features of a split, computing the chunks that are missing on disk.

    All ranks must call. kind: see Embedder.iterate_features. labels: store the images' classes too.
    """
    folder = features_folder(model, images, kind)
    rank0_first(lambda: folder.mkdir(parents=True, exist_ok=True))

    # 1. The missing chunks are assigned to the ranks in turn. Rank 0 lists them, because another
    #    rank could see the folder differently on a network file system.
    count = len(images)
    suffixes = ("", ".label") if labels else ("",)

    def missing_chunks() -> str:
        missing = []
        for chunk in range(chunk_count(count)):
            if not all(chunk_file(folder, chunk, suffix).exists() for suffix in suffixes):
                missing.append(str(chunk))
        return " ".join(missing)

    missing = [int(chunk) for chunk in broadcast_from_rank0(missing_chunks).split()]
    rank_chunks = missing[rank() :: world_size()]
    indices_of_rank: list[int] = []
    for chunk in rank_chunks:
        indices_of_rank += range(chunk * CHUNK, min((chunk + 1) * CHUNK, count))
    max_chunks = math.ceil(len(missing) / world_size())  # of any rank
    rounds = max_chunks * (CHUNK // BATCH)

    # 2. Collect batches until they fill a chunk, or end with the split's last image.
    dtype = torch.float16 if kind in FLOAT16_KINDS else torch.float32
    unfinished_chunks = iter(rank_chunks)
    chunk_indices: list[int] = []
    chunk_batches: list[Tensor] = []
    for indices, batch in model.iterate_features(images, kind, indices_of_rank, rounds):
        chunk_indices += indices.tolist()
        chunk_batches.append(batch.to(dtype).cpu())
        if chunk_indices and (len(chunk_indices) == CHUNK or chunk_indices[-1] == count - 1):
            chunk = next(unfinished_chunks)
            # The labels are written first, so that a chunk with features has labels too.
            if labels:
                write_array(chunk_file(folder, chunk, ".label"), read_labels(images, chunk_indices))
            write_array(chunk_file(folder, chunk), torch.cat(chunk_batches).numpy())
            chunk_indices, chunk_batches = [], []
    barrier()
    return Features(folder, count)


def features_folder(model: Embedder, images: Images, kind: str) -> Path:
    """Return the folder of a split's features; its name has a digest of all that affects them."""
    last_key = images.key(len(images) - 1)
    set_folder = str(images.folder.resolve())
    layout = type(images).__name__
    settings = (
        model.preprocess,
        model.mask,
        model.ensemble,
        set_folder,
        layout,
        len(images),
        last_key,
    )
    digest = zlib.crc32(repr(settings).encode())
    name = f"{images.name}-{images.split}-{kind}-{digest:08x}"
    return model.results_folder / "features" / model.tag / name


def read_labels(images: Images, indices: list[int]) -> np.ndarray:
    """Return the classes of images, int64.

    Raises ValueError if a class has no name. Nothing is stored then, so the set can be corrected.
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
    """Raise ValueError unless the set has classes, and labeled images in train/ and test/."""
    images.class_names()
    images.label(0)
    images.open_split("train").label(0)


def check_visible_patches(model: Embedder, options: object) -> None:
    """Raise ValueError if options.features need all patches and the model sees only some."""
    if options.features in ("grid", "pixels") and not model.sees_all_patches:
        raise ValueError(
            f"--mask, --ensemble: features={options.features} are of whole images; remove these"
            " options"
        )


def train_test_features(model: Embedder, images: Images, kind: str) -> tuple[Features, Features]:
    """Return the features of a set's train/ and test/, with labels. All ranks must call."""
    train = compute_features(model, images.open_split("train"), kind, labels=True)
    test = compute_features(model, images, kind, labels=True)
    return train, test


def map_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory, without an open file.

    np.load's mmap_mode keeps the file open. ImageNet's features are 1,252 files, and a process may
    often open only 1,024.
    """
    header = np.load(path, mmap_mode="r")
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
    return content[header.offset :].view(header.dtype).reshape(header.shape)


def chunk_count(images: int) -> int:
    """Return the number of chunks of a split with this many images."""
    return math.ceil(images / CHUNK)


def chunk_file(folder: Path, chunk: int, suffix: str = "") -> Path:
    """Return the path of a chunk's features; suffix .label: of its labels."""
    return folder / f"{chunk:05d}{suffix}.npy"


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file atomically."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        np.save(file, values)
    os.replace(unfinished, path)
