"""Augmented images for fine-tuning are functions of (seed, epoch, sample).

Mixing gives the same result on any number of ranks, and targets that sum to one.

    bash run/test.sh tests/data/evals/test_finetune_data.py
"""

import importlib.util
import random

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.evals.finetune import (
    LabeledImages,
    MixupCutmix,
    mixup_pairs_of_rank,
    rand_augment,
    timm_module,
)
from glimpse.data.shards import write_shard
from glimpse.tests.helpers.tiny import NAMES, picture

SETTINGS = dict(
    size=32,
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    noise=(4, 2),
    seed=0,
)
STRONG = dict(crop=0.08, augment="rand-m9-mstd0.5-inc1", erase=0.5)
ALL_SAMPLES = [(0, i) for i in range(24)]  # every image, in the first epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    rng = np.random.default_rng(0)
    samples = []
    for i in range(24):
        samples.append((f"{i:04d}", {"png": picture(NAMES[i], rng), "cls": b"%d" % i}))
    (folder / "train").mkdir()
    write_shard(folder / "train" / "0.tar", samples)
    return ClipBenchmarkSet(folder, "train")


def random_states():
    """Return the states of the three global generators."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def test_images_depend_on_seed_epoch_and_sample(images):
    """They do not depend on earlier reads or the global generators, whose state is preserved."""
    rows = [*ALL_SAMPLES, (1, 3)]

    first, labels, noise = LabeledImages(images, 24, **SETTINGS, **STRONG)[rows]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    states = random_states()
    again, _, noise_again = LabeledImages(images, 24, **SETTINGS, **STRONG)[rows[::-1]]
    other, _, _ = LabeledImages(images, 24, **{**SETTINGS, "seed": 1}, **STRONG)[rows]

    assert states == random_states()
    torch.testing.assert_close(again.flip(0), first, rtol=0, atol=0)
    torch.testing.assert_close(noise_again.flip(0), noise, rtol=0, atol=0)
    assert labels.tolist() == [*range(24), 3]
    assert first.shape == (25, 3, 32, 32)
    assert noise.shape == (25, 4, 2)
    assert not torch.equal(first[24], first[3]), "another epoch, another crop"
    assert not torch.equal(other, first)


def test_the_whole_image_without_augmentation(images):
    """Only the random flip remains; the images are normalized per channel."""
    mean = torch.tensor(SETTINGS["mean"]).view(3, 1, 1)

    normalized, _, _ = LabeledImages(images, 24, **SETTINGS, crop=1.0, augment="none", erase=0.0)[
        ALL_SAMPLES
    ]

    pixels = (normalized * 0.2 + mean) * 255
    assert pixels.min() >= -1e-3
    assert pixels.max() <= 255 + 1e-3
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)


def test_erasing_draws_noise_after_normalization(images):
    plain, _, _ = LabeledImages(images, 24, **SETTINGS, crop=0.5, augment="none", erase=0.0)[
        ALL_SAMPLES
    ]
    erased, _, _ = LabeledImages(images, 24, **SETTINGS, crop=0.5, augment="none", erase=1.0)[
        ALL_SAMPLES
    ]

    changed = (plain != erased).float().mean((1, 2, 3))
    assert (changed > 0.01).all()
    assert (changed < 0.4).all(), "at most a third of an image"
    assert abs(float(erased[plain != erased].std()) - 1) < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_pairs_stay_on_a_rank(world_size):
    rows = [(0, i) for i in range(10)]

    shares = [mixup_pairs_of_rank(rows, rank, world_size) for rank in range(world_size)]

    assert sorted(sum(shares, [])) == rows
    for share in shares:
        for (_, front), (_, back) in zip(share, share[::-1]):
            assert front + back == 9


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_shares_are_mixed_like_the_full_batch(mixup, cutmix):
    pixels = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 4
    rows = [(0, i) for i in range(10)]
    mix = MixupCutmix(4, mixup, cutmix, 0.1)

    for step in range(4):
        mixed, targets = mix(pixels.clone(), labels, 0, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(10))
        assert not torch.equal(mixed, pixels)

        for rank in range(3):
            share = [i for _, i in mixup_pairs_of_rank(rows, rank, 3)]
            mixed_share, targets_share = mix(pixels[share], labels[share], 0, step)
            torch.testing.assert_close(mixed_share, mixed[share], rtol=0, atol=0)
            torch.testing.assert_close(targets_share, targets[share], rtol=0, atol=0)


def test_targets_by_hand():
    """Smoothing 0.2 with two classes gives 0.9 and 0.1; mixing with weight w gives w and 1 - w."""
    pixels = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    labels = torch.tensor([0, 1])

    unmixed, targets = MixupCutmix(2, 0.0, 0.0, 0.2)(pixels.clone(), labels, 0, 0)

    assert torch.equal(unmixed, pixels)
    torch.testing.assert_close(targets, torch.tensor([[0.9, 0.1], [0.1, 0.9]]))

    mixed, targets = MixupCutmix(2, 0.8, 0.0, 0.0)(pixels.clone(), labels, 0, 0)

    weight = 1 - float(mixed[0, 0, 0, 0])
    assert 0 < weight < 1
    torch.testing.assert_close(targets, torch.tensor([[weight, 1 - weight], [1 - weight, weight]]))


def test_a_label_beyond_the_classes_is_named(images):
    with pytest.raises(ValueError, match="0.tar 0005 is of class 5; classnames.txt names 5"):
        LabeledImages(images, 5, **SETTINGS, **STRONG)[[(0, 5)]]


def test_randaugment_in_another_notation_is_refused():
    for notation in ("auto-m9", "rand-x9", "rand-mnine"):
        with pytest.raises(ValueError, match="finetune.augment=.*not in timm's notation"):
            rand_augment(notation, 32, (0.5, 0.5, 0.5))

    transform = rand_augment("rand-m9-n1-p1-inc1", 32, (0.5, 0.5, 0.5))
    strongest = timm_module("auto_augment").NAME_TO_OP["PosterizeIncreasing"]
    image = Image.new("RGB", (4, 4), (200, 100, 50))

    assert transform
    assert strongest(image, 0).getpixel((0, 0)) == (128, 0, 0)


def test_timm_is_required(monkeypatch):
    timm_module.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match="pip install timm"):
        timm_module("mixup")
