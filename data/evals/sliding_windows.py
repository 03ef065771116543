"""Sliding windows over images, for evaluations that need an answer at every pixel.

An image's short side is made `size` pixels; windows of the tower's side S lie on it every `stride`
pixels, the last of a row or column at its end, so that positions are those that the tower was
trained at (MaskCLIP, section 4: 224-pixel windows every 112 of 512).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glimpse.data.evals.clip_benchmark import Images, Preprocess
from glimpse.data.transforms import decode, image_size, resize


@dataclass(frozen=True)
class WindowGrid:
    """Positions of windows of `side` pixels on an image; size >= side."""

    side: int
    size: int
    stride: int

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return the sides (rows, columns) to resize an image to; neither is below `size`."""
        short = min(height, width)
        rows = max(self.size, round(height * self.size / short))
        columns = max(self.size, round(width * self.size / short))
        return rows, columns

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the top left corners of the windows on an image's canvas, row by row.

        height, width: the image's sides. The windows cover all of the canvas.
        """
        rows, columns = self.canvas(height, width)
        return [(top, left) for top in self.starts(rows) for left in self.starts(columns)]

    def starts(self, length: int) -> list[int]:
        """Return the first pixels of the windows along a side of the canvas."""
        last = length - self.side
        return [*range(0, last, self.stride), last]


class WindowImages(Images):
    """The windows of some of a set's images, each an image to be passed through a tower.

    Window w is a part of image `owner[w]`.
    """

    def __init__(self, images: Images, sliding: WindowGrid, indices: Sequence[int]):
        self.images = images
        self.sliding = sliding
        self.folder = images.folder
        self.split = images.split
        self.shapes: dict[int, tuple[int, int]] = {}  # by image: its height and width
        for i in indices:
            try:
                self.shapes[i] = image_size(images.image(i))
            except ValueError as error:
                raise ValueError(f"evals: {images.location(i)}: {error}") from None
        self.image_index: list[int] = []
        self.corners: list[tuple[int, int]] = []
        for i, shape in self.shapes.items():
            places = sliding.corners(*shape)
            self.image_index += [i] * len(places)
            self.corners += places
        # Consecutive windows are of the same image, which is resized once.
        self.last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    def image(self, i: int) -> bytes:
        return self.images.image(self.image_index[i])

    def key(self, i: int) -> str:
        return self.images.key(self.image_index[i])

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        owner = self.image_index[i]
        if self.last is None or self.last[0] != owner:
            rows, columns = self.sliding.canvas(*self.shapes[owner])
            pixels = resize(decode(self.image(i)), rows, columns, pre.interpolation)
            self.last = (owner, pixels)
        _, pixels = self.last
        top, left = self.corners[i]
        return pixels[top : top + self.sliding.side, left : left + self.sliding.side]
