"""Turn an unpacked ImageNet-Vid-Robust into an evaluation set for PM-0 and PM-10
(run/evals/metrics.py).

    ROOT/val/VIDEO/000010.JPEG
        frames
    ROOT/metadata/pmsets.json
        {anchor: [its reviewed neighbors, at most 10 frames away]}, paths from ROOT
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
    """Return True if the folder is ImageNet-Vid-Robust."""
    return (root / "metadata" / "pmsets.json").is_file()


def classes(root: Path) -> list[str]:
    """Return the class names in the order of their numbers."""
    index = json.loads((root / "misc" / "imagenet_vid_class_index.json").read_text())
    names = []
    for number in range(len(index)):
        name = index[str(number)][1]  # [WordNet number, name]
        names.append(name.replace("_", " "))
    return names


def frames(root: Path) -> list[tuple[Path, dict]]:
    """Return (image, content of its json) of each anchor, each followed by its neighbors.

    ValueError: a frame has no classes.
    """
    metadata = root / "metadata"
    sets = json.loads((metadata / "pmsets.json").read_text())
    labels = json.loads((metadata / "labels.json").read_text())

    rows = []
    for anchor, neighbors in sets.items():
        for frame in [anchor, *neighbors]:
            if not labels.get(frame):
                raise ValueError(f"{root}/metadata/labels.json: no classes of {frame}")
            about = dict(anchor=anchor, offset=offset(anchor, frame), labels=labels[frame])
            rows.append((root / frame, about))
    return rows


def offset(anchor: str, frame: str) -> int:
    """Return how many frames `frame` is after its anchor, clipped to -10 ... 10.

    The set lists only frames within 10 of their anchor.
    """
    distance = frame_number(frame) - frame_number(anchor)
    return max(-10, min(10, distance))


def frame_number(name: str) -> int:
    """Return the last number in the name of a frame's file."""
    return int(re.findall(r"\d+", Path(name).stem)[-1])


def samples(rows: Iterable[tuple[Path, dict]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, parts) of each frame."""
    for i, (path, about) in enumerate(rows):
        image = path.read_bytes()
        yield f"{i:07d}", {kind_of(image): image, "json": json.dumps(about).encode()}
