"""ImageNet-Vid-Robust as it is unpacked -> an evaluation set for PM-0 and PM-10
(run/evals/metrics.py).

    ROOT/val/VIDEO/000010.JPEG
        frames
    ROOT/metadata/pmsets.json
        {anchor: [its reviewed neighbours, at most 10 frames away]}, paths from ROOT
    ROOT/metadata/labels.json
        {frame: [classes]}
    ROOT/misc/imagenet_vid_class_index.json
        {"0": [WordNet number, name], ...}
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from glimpse.data.builders.pairs import kind_of


def is_video_set(root: Path) -> bool:
    return (root / "metadata" / "pmsets.json").is_file()


def classes(root: Path) -> list[str]:
    index = json.loads((root / "misc" / "imagenet_vid_class_index.json").read_text())
    return [index[str(i)][1].replace("_", " ") for i in range(len(index))]


def frames(root: Path) -> list[tuple[Path, dict]]:
    """(image, what its json says) of each anchor and, after it, each of its neighbours.

    ValueError: a frame has no classes.
    """
    sets, labels = (
        json.loads((root / "metadata" / name).read_text())
        for name in ("pmsets.json", "labels.json")
    )
    found = [(anchor, frame) for anchor, near in sets.items() for frame in [anchor, *near]]
    if bare := [frame for _, frame in found if not labels.get(frame)]:
        raise ValueError(f"{root}/metadata/labels.json: no classes of {bare[0]}")
    return [
        (root / frame, dict(anchor=anchor, offset=offset(anchor, frame), labels=labels[frame]))
        for anchor, frame in found
    ]


def offset(anchor: str, frame: str) -> int:
    """How many frames later; what the set lists is within 10 by its making, so never more."""
    first, second = (int(re.findall(r"\d+", Path(name).stem)[-1]) for name in (anchor, frame))
    return max(-10, min(10, second - first))


def samples(rows: Iterable[tuple[Path, dict]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts) of each frame."""
    for i, (path, about) in enumerate(rows):
        image = path.read_bytes()
        yield f"{i:07d}", {kind_of(image): image, "json": json.dumps(about).encode()}
