"""Images like photographs, and a record of how JPEGs are decoded, for the tests of views.

photo(40, 60) is a Pillow image, encode(image, "PNG") its bytes.
"""

import io

import numpy as np
import pytest
from PIL import Image

from glimpse.data import transforms


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> Image.Image:
    """Random colors, smooth enough to compress like a photograph, with some grain."""
    rng = np.random.default_rng(seed)
    shape = (height // 20 + 2, width // 20 + 2, channels)
    coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    grainy = smooth + rng.normal(0, 4, smooth.shape)
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """Return the bytes of an image file; options: of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record_shrinks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the `shrink` of every image that is decoded from now on, and return the list."""
    shrinks = []
    decode = transforms.decode

    def recording_decode(data: bytes, shrink: int = 1) -> np.ndarray:
        shrinks.append(shrink)
        return decode(data, shrink)

    monkeypatch.setattr(transforms, "decode", recording_decode)
    return shrinks
