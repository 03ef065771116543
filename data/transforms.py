"""Make views of an encoded image: decode, crop, resize, flip, recolor.

A view is uint8 (H, W, 3); the model normalizes it later, on the device. A box is (top, left,
height, width) in pixels of the source image. A size is (H, W), or one number for a square.

Decoding. simplejpeg decodes JPEGs: the same pixels as Pillow's, without its copies. If every crop
is at least twice as large as its view, libjpeg-turbo decodes the JPEG at 1/2, 1/4 or 1/8 of its
size; its other scales take longer than the full size. Pillow decodes everything else, and every
JPEG that simplejpeg refuses.

Resizing uses torch's antialiased kernel for bytes: Pillow's algorithm in vector instructions, with
a difference of at most one level of 255 at 99.9 % of the pixels.

There are three differences from released code. EXIF orientation is ignored, as in open_clip and
torchvision. Transparent pixels are blended with white, whereas open_clip and torchvision drop the
alpha channel. Resizing is always antialiased, whereas FLIP resizes with TensorFlow's bicubic
without antialiasing: crops of photographs are usually shrunk.
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
except ImportError:  # Pillow decodes the same pixels, more slowly
    simplejpeg = None

Box = tuple[int, int, int, int]
Size = int | tuple[int, int]  # side of a square, or (height, width), in pixels
CROPS = ("resize_crop", "square", "squash")  # crops of evaluation images, see center_view
INTERPOLATIONS = ("bicubic", "bilinear")
CROP_ATTEMPTS = 10  # random crops to try before the central one is used, as in torchvision and FLIP


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
                f"jitter: {self.jitter}; it must be strengths of brightness, contrast, saturation"
                " (0 or more) and hue (0 to 0.5)"
            )
        for key in ("grey", "blur", "solarize"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be a probability, 0 to 1")
        if not 1 <= self.count <= 9:
            raise ValueError(f"count: {self.count}; it must be 1 to 9")
        if self.size < 0:
            raise ValueError(
                f"size: {self.size}; it must be a side in pixels, or 0 for model.image_size"
            )
        if self.enlarge and not self.encloses:
            raise ValueError(
                "enlarge: only a view that encloses others can be enlarged; list them in encloses"
            )
        if self.encloses and (self.crop, self.ratio) != (View.crop, View.ratio):
            raise ValueError(
                "crop, ratio: a view that encloses others uses the box around theirs; remove both"
            )
        if self.encloses and self.flip:
            raise ValueError(
                "flip: a view that encloses others cannot be mirrored, because their boxes locate"
                " them in it; set it to false"
            )
        check_interpolation(self.interpolation)
        parse_mask(self.mask)


def view_names(name: str, view: View) -> list[str]:
    """Return the names of the draws of a view: NAME, or NAME1, NAME2, ... for several."""
    if view.count == 1:
        return [name]
    return [f"{name}{n + 1}" for n in range(view.count)]


def expand_views(views: dict[str, View]) -> dict[str, View]:
    """Return one view for each draw of each view, under its name, in alphabetical order.

    The order must not depend on the config file: the loader seeds each view by its
    place in this order.
    """
    names = {name: view_names(name, view) for name, view in views.items()}
    result: dict[str, View] = {}
    for name, view in views.items():
        # An enclosing view encloses every draw of the views that it lists.
        enclosed: list[str] = []
        for other in view.encloses:
            check_enclosed(name, other, views)
            enclosed += names[other]
        for draw in names[name]:
            if draw in result:
                raise ValueError(f"views: two views are called {draw!r}; rename one")
            result[draw] = replace(view, count=1, encloses=tuple(enclosed))
    return dict(sorted(result.items()))


def check_enclosed(name: str, other: str, views: dict[str, View]) -> None:
    """Raise ValueError unless view `name` can enclose the view `other`."""
    if other not in views or views[other].encloses:
        allowed = sorted(key for key, view in views.items() if not view.encloses)
        raise ValueError(
            f"views.{name}.encloses: {other!r} is not a view with a crop; use some of:"
            f" {', '.join(allowed)}"
        )
    if views[other].flip:
        raise ValueError(
            f"views.{other}.flip: {name} encloses this view and locates patches by its box; set"
            " flip to false"
        )


def height_and_width(size: Size) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def check_interpolation(name: str) -> None:
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: unknown {name!r}; known: {', '.join(INTERPOLATIONS)}")


def random_views(
    data: bytes, size: Size, views: dict[str, View], rngs: dict[str, np.random.Generator]
) -> dict[str, tuple[np.ndarray, Box]]:
    """Make random views of an image, which is decoded once.

    views: from `expand_views`. rngs: a generator for each view; a view depends on another
    view's generator only if it encloses that view. Return {name: (pixels (H, W, 3)
    uint8, box)}. Raise ValueError if the image cannot be read.
    """
    # 1. Draw a box in the full-size image for each view with a crop.
    height, width = image_size(data)
    targets = {name: height_and_width(view.size or size) for name, view in views.items()}
    boxes = {}
    for name, view in views.items():
        if not view.encloses:
            aspect = targets[name][1] / targets[name][0]
            boxes[name] = random_box(height, width, view, rngs[name], aspect)
    flips = {name: view.flip and rngs[name].random() < 0.5 for name, view in views.items()}

    # 2. Decode a JPEG at the smallest of 1/2, 1/4 and 1/8 at which every crop is still at least as
    #    large as its view, and scale the boxes. Rounding moves a box by less than a pixel of its
    #    view. Sides are rounded down, so that a box never passes the border of the decoded image.
    shrink = choose_shrink(views, boxes, targets) if is_jpeg(data) else 1
    crops = {name: shrink_box(box, shrink) for name, box in boxes.items()}
    for name, view in views.items():
        if view.encloses:
            crops[name] = enclosing_box([crops[other] for other in view.encloses])
            if view.enlarge:
                crops[name] = enlarge_box(
                    crops[name], height // shrink, width // shrink, rngs[name]
                )

    # 3. Crop, resize, flip and recolor.
    image = decode(data, shrink)
    results = {}
    for name, view in views.items():
        top, left, rows, columns = crops[name]
        pixels = resize(
            image[top : top + rows, left : left + columns],
            *targets[name],
            view.interpolation,
            flips[name],
        )
        pixels = recolor(pixels, rngs[name], view.jitter, view.grey, view.blur, view.solarize)
        results[name] = pixels, (top * shrink, left * shrink, rows * shrink, columns * shrink)
    return results


def choose_shrink(
    views: dict[str, View], boxes: dict[str, Box], targets: dict[str, tuple[int, int]]
) -> int:
    """Return the largest of 8, 4, 2 and 1 by which no crop becomes smaller than its view."""
    smallest_ratio = math.inf
    for name, view in views.items():
        if view.encloses:
            box = enclosing_box([boxes[other] for other in view.encloses])
        else:
            box = boxes[name]
        rows, columns = targets[name]
        smallest_ratio = min(smallest_ratio, box[2] / rows, box[3] / columns)
    return next((shrink for shrink in (8, 4, 2) if smallest_ratio >= shrink), 1)


def shrink_box(box: Box, shrink: int) -> Box:
    """Return a box in an image that was decoded at 1 / shrink of its size."""
    top, left, rows, columns = box
    return top // shrink, left // shrink, rows // shrink, columns // shrink


def random_view(
    data: bytes, size: Size, view: View, rng: np.random.Generator
) -> tuple[np.ndarray, Box]:
    """Make one random view of an image; see random_views."""
    return random_views(data, size, {"": view}, {"": rng})[""]


def enclosing_box(boxes: list[Box]) -> Box:
    """Return the smallest box around several boxes."""
    top = min(box[0] for box in boxes)
    left = min(box[1] for box in boxes)
    bottom = max(box[0] + box[2] for box in boxes)
    right = max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def enlarge_box(box: Box, height: int, width: int, rng: np.random.Generator) -> Box:
    """Move each side of a box outward, by a uniform share of its distance to the image's border."""
    top = int(rng.integers(box[0] + 1))
    left = int(rng.integers(box[1] + 1))
    bottom = int(rng.integers(box[0] + box[2], height + 1))
    right = int(rng.integers(box[1] + box[3], width + 1))
    return top, left, bottom - top, right - left


def random_box(
    height: int, width: int, view: View, rng: np.random.Generator, aspect: float = 1.0
) -> Box:
    """Draw a box of random area and aspect ratio, as in torchvision and FLIP.

    If CROP_ATTEMPTS boxes in a row do not fit into the image, return the largest central box with
    an allowed aspect ratio. This happens only for images with an extreme aspect ratio; FLIP would
    use a central square of 7/8 of the short side.

    aspect: width / height of the view. view.ratio is relative to it, so that views that are not
    square are distorted as little as square ones.
    """
    narrowest, widest = aspect * view.ratio[0], aspect * view.ratio[1]
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
    """Make the view of an image for evaluation, (H, W, 3) uint8.

    crop:
    - resize_crop: resize the image until it just covers H x W, then take its center (CLIP, SLIP,
      open_clip);
    - square: take the largest central box with the aspect ratio of H x W, then resize it (FLIP);
    - squash: resize the image to H x W, which distorts it (DFN's models in open_clip).

    The image is decoded at its full size. Raise ValueError if it cannot be read.
    """
    if crop not in CROPS:
        raise ValueError(f"crop: unknown {crop!r}; known: {', '.join(CROPS)}")
    image = decode(data)
    height, width = image.shape[:2]
    H, W = height_and_width(size)
    if crop == "squash":
        return resize(image, H, W, interpolation)

    # Compared with H x W the image is tall: its width decides the scale.
    tall = height * W >= width * H
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
    """Resize an image (H, W, 3) uint8 to (height, width, 3); flip mirrors it horizontally."""
    check_interpolation(interpolation)
    # (1, H, W, 3) seen as (1, 3, H, W). The strides must be channels-last, including that of the
    # batch. Otherwise torch resizes plane by plane, which takes twice as long.
    batch = torch.from_numpy(np.ascontiguousarray(image)).view(1, *image.shape)
    pixels = batch.permute(0, 3, 1, 2)
    pixels = torch.nn.functional.interpolate(
        pixels, (height, width), mode=interpolation, antialias=True
    )
    if flip:
        pixels = pixels.flip(3)
    return pixels[0].permute(1, 2, 0).numpy()


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from the header of an image.

    Raise ValueError if it is not an image, or larger than Pillow allows.
    """
    if size := jpeg_header(data):
        return size
    with open_image(data) as image:
        return image.height, image.width


def jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that simplejpeg can decode; None leaves it to Pillow.

    That includes damaged images: Pillow's errors describe the problem better.
    """
    if simplejpeg is None or not is_jpeg(data):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Pillow warns about decompression bombs, and refuses images of more than twice its limit.
    too_large = height * width > (Image.MAX_IMAGE_PIXELS or math.inf)
    return None if too_large or color_space in ("CMYK", "YCCK") else (height, width)


def decode(data: bytes, shrink: int = 1) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8.

    shrink: 2, 4 or 8 decodes a JPEG at that fraction of its size, sides rounded up. Raise
    ValueError if the image cannot be read.
    """
    if header := jpeg_header(data):
        height, width = (-(-side // shrink) for side in header)
        try:
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        except ValueError:  # truncated, or a defect that Pillow tolerates: let Pillow decide
            pass
    with open_image(data) as image:
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        return to_rgb(image)


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow, and convert any error in the block to a ValueError.

    Pillow raises errors of many types for damaged data.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:  # Pillow's message contains a memory address
        raise ValueError("cannot read the image: its format is unknown to Pillow") from None
    except Exception as error:
        raise ValueError(f"cannot read the image: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode to (H, W, 3) uint8, blending transparency with white."""
    # 16-bit grayscale: Pillow's conversion would clip values at 255 instead of scaling them.
    if image.mode.startswith("I"):
        high_bytes = np.asarray(image) >> 8
        image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


# ---- Augmentations of self-supervised views as in SLIP and A-CLIP: color jitter, grayscale, blur
# and solarize, in this order. They use Pillow, with torchvision's definitions of the parameters.

JITTER_PROBABILITY = 0.8  # the other probabilities are fields of View
BLUR_SIGMA = (0.1, 2.0)  # pixels


def recolor(
    image: np.ndarray,
    rng: np.random.Generator,
    jitter: tuple[float, ...],
    grey: float,
    blur: float,
    solarize: float,
) -> np.ndarray:
    """Change the colors of an image (H, W, 3) uint8 at random, and blur it.

    jitter: strengths for brightness, contrast, saturation and hue. A strength x draws a factor from
    1 - x to 1 + x, for the hue a shift from -x to x. grey, blur and solarize are probabilities. If
    all are 0, the image is returned unchanged.
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
    """Change brightness, contrast, saturation and hue at random, in random order."""
    for i in rng.permutation(4):
        if not jitter[i]:
            continue
        if i == 3:  # hue
            picture = shift_hue(picture, rng.uniform(-jitter[3], jitter[3]))
        else:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            factor = rng.uniform(max(0.0, 1 - jitter[i]), 1 + jitter[i])
            picture = enhancer(picture).enhance(factor)
    return picture


def shift_hue(picture: Image.Image, shift: float) -> Image.Image:
    """Rotate every hue by `shift` of the color circle, -0.5 to 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + round(shift * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
