"""Pictures of segmentations: images, their label maps, and the predictions."""

import numpy as np
from PIL import Image, ImageDraw

from glimpse.data.evals.clip_benchmark import IGNORE

GRAY = 128


def draw_segmentations(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str], side: int = 144
) -> Image.Image:
    """Draw rows of image (H, W, 3), label map and predicted map (H, W) as one picture.

    Each row is `side` high, with the names of the classes in it. Pixels of no class in the label
    map are gray in both maps, so that they can be compared.
    """
    strips = [draw_row(*row, classes, side) for row in rows]
    width = max(image.width for image in strips)
    height = sum(image.height for image in strips)
    picture = Image.new("RGB", (width, height), "white")
    top = 0
    for image in strips:
        picture.paste(image, (0, top))
        top += image.height
    return picture


def draw_row(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: list[str], side: int
) -> Image.Image:
    """Draw one row of the picture."""
    known = truth != IGNORE
    width = round(side * image.shape[1] / image.shape[0])
    result = Image.new("RGB", (3 * width + 8 + 260, side + 4), "white")

    # The image and its two maps, side by side.
    result.paste(Image.fromarray(image).resize((width, side)), (0, 0))
    for n, values in enumerate((truth, prediction), start=1):
        colored = np.where(known[..., None], class_colors(values), GRAY).astype(np.uint8)
        part = Image.fromarray(colored).resize((width, side), Image.Resampling.NEAREST)
        result.paste(part, (n * (width + 4), 0))

    # The names of the classes in each map, in their colors; the largest first, as many as fit in.
    draw = ImageDraw.Draw(result)
    for n, (title, values) in enumerate((("is", truth[known]), ("found", prediction[known]))):
        left = 3 * width + 16 + 130 * n
        draw.text((left, 2), title, fill="black")
        numbers, counts = np.unique(values, return_counts=True)
        largest = numbers[np.argsort(-counts)][: (side - 16) // 13]
        for line, number in enumerate(largest):
            color = tuple(class_colors(np.array(number)).tolist())
            draw.text((left, 16 + 13 * line), classes[number][:20], fill=color)
    return result


def class_colors(numbers: np.ndarray) -> np.ndarray:
    """Return a color (..., 3) uint8 for each class's number.

    Hues are a golden angle apart, in three degrees of darkness.
    """
    hue = numbers[..., None] * 0.618034 * 6 + np.array([0, 4, 2])
    level = np.array([1.0, 0.75, 0.5])[numbers % 3][..., None]
    return (255 * level * np.clip(np.abs(hue % 6 - 3) - 1, 0, 0.85)).astype(np.uint8)
