"""Encoded images -> views: decoded, cropped, resized and mirrored in one pass; uint8 (H, W, 3), normalised later, on the device.

A box is (top, left, height, width) in pixels of the source.  JPEGs are decoded by simplejpeg (the same pixels as Pillow's, without its
copies) and, where a crop is at least twice as large as the view, at a half, a quarter or an eighth of their size: libjpeg-turbo's
other scales take longer than the whole image.  Everything else, and every JPEG that simplejpeg refuses, is Pillow's.
Resizing is torch's antialiased kernel for bytes, Pillow's algorithm in vector instructions (within one level of 255 at 99.9 % of pixels).

Three choices where released code differs.  As in open_clip and torchvision, EXIF orientation is ignored.  Transparency is laid on white,
where they drop the alpha channel and show what lies beneath.  FLIP resizes with TensorFlow's bicubic, without antialiasing; we always
antialias, since a crop of a photograph is shrunk.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from data.masking import parse

try:
    import simplejpeg
except ImportError:  # Pillow alone gives the same pixels, in more time
    simplejpeg = None

Box = tuple[int, int, int, int]
INTERPOLATIONS = ("bicubic", "bilinear")
TRIES = 10  # draws of a crop before the central one is taken, as in torchvision and FLIP


@dataclass(frozen=True)
class View:
    """How one training view of an image is made."""

    crop: tuple[float, float]  # smallest and largest share of the image's area that a crop covers, in (0, 1]; uniform between
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # narrowest and widest crop, width : height, before it is made square; log-uniform between
    flip: bool = False  # mirror one view in two; off where a method needs the view's box, which does not tell
    interpolation: str = "bicubic"  # bicubic or bilinear, both antialiased
    mask: str = "none"  # which patches stay visible: none, random(0.5), gaussian(0.75), ... as data/masking.py reads it

    def __post_init__(self):
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: {self.crop}; it must be two shares of the image's area, 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio: {self.ratio}; it must be two ratios of width to height, 0 < narrowest <= widest")
        check_interpolation(self.interpolation)
        parse(self.mask)


def check_interpolation(name: str) -> None:
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: {name!r}; known: {', '.join(INTERPOLATIONS)}")


def random_view(data: bytes, size: int, view: View, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    """A random resized crop, (size, size, 3), and its box. ValueError: the image cannot be read."""
    height, width = image_size(data)
    box = random_box(height, width, view, rng)
    flip = view.flip and rng.random() < 0.5
    shrink = next((s for s in (8, 4, 2) if min(box[2:]) >= s * size and is_jpeg(data)), 1)
    top, left, rows, columns = (side // shrink for side in box)  # a shift of less than one pixel of the view
    image = decode(data, shrink)[top : top + rows, left : left + columns]
    return resize(image, size, size, view.interpolation, flip), (top * shrink, left * shrink, rows * shrink, columns * shrink)


def random_box(height: int, width: int, view: View, rng: np.random.Generator) -> Box:
    """A box of random area and shape, as torchvision and FLIP draw it; after TRIES that do not fit, the largest central one in shape.

    Only images far wider or taller than view.ratio come to that, where FLIP would take a central square of 7/8 of the short side.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(*view.crop)
        ratio = math.exp(rng.uniform(math.log(view.ratio[0]), math.log(view.ratio[1])))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns
    rows = min(height, max(1, round(width / view.ratio[0])))
    columns = min(width, max(1, round(height * view.ratio[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def center_view(data: bytes, size: int, how: str = "resize_crop", interpolation: str = "bicubic") -> np.ndarray:
    """The view for evaluation, (size, size, 3), from the image at its full size. ValueError: the image cannot be read.

    resize_crop: the short side to `size`, then the central square (CLIP, SLIP, open_clip); square: the central square, then resized (FLIP).
    """
    if how not in ("resize_crop", "square"):
        raise ValueError(f"how: {how!r}; known: resize_crop, square")
    image = decode(data)
    height, width = image.shape[:2]
    short = min(height, width)
    if how == "square":
        top, left = (height - short + 1) // 2, (width - short + 1) // 2
        return resize(image[top : top + short, left : left + short], size, size, interpolation)
    rows, columns = int(size * height / short), int(size * width / short)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return np.ascontiguousarray(resize(image, rows, columns, interpolation)[top : top + size, left : left + size])


def resize(image: np.ndarray, height: int, width: int, interpolation: str, flip: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3); flip mirrors left and right."""
    check_interpolation(interpolation)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).view(1, *image.shape).permute(0, 3, 1, 2)
    # torch must see channels last, in the stride of the batch too: else it works plane by plane, in twice the time
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode=interpolation, antialias=True)
    return (pixels.flip(3) if flip else pixels)[0].permute(1, 2, 0).numpy()


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header has it. ValueError: no image, or one larger than Pillow allows."""
    if found := jpeg_header(data):
        return found
    with opened(data) as image:
        return image.height, image.width


def jpeg_header(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG for simplejpeg; None leaves the image to Pillow, which also says what is wrong with it."""
    if simplejpeg is None or not is_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    bomb = height * width > (Image.MAX_IMAGE_PIXELS or math.inf)  # Pillow warns, and above twice that size refuses
    return None if bomb or colours in ("CMYK", "YCCK") else (height, width)


def decode(data: bytes, shrink: int = 1) -> np.ndarray:
    """(H, W, 3) uint8; a JPEG also at a shrink of 2, 4 or 8, sides rounded up. ValueError: the image cannot be read."""
    if found := jpeg_header(data):
        height, width = (-(-side // shrink) for side in found)
        try:
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        except ValueError:  # truncated, or a flaw that Pillow forgives: Pillow decides
            pass
    with opened(data) as image:
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        return to_rgb(image)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image. Whatever Pillow raises on broken data (it has many kinds) becomes a ValueError."""
    try:
        with Image.open(BytesIO(data)) as image:
            yield image
    except Exception as error:
        raise ValueError(f"cannot read the image: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode, transparency laid on white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
