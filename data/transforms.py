"""One encoded image into views: decode, crop, resize, flip, color; uint8 (H, W, 3), normalized
later, on the device.

A box is (top, left, height, width) in pixels of the source; H x W are the sides of a view, one
number where it is square.

JPEGs are decoded by simplejpeg (the same pixels as Pillow's, without its copies) and, where a crop
is at least twice as large as the view, at a half, a quarter or an eighth of their size:
libjpeg-turbo's other scales take longer than the whole image. Everything else, and every JPEG that
simplejpeg refuses, is Pillow's. Resizing is torch's antialiased kernel for bytes, Pillow's
algorithm in vector instructions (within one level of 255 at 99.9 % of pixels).

Three choices where released code differs. As in open_clip and torchvision, EXIF orientation is
ignored. Transparency is laid on white, where they drop the alpha channel and show what lies
beneath. FLIP resizes with TensorFlow's bicubic, without antialiasing; we always antialias, since a
crop of a photograph is shrunk.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from glimpse.data.masking import parse_mask

try:
    import simplejpeg
except ImportError:  # Pillow alone gives the same pixels, in more time
    simplejpeg = None

Box = tuple[int, int, int, int]
Size = int | tuple[int, int]  # a square's side, or (height, width); pixels
CROPS = ("resize_crop", "square", "squash")  # of an evaluation image, see center_view
INTERPOLATIONS = ("bicubic", "bilinear")
CROP_ATTEMPTS = 10  # draws of a crop before the central one is taken, as in torchvision and FLIP


@dataclass(frozen=True)
class View:
    """How one training view of an image is made."""

    # Smallest and largest share of the image's area that a crop covers, 0 < smallest <=
    # largest <= 1.
    crop: tuple[float, float] = (0.5, 1.0)
    # Smallest and largest aspect ratio of a crop, width / height relative to the aspect ratio
    # of the view.
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Mirror the view horizontally with probability 0.5; not allowed in a view that another
    # view encloses.
    flip: bool = False
    # Resampling filter: bicubic or bilinear, both antialiased.
    interpolation: str = "bicubic"
    # Patches that stay visible: none, random(RATIO), gaussian(RATIO) or
    # inverse_gaussian(RATIO), where RATIO is the share to hide; the last two also take
    # sigma=, e.g. gaussian(0.5, sigma=0.2).
    mask: str = "none"
    # Strength of the color jitter in brightness, contrast, saturation (0 or more) and hue (0
    # to 0.5); it is applied with probability 0.8.
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    # Probability of converting the view to grayscale.
    grey: float = 0.0
    # Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels.
    blur: float = 0.0
    # Probability of inverting all pixel values from 128 on.
    solarize: float = 0.0
    # Independent draws of this view for each image, 1 to 9; two or more are named NAME1,
    # NAME2, ...
    count: int = 1
    # Views whose crops this view encloses: it is the smallest box around them and has no crop
    # of its own.
    encloses: tuple[str, ...] = ()
    # Move each side of the enclosing box outward by a random amount, as A-CLIP's released
    # code does.
    enlarge: bool = False
    # Side of the view in pixels, only for a view that encloses others; 0 uses
    # model.image_size.
    size: int = 0

    def __post_init__(self):
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(
                f"crop: {self.crop}; it must be two shares of the image's area, 0 < smallest <="
                " largest <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(
                f"ratio: {self.ratio}; it must be two ratios of width to height, 0 < narrowest <="
                " widest"
            )
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                f"jitter: {self.jitter}; of brightness, contrast, saturation (0 or more) and hue (0"
                " to 0.5)"
            )
        for key in ("grey", "blur", "solarize"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be a probability, 0 to 1")
        if not 1 <= self.count <= 9:
            raise ValueError(f"count: {self.count}; a view is drawn 1 to 9 times")
        if self.size < 0:
            raise ValueError(
                f"size: {self.size}; it must be a side in pixels, or 0 for model.image_size"
            )
        if self.enlarge and not self.encloses:
            raise ValueError(
                "enlarge: only a view that encloses others can be enlarged; name them in encloses"
            )
        if self.encloses and (self.crop, self.ratio) != (View.crop, View.ratio):
            raise ValueError(
                "crop, ratio: a view that encloses others has the box around theirs; leave both out"
            )
        if self.encloses and self.flip:
            raise ValueError(
                "flip: a view that encloses others cannot be mirrored, since places in it are"
                " looked up by theirs"
            )
        check_interpolation(self.interpolation)
        parse_mask(self.mask)


def view_names(name: str, view: View) -> list[str]:
    """Names of the draws of a view: NAME, or NAME1, NAME2, ... where there are several."""
    if view.count == 1:
        return [name]
    return [f"{name}{n + 1}" for n in range(view.count)]


def expand_views(views: dict[str, View]) -> dict[str, View]:
    """Every draw of every view under its own name, in alphabetical order."""
    names = {name: view_names(name, view) for name, view in views.items()}
    result: dict[str, View] = {}
    for name, view in views.items():
        inside: list[str] = []
        for other in view.encloses:
            check_enclosed(name, other, views)
            inside += names[other]
        for draw in names[name]:
            if draw in result:
                raise ValueError(f"views: two are called {draw!r}; rename one")
            result[draw] = replace(view, count=1, encloses=tuple(inside))
    return dict(sorted(result.items()))


def check_enclosed(name: str, other: str, views: dict[str, View]) -> None:
    """Raise ValueError unless view `name` can enclose the view `other`."""
    if other not in views or views[other].encloses:
        with_crop = sorted(key for key, view in views.items() if not view.encloses)
        raise ValueError(
            f"views.{name}.encloses: {other!r}; name views with a crop: {', '.join(with_crop)}"
        )
    if views[other].flip:
        raise ValueError(
            f"views.{other}.flip: {name} encloses it and looks places up by its box; set it to"
            " false"
        )


def height_and_width(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def check_interpolation(name: str) -> None:
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: {name!r}; known: {', '.join(INTERPOLATIONS)}")


def random_views(
    data: bytes, size: Size, views: dict[str, View], rngs: dict[str, np.random.Generator]
) -> dict[str, tuple[np.ndarray, Box]]:
    """{name: ((H, W, 3) uint8, its box)} of views from `expanded`; the image is decoded once.

    ValueError: it cannot be read.
    """
    # 1. Draw the boxes in the whole image.
    height, width = image_size(data)
    targets = {name: height_and_width(view.size or size) for name, view in views.items()}
    boxes = {}
    for name, view in views.items():
        if not view.encloses:
            shape = targets[name][1] / targets[name][0]
            boxes[name] = random_box(height, width, view, rngs[name], shape)
    flips = {name: view.flip and rngs[name].random() < 0.5 for name, view in views.items()}

    # 2. A JPEG is decoded at a half, a quarter or an eighth, where every view is smaller still.
    #    Boxes shift by less than one pixel of the view.
    shrink = choose_shrink(views, boxes, targets) if is_jpeg(data) else 1
    cuts = {name: shrink_box(box, shrink) for name, box in boxes.items()}
    for name, view in views.items():
        if view.encloses:
            cuts[name] = enclosing_box([cuts[other] for other in view.encloses])
            if view.enlarge:
                cuts[name] = enlarge_box(cuts[name], height // shrink, width // shrink, rngs[name])

    # 3. Cut, resize and recolor.
    image = decode(data, shrink)
    results = {}
    for name, view in views.items():
        top, left, rows, columns = cuts[name]
        crop = image[top : top + rows, left : left + columns]
        pixels = resize(crop, *targets[name], view.interpolation, flips[name])
        pixels = recolor(pixels, rngs[name], view.jitter, view.grey, view.blur, view.solarize)
        results[name] = pixels, (top * shrink, left * shrink, rows * shrink, columns * shrink)
    return results


def choose_shrink(
    views: dict[str, View], boxes: dict[str, Box], targets: dict[str, tuple[int, int]]
) -> int:
    """8, 4, 2 or 1: by how much the image may shrink before the tightest view would be enlarged."""
    room = math.inf
    for name, view in views.items():
        box = (
            enclosing_box([boxes[other] for other in view.encloses])
            if view.encloses
            else boxes[name]
        )
        rows, columns = targets[name]
        room = min(room, box[2] / rows, box[3] / columns)
    return next((shrink for shrink in (8, 4, 2) if room >= shrink), 1)


def shrink_box(box: Box, shrink: int) -> Box:
    top, left, rows, columns = box
    return top // shrink, left // shrink, rows // shrink, columns // shrink


def random_view(
    data: bytes, size: Size, view: View, rng: np.random.Generator
) -> tuple[np.ndarray, Box]:
    """One view of an image: see random_views."""
    return random_views(data, size, {"": view}, {"": rng})[""]


def enclosing_box(boxes: list[Box]) -> Box:
    """The smallest box around the boxes."""
    top = min(box[0] for box in boxes)
    left = min(box[1] for box in boxes)
    bottom = max(box[0] + box[2] for box in boxes)
    right = max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def enlarge_box(box: Box, height: int, width: int, rng: np.random.Generator) -> Box:
    """The box with each side moved outwards, by a uniform share of what the image leaves it."""
    top = int(rng.integers(box[0] + 1))
    left = int(rng.integers(box[1] + 1))
    bottom = int(rng.integers(box[0] + box[2], height + 1))
    right = int(rng.integers(box[1] + box[3], width + 1))
    return top, left, bottom - top, right - left


def random_box(
    height: int, width: int, view: View, rng: np.random.Generator, shape: float = 1.0
) -> Box:
    """Draw a box of random area and shape, as torchvision and FLIP do; after TRIES that do not fit,
    take the largest central one in shape.

    shape: width : height of the view that is made of it, which view.ratio multiplies, so that a
    view that is not square is distorted no more than a square one. Only images far wider or taller
    than that come to the central box, where FLIP would take a central square of 7/8 of the short
    side.
    """
    narrowest, widest = shape * view.ratio[0], shape * view.ratio[1]
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*view.crop)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(rng.integers(height - rows + 1))
            left = int(rng.integers(width - columns + 1))
            return top, left, rows, columns
    rows = min(height, max(1, round(width / narrowest)))
    columns = min(width, max(1, round(height * widest)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def center_view(
    data: bytes, size: Size, crop: str = "resize_crop", interpolation: str = "bicubic"
) -> np.ndarray:
    """The view for evaluation, (H, W, 3), from the image at its full size.

    resize_crop: the short side to `size`, then the central square (CLIP, SLIP, open_clip); square:
    the central square, then resized (FLIP); squash: all of the image, distorted (DFN's models in
    open_clip).

    Of a view that is not square: the image, made just large enough to cover H x W, then its center;
    the largest central box in the shape of H x W, then resized; all of the image.

    ValueError: the image cannot be read.
    """
    if crop not in CROPS:
        raise ValueError(f"how: {crop!r}; known: {', '.join(CROPS)}")
    image = decode(data)
    height, width = image.shape[:2]
    H, W = height_and_width(size)
    if crop == "squash":
        return resize(image, H, W, interpolation)

    tall = height * W >= width * H  # for its width, so that it is the width that must fit
    if crop == "square":
        if tall:
            rows, columns = max(1, round(width * H / W)), width
        else:
            rows, columns = height, max(1, round(height * W / H))
        top, left = (height - rows + 1) // 2, (width - columns + 1) // 2
        return resize(image[top : top + rows, left : left + columns], H, W, interpolation)

    if tall:
        rows, columns = int(W * height / width), W
    else:
        rows, columns = H, int(H * width / height)
    top, left = round((rows - H) / 2), round((columns - W) / 2)
    resized = resize(image, rows, columns, interpolation)
    return np.ascontiguousarray(resized[top : top + H, left : left + W])


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str, flip: bool = False
) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3); flip mirrors left and right."""
    check_interpolation(interpolation)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).view(1, *image.shape).permute(0, 3, 1, 2)
    # torch must see channels last, in the stride of the batch too: else it works plane by plane, in
    # twice the time
    pixels = torch.nn.functional.interpolate(
        pixels, (height, width), mode=interpolation, antialias=True
    )
    if flip:
        pixels = pixels.flip(3)
    return pixels[0].permute(1, 2, 0).numpy()


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header has it.

    ValueError: no image, or one larger than Pillow allows.
    """
    if size := jpeg_header(data):
        return size
    with open_image(data) as image:
        return image.height, image.width


def jpeg_header(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG for simplejpeg; None leaves the image to Pillow, which also says
    what is wrong with it.
    """
    if simplejpeg is None or not is_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Pillow warns, and above twice that size refuses
    bomb = height * width > (Image.MAX_IMAGE_PIXELS or math.inf)
    return None if bomb or colours in ("CMYK", "YCCK") else (height, width)


def decode(data: bytes, shrink: int = 1) -> np.ndarray:
    """(H, W, 3) uint8; a JPEG also at a shrink of 2, 4 or 8, sides rounded up.

    ValueError: the image cannot be read.
    """
    if header := jpeg_header(data):
        height, width = (-(-side // shrink) for side in header)
        try:
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        except ValueError:  # truncated, or a flaw that Pillow forgives: Pillow decides
            pass
    with open_image(data) as image:
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        return to_rgb(image)


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image. Whatever Pillow raises on broken data (it has many kinds) becomes a
    ValueError.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:  # Pillow's own words tell an address in memory
        raise ValueError("cannot read the image: of no format that Pillow knows") from None
    except Exception as error:
        raise ValueError(f"cannot read the image: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode, transparency laid on white."""
    # 16 bits of grey, which Pillow's own conversion would clip at 255
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


# ---- color and sharpness of self-supervised views, as SLIP and A-CLIP make them: jitter, gray,
# blur, solarize, in this order; Pillow does the work, in torchvision's terms

JITTER_PROBABILITY = 0.8  # of the images; the other probabilities are the view's
BLUR_SIGMA = (0.1, 2.0)  # of the blur, pixels


def recolor(
    image: np.ndarray,
    rng: np.random.Generator,
    jitter: tuple[float, ...],
    grey: float,
    blur: float,
    solarize: float,
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same, changed at random.

    jitter: of brightness, contrast, saturation, hue; x draws a factor from 1 - x to 1 + x, for the
    hue a shift from -x to x. The others are probabilities. All 0: unchanged.
    """
    if not (any(jitter) or grey or blur or solarize):
        return image
    picture = Image.fromarray(image)
    if any(jitter) and rng.random() < JITTER_PROBABILITY:
        picture = jitter_color(picture, jitter, rng)
    if rng.random() < grey:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_SIGMA)))
    if rng.random() < solarize:
        picture = ImageOps.solarize(picture, 128)
    return np.asarray(picture)


def jitter_color(
    picture: Image.Image, jitter: tuple[float, ...], rng: np.random.Generator
) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    for i in rng.permutation(4):
        if not jitter[i]:
            continue
        if i == 3:
            picture = shift_hue(picture, rng.uniform(-jitter[3], jitter[3]))
        else:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            picture = kind(picture).enhance(rng.uniform(max(0.0, 1 - jitter[i]), 1 + jitter[i]))
    return picture


def shift_hue(picture: Image.Image, shift: float) -> Image.Image:
    """Move every hue along the circle by `shift` of it, -0.5 to 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + round(shift * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
