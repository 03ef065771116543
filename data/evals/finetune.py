"""Labeled images for fine-tuning, strongly augmented.

The random numbers of a sample follow from (seed, epoch, sample), those of a mixed batch from (seed,
step): neither the number of workers nor of ranks changes a crop, an erased box, or which images are
mixed.

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
from glimpse.data.transforms import Size, View, height_and_width, random_view

EpochSample = tuple[int, int]  # epoch, sample


@cache
def timm_module(name: str) -> ModuleType:
    """Load timm/data/NAME.py; ValueError if timm is not installed."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ValueError(
            "finetune: RandAugment, random erasing, mixup and cutmix are timm's, which is not"
            " installed; pip install timm"
        )
    path = Path(package.origin).parent / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"timm_{name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"finetune: {path} is no Python module; reinstall timm")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rand_augment(
    how: str, size: Size, mean: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    """Build RandAugment from timm's notation, e.g. rand-m9-mstd0.5-inc1, for images of this size.

    ValueError: the notation is misspelled, which timm itself would ignore.
    """
    if not re.fullmatch(r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*", how):
        raise ValueError(
            f"finetune(augment={how!r}):"
            " write it as timm does, e.g. 'rand-m9-mstd0.5-inc1', or none"
        )
    module = timm_module("auto_augment")

    # timm may ask Pillow to keep 0 bits of a color, which Pillow refuses.
    def posterize(image: Image.Image, bits: int, **options) -> Image.Image:
        return module.posterize(image, max(1, bits), **options)

    for name in module.NAME_TO_OP:
        if name.startswith("Posterize"):
            module.NAME_TO_OP[name] = posterize

    # The same settings as timm's create_transform.
    longest_shift = int(0.45 * min(height_and_width(size)))
    fill_color = tuple(round(255 * channel) for channel in mean)
    settings = dict(translate_const=longest_shift, img_mean=fill_color)
    return module.rand_augment_transform(how, settings)


@contextmanager
def seed_global_generators(rng: np.random.Generator) -> Iterator[None]:
    """Seed the three global generators from `rng` inside the block, and restore them after it.

    timm draws from all three of them.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        for seed in (random.seed, np.random.seed, torch.default_generator.manual_seed):
            seed(int(rng.integers(2**32)))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def mixup_pairs_of_rank(
    rows: Sequence[EpochSample], rank: int, world_size: int
) -> list[EpochSample]:
    """Return this rank's share of a batch, made of the pairs that mixup mixes.

    The i-th row from the front and the i-th from the back are such a pair, of the batch and of the
    share.
    """
    front = range(rank, len(rows) // 2, world_size)
    return [rows[i] for i in front] + [rows[-1 - i] for i in reversed(front)]


def checked_label(images: Images, i: int, classes: int) -> int:
    """Return the class of image i; ValueError if the set does not name it."""
    number = images.label(i)
    if not 0 <= number < classes:
        raise ValueError(
            f"evals: {images.folder}: {images.key(i)} is of class {number}; classnames.txt names"
            f" {classes}, from 0"
        )
    return number


class LabeledImages(Dataset):
    """Batches by lists of rows: item [rows] is (images, classes, noise).

    Images are (b, 3, H, W) float32, normalized; classes (b,); the uniform noise (b, *noise) is for
    what a model drops. crop: smallest share of the image's area that a crop covers. augment:
    RandAugment in timm's notation, or none. erase: probability.
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
        self.images = images
        self.classes = classes
        self.size = size
        self.noise = noise
        self.seed = seed
        self.view = View((crop, 1.0), flip=True, interpolation=interpolation)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.augment = rand_augment(augment, size, mean) if augment != "none" else None
        self.erase = timm_module("random_erasing").RandomErasing(erase, mode="pixel", device="cpu")

    def __getitem__(self, rows: Sequence[EpochSample]) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, noise = zip(*(self.row(*row) for row in rows))
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(np.stack(noise))

    def row(self, epoch: int, i: int) -> tuple[Tensor, int, np.ndarray]:
        """Return image i as it is seen in an epoch, its class, and its noise."""
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        try:
            pixels, _ = random_view(self.images.image(i), self.size, self.view, rng)
        except ValueError as error:
            raise ValueError(f"evals: {self.images.location(i)}: {error}") from None
        noise = rng.random(self.noise, dtype=np.float32)
        with seed_global_generators(rng):
            if self.augment:
                pixels = np.array(self.augment(Image.fromarray(pixels)))
            values = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            image = self.erase((values - self.mean) / self.std)
        return image, checked_label(self.images, i, self.classes), noise


class MixupCutmix:
    """Mixup or cutmix, with one weight for the whole batch, and label smoothing.

    0 switches any of them off.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, smoothing: float):
        self.mix = timm_module("mixup").Mixup(
            mixup,
            cutmix,
            prob=float(mixup + cutmix > 0),
            label_smoothing=smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Mix images (b, 3, H, W) of `paired`, in place, with random numbers that follow from key.

        labels: their classes (b,). Return the images and their targets (b, C).
        """
        with seed_global_generators(np.random.default_rng(key)):
            return self.mix(images, labels)
