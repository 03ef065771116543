"""Pictures of segmentations: images, their label maps, and what was found."""

import numpy as np
from PIL import Image, ImageDraw

from glimpse.data.evals.clip_benchmark import IGNORE

GREY = 128


def segmentations(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str], side: int = 144
) -> Image.Image:
    """Rows of image (H, W, 3), label map and found map (H, W) as one picture, each `side` high,
    with the names of the classes in it.

    What the label map leaves open is grey in both maps, so that they can be compared.
    """
    strips = []
    for image, truth, found in rows:
        known = truth != IGNORE
        maps = [
            np.where(known[..., None], colours(values), GREY).astype(np.uint8)
            for values in (truth, found)
        ]
        wide = round(side * image.shape[1] / image.shape[0])
        parts = [Image.fromarray(image).resize((wide, side))]
        parts += [
            Image.fromarray(values).resize((wide, side), Image.Resampling.NEAREST)
            for values in maps
        ]
        strip = Image.new("RGB", (3 * wide + 8 + 260, side + 4), "white")
        for n, part in enumerate(parts):
            strip.paste(part, (n * (wide + 4), 0))
        draw = ImageDraw.Draw(strip)
        for n, (title, values) in enumerate((("is", truth[known]), ("found", found[known]))):
            draw.text((3 * wide + 16 + 130 * n, 2), title, fill="black")
            numbers, counts = np.unique(values, return_counts=True)
            # the largest first
            for line, c in enumerate(numbers[np.argsort(-counts)][: (side - 16) // 13]):
                draw.text(
                    (3 * wide + 16 + 130 * n, 16 + 13 * line),
                    classes[c][:20],
                    fill=tuple(colours(np.array(c)).tolist()),
                )
        strips.append(strip)
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def colours(numbers: np.ndarray) -> np.ndarray:
    """A colour (..., 3) uint8 for each class's number: hues a golden angle apart, in three degrees
    of darkness.
    """
    hue = numbers[..., None] * 0.618034 * 6 + np.array([0, 4, 2])
    level = np.array([1.0, 0.75, 0.5])[numbers % 3][..., None]
    return (255 * level * np.clip(np.abs(hue % 6 - 3) - 1, 0, 0.85)).astype(np.uint8)
