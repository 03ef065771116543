"""Labeled images for fine-tuning, with strong augmentation.

The random numbers of a sample depend on (seed, epoch, sample), those of a mixed batch on the key
that `MixupCutmix` gets. Crops, erased boxes and the choice of mixed images therefore do not depend
on the number of workers or ranks.

RandAugment, random erasing, mixup and cutmix are timm's. timm is an optional dependency: only these
need it, and they load three of its files directly, because importing the package would import
torchvision.

Shapes: b images of this rank in a batch, H x W an image's sides, C classes.
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

EpochSample = tuple[int, int]  # (epoch, sample)


@cache
def timm_module(name: str) -> ModuleType:
    """Load the module timm/data/NAME.py; ValueError if timm is not installed."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ValueError(
            "finetune: RandAugment, random erasing, mixup and cutmix need timm, which is not"
            " installed; pip install timm"
        )
    path = Path(package.origin).parent / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"timm_{name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"finetune: {path} is not a Python module; reinstall timm")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rand_augment(
    notation: str, size: Size, mean: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    """Build RandAugment for images of this size from timm's notation, e.g. rand-m9-mstd0.5-inc1.

    Raise ValueError if the notation is misspelled; timm would ignore that.
    """
    if not re.fullmatch(r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*", notation):
        raise ValueError(
            f"finetune(augment={notation!r}): it is not in timm's notation; write e.g."
            " 'rand-m9-mstd0.5-inc1', or none"
        )
    module = timm_module("auto_augment")

    # timm may request 0 bits per color, which Pillow refuses: use at least 1.
    def posterize(image: Image.Image, bits: int, **options) -> Image.Image:
        return module.posterize(image, max(1, bits), **options)

    for name in module.NAME_TO_OP:
        if name.startswith("Posterize"):
            module.NAME_TO_OP[name] = posterize

    # The same settings as timm's create_transform.
    longest_shift = int(0.45 * min(height_and_width(size)))
    fill_color = tuple(round(255 * channel) for channel in mean)
    settings = dict(translate_const=longest_shift, img_mean=fill_color)
    return module.rand_augment_transform(notation, settings)


@contextmanager
def seed_global_generators(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch from `rng` for the duration of a block.

    timm uses all three of them. Their previous states are restored afterwards.
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
    samples: Sequence[EpochSample], rank: int, world_size: int
) -> list[EpochSample]:
    """Return this rank's share of a batch, which contains both samples of each pair to be mixed.

    timm mixes the i-th sample with the i-th from the end. These pairs are the same in the share as
    in the batch.
    """
    front = range(rank, len(samples) // 2, world_size)
    return [samples[i] for i in front] + [samples[-1 - i] for i in reversed(front)]


def checked_label(images: Images, i: int, classes: int) -> int:
    """Return the class number of image i; ValueError unless it is below `classes`."""
    number = images.label(i)
    if not 0 <= number < classes:
        raise ValueError(
            f"evals: {images.folder}: {images.key(i)} is of class {number}; classnames.txt names"
            f" {classes}, from 0"
        )
    return number


class LabeledImages(Dataset):
    """Batches of augmented images: item [(epoch, sample), ...] is (images, classes, noise).

    images: (b, 3, H, W) float32, normalized. classes: (b,). noise: (b, *noise), uniform in [0, 1);
    the model uses it for stochastic depth (drop path).

    crop: smallest share of the image's area that a crop covers. augment: RandAugment in timm's
    notation, or none. erase: probability of random erasing.
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

    def __getitem__(self, samples: Sequence[EpochSample]) -> tuple[Tensor, Tensor, Tensor]:
        prepared = [self.prepare(epoch, i) for epoch, i in samples]
        images, labels, noise = zip(*prepared)
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(np.stack(noise))

    def prepare(self, epoch: int, i: int) -> tuple[Tensor, int, np.ndarray]:
        """Return the augmented image i of an epoch (3, H, W), its class, and its noise."""
        # All random numbers come from this generator. timm uses the global ones, which are seeded
        # from it.
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
    """Mixup or cutmix, with one weight for all images of a batch, and label smoothing.

    The value 0 disables any of the three.
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
        """Mix images (b, 3, H, W) in place, and return them and their targets (b, C).

        The images must be in the order of `mixup_pairs_of_rank`. labels: their classes (b,). key:
        seed of the random numbers, equal on all ranks.
        """
        with seed_global_generators(np.random.default_rng(key)):
            return self.mix(images, labels)
