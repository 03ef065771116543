"""Several views of one image. An enclosing view has the smallest box around the enclosed views.

An enlarged view has a larger box. A box is the region of the pixels, also if a JPEG is decoded at a
smaller size. Each view has random numbers that no other view changes. Invalid settings are refused.

    bash run/test.sh tests/data/test_views.py
"""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glimpse.data.transforms import (
    View,
    enclosing_box,
    enlarge_box,
    expand_views,
    random_views,
)
from glimpse.tests.helpers.photos import encode, record_shrinks

CROP = (0.25, 0.4)
# Format, (height, width), side of the views, and the shrink with which a JPEG can be decoded.
CASES = [
    ("PNG", (90, 141), 24, 1),
    ("JPEG", (141, 90), 36, 1),
    ("JPEG", (403, 507), 72, 2),
    ("JPEG", (611, 303), 46, 4),
    ("JPEG", (403, 507), 24, 8),
]
COLOR_CHANGES = dict(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2)


def brightness(positions, shape, axis):
    """Return the brightness of the image of `encode_ramp` at (rows, columns).

    It increases along the axis. It also depends on the other axis, so that rounding errors average
    out.
    """
    weights = [64, 64]
    weights[axis] = 191
    rows, columns = positions
    down = rows / (shape[0] - 1) * weights[0]
    right = columns / (shape[1] - 1) * weights[1]
    return down[:, None] + right


def encode_ramp(kind, shape, axis=1):
    """Encode a gray image whose brightness increases downward (axis 0) or to the right (1)."""
    positions = [np.arange(side) for side in shape]
    pixels = np.rint(brightness(positions, shape, axis)).astype(np.uint8)
    options = dict(quality=100) if kind == "JPEG" else {}
    return encode(Image.fromarray(pixels), kind, **options)


def draw_views(data, size, views, seed=0):
    """Call random_views with a generator for each view, seeded by its name and the seed."""
    views = expand_views(views)
    rngs = {name: np.random.default_rng((seed, *name.encode())) for name in views}
    return random_views(data, size, views, rngs)


def box_around(boxes, shape):
    """Return the smallest box around boxes, computed by painting them."""
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


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("kind, shape, size, shrink", CASES)
def test_an_enclosing_view_is_around_all_draws(kind, shape, size, shrink, enlarge, monkeypatch):
    shrinks = record_shrinks(monkeypatch)
    data = encode_ramp(kind, shape)
    views = {
        "view": View(crop=CROP, count=2),
        "other": View(crop=CROP),
        "apart": View(),
        "teacher": View(encloses=("other", "view"), enlarge=enlarge),
    }
    larger_count = 0
    for seed in range(60):
        result = draw_views(data, size, views, seed)

        boxes = {name: box for name, (_, box) in result.items()}
        assert sorted(boxes) == ["apart", "other", "teacher", "view1", "view2"]
        smallest = box_around([boxes[name] for name in ("other", "view1", "view2")], shape)
        box = boxes["teacher"]
        assert contains((0, 0, *shape), box)
        if enlarge:
            assert contains(box, smallest)
        else:
            assert box == smallest
        larger_count += box != smallest
    if enlarge:
        assert larger_count >= 0.8 * 60
    assert shrinks == [shrink] * 60, "decoded once"


def test_enlarging_moves_each_side_by_a_uniform_share_of_what_is_left():
    rng = np.random.default_rng(0)
    smallest = enclosing_box([(30, 50, 20, 10), (35, 40, 35, 15)])
    assert smallest == (30, 40, 40, 20)

    boxes = np.array([enlarge_box(smallest, 100, 120, rng) for _ in range(4000)])

    top, left, rows, columns = boxes.T
    for side, low, high in (
        (top, 0, 30),
        (left, 0, 40),
        (top + rows, 70, 100),
        (left + columns, 60, 120),
    ):
        assert side.min() == low, "the limits are reached"
        assert side.max() == high, "the limits are reached"
        deciles = np.quantile(side, np.linspace(0, 1, 11))
        expected = np.linspace(low, high, 11)
        np.testing.assert_allclose(deciles, expected, atol=0.04 * (high - low) + 0.5)
    assert enlarge_box((0, 0, 100, 120), 100, 120, rng) == (0, 0, 100, 120), (
        "the image leaves no room"
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind, shape, size, shrink", CASES)
def test_a_box_is_where_the_pixels_come_from(kind, shape, size, shrink, axis, monkeypatch):
    shrinks = record_shrinks(monkeypatch)
    data = encode_ramp(kind, shape, axis)
    views = {
        "view": View(crop=CROP, count=2),
        "teacher": View(encloses=("view",), interpolation="bilinear"),
        "enlarged": View(encloses=("view",), enlarge=True, size=size + 3),
    }
    shifts = []
    for seed in range(10):
        for image, (top, left, rows, columns) in draw_views(data, size, views, seed).values():
            # Compare the view with the image's brightness at the centers of the view's pixels.
            centers = (np.arange(len(image)) + 0.5) / len(image)
            positions = [top + centers * rows - 0.5, left + centers * columns - 0.5]
            error = image - brightness(positions, shape, axis)[..., None]
            # At the border of a view, resizing averages pixels on one side only.
            error = error[3:-3, 3:-3]
            assert np.abs(error).max() < 2
            shifts.append(error.mean() * (shape[axis] - 1) / 191 / shrink)
    assert abs(np.mean(shifts)) < 0.1, "in decoded pixels"
    assert np.max(np.abs(shifts)) < 0.25, "in decoded pixels"
    assert set(shrinks) == {shrink}


def test_each_view_has_its_own_side():
    data = encode_ramp("PNG", (90, 141))
    views = {
        "view": View(count=2),
        "teacher": View(encloses=("view",), size=48),
        "small": View(size=16),
    }

    result = draw_views(data, 32, views)

    shapes = {name: image.shape for name, (image, _) in result.items()}
    assert shapes == {
        "view1": (32, 32, 3),
        "view2": (32, 32, 3),
        "teacher": (48, 48, 3),
        "small": (16, 16, 3),
    }
    for name, (_, box) in draw_views(data, 40, views).items():
        assert result[name][1] == box, "the size of a view does not change its box"


def test_a_jpeg_is_shrunk_only_as_far_as_every_view_allows(monkeypatch):
    shrinks = record_shrinks(monkeypatch)
    data = encode_ramp("JPEG", (130, 200))
    for sides in ((16,), (30,), (16, 30), (16, 30, 65), (16, 66)):
        views = {}
        for side in sides:
            views[f"v{side}"] = View(crop=(1.0, 1.0), ratio=(1.0, 2.0), size=side)

        draw_views(data, 8, views)

    assert shrinks == [8, 4, 4, 2, 1]


def equal(a, b):
    """Compare two views, each (image, box)."""
    return np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_same_generators_same_views(kind):
    data = encode_ramp(kind, (141, 90))
    views = {
        "view": View(count=2, **COLOR_CHANGES),
        "teacher": View(encloses=("view",), enlarge=True, **COLOR_CHANGES),
    }

    first, same, other = (draw_views(data, 32, views, seed) for seed in (0, 0, 1))

    for name in first:
        assert equal(first[name], same[name])
        assert first[name][1] != other[name][1]
    assert first["view1"][1] != first["view2"][1], "draws of one view differ"


def test_another_view_changes_no_crop_and_no_color():
    data = encode_ramp("PNG", (90, 141))
    view = View(**COLOR_CHANGES)
    views = {
        "teacher": View(encloses=("view", "more"), enlarge=True),
        "more": View(count=3, **COLOR_CHANGES),
        "a": View(flip=True),
        "view": view,
    }

    one_view = draw_views(data, 32, {"view": view})
    four_views = draw_views(data, 32, views)
    reordered = draw_views(data, 32, dict(reversed(views.items())))

    assert equal(one_view["view"], four_views["view"])
    for name in four_views:
        assert equal(four_views[name], reordered[name]), "the order of the views does not matter"


def test_each_draw_is_mirrored_on_its_own():
    data = encode_ramp("PNG", (40, 60))
    views = {"view": View(count=2, flip=True), "other": View()}
    counts = Counter()
    for seed in range(60):
        result = draw_views(data, 16, views, seed)

        mirrored = {}
        for name, (image, _) in result.items():
            mirrored[name] = bool(image[8, 0, 0] > image[8, -1, 0])
        assert not mirrored["other"]
        counts[mirrored["view1"], mirrored["view2"]] += 1
    assert set(counts) == {(False, False), (False, True), (True, False), (True, True)}
    assert min(counts.values()) >= 6


def test_expand_views():
    views = {
        "view": View(count=3, grey=0.2),
        "teacher": View(encloses=("view", "also"), enlarge=True),
        "also": View(size=16),
    }

    draws = expand_views(views)

    names = ["also", "teacher", "view1", "view2", "view3"]
    assert list(draws) == names, "in alphabetical order; a view with count 1 keeps its name"
    encloses = ("view1", "view2", "view3", "also")
    assert draws["teacher"] == View(encloses=encloses, enlarge=True)
    assert draws["view1"] == View(grey=0.2)
    assert draws["view3"] == View(grey=0.2)
    assert draws["also"] == View(size=16)
    assert expand_views(draws) == draws

    nested = expand_views({"view": View(), "wide": View(encloses=("view",), count=2)})
    assert nested["wide1"] == View(encloses=("view",))
    assert nested["wide2"] == View(encloses=("view",))


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
