"""Views: one fast pass returns what Pillow gives in three slow steps (decode all, crop, resize).

Whatever the format, with simplejpeg and without; crops are drawn as torchvision draws them; what
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
    """Random colors, smooth enough to look like a photograph to a codec, with some grain."""
    rng = np.random.default_rng(seed)
    shape = (height // 20 + 2, width // 20 + 2, channels)
    coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    grainy = smooth + rng.normal(0, 4, smooth.shape)
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data, box, size, interpolation):
    """The slow way: decode all, crop, resize."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), RESAMPLE[interpolation])).astype(int)


def difference(image, other):
    return np.abs(image.astype(int) - other)


def same_but_for_rounding(image, other):
    error = difference(image, other)  # in levels, of 255
    return error.mean() < 0.25 and np.quantile(error, 0.99) <= 1 and error.max() <= 8


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("shape", [(150, 200), (203, 151), (30, 41)])
def test_a_view_is_pillow_crop_and_resize(shape, kind, interpolation):
    data = encode(picture(*shape), kind)
    view = View(crop=(0.3, 1.0), interpolation=interpolation)
    for seed in range(5):
        image, box = random_view(data, 96, view, np.random.default_rng(seed))

        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        assert same_but_for_rounding(image, pillow(data, box, 96, interpolation))


@pytest.mark.parametrize("size, shrink", [(100, 2), (56, 4), (28, 8)])
def test_a_large_jpeg_is_decoded_smaller(size, shrink, monkeypatch):
    """Its pixels then differ less from Pillow's bicubic than Pillow's own bilinear do.

    The box that is returned is the box that is shown.
    """
    shrinks = []

    def recorded(data, shrink):
        shrinks.append(shrink)
        return decode(data, shrink)

    monkeypatch.setattr(augment, "decode", recorded)
    image = picture(403, 507)
    data = encode(image, quality=92)
    view = View(crop=(0.6, 0.9), ratio=(0.9, 1.1))
    for seed in range(5):
        pixels, box = random_view(data, size, view, np.random.default_rng(seed))

        assert all(side % shrink == 0 for side in box)
        assert min(box[2:]) >= shrink * size
        exact = pillow(data, box, size, "bicubic")
        bilinear = pillow(data, box, size, "bilinear")
        assert difference(pixels, exact).mean() < difference(bilinear, exact).mean()
    assert shrinks == [shrink] * 5

    random_view(encode(image, "PNG"), size, view, np.random.default_rng(0))
    assert shrinks[-1] == 1, "only a JPEG can be decoded smaller"


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
CASES = []
for name, (image, _) in JPEGS.items():
    shrinks = [shrink for shrink in (2, 4, 8) if min(image.size) >= 4 * shrink]
    CASES += [(name, shrink) for shrink in (1, *shrinks)]


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
    data = encode(picture(120, 160))
    view = View(crop=(0.5, 1.0), flip=True)

    image, box = random_view(data, 64, view, np.random.default_rng(0))
    same_image, same_box = random_view(data, 64, view, np.random.default_rng(0))
    _, other_box = random_view(data, 64, view, np.random.default_rng(1))

    assert np.array_equal(image, same_image)
    assert box == same_box
    assert box != other_box


def test_flip_mirrors_one_view_in_two():
    data = encode(picture(64, 64), "PNG")
    straight = center_view(data, 32)
    view = View(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    mirrored = 0
    for seed in range(200):
        image, box = random_view(data, 32, view, np.random.default_rng(seed))

        assert box == (0, 0, 64, 64)
        assert image.flags.c_contiguous
        flipped = np.array_equal(image, straight[:, ::-1])
        assert flipped or np.array_equal(image, straight)
        mirrored += flipped
    assert 80 < mirrored < 120


def test_crops_are_uniform_in_area_in_log_shape_and_in_place():
    rng = np.random.default_rng(0)
    view = View(crop=(0.2, 0.4))  # small enough that every draw fits

    boxes = np.array([random_box(3000, 4000, view, rng) for _ in range(4000)])

    top, left, height, width = boxes.T
    area = height * width / 12e6
    shape = np.log(width / height) / np.log(4 / 3)
    assert_uniform(area, 0.2, 0.4)
    assert_uniform(shape, -1, 1)
    assert_uniform(top / (3000 - height), 0, 1)
    assert_uniform(left / (4000 - width), 0, 1)


def assert_uniform(values, low, high):
    deciles = np.quantile(values, np.linspace(0, 1, 11))
    expected = np.linspace(low, high, 11)
    np.testing.assert_allclose(deciles, expected, atol=0.03 * (high - low))


@pytest.mark.parametrize(
    "shape, box",
    [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100)), ((1, 1), (0, 0, 1, 1))],
)
def test_an_image_too_long_for_any_crop_is_cropped_centrally(shape, box):
    view = View(crop=(0.9, 1.0))

    assert random_box(*shape, view, np.random.default_rng(0)) == box


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(151, 200), (240, 97), (64, 64), (20, 33)])
def test_resize_crop_is_torchvision(shape, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*shape)
    mode = transforms.InterpolationMode(interpolation)

    view = center_view(encode(image, "PNG"), 64, "resize_crop", interpolation)

    resized = transforms.Resize(64, interpolation=mode)(image)
    expected = np.asarray(transforms.CenterCrop(64)(resized)).astype(int)
    assert same_but_for_rounding(view, expected)


@pytest.mark.parametrize(
    "shape, box", [((150, 201), (0, 26, 150, 150)), ((200, 150), (25, 0, 150, 150))]
)
def test_square_is_the_centre_then_resized(shape, box):
    data = encode(picture(*shape), quality=92)

    view = center_view(data, 64, "square")

    assert same_but_for_rounding(view, pillow(data, box, 64, "bicubic"))


def test_transparency_lies_on_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = 255, 0, 0, 255
    pixels[4:, 4:, 3] = 51  # a fifth of red
    image = Image.fromarray(pixels)
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True)):
        opaque = decode(data)

        assert (opaque[:, :4] == 255).all()
        assert (opaque[:4, 4:] == [255, 0, 0]).all()
        assert (opaque[4:, 4:] == [255, 204, 204]).all()

    palette = Image.fromarray(pixels[:4]).convert("RGB").quantize(2)
    opaque = decode(encode(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert (opaque[:, :4] == 255).all()
    assert (opaque[:, 4:] == [255, 0, 0]).all()


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)

    pixels = decode(encode(Image.fromarray(grey), "PNG"))

    assert np.array_equal(pixels[:, :, 0], grey >> 8)


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("L", "WEBP")])
def test_other_modes_become_rgb(mode, kind):
    data = encode(picture(20, 30).convert(mode), kind)

    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_orientation_is_ignored_as_peers_do():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image = picture(40, 60)

    assert np.array_equal(decode(encode(image, exif=exif)), decode(encode(image)))


def half(kind):
    data = encode(picture(90, 81), kind)
    return data[: len(data) // 2]


BROKEN = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "a jpeg's first bytes": b"\xff\xd8\xff" + bytes(50),
    "a png with a wrong checksum": encode(picture(9, 9), "PNG")[:-20] + bytes(20),
    "half a JPEG": half("JPEG"),
    "half a PNG": half("PNG"),
    "half a WEBP": half("WEBP"),
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
            "interpolation: unknown 'lanczos'; known: bicubic, bilinear",
        ),
        (dict(crop=(0.5, 1), mask="gausian(0.5)"), "did you mean 'gaussian'"),
    ],
)
def test_views_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        View(**fields)


def test_an_unknown_evaluation_view_is_refused():
    with pytest.raises(ValueError, match="crop: unknown 'center'; known: resize_crop, square"):
        center_view(encode(picture(9, 9)), 8, "center")
