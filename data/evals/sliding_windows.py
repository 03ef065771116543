"""Whole images under a sliding window, for evaluations that need an answer at every pixel.

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
class Sliding:
    """How windows of `side` pixels lie on an image; size >= side."""

    side: int
    size: int
    stride: int

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The sides (rows, columns) to which an image is resized; neither is below `size`."""
        short = min(height, width)
        return max(self.size, round(height * self.size / short)), max(
            self.size, round(width * self.size / short)
        )

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """The top left corners of the windows, row by row, on the canvas of an image of these
        sides; together they cover all of it.
        """
        rows, columns = self.canvas(height, width)
        return [(top, left) for top in self.starts(rows) for left in self.starts(columns)]

    def starts(self, length: int) -> list[int]:
        last = length - self.side
        return [*range(0, last, self.stride), last]


class Windows(Images):
    """The windows of some of a set's images as images of their own, to be passed through a tower:
    window w of image `owner[w]`.
    """

    def __init__(self, images: Images, sliding: Sliding, chosen: Sequence[int]):
        self.images, self.sliding, self.folder, self.split = (
            images,
            sliding,
            images.folder,
            images.split,
        )
        self.shapes = {}  # by image: its height and width
        for i in chosen:
            try:
                self.shapes[i] = image_size(images.image(i))
            except ValueError as error:
                raise ValueError(f"evals: {images.place(i)}: {error}") from None
        found = [(i, place) for i, shape in self.shapes.items() for place in sliding.places(*shape)]
        self.owner, self.places = [i for i, _ in found], [place for _, place in found]
        # neighbours ask for the same image, which is resized once
        self.last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.owner)

    def image(self, i: int) -> bytes:
        return self.images.image(self.owner[i])

    def key(self, i: int) -> str:
        return self.images.key(self.owner[i])

    def view(self, i: int, pre: Preprocess) -> np.ndarray:
        owner, (top, left) = self.owner[i], self.places[i]
        if self.last is None or self.last[0] != owner:
            self.last = (
                owner,
                resize(
                    decode(self.image(i)),
                    *self.sliding.canvas(*self.shapes[owner]),
                    pre.interpolation,
                ),
            )
        return self.last[1][top : top + self.sliding.side, left : left + self.sliding.side]
