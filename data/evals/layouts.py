"""Which layout a folder is in: `open_set(folder)` -> its images, with what the layout knows of them
(data/evals/clip_benchmark.py `Images`).

To add one: a class with `fits` and `open` in data/evals/segmentation_layouts.py or
data/evals/caption_layouts.py, and its
place in LAYOUTS.
"""

from pathlib import Path

from glimpse.data.evals.caption_layouts import CocoCaptions, Karpathy, Nocaps, Vqa
from glimpse.data.evals.clip_benchmark import Benchmark, Images
from glimpse.data.evals.segmentation_layouts import (
    Ade20k,
    CocoStuff,
    Files,
    Folders,
    PascalContext,
)
from glimpse.data.stream import is_url

LAYOUTS: tuple[type[Files], ...] = (
    Karpathy,
    Nocaps,
    CocoCaptions,
    Vqa,
    Ade20k,
    PascalContext,
    CocoStuff,
    Folders,
)


def open_set(folder: str | Path, split: str = "test", reads: str = "") -> Images:
    """The set in a folder, or at a URL: shards where it has SPLIT/*.tar, else the first of LAYOUTS
    that fits, for `reads` if it says so.

    reads: label_map, captions or questions, since COCO's folder may hold all three.
    """
    if is_url(str(folder)):
        return Benchmark(folder, split)
    folder = Path(folder)
    fitting = (
        []
        if any((folder / split).glob("*.tar"))
        else [layout for layout in LAYOUTS if layout.fits(folder)]
    )
    wanted = [layout for layout in fitting if layout.holds == reads] or fitting
    return wanted[0](folder, split) if wanted else Benchmark(folder, split)
