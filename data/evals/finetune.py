"""Labelled images for fine-tuning, strongly augmented. What is drawn for a sample follows from
(seed, epoch, sample), for a mixed batch from (seed, step): neither the number of workers nor of
ranks changes a crop, an erased box, or what is mixed with what.

RandAugment, random erasing, mixup and cutmix are timm's, which is not needed otherwise. Three of
its files are loaded by themselves: the package would import torchvision. Names: B global batch, b
this rank's share, H x W an image's sides, C classes.
"""

import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from glimpse.data.evals.clip_benchmark import Images
from glimpse.data.transforms import Size, View, random_view, sides

Row = tuple[int, int]  # epoch, sample


@cache
def timm(name: str) -> ModuleType:
    """timm/data/NAME.py; ValueError where timm is not installed."""
    package = importlib.util.find_spec("timm")
    if package is None:
        raise ValueError(
            "finetune: RandAugment, random erasing, mixup and cutmix are timm's, which is not"
            " installed; pip install timm"
        )
    spec = importlib.util.spec_from_file_location(
        f"timm_{name}", Path(package.origin).parent / "data" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rand_augment(
    how: str, size: Size, mean: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    """RandAugment as timm writes it, e.g.

    rand-m9-mstd0.5-inc1, for images of this size. What is misspelt timm would pass over.
    """
    if not re.fullmatch(r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*", how):
        raise ValueError(
            f"finetune(augment={how!r}): write it as timm does, e.g. 'rand-m9-mstd0.5-inc1', or"
            " none"
        )
    module = timm("auto_augment")
    # Pillow refuses to keep no bits, as timm may ask
    for name in [name for name in module.NAME_TO_OP if name.startswith("Posterize")]:
        module.NAME_TO_OP[name] = lambda image, bits, **more: module.posterize(
            image, max(1, bits), **more
        )
    # as timm's create_transform
    fill = dict(
        translate_const=int(0.45 * min(sides(size))), img_mean=tuple(round(255 * m) for m in mean)
    )
    return module.rand_augment_transform(how, fill)


@contextmanager
def drawn_from(rng: np.random.Generator) -> Iterator[None]:
    """timm draws from three global generators: inside they follow from this one, afterwards they
    are as they were.
    """
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        for begin in (random.seed, np.random.seed, torch.default_generator.manual_seed):
            begin(int(rng.integers(2**32)))
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def paired(rows: Sequence[Row], rank: int, world: int) -> list[Row]:
    """This rank's share of a batch, of whole pairs: the i-th from the front and the i-th from the
    back, which mixup mixes, stay so.
    """
    front = range(rank, len(rows) // 2, world)
    return [rows[i] for i in front] + [rows[-1 - i] for i in reversed(front)]


def label(images: Images, i: int, classes: int) -> int:
    """The class of image i; ValueError where the set does not name it."""
    found = images.label(i)
    if not 0 <= found < classes:
        raise ValueError(
            f"evals: {images.folder}: {images.key(i)} is of class {found}; classnames.txt names"
            f" {classes}, from 0"
        )
    return found


class Labelled(Dataset):
    """Item [rows]: images (b, 3, H, W) float32, normalised; their classes (b,); uniform noise (b,
    *noise), for what a model drops.

    crop: smallest share of the image's area that a crop covers. augment: RandAugment as timm writes
    it, or none. erase: probability.
    """

    def __init__(
        self,
        images: Images,
        classes: int,
        *,
        size: Size,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        crop: float,
        augment: str,
        erase: float,
        noise: tuple[int, ...],
        seed: int,
    ):
        self.images, self.classes, self.size, self.noise, self.seed = (
            images,
            classes,
            size,
            noise,
            seed,
        )
        self.view = View((crop, 1.0), flip=True, interpolation=interpolation)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.augment = rand_augment(augment, size, mean) if augment != "none" else None
        self.erase = timm("random_erasing").RandomErasing(erase, mode="pixel", device="cpu")

    def __getitem__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, noise = zip(*(self.row(*row) for row in rows))
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(np.stack(noise))

    def row(self, epoch: int, i: int) -> tuple[Tensor, int, np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        try:
            pixels, _ = random_view(self.images.image(i), self.size, self.view, rng)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.place(i)}: {error}") from None
        noise = rng.random(self.noise, dtype=np.float32)
        with drawn_from(rng):
            if self.augment:
                pixels = np.array(self.augment(Image.fromarray(pixels)))
            pixels = self.erase(
                (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - self.mean) / self.std
            )
        return pixels, label(self.images, i, self.classes), noise


class Mix:
    """Mixup and cutmix, one of them with one weight for the whole batch, and label smoothing; 0
    switches either off.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, smoothing: float):
        self.mix = timm("mixup").Mixup(
            mixup,
            cutmix,
            prob=float(mixup + cutmix > 0),
            label_smoothing=smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Images (b, 3, H, W) of `paired`, which are changed, and their classes (b,) -> the images,
        targets (b, C); drawn for the key.
        """
        with drawn_from(np.random.default_rng(key)):
            return self.mix(images, labels)
