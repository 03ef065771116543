"""Views: one fast pass returns what Pillow does in three slow steps (decode, crop, resize).

That holds for all formats, with simplejpeg and without. Random crops have torchvision's
distribution. Unreadable images raise ValueError, and no other error.
"""

import io

import numpy as np
import pytest
from PIL import Image

from glimpse.data import transforms
from glimpse.data.transforms import View, center_view, decode, random_box, random_view
from glimpse.tests.helpers.photos import encode, photo, record_shrinks

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def crop_with_pillow(data, box, size, interpolation):
    """The slow way: decode, crop, resize."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), RESAMPLE[interpolation])).astype(int)


def difference(image, other):
    return np.abs(image.astype(int) - other)


def equal_up_to_rounding(image, other):
    error = difference(image, other)  # in levels of 255
    return error.mean() < 0.25 and np.quantile(error, 0.99) <= 1 and error.max() <= 8


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("shape", [(150, 200), (203, 151), (30, 41)])
def test_a_view_is_pillow_crop_and_resize(shape, kind, interpolation):
    data = encode(photo(*shape), kind)
    view = View(crop=(0.3, 1.0), interpolation=interpolation)
    for seed in range(5):
        image, box = random_view(data, 96, view, np.random.default_rng(seed))

        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        assert equal_up_to_rounding(image, crop_with_pillow(data, box, 96, interpolation))


@pytest.mark.parametrize("size, shrink", [(100, 2), (56, 4), (28, 8)])
def test_a_large_jpeg_is_decoded_smaller(size, shrink, monkeypatch):
    """The pixels differ less from Pillow's bicubic resizing than Pillow's bilinear does.

    The returned box is exactly the region of the view.
    """
    shrinks = record_shrinks(monkeypatch)
    image = photo(403, 507)
    data = encode(image, quality=92)
    view = View(crop=(0.6, 0.9), ratio=(0.9, 1.1))
    for seed in range(5):
        pixels, box = random_view(data, size, view, np.random.default_rng(seed))

        assert all(side % shrink == 0 for side in box)
        assert min(box[2:]) >= shrink * size
        exact = crop_with_pillow(data, box, size, "bicubic")
        bilinear = crop_with_pillow(data, box, size, "bilinear")
        assert difference(pixels, exact).mean() < difference(bilinear, exact).mean()
    assert shrinks == [shrink] * 5

    random_view(encode(image, "PNG"), size, view, np.random.default_rng(0))
    assert shrinks[-1] == 1, "only a JPEG can be decoded smaller"


JPEGS = {
    "color": (photo(203, 151), {}),
    "gray": (photo(203, 151).convert("L"), {}),
    "cmyk": (photo(90, 81).convert("CMYK"), {}),
    "progressive": (photo(90, 81), dict(progressive=True)),
    "4:4:4": (photo(90, 81), dict(subsampling=0)),
    "rgb": (photo(90, 81), dict(keep_rgb=True)),
    "small": (photo(9, 9), {}),
    "one pixel": (photo(1, 1), {}),
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
    assert transforms.simplejpeg is not None
    monkeypatch.setattr(transforms, "simplejpeg", None)
    assert np.array_equal(decode(data, shrink), pixels)


def test_the_generator_decides():
    data = encode(photo(120, 160))
    view = View(crop=(0.5, 1.0), flip=True)

    image, box = random_view(data, 64, view, np.random.default_rng(0))
    same_image, same_box = random_view(data, 64, view, np.random.default_rng(0))
    _, other_box = random_view(data, 64, view, np.random.default_rng(1))

    assert np.array_equal(image, same_image)
    assert box == same_box
    assert box != other_box


def test_flip_mirrors_one_view_in_two():
    data = encode(photo(64, 64), "PNG")
    unflipped = center_view(data, 32)
    view = View(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    mirrored_count = 0
    for seed in range(200):
        image, box = random_view(data, 32, view, np.random.default_rng(seed))

        assert box == (0, 0, 64, 64)
        assert image.flags.c_contiguous
        flipped = np.array_equal(image, unflipped[:, ::-1])
        assert flipped or np.array_equal(image, unflipped)
        mirrored_count += flipped
    assert 80 < mirrored_count < 120


def test_crops_are_uniform_in_area_in_log_shape_and_in_place():
    rng = np.random.default_rng(0)
    view = View(crop=(0.2, 0.4))  # small enough for every draw to fit

    boxes = np.array([random_box(3000, 4000, view, rng) for _ in range(4000)])

    top, left, height, width = boxes.T
    area = height * width / 12e6
    log_ratio = np.log(width / height) / np.log(4 / 3)
    assert_uniform(area, 0.2, 0.4)
    assert_uniform(log_ratio, -1, 1)
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
    torchvision = pytest.importorskip("torchvision.transforms")
    image = photo(*shape)
    mode = torchvision.InterpolationMode(interpolation)

    view = center_view(encode(image, "PNG"), 64, "resize_crop", interpolation)

    resized = torchvision.Resize(64, interpolation=mode)(image)
    expected = np.asarray(torchvision.CenterCrop(64)(resized)).astype(int)
    assert equal_up_to_rounding(view, expected)


@pytest.mark.parametrize(
    "shape, box", [((150, 201), (0, 26, 150, 150)), ((200, 150), (25, 0, 150, 150))]
)
def test_square_is_the_center_then_resized(shape, box):
    data = encode(photo(*shape), quality=92)

    view = center_view(data, 64, "square")

    assert equal_up_to_rounding(view, crop_with_pillow(data, box, 64, "bicubic"))


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


def test_sixteen_bit_gray_keeps_its_range():
    gray = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)

    pixels = decode(encode(Image.fromarray(gray), "PNG"))

    assert np.array_equal(pixels[:, :, 0], gray >> 8)


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("L", "WEBP")])
def test_other_modes_become_rgb(mode, kind):
    data = encode(photo(20, 30).convert(mode), kind)

    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_orientation_is_ignored_as_in_other_libraries():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    image = photo(40, 60)

    assert np.array_equal(decode(encode(image, exif=exif)), decode(encode(image)))


def half_file(kind):
    """The first half of an image file."""
    data = encode(photo(90, 81), kind)
    return data[: len(data) // 2]


BROKEN = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "a jpeg's first bytes": b"\xff\xd8\xff" + bytes(50),
    "a png with a wrong checksum": encode(photo(9, 9), "PNG")[:-20] + bytes(20),
    "half a JPEG": half_file("JPEG"),
    "half a PNG": half_file("PNG"),
    "half a WEBP": half_file("WEBP"),
}


@pytest.mark.parametrize("use_simplejpeg", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_value_errors(name, use_simplejpeg, monkeypatch):
    if not use_simplejpeg:
        monkeypatch.setattr(transforms, "simplejpeg", None)

    with pytest.raises(ValueError, match="cannot read the image"):
        random_view(BROKEN[name], 32, View(crop=(0.5, 1.0)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="cannot read the image"):
        center_view(BROKEN[name], 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused(kind, monkeypatch):
    data = encode(photo(40, 50), kind)
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
        center_view(encode(photo(9, 9)), 8, "center")
