"""Views: one fast pass returns what Pillow gives in three slow steps (decode all, crop, resize),
whatever the format, with simplejpeg and without; crops are drawn as torchvision draws them; what
cannot be read is a ValueError and nothing else.
"""

import io

import numpy as np
import pytest
from PIL import Image

import glimpse.data.transforms as augment
from glimpse.data.transforms import View, center_view, decode, random_box, random_view

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def picture(height, width, seed=0, channels=3):
    """Random colours, smooth enough to look like a photograph to a codec, with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(
        rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, channels), dtype=np.uint8)
    )
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(
        np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    )


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data, box, size, interpolation):
    """The slow way: decode all, crop, resize."""
    top, left, height, width = box
    crop = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), RESAMPLE[interpolation])).astype(int)


def difference(image, other):
    return np.abs(image.astype(int) - other)


def same_but_for_rounding(image, other):
    error = difference(image, other)
    return error.mean() < 0.25 and np.quantile(error, 0.99) <= 1 and error.max() <= 8  # of 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("shape", [(150, 200), (203, 151), (30, 41)])
def test_a_view_is_pillow_crop_and_resize(shape, kind, interpolation):
    data, view = encode(picture(*shape), kind), View(crop=(0.3, 1.0), interpolation=interpolation)
    for seed in range(5):
        image, box = random_view(data, 96, view, np.random.default_rng(seed))
        assert (
            image.shape == (96, 96, 3)
            and image.dtype == np.uint8
            and image.flags.c_contiguous
            and image.flags.writeable
        )
        assert same_but_for_rounding(image, pillow(data, box, 96, interpolation))


@pytest.mark.parametrize("size, shrink", [(100, 2), (56, 4), (28, 8)])
def test_a_large_jpeg_is_decoded_smaller(size, shrink, monkeypatch):
    """Its pixels then differ less from Pillow's bicubic than Pillow's own bilinear do, and the box
    it tells is the box it shows.
    """
    asked = []
    monkeypatch.setattr(
        augment, "decode", lambda data, shrink: asked.append(shrink) or decode(data, shrink)
    )
    data = encode(picture(403, 507), quality=92)
    view = View(crop=(0.6, 0.9), ratio=(0.9, 1.1))
    for seed in range(5):
        image, box = random_view(data, size, view, np.random.default_rng(seed))
        exact = pillow(data, box, size, "bicubic")
        assert not any(side % shrink for side in box) and min(box[2:]) >= shrink * size
        assert (
            difference(image, exact).mean()
            < difference(pillow(data, box, size, "bilinear"), exact).mean()
        )
    assert asked == [shrink] * 5
    random_view(encode(picture(403, 507), "PNG"), size, view, np.random.default_rng(0))
    assert asked[-1] == 1, "only a JPEG can be decoded smaller"


JPEGS = {
    "colour": (picture(203, 151), {}),
    "grey": (picture(203, 151).convert("L"), {}),
    "cmyk": (picture(90, 81).convert("CMYK"), {}),
    "progressive": (picture(90, 81), dict(progressive=True)),
    "4:4:4": (picture(90, 81), dict(subsampling=0)),
    "rgb": (picture(90, 81), dict(keep_rgb=True)),
    "small": (picture(9, 9), {}),
    "a pixel": (picture(1, 1), {}),
}
CASES = [
    (name, shrink)
    for name in JPEGS
    for shrink in (1, 2, 4, 8)
    if min(JPEGS[name][0].size) >= 4 * shrink or shrink == 1
]


@pytest.mark.parametrize("name, shrink", CASES)
def test_pillow_alone_reads_the_same_pixels(name, shrink, monkeypatch):
    image, options = JPEGS[name]
    data = encode(image, **options)
    pixels = decode(data, shrink)
    assert pixels.shape == (-(-image.height // shrink), -(-image.width // shrink), 3)
    if shrink == 1:
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert augment.simplejpeg is not None
    monkeypatch.setattr(augment, "simplejpeg", None)
    assert np.array_equal(decode(data, shrink), pixels)


def test_the_generator_decides():
    data, view = encode(picture(120, 160)), View(crop=(0.5, 1.0), flip=True)
    one, same, other = (
        random_view(data, 64, view, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(one[0], same[0]) and one[1] == same[1]
    assert one[1] != other[1]


def test_flip_mirrors_one_view_in_two():
    data, mirrored = encode(picture(64, 64), "PNG"), 0
    straight = center_view(data, 32)
    for seed in range(200):
        image, box = random_view(
            data,
            32,
            View(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=True),
            np.random.default_rng(seed),
        )
        assert box == (0, 0, 64, 64) and image.flags.c_contiguous
        flipped = np.array_equal(image, straight[:, ::-1])
        assert flipped or np.array_equal(image, straight)
        mirrored += flipped
    assert 80 < mirrored < 120


def test_crops_are_uniform_in_area_in_log_shape_and_in_place():
    rng, view = np.random.default_rng(0), View(crop=(0.2, 0.4))  # small enough that every draw fits
    top, left, height, width = np.array([random_box(3000, 4000, view, rng) for _ in range(4000)]).T
    area = height * width / 12e6
    shape = np.log(width / height) / np.log(4 / 3)
    for values, low, high in (
        (area, 0.2, 0.4),
        (shape, -1, 1),
        (top / (3000 - height), 0, 1),
        (left / (4000 - width), 0, 1),
    ):
        expected = np.linspace(low, high, 11)
        np.testing.assert_allclose(
            np.quantile(values, np.linspace(0, 1, 11)), expected, atol=0.03 * (high - low)
        )


@pytest.mark.parametrize(
    "shape, box",
    [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100)), ((1, 1), (0, 0, 1, 1))],
)
def test_an_image_too_long_for_any_crop_is_cropped_centrally(shape, box):
    assert random_box(*shape, View(crop=(0.9, 1.0)), np.random.default_rng(0)) == box


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(151, 200), (240, 97), (64, 64), (20, 33)])
def test_resize_crop_is_torchvision(shape, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*shape)
    mode = transforms.InterpolationMode(interpolation)
    expected = np.asarray(
        transforms.CenterCrop(64)(transforms.Resize(64, interpolation=mode)(image))
    ).astype(int)
    assert same_but_for_rounding(
        center_view(encode(image, "PNG"), 64, "resize_crop", interpolation), expected
    )


@pytest.mark.parametrize(
    "shape, box", [((150, 201), (0, 26, 150, 150)), ((200, 150), (25, 0, 150, 150))]
)
def test_square_is_the_centre_then_resized(shape, box):
    data = encode(picture(*shape), quality=92)
    assert same_but_for_rounding(center_view(data, 64, "square"), pillow(data, box, 64, "bicubic"))


def test_transparency_lies_on_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = 255, 0, 0, 255
    pixels[4:, 4:, 3] = 51  # a fifth of red
    for data in (
        encode(Image.fromarray(pixels), "PNG"),
        encode(Image.fromarray(pixels), "WEBP", lossless=True),
    ):
        image = decode(data)
        assert (
            (image[:, :4] == 255).all()
            and (image[:4, 4:] == [255, 0, 0]).all()
            and (image[4:, 4:] == [255, 204, 204]).all()
        )
    palette = Image.fromarray(pixels[:4]).convert("RGB").quantize(2)
    data = encode(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert (decode(data)[:, :4] == 255).all() and (decode(data)[:, 4:] == [255, 0, 0]).all()


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(decode(encode(Image.fromarray(grey), "PNG"))[:, :, 0], grey >> 8)


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("L", "WEBP")])
def test_other_modes_become_rgb(mode, kind):
    data = encode(picture(20, 30).convert(mode), kind)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_orientation_is_ignored_as_peers_do():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = picture(40, 60)
    assert np.array_equal(decode(encode(image, exif=exif)), decode(encode(image)))


def half(data):
    return data[: len(data) // 2]


BROKEN = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "a jpeg's first bytes": b"\xff\xd8\xff" + bytes(50),
    "a png with a wrong checksum": encode(picture(9, 9), "PNG")[:-20] + bytes(20),
    **{f"half a {kind}": half(encode(picture(90, 81), kind)) for kind in ("JPEG", "PNG", "WEBP")},
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_value_errors(name, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(augment, "simplejpeg", None)
    with pytest.raises(ValueError, match="cannot read the image"):
        random_view(BROKEN[name], 32, View(crop=(0.5, 1.0)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="cannot read the image"):
        center_view(BROKEN[name], 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused(kind, monkeypatch):
    data = encode(picture(40, 50), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)  # Pillow refuses above twice that
    with pytest.raises(ValueError, match="DecompressionBombError"):
        random_view(data, 32, View(crop=(0.5, 1.0)), np.random.default_rng(0))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(crop=(0, 1)), r"crop: \(0, 1\); it must be two shares"),
        (dict(crop=(0.9, 0.5)), "smallest <= largest"),
        (dict(crop=(0.5, 1.5)), "largest <= 1"),
        (dict(crop=(0.5, 1), ratio=(0, 1)), r"ratio: \(0, 1\); it must be two ratios"),
        (dict(crop=(0.5, 1), ratio=(2, 1)), "narrowest <= widest"),
        (
            dict(crop=(0.5, 1), interpolation="lanczos"),
            "interpolation: 'lanczos'; known: bicubic, bilinear",
        ),
        (dict(crop=(0.5, 1), mask="gausian(0.5)"), "did you mean 'gaussian'"),
    ],
)
def test_views_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        View(**fields)


def test_an_unknown_evaluation_view_is_refused():
    with pytest.raises(ValueError, match="how: 'center'; known: resize_crop, square"):
        center_view(encode(picture(9, 9)), 8, "center")
