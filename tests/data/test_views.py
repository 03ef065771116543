"""Several views of one image: an enclosing view has the smallest box around those that it encloses.

An enlarged one has a larger box. A box is where the pixels come from, shrunk JPEGs included; each
view has its own draws, which no other view changes; settings that cannot be meant are refused.

    bash run/test.sh tests/data/test_views.py
"""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import glimpse.data.transforms as augment
from glimpse.data.transforms import (
    View,
    decode,
    enclosing_box,
    enlarge_box,
    expand_views,
    random_views,
)

CROP = (0.25, 0.4)
# kind, (height, width), side of the views, how much smaller a JPEG can be decoded for them
CASES = [
    ("PNG", (90, 141), 24, 1),
    ("JPEG", (141, 90), 36, 1),
    ("JPEG", (403, 507), 72, 2),
    ("JPEG", (611, 303), 46, 4),
    ("JPEG", (403, 507), 24, 8),
]
COLOURED = dict(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)


def brightness(places, shape, axis):
    """The brightness that `coded` has at (rows, columns).

    It grows along the axis; the other one mixes in, so that rounding takes no side.
    """
    weights = [64, 64]
    weights[axis] = 191
    rows, columns = places
    down = rows / (shape[0] - 1) * weights[0]
    right = columns / (shape[1] - 1) * weights[1]
    return down[:, None] + right


def coded(kind, shape, axis=1):
    """A gray picture that grows brighter down (axis 0) or to the right (1)."""
    places = [np.arange(side) for side in shape]
    pixels = np.rint(brightness(places, shape, axis)).astype(np.uint8)
    options = dict(quality=100) if kind == "JPEG" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(data, size, views, seed=0):
    """random_views, each with a generator that follows from its name and the seed."""
    views = expand_views(views)
    rngs = {name: np.random.default_rng((seed, *name.encode())) for name in views}
    return random_views(data, size, views, rngs)


def around(boxes, shape):
    """The smallest box around boxes, by painting them."""
    canvas = np.zeros(shape, bool)
    for top, left, rows, columns in boxes:
        canvas[top : top + rows, left : left + columns] = True
    assert canvas.sum() <= sum(box[2] * box[3] for box in boxes)
    top, *_, bottom = np.flatnonzero(canvas.any(1))
    left, *_, right = np.flatnonzero(canvas.any(0))
    return top, left, bottom + 1 - top, right + 1 - left


def contains(outer, inner):
    for axis in (0, 1):
        if inner[axis] < outer[axis]:
            return False
        if inner[axis] + inner[2 + axis] > outer[axis] + outer[2 + axis]:
            return False
    return True


def watched(monkeypatch):
    """The shrinks that images are decoded with."""
    shrinks = []

    def recorded(data, shrink=1):
        shrinks.append(shrink)
        return decode(data, shrink)

    monkeypatch.setattr(augment, "decode", recorded)
    return shrinks


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("kind, shape, size, shrink", CASES)
def test_an_enclosing_view_is_around_all_draws(kind, shape, size, shrink, enlarge, monkeypatch):
    shrinks = watched(monkeypatch)
    data = coded(kind, shape)
    views = {
        "view": View(crop=CROP, count=2),
        "other": View(crop=CROP),
        "apart": View(),
        "teacher": View(encloses=("other", "view"), enlarge=enlarge),
    }
    larger = 0
    for seed in range(60):
        result = drawn(data, size, views, seed)

        boxes = {name: box for name, (_, box) in result.items()}
        assert sorted(boxes) == ["apart", "other", "teacher", "view1", "view2"]
        least = around([boxes[name] for name in ("other", "view1", "view2")], shape)
        box = boxes["teacher"]
        assert contains((0, 0, *shape), box)
        if enlarge:
            assert contains(box, least)
        else:
            assert box == least
        larger += box != least
    if enlarge:
        assert larger >= 0.8 * 60
    assert shrinks == [shrink] * 60, "decoded once"


def test_enlarging_moves_each_side_by_a_uniform_share_of_what_is_left():
    rng = np.random.default_rng(0)
    least = enclosing_box([(30, 50, 20, 10), (35, 40, 35, 15)])
    assert least == (30, 40, 40, 20)

    boxes = np.array([enlarge_box(least, 100, 120, rng) for _ in range(4000)])

    top, left, rows, columns = boxes.T
    for side, low, high in (
        (top, 0, 30),
        (left, 0, 40),
        (top + rows, 70, 100),
        (left + columns, 60, 120),
    ):
        assert side.min() == low, "both ends are met"
        assert side.max() == high, "both ends are met"
        deciles = np.quantile(side, np.linspace(0, 1, 11))
        expected = np.linspace(low, high, 11)
        np.testing.assert_allclose(deciles, expected, atol=0.04 * (high - low) + 0.5)
    assert enlarge_box((0, 0, 100, 120), 100, 120, rng) == (0, 0, 100, 120), "nothing is left"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind, shape, size, shrink", CASES)
def test_a_box_tells_where_the_pixels_come_from(kind, shape, size, shrink, axis, monkeypatch):
    shrinks = watched(monkeypatch)
    data = coded(kind, shape, axis)
    views = {
        "view": View(crop=CROP, count=2),
        "teacher": View(encloses=("view",), interpolation="bilinear"),
        "enlarged": View(encloses=("view",), enlarge=True, size=size + 3),
    }
    shifts = []
    for seed in range(10):
        for image, (top, left, rows, columns) in drawn(data, size, views, seed).values():
            # The picture's brightness where the box puts the centers of the view's pixels.
            centers = (np.arange(len(image)) + 0.5) / len(image)
            places = [top + centers * rows - 0.5, left + centers * columns - 0.5]
            error = image - brightness(places, shape, axis)[..., None]
            # at its border, a view is smoothed on one side only
            error = error[3:-3, 3:-3]
            assert np.abs(error).max() < 2
            shifts.append(error.mean() * (shape[axis] - 1) / 191 / shrink)
    assert abs(np.mean(shifts)) < 0.1, "pixels, as decoded"
    assert np.max(np.abs(shifts)) < 0.25, "pixels, as decoded"
    assert set(shrinks) == {shrink}


def test_each_view_has_its_own_side():
    data = coded("PNG", (90, 141))
    views = {
        "view": View(count=2),
        "teacher": View(encloses=("view",), size=48),
        "small": View(size=16),
    }

    result = drawn(data, 32, views)

    shapes = {name: image.shape for name, (image, _) in result.items()}
    assert shapes == {
        "view1": (32, 32, 3),
        "view2": (32, 32, 3),
        "teacher": (48, 48, 3),
        "small": (16, 16, 3),
    }
    for name, (_, box) in drawn(data, 40, views).items():
        assert result[name][1] == box, "a side moves no box"


def test_a_jpeg_is_shrunk_only_as_far_as_every_view_allows(monkeypatch):
    shrinks = watched(monkeypatch)
    data = coded("JPEG", (130, 200))
    for sides in ((16,), (30,), (16, 30), (16, 30, 65), (16, 66)):
        views = {}
        for side in sides:
            views[f"v{side}"] = View(crop=(1.0, 1.0), ratio=(1.0, 2.0), size=side)

        drawn(data, 8, views)

    assert shrinks == [8, 4, 4, 2, 1]


def equal(a, b):
    """Compare two views: (image, box)."""
    return np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_same_generators_same_views(kind):
    data = coded(kind, (141, 90))
    views = {
        "view": View(count=2, **COLOURED),
        "teacher": View(encloses=("view",), enlarge=True, **COLOURED),
    }

    first, same, other = (drawn(data, 32, views, seed) for seed in (0, 0, 1))

    for name in first:
        assert equal(first[name], same[name])
        assert first[name][1] != other[name][1]
    assert first["view1"][1] != first["view2"][1], "draws of one view differ"


def test_another_view_changes_no_crop_and_no_colour():
    data = coded("PNG", (90, 141))
    view = View(**COLOURED)
    views = {
        "teacher": View(encloses=("view", "more"), enlarge=True),
        "more": View(count=3, **COLOURED),
        "a": View(flip=True),
        "view": view,
    }

    alone = drawn(data, 32, {"view": view})
    among = drawn(data, 32, views)
    turned = drawn(data, 32, dict(reversed(views.items())))

    assert equal(alone["view"], among["view"])
    for name in among:
        assert equal(among[name], turned[name]), "the order of the views does not matter"


def test_each_draw_is_mirrored_on_its_own():
    data = coded("PNG", (40, 60))
    views = {"view": View(count=2, flip=True), "other": View()}
    counts = Counter()
    for seed in range(60):
        result = drawn(data, 16, views, seed)

        mirrored = {}
        for name, (image, _) in result.items():
            mirrored[name] = bool(image[8, 0, 0] > image[8, -1, 0])
        assert not mirrored["other"]
        counts[mirrored["view1"], mirrored["view2"]] += 1
    assert set(counts) == {(False, False), (False, True), (True, False), (True, True)}
    assert min(counts.values()) >= 6


def test_expanded():
    views = {
        "view": View(count=3, grey=0.2),
        "teacher": View(encloses=("view", "also"), enlarge=True),
        "also": View(size=16),
    }

    draws = expand_views(views)

    names = ["also", "teacher", "view1", "view2", "view3"]
    assert list(draws) == names, "in alphabetical order; a view drawn once keeps its name"
    encloses = ("view1", "view2", "view3", "also")
    assert draws["teacher"] == View(encloses=encloses, enlarge=True)
    assert draws["view1"] == View(grey=0.2)
    assert draws["view3"] == View(grey=0.2)
    assert draws["also"] == View(size=16)
    assert expand_views(draws) == draws

    twice = expand_views({"view": View(), "wide": View(encloses=("view",), count=2)})
    assert twice["wide1"] == View(encloses=("view",))
    assert twice["wide2"] == View(encloses=("view",))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(count=0), "^count: 0; it must be 1 to 9"),
        (dict(count=10), "^count: 10; it must be 1 to 9"),
        (
            dict(enlarge=True),
            "^enlarge: only a view that encloses others can be enlarged; list them in encloses",
        ),
        (
            dict(encloses=("view",), flip=True),
            "^flip: a view that encloses others cannot be mirrored",
        ),
        (dict(size=-16), "^size: -16; "),
        (dict(grey=1.5), "^grey: 1.5; it must be a probability, 0 to 1"),
        (dict(blur=-0.1), "^blur: -0.1; it must be a probability, 0 to 1"),
        (dict(solarize=2), "^solarize: 2; it must be a probability, 0 to 1"),
        (
            dict(jitter=(0.4, 0.4, 0.2, 0.6)),
            r"^jitter: \(0.4, 0.4, 0.2, 0.6\); it must be strengths of brightness, contrast,"
            r" saturation .* hue \(0 to 0.5\)",
        ),
        (
            dict(jitter=(0.4, -0.4, 0.2, 0.1)),
            r"^jitter: \(0.4, -0.4, 0.2, 0.1\); .*saturation \(0 or more\)",
        ),
    ],
)
def test_a_view_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        View(**fields)


@pytest.mark.parametrize(
    "views, message",
    [
        (
            dict(teacher=View(encloses=("imge",)), image=View(), a=View()),
            "^views.teacher.encloses: 'imge' is not a view with a crop; use some of: a, image$",
        ),
        (
            dict(teacher=View(encloses=("view1",)), view=View(count=2)),
            "^views.teacher.encloses: 'view1' is not a view with a crop; use some of: view$",
        ),
        (
            dict(teacher=View(encloses=("wide",)), wide=View(encloses=("image",)), image=View()),
            "^views.teacher.encloses: 'wide' is not .*: image$",
        ),
        (
            dict(teacher=View(encloses=("teacher",)), image=View()),
            "^views.teacher.encloses: 'teacher' is not a view with a crop; use some of: image$",
        ),
        (
            dict(teacher=View(encloses=("image",)), image=View(flip=True)),
            "^views.image.flip: teacher encloses this view .* set flip to false$",
        ),
        (
            dict(view=View(count=2), view1=View()),
            "^views: two views are called 'view1'; rename one$",
        ),
    ],
)
def test_views_that_do_not_go_together(views, message):
    for order in (views, dict(reversed(views.items()))):
        with pytest.raises(ValueError, match=message):
            expand_views(order)
