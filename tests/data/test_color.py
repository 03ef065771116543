"""Colours: each change is torchvision's, at a factor from the range asked for and in this order; it
happens as often as asked, and
follows from the generator alone.

    bash run/test.sh tests/data/test_color.py
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

import glimpse.data.transforms as colour
from glimpse.data.transforms import recolour, turned
from glimpse.data.transforms import View, random_view
from glimpse.tests.data.test_transforms import encode, picture

F = pytest.importorskip("torchvision.transforms.functional")

OFF = (0.0, 0.0, 0.0, 0.0)
PICTURE = picture(40, 60)
IMAGE = np.asarray(PICTURE)
JITTER = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


class Chosen:
    """In place of a generator: everything happens, and a uniform draw lies at `share` between its
    ends.
    """

    def __init__(self, share, order=(0, 1, 2, 3)):
        self.share, self.order = share, order

    def random(self):
        return 0.0

    def uniform(self, low, high):
        return low + self.share * (high - low)

    def permutation(self, n):
        assert n == 4
        return self.order


def changed(rng, jitter=OFF, grey=0.0, blur=0.0, solarize=0.0, image=IMAGE):
    made = recolour(image, rng, jitter, grey, blur, solarize)
    assert made.shape == image.shape and made.dtype == np.uint8
    return made


def only(name, amount):
    return tuple(amount if i == JITTER[name] else 0.0 for i in range(4))


def level(made, expected):
    """The largest and the mean difference."""
    error = np.abs(made.astype(int) - np.asarray(expected).astype(int))
    return error.max(), error.mean()


def test_zeros_leave_the_image_and_the_generator_alone():
    rng = np.random.default_rng(0)
    assert recolour(IMAGE, rng, OFF, 0.0, 0.0, 0.0) is IMAGE
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "name, amount, low, high",
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.4, 0.6, 1.4),
        ("saturation", 0.2, 0.8, 1.2),
        # no factor is below 0
        ("brightness", 1.5, 0.0, 2.5),
        ("contrast", 1.5, 0.0, 2.5),
        ("saturation", 1.5, 0.0, 2.5),
        # a whole number of 255ths, which torchvision would round towards 0
        ("hue", 0.2, -0.2, 0.2),
        ("hue", 0.4, -0.4, 0.4),
    ],
)
def test_jitter_is_torchvision_from_one_end_of_its_range_to_the_other(name, amount, low, high):
    adjust = getattr(F, f"adjust_{name}")
    for share, factor in ((0.0, low), (0.5, (low + high) / 2), (1.0, high)):
        made = changed(Chosen(share), only(name, amount))
        assert np.array_equal(made, np.asarray(adjust(PICTURE, factor)))
    assert not np.array_equal(made, IMAGE)


@pytest.mark.parametrize("shift", [-0.5, -0.33, -0.1, 0.05, 0.25, 0.5])
def test_hue_is_within_a_level_of_torchvision(shift):
    largest, mean = level(np.asarray(turned(PICTURE, shift)), F.adjust_hue(PICTURE, shift))
    assert largest <= 7 and mean < 2.5, (
        "one of 256 levels around the circle is 6 of red, green or blue"
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_everything_at_once_is_torchvision_step_by_step(order):
    jitter, shares = (0.4, 0.5, 0.6, 0.2), (1.4, 1.5, 1.6, 0.2)
    expected = PICTURE
    for i in order:
        expected = getattr(F, f"adjust_{list(JITTER)[i]}")(expected, shares[i])
    assert np.array_equal(changed(Chosen(1.0, order), jitter), np.asarray(expected))
    expected = F.rgb_to_grayscale(expected, 3).filter(ImageFilter.GaussianBlur(2.0))
    assert np.array_equal(
        changed(Chosen(1.0, order), jitter, 0.2, 0.1, 0.2), np.asarray(F.solarize(expected, 128))
    )


def test_every_order_of_the_jitter_is_as_likely(monkeypatch):
    steps, found = [], Counter()
    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setattr(
            colour.ImageEnhance,
            name,
            lambda image, name=name: SimpleNamespace(
                enhance=lambda factor: steps.append(name) or image
            ),
        )
    monkeypatch.setattr(colour, "turned", lambda image, shift: steps.append("hue") or image)
    for seed in range(1200):
        steps.clear()
        colour.jittered(PICTURE, (0.1, 0.1, 0.1, 0.1), np.random.default_rng(seed))
        found[tuple(steps)] += 1
    assert len(found) == 24 and min(found.values()) > 25 and max(found.values()) < 80  # 50 each


def test_grey_and_solarize_are_torchvision():
    assert np.array_equal(
        changed(Chosen(0.5), grey=0.1), np.asarray(F.rgb_to_grayscale(PICTURE, 3))
    )
    made = changed(Chosen(0.5), solarize=0.1)
    assert np.array_equal(made, np.asarray(F.solarize(PICTURE, 128)))
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert changed(Chosen(0.5), solarize=0.1, image=ramp)[0, 126:130, 0].tolist() == [
        126,
        127,
        127,
        126,
    ]


@pytest.mark.parametrize("share, sigma", [(0.0, 0.1), (0.5, 1.05), (1.0, 2.0)])
def test_blur_is_nearly_torchvision_gaussian(share, sigma):
    """Pillow's is made of boxes; it is nearer to the true one of its sigma than to any other."""
    grain = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    made = changed(Chosen(share), blur=0.1, image=np.asarray(grain))
    errors = {
        s: level(made, F.gaussian_blur(grain, [23, 23], [s, s]))[1]
        for s in (0.1, 0.6, 0.9, 1.05, 1.2, 1.8, 2.0, 2.2)
    }
    assert min(errors, key=errors.get) == sigma and errors[sigma] < 2


CHECKS = np.where(np.indices((4, 4)).sum(0)[..., None] % 2, (250, 30, 90), (10, 200, 140)).astype(
    np.uint8
)


@pytest.mark.parametrize(
    "how, share",
    [
        (dict(jitter=(0.4, 0.4, 0.2, 0.1)), 0.8),
        (dict(jitter=only("hue", 0.5)), 0.8),
        (dict(grey=0.2), 0.2),
        (dict(blur=0.1), 0.1),
        (dict(solarize=0.2), 0.2),
    ],
)
def test_as_often_as_asked(how, share):
    rng, draws = np.random.default_rng(0), 1500
    found = (
        sum(not np.array_equal(changed(rng, **how, image=CHECKS), CHECKS) for _ in range(draws))
        / draws
    )
    assert found == pytest.approx(share, abs=0.03)


def test_each_change_is_drawn_on_its_own():
    rng, bright, draws = (
        np.random.default_rng(0),
        np.full((2, 2, 3), (200, 220, 240), np.uint8),
        1500,
    )
    made = np.stack(
        [changed(rng, grey=0.5, solarize=0.4, image=bright)[0, 0].astype(int) for _ in range(draws)]
    )
    grey, dark = made[:, 0] == made[:, 2], made[:, 1] < 128
    for found, share in ((grey, 0.5), (dark, 0.4), (grey & dark, 0.2)):
        assert found.mean() == pytest.approx(share, abs=0.03)


def test_the_generator_decides_and_the_image_is_left_as_it_was():
    how, before = dict(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2), IMAGE.copy()
    one, same = (
        [changed(np.random.default_rng(seed), **how) for seed in range(20)] for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert len({made.tobytes() for made in one}) > 15
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
    data = encode(picture(64, 48), "PNG")
    for seed in range(4):
        made, box = random_view(data, 32, View(flip=flip, **field), np.random.default_rng(seed))
        plain, same_box = random_view(data, 32, View(flip=flip), np.random.default_rng(seed))
        assert box == same_box
        if expected:
            assert np.array_equal(made, np.asarray(expected(Image.fromarray(plain))))
        else:  # a blur: smoother, and of the same mean
            assert level(made, plain)[0] > 0 and abs(made.mean() - plain.mean()) < 1
            assert (
                np.abs(np.diff(made.astype(int), axis=1)).sum()
                < np.abs(np.diff(plain.astype(int), axis=1)).sum()
            )
