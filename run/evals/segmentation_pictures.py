"""Pictures of segmentations: images, their label maps, and the predictions."""

import numpy as np
from PIL import Image, ImageDraw

from glimpse.data.evals.clip_benchmark import IGNORE

GRAY = 128
GAP = 4  # pixels between the parts of a row
LEGEND_COLUMN = 130  # width of the class names of one map
LINE_HEIGHT = 13


def draw_segmentations(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str], side: int = 144
) -> Image.Image:
    """Draw rows of image (H, W, 3), label map and prediction (H, W) as one picture.

    Each row is `side` pixels high, with the names of the classes in it. Pixels without a class in
    the label map are gray in both maps, so that the maps can be compared.
    """
    row_images = [draw_row(*row, classes, side) for row in rows]
    width = max(image.width for image in row_images)
    height = sum(image.height for image in row_images)
    picture = Image.new("RGB", (width, height), "white")
    top = 0
    for image in row_images:
        picture.paste(image, (0, top))
        top += image.height
    return picture


def draw_row(
    image: np.ndarray, label_map: np.ndarray, prediction: np.ndarray, classes: list[str], side: int
) -> Image.Image:
    """Draw one row of the picture."""
    labeled = label_map != IGNORE
    width = round(side * image.shape[1] / image.shape[0])
    row = Image.new("RGB", (3 * width + 2 * GAP + 2 * LEGEND_COLUMN, side + GAP), "white")

    # The image and its two maps, side by side.
    row.paste(Image.fromarray(image).resize((width, side)), (0, 0))
    for n, values in enumerate((label_map, prediction), start=1):
        colored = np.where(labeled[..., None], class_colors(values), GRAY).astype(np.uint8)
        map_image = Image.fromarray(colored).resize((width, side), Image.Resampling.NEAREST)
        row.paste(map_image, (n * (width + GAP), 0))

    # The names of each map's classes in their colors, the largest first, as far as they fit.
    draw = ImageDraw.Draw(row)
    legends = (("label map", label_map[labeled]), ("prediction", prediction[labeled]))
    for n, (title, values) in enumerate(legends):
        left = 3 * width + 4 * GAP + LEGEND_COLUMN * n
        draw.text((left, 2), title, fill="black")
        numbers, counts = np.unique(values, return_counts=True)
        largest = numbers[np.argsort(-counts)][: (side - 16) // LINE_HEIGHT]
        for line, number in enumerate(largest):
            color = tuple(class_colors(np.array(number)).tolist())
            draw.text((left, 16 + LINE_HEIGHT * line), classes[number][:20], fill=color)
    return row


def class_colors(numbers: np.ndarray) -> np.ndarray:
    """Return a color (..., 3) uint8 for each class number.

    Consecutive hues are a golden angle apart, so that classes differ, in three brightness levels.
    """
    hue = numbers[..., None] * 0.618034 * 6 + np.array([0, 4, 2])
    brightness = np.array([1.0, 0.75, 0.5])[numbers % 3][..., None]
    rgb = np.clip(np.abs(hue % 6 - 3) - 1, 0, 0.85)
    return (255 * brightness * rgb).astype(np.uint8)
