"""Open evaluation sets: `open_set(folder)` detects the layout of a folder.

The result is an `Images` of data/evals/clip_benchmark.py. To add a layout, write a class with
`matches` and `read_split` in data/evals/segmentation_layouts.py or data/evals/caption_layouts.py,
and add it to LAYOUTS, whose first match is used.
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

    A folder with SPLIT/*.tar contains shards; any other is opened by the first of LAYOUTS that
    matches.

    content: label_map, captions or questions. A layout with this content takes precedence, because
    COCO's folder may contain all three. Raise ValueError if the folder is not an evaluation set.
    """
    if is_url(str(folder)):
        return ClipBenchmarkSet(folder, split)
    folder = Path(folder)
    if any((folder / split).glob("*.tar")):
        return ClipBenchmarkSet(folder, split)

    layouts = [layout for layout in LAYOUTS if layout.matches(folder)]
    for layout in layouts:
        if layout.content == content:
            return layout(folder, split)
    if layouts:
        return layouts[0](folder, split)
    return ClipBenchmarkSet(folder, split)  # raises an error that lists what a set needs
