"""Sliding windows over images, for evaluations of every pixel.

The short side of an image is resized to `size` pixels. Windows of the tower's image side S are
placed on it every `stride` pixels, the last of a row or column at its end. The tower therefore sees
images of the size that its position embeddings were trained for (MaskCLIP, section 4: 224-pixel
windows every 112 pixels of 512).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glimpse.data.evals.clip_benchmark import Images, Preprocess
from glimpse.data.transforms import decode, image_size, resize


@dataclass(frozen=True)
class WindowGrid:
    """Positions of windows of `side` pixels on a resized image; size >= side."""

    side: int
    size: int
    stride: int

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (rows, columns) to resize an image to; neither is below `size`."""
        short = min(height, width)
        rows = max(self.size, round(height * self.size / short))
        columns = max(self.size, round(width * self.size / short))
        return rows, columns

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the top left corners of an image's windows on its canvas, row by row.

        The windows cover the canvas. height, width: of the original image.
        """
        rows, columns = self.canvas(height, width)
        return [(top, left) for top in self.starts(rows) for left in self.starts(columns)]

    def starts(self, length: int) -> list[int]:
        """Return the first pixels of the windows along a side of the canvas."""
        last = length - self.side
        return [*range(0, last, self.stride), last]


class WindowImages(Images):
    """The windows of some images of a set; each window is an image for the tower.

    Window w belongs to image `image_index[w]`.
    """

    def __init__(self, images: Images, grid: WindowGrid, indices: Sequence[int]):
        self.images = images
        self.grid = grid
        self.folder = images.folder
        self.split = images.split
        self.shapes: dict[int, tuple[int, int]] = {}  # height and width by image
        for i in indices:
            try:
                self.shapes[i] = image_size(images.image(i))
            except ValueError as error:
                raise ValueError(f"evals: {images.location(i)}: {error}") from None
        self.image_index: list[int] = []
        self.corners: list[tuple[int, int]] = []
        for i, shape in self.shapes.items():
            corners = grid.corners(*shape)
            self.image_index += [i] * len(corners)
            self.corners += corners
        # Consecutive windows belong to one image: keep the last one resized.
        self.last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    def image(self, i: int) -> bytes:
        return self.images.image(self.image_index[i])

    def key(self, i: int) -> str:
        return self.images.key(self.image_index[i])

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        image_index = self.image_index[i]
        if self.last is None or self.last[0] != image_index:
            rows, columns = self.grid.canvas(*self.shapes[image_index])
            pixels = resize(decode(self.image(i)), rows, columns, pre.interpolation)
            self.last = (image_index, pixels)
        _, pixels = self.last
        top, left = self.corners[i]
        return pixels[top : top + self.grid.side, left : left + self.grid.side]
