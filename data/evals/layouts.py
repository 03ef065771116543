"""The known layouts of evaluation sets: `open_set(folder)` detects a folder's layout and opens it.

The result is an `Images` of data/evals/clip_benchmark.py. To add a layout, write a class with
`fits` and `open` in data/evals/segmentation_layouts.py or data/evals/caption_layouts.py, and give
it its place in LAYOUTS: the first that fits is taken.
"""

from pathlib import Path

from glimpse.data.evals.caption_layouts import CocoCaptions, Karpathy, Nocaps, Vqa
from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet, Images
from glimpse.data.evals.segmentation_layouts import (
    Ade20k,
    CocoStuff,
    CustomFolders,
    FileSet,
    PascalContext,
)
from glimpse.data.stream import is_url

LAYOUTS: tuple[type[FileSet], ...] = (
    Karpathy,
    Nocaps,
    CocoCaptions,
    Vqa,
    Ade20k,
    PascalContext,
    CocoStuff,
    CustomFolders,
)


def open_set(folder: str | Path, split: str = "test", content: str = "") -> Images:
    """Open the set in a folder or at a URL.

    A folder with SPLIT/*.tar holds shards; any other is opened by the first of LAYOUTS that fits,
    of those for `reads` if there are any. reads: label_map, captions or questions, since COCO's
    folder may hold all three.
    """
    if is_url(str(folder)):
        return ClipBenchmarkSet(folder, split)
    folder = Path(folder)
    if any((folder / split).glob("*.tar")):
        return ClipBenchmarkSet(folder, split)

    fitting = [layout for layout in LAYOUTS if layout.matches(folder)]
    for layout in fitting:
        if layout.content == content:
            return layout(folder, split)
    if fitting:
        return fitting[0](folder, split)
    return ClipBenchmarkSet(folder, split)  # raises the error that names what a set needs
