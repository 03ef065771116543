"""Colors: each change is torchvision's, with a random factor, in a fixed order.

The changes have the probabilities of the view, and depend on the generator only.

    bash run/test.sh tests/data/test_color.py
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from glimpse.data import transforms
from glimpse.data.transforms import View, random_view, recolor, shift_hue
from glimpse.tests.helpers.photos import encode, photo

F = pytest.importorskip("torchvision.transforms.functional")

NO_JITTER = (0.0, 0.0, 0.0, 0.0)
PHOTO = photo(40, 60)
IMAGE = np.asarray(PHOTO)
JITTER_INDEX = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


class FixedGenerator:
    """A replacement for a random generator with which every change happens.

    Its uniform draws are at `share` of the way between their limits.
    """

    def __init__(self, share, order=(0, 1, 2, 3)):
        self.share = share
        self.order = order

    def random(self):
        return 0.0

    def uniform(self, low, high):
        return low + self.share * (high - low)

    def permutation(self, n):
        assert n == 4
        return self.order


def change_colors(rng, jitter=NO_JITTER, grey=0.0, blur=0.0, solarize=0.0, image=IMAGE):
    result = recolor(image, rng, jitter, grey, blur, solarize)
    assert result.shape == image.shape
    assert result.dtype == np.uint8
    return result


def jitter_of(name, amount):
    """Return the jitter of a single property."""
    jitter = [0.0] * 4
    jitter[JITTER_INDEX[name]] = amount
    return tuple(jitter)


def level_errors(result, expected):
    """Return the largest and the mean difference, in levels of 255."""
    error = np.abs(result.astype(int) - np.asarray(expected).astype(int))
    return error.max(), error.mean()


def test_zeros_leave_the_image_and_the_generator_alone():
    rng = np.random.default_rng(0)

    assert recolor(IMAGE, rng, NO_JITTER, 0.0, 0.0, 0.0) is IMAGE
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "name, amount, low, high",
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.4, 0.6, 1.4),
        ("saturation", 0.2, 0.8, 1.2),
        # Factors below 0 become 0.
        ("brightness", 1.5, 0.0, 2.5),
        ("contrast", 1.5, 0.0, 2.5),
        ("saturation", 1.5, 0.0, 2.5),
        # Integer multiples of 1/255; torchvision would round others towards 0.
        ("hue", 0.2, -0.2, 0.2),
        ("hue", 0.4, -0.4, 0.4),
    ],
)
def test_jitter_is_torchvision_from_one_end_of_its_range_to_the_other(name, amount, low, high):
    adjust = getattr(F, f"adjust_{name}")
    for share, factor in ((0.0, low), (0.5, (low + high) / 2), (1.0, high)):
        result = change_colors(FixedGenerator(share), jitter_of(name, amount))

        assert np.array_equal(result, np.asarray(adjust(PHOTO, factor)))
    assert not np.array_equal(result, IMAGE)


@pytest.mark.parametrize("shift", [-0.5, -0.33, -0.1, 0.05, 0.25, 0.5])
def test_hue_is_within_a_level_of_torchvision(shift):
    result = np.asarray(shift_hue(PHOTO, shift))

    largest, mean = level_errors(result, F.adjust_hue(PHOTO, shift))
    assert largest <= 7, "one of the 256 levels of hue is 6 levels of red, green or blue"
    assert mean < 2.5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_everything_at_once_is_torchvision_step_by_step(order):
    jitter = (0.4, 0.5, 0.6, 0.2)
    factors = (1.4, 1.5, 1.6, 0.2)  # the upper end of each range
    names = list(JITTER_INDEX)

    jittered = change_colors(FixedGenerator(1.0, order), jitter)
    everything = change_colors(FixedGenerator(1.0, order), jitter, 0.2, 0.1, 0.2)

    expected = PHOTO
    for i in order:
        adjust = getattr(F, f"adjust_{names[i]}")
        expected = adjust(expected, factors[i])
    assert np.array_equal(jittered, np.asarray(expected))
    expected = F.rgb_to_grayscale(expected, 3)
    expected = expected.filter(ImageFilter.GaussianBlur(2.0))
    expected = F.solarize(expected, 128)
    assert np.array_equal(everything, np.asarray(expected))


def test_every_order_of_the_jitter_is_as_likely(monkeypatch):
    steps = []

    def recording_enhancer(name):
        """Replace a class of ImageEnhance by one that records its use and changes nothing."""

        def enhancer(image):
            def enhance(factor):
                steps.append(name)
                return image

            return SimpleNamespace(enhance=enhance)

        return enhancer

    def recording_hue(image, shift):
        steps.append("hue")
        return image

    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setattr(transforms.ImageEnhance, name, recording_enhancer(name))
    monkeypatch.setattr(transforms, "shift_hue", recording_hue)
    counts = Counter()
    for seed in range(1200):
        steps.clear()
        transforms.jitter_color(PHOTO, (0.1, 0.1, 0.1, 0.1), np.random.default_rng(seed))
        counts[tuple(steps)] += 1

    assert len(counts) == 24
    assert min(counts.values()) > 25  # 50 each
    assert max(counts.values()) < 80


def test_grey_and_solarize_are_torchvision():
    grey = change_colors(FixedGenerator(0.5), grey=0.1)
    assert np.array_equal(grey, np.asarray(F.rgb_to_grayscale(PHOTO, 3)))

    solarized = change_colors(FixedGenerator(0.5), solarize=0.1)
    assert np.array_equal(solarized, np.asarray(F.solarize(PHOTO, 128)))

    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    solarized = change_colors(FixedGenerator(0.5), solarize=0.1, image=ramp)
    assert solarized[0, 126:130, 0].tolist() == [126, 127, 127, 126]


@pytest.mark.parametrize("share, sigma", [(0.0, 0.1), (0.5, 1.05), (1.0, 2.0)])
def test_blur_is_nearly_torchvision_gaussian(share, sigma):
    """Pillow approximates a Gaussian by boxes: nearest to the Gaussian of the same sigma."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    grain = Image.fromarray(pixels)

    result = change_colors(FixedGenerator(share), blur=0.1, image=pixels)

    errors = {}
    for other in (0.1, 0.6, 0.9, 1.05, 1.2, 1.8, 2.0, 2.2):
        _, errors[other] = level_errors(result, F.gaussian_blur(grain, [23, 23], [other, other]))
    assert min(errors, key=errors.get) == sigma
    assert errors[sigma] < 2


ODD = np.indices((4, 4)).sum(0)[..., None] % 2
CHECKS = np.where(ODD, (250, 30, 90), (10, 200, 140)).astype(np.uint8)


@pytest.mark.parametrize(
    "how, share",
    [
        (dict(jitter=(0.4, 0.4, 0.2, 0.1)), 0.8),
        (dict(jitter=jitter_of("hue", 0.5)), 0.8),
        (dict(grey=0.2), 0.2),
        (dict(blur=0.1), 0.1),
        (dict(solarize=0.2), 0.2),
    ],
)
def test_as_often_as_asked(how, share):
    rng = np.random.default_rng(0)
    draws = 1500

    results = [change_colors(rng, **how, image=CHECKS) for _ in range(draws)]

    changes = sum(not np.array_equal(result, CHECKS) for result in results)
    assert changes / draws == pytest.approx(share, abs=0.03)


def test_each_change_is_drawn_on_its_own():
    rng = np.random.default_rng(0)
    bright = np.full((2, 2, 3), (200, 220, 240), np.uint8)

    results = [change_colors(rng, grey=0.5, solarize=0.4, image=bright) for _ in range(1500)]

    colors = np.stack([result[0, 0].astype(int) for result in results])
    grey = colors[:, 0] == colors[:, 2]
    dark = colors[:, 1] < 128
    assert grey.mean() == pytest.approx(0.5, abs=0.03)
    assert dark.mean() == pytest.approx(0.4, abs=0.03)
    assert (grey & dark).mean() == pytest.approx(0.2, abs=0.03)


def test_the_generator_decides_and_the_image_is_left_as_it_was():
    how = dict(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)
    before = IMAGE.copy()

    results = [change_colors(np.random.default_rng(seed), **how) for seed in range(20)]
    again = [change_colors(np.random.default_rng(seed), **how) for seed in range(20)]

    for result, same in zip(results, again):
        assert np.array_equal(result, same)
    assert len({result.tobytes() for result in results}) > 15
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "field, expected",
    [
        (dict(grey=1.0), lambda image: F.rgb_to_grayscale(image, 3)),
        (dict(blur=1.0), None),
        (dict(solarize=1.0), lambda image: F.solarize(image, 128)),
    ],
)
def test_a_view_passes_its_settings_on(field, expected, flip):
    data = encode(photo(64, 48), "PNG")
    for seed in range(4):
        image, box = random_view(data, 32, View(flip=flip, **field), np.random.default_rng(seed))
        plain, same_box = random_view(data, 32, View(flip=flip), np.random.default_rng(seed))

        assert box == same_box
        if expected:
            assert np.array_equal(image, np.asarray(expected(Image.fromarray(plain))))
        else:  # blur: smoother, with the same mean
            largest, _ = level_errors(image, plain)
            assert largest > 0
            assert abs(image.mean() - plain.mean()) < 1
            assert variation(image) < variation(plain)


def variation(image):
    """Return the total difference of horizontal neighbors."""
    return np.abs(np.diff(image.astype(int), axis=1)).sum()
