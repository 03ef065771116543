"""Changes of colour and sharpness for self-supervised views, as SLIP and A-CLIP make them: jitter,
grey, blur, solarize, in this order.

Pillow does the work, in torchvision's terms: a jitter of x draws a factor from 1 - x to 1 + x; one
of hue, a shift from -x to x.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

JITTERED = 0.8  # of the images; the other probabilities are the view's
SIGMA = (0.1, 2.0)  # of the blur, pixels


def recolour(
    image: np.ndarray,
    rng: np.random.Generator,
    jitter: tuple[float, ...],
    grey: float,
    blur: float,
    solarize: float,
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same.

    jitter: of brightness, contrast, saturation, hue; the others are probabilities. All 0:
    unchanged.
    """
    if not (any(jitter) or grey or blur or solarize):
        return image
    picture = Image.fromarray(image)
    if any(jitter) and rng.random() < JITTERED:
        picture = jittered(picture, jitter, rng)
    if rng.random() < grey:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
    if rng.random() < solarize:
        picture = ImageOps.solarize(picture, 128)
    return np.asarray(picture)


def jittered(
    picture: Image.Image, jitter: tuple[float, ...], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order."""
    for i in rng.permutation(4):
        if not jitter[i]:
            continue
        if i == 3:
            picture = turned(picture, rng.uniform(-jitter[3], jitter[3]))
        else:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            picture = kind(picture).enhance(rng.uniform(max(0.0, 1 - jitter[i]), 1 + jitter[i]))
    return picture


def turned(picture: Image.Image, shift: float) -> Image.Image:
    """With every hue further along the circle by `shift` of it, -0.5 to 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + round(shift * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
