"""Features of a whole set, made once by all ranks and kept on disk, so that what is fitted to them
can be broken off and done again.

    RUN/features/TAG/SET-SPLIT-WHAT-DIGEST/00000.npy ...
        CHUNK images each, float32 or float16; 00000.label.npy their classes

TAG tells the weights, DIGEST the set and how its images are shown. A chunk is there whole or not at
all; any number of ranks goes on.
The run's folder must be one that all ranks see.  Names: N images, D width.
"""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.lib.distributed import barrier, once, rank, told, world

CHUNK = 16 * BATCH
KINDS = ("pooled", "embedded", "grid", "pixels")  # a vector an image, as Embedder.passed has them
HALF = ("tokens", "grid", "pixels")  # kept as float16: many numbers, of few bits


class Features:
    """The features of a set's images, (N, ...), by number; the whole on every rank, read from disk
    as they are asked for.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.parts = [mapped(part(folder, c)) for c in range(chunks(count))]

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Iterable[int] | Tensor) -> Tensor:
        """(n, ...) float32, in the order asked for."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), *self.parts[0].shape[1:]), np.float32)
        for chunk in np.unique(indices // CHUNK):
            here = np.nonzero(indices // CHUNK == chunk)[0]
            out[here] = self.parts[chunk][indices[here] % CHUNK]
        return torch.from_numpy(out)

    def all(self) -> Tensor:
        return torch.from_numpy(np.concatenate(self.parts).astype(np.float32, copy=False))

    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(
            np.concatenate(
                [np.load(part(self.folder, c, ".label")) for c in range(chunks(self.count))]
            )
        )


def features(model: Embedder, images: Images, what: str, labels: bool = False) -> Features:
    """`what` as Embedder.passed has it; labels: the classes of the images too.

    All ranks must call.
    """
    last = images.key(len(images) - 1)
    how = repr(
        (
            model.pre,
            model.mask,
            model.ensemble,
            str(images.folder.resolve()),
            type(images).__name__,
            len(images),
            last,
        )
    )
    folder = (
        model.home
        / "features"
        / model.tag
        / f"{images.name}-{images.split}-{what}-{zlib.crc32(how.encode()):08x}"
    )
    once(lambda: folder.mkdir(parents=True, exist_ok=True))
    missing = told(
        lambda: " ".join(
            str(c)
            for c in range(chunks(len(images)))
            if not part(folder, c).exists() or labels and not part(folder, c, ".label").exists()
        )
    )
    missing = [int(c) for c in missing.split()]
    mine = missing[rank() :: world()]
    samples = [i for c in mine for i in range(c * CHUNK, min((c + 1) * CHUNK, len(images)))]
    turns = -(-len(missing) // world()) * (CHUNK // BATCH)
    made, waiting = iter(mine), []
    for indices, x in model.passed(images, what, samples, turns):
        waiting.append((indices, x.to(torch.float16 if what in HALF else torch.float32).cpu()))
        have = sum(len(i) for i, _ in waiting)
        if have and (have == CHUNK or int(indices[-1]) == len(images) - 1):
            chunk, order = next(made), torch.cat([i for i, _ in waiting]).tolist()
            if labels:
                write(part(folder, chunk, ".label"), numbers(images, order))
            write(part(folder, chunk), torch.cat([x for _, x in waiting]).numpy())
            waiting.clear()
    barrier()
    return Features(folder, len(images))


def numbers(images: Images, indices: list[int]) -> np.ndarray:
    """The classes of images, int64.

    ValueError: there is none of that number; nothing is kept of it, so that it can be mended.
    """
    found, classes = [images.label(i) for i in indices], len(images.classes())
    if wrong := [i for i, label in zip(indices, found) if not 0 <= label < classes]:
        raise ValueError(
            f"evals: {images.folder}: {images.key(wrong[0])} of {images.split} is of class"
            f" {images.label(wrong[0])}; classnames.txt names {classes}, from 0"
        )
    return np.array(found, np.int64)


def check_splits(images: Images, options: object) -> None:
    """ValueError unless the set has classes, and images of them in its test and train splits."""
    images.classes(), images.label(0), images.other("train").label(0)


def check_view(model: Embedder, options: object) -> None:
    """ValueError where options.features are of all patches in their places, and the model sees
    some.
    """
    if options.features in ("grid", "pixels") and not model.whole:
        raise ValueError(
            f"--mask, --ensemble: features={options.features} are of whole images; leave them out"
        )


def splits(model: Embedder, images: Images, what: str) -> tuple[Features, Features]:
    """(train, test) features of a set, with labels.  All ranks must call."""
    return features(model, images.other("train"), what, labels=True), features(
        model, images, what, labels=True
    )


def mapped(path: Path) -> np.ndarray:
    """A .npy file, read as it is asked for.

    numpy's own map keeps the file open, and ImageNet's 1,252 are more than a process may have.
    """
    found = np.load(path, mmap_mode="r")
    held = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
    return held[found.offset :].view(found.dtype).reshape(found.shape)


def chunks(count: int) -> int:
    return -(-count // CHUNK)


def part(folder: Path, chunk: int, kind: str = "") -> Path:
    return folder / f"{chunk:05d}{kind}.npy"


def write(path: Path, values: np.ndarray) -> None:
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        np.save(file, values)
    os.replace(unfinished, path)
