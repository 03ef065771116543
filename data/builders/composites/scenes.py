"""Composites: scenes of several drawings (data/builders/glyphs/build.py) on a canvas, with complete
annotations.

    OUT/train/0.tar ...          scenes to train on: key.webp, .seg.png, .json; as a training set,
                                 it has its captions in the json
    OUT/test/0.tar ...           scenes of drawings that OUT/train never shows (in styles that it
                                 does show), and .txt, a caption a line
    OUT/unseen_style/test/...    scenes of styles that OUT/train never shows; OUT/unseen_style/train
                                 is a link to OUT/train
    OUT/classnames.txt, OUT/zeroshot_classification_templates.txt, OUT/composites.json,
        OUT/LICENSES.txt

So OUT and OUT/unseen_style are evaluation sets (data/evals/clip_benchmark.py).

key.seg.png: for each pixel the class of the uppermost drawing that covers more than half of it;
IGNORE on the background. key.json: {caption: [...], boxes: [{name, class, box: [left, top, right,
bottom]}], questions: [{question, answers, kind}]}, where a box tightly encloses the visible part.
A scene depends only on the seed, its set and its number.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from glimpse.data.builders.composites.texts import (
    CONCEPTS,
    TEMPLATES,
    Thing,
    captions,
    questions,
)
from glimpse.data.builders.glyphs.build import Progress, bar, finished
from glimpse.data.builders.worker_pool import workers
from glimpse.data.evals.clip_benchmark import IGNORE
from glimpse.data.shards import Shards, build_index, write_shard

FORMAT = 1  # raise it when the same seed would give other scenes
CANVAS = 96
# things in a scene -> their longer side, at least and at most
SIDES = {1: (36, 72), 2: (30, 50), 3: (26, 42), 4: (24, 36)}
HOW_MANY = (0.15, 0.35, 0.3, 0.2)  # chances of 1 .. 4 things
TWIN = 0.3  # chance that a thing has the name of the previous one
OVERLAP = 0.1  # share of the smaller of two boxes that the other may cover
TILT = 12  # degrees to either side
STORED = 64  # pixels: drawings are kept at this size
# The third style of that family is bare strokes: its alpha is no mask of the thing.
UNSEEN = ("fluent3d", "fluent-emoji-flat")
SHARD = 1000
Drawings = Mapping[str, list[Image.Image]]  # name -> RGBA drawings, cropped


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    label_map: np.ndarray  # (CANVAS, CANVAS) uint8
    things: list[Thing]


def build(
    out: Path,
    *,
    glyphs: Path,
    train: int = 10000,
    test: int = 2000,
    unseen: int = 1000,
    seed: int = 0,
    concepts: Mapping[str, str] = CONCEPTS,
    progress: Progress = bar,
) -> dict:
    """Build the set in `out` unless it is finished; return the content of composites.json.

    glyphs: a finished glyphs set; train, test, unseen: numbers of scenes; concepts: name -> caption
    of its glyphs.
    """
    record = glyphs / "glyphs.json"
    if not record.exists():
        raise ValueError(
            f"{glyphs}: no finished glyphs set; run: run/prepare.py glyphs --out {glyphs}"
        )
    for part, scenes in (("train", train), ("test", test), ("unseen", unseen)):
        if scenes < 1:
            raise ValueError(f"composites: {part} is {scenes} scenes; it must be at least 1")
    settings = dict(
        format=FORMAT,
        scenes=[train, test, unseen],
        seed=seed,
        concepts=dict(concepts),
        glyphs=json.loads(record.read_text())["settings"],
    )
    if out.exists() and (summary := finished(out, settings, "composites")):
        return summary

    drawings = read_drawings(glyphs, concepts)
    counts = {}
    for part, by_name in drawings.items():
        counts[part] = {name: len(images) for name, images in by_name.items()}

    # Written to a temporary folder first: an interrupted build leaves no `out`.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        unseen_style = new / "unseen_style"
        parts = (("train", new, train), ("test", new, test), ("unseen", unseen_style, unseen))
        for number, (part, where, scenes) in enumerate(parts):
            write_scenes(where, part, drawings[part], (seed, number), scenes, progress)
            write_classes(where, concepts)
        (unseen_style / "train").symlink_to("../train")
        shutil.copy(glyphs / "LICENSES.txt", new / "LICENSES.txt")
        summary = dict(settings=settings, drawings=counts)
        text = json.dumps(summary, indent=1, ensure_ascii=False)
        (new / "composites.json").write_text(text + "\n")
        os.rename(new, out)
    return summary


def write_classes(folder: Path, concepts: Mapping[str, str]) -> None:
    """Write the names of the classes and the templates."""
    names = "".join(f"{name}\n" for name in concepts)
    templates = "".join(f"{template}\n" for template in TEMPLATES)
    (folder / "classnames.txt").write_text(names)
    (folder / "zeroshot_classification_templates.txt").write_text(templates)


# --------------------------------------------------------------------------------------------------
# drawings


def read_drawings(glyphs: Path, concepts: Mapping[str, str]) -> Mapping[str, Drawings]:
    """Return {train, test, unseen} -> the drawings of each concept.

    test has a third of the drawings in seen styles, train the others; unseen has the drawings in
    the styles UNSEEN. ValueError: a concept has too few drawings.
    """
    train = drawings_by_name(glyphs, "train", concepts)
    heldout = drawings_by_name(glyphs, "heldout", concepts)
    drawings: dict[str, dict[str, list[Image.Image]]] = {"train": {}, "test": {}, "unseen": {}}
    for name, caption in concepts.items():
        # Sorted by the hash of their keys, so that the third for test mixes styles.
        seen = sorted(train[name])
        unseen = sorted(heldout[name])
        if len(seen) < 3 or not unseen:
            styles = ", ".join(UNSEEN)
            raise ValueError(
                f"{glyphs}: {caption!r} has {len(seen)} drawings to train on and {len(unseen)} in"
                f" {styles}; composites need 3 and 1"
            )
        third = len(seen) // 3
        rows = dict(train=seen[third:], test=seen[:third], unseen=unseen)
        for part, members in rows.items():
            drawings[part][name] = [cut_out(image, key) for _, key, image in members]
    return drawings


def drawings_by_name(
    glyphs: Path, part: str, concepts: Mapping[str, str]
) -> dict[str, list[tuple[bytes, str, bytes]]]:
    """Return name -> (hash of the key, key, image) of the drawings in glyphs/train or heldout.

    Skin tones are left out, and so are held-out styles other than UNSEEN.
    """
    names = {caption: name for name, caption in concepts.items()}
    rows = defaultdict(list)
    shards = Shards([glyphs / part])
    for i in range(len(shards)):
        sample = shards[i]
        about = json.loads(sample.files["json"])
        if sample.caption not in names or not about["emoji"] or about["toned"]:
            continue
        if part == "heldout" and about["style"] not in UNSEEN:
            continue
        digest = hashlib.md5(sample.key.encode()).digest()
        rows[names[sample.caption]].append((digest, sample.key, sample.image))
    return rows


def cut_out(image: bytes, key: str) -> Image.Image:
    """Decode a drawing as RGBA, cropped to its opaque pixels and at most STORED a side.

    Opaque: more than half. ValueError: no pixel is.
    """
    with Image.open(io.BytesIO(image)) as opened:
        drawing = opened.convert("RGBA")
    box = solid(drawing)
    if not box:
        raise ValueError(f"glyphs: {key} has no opaque pixel")
    drawing = drawing.crop(box)
    drawing.thumbnail((STORED, STORED), Image.Resampling.LANCZOS)
    return drawing


def solid(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box of the pixels that are more than half opaque; None if there are none."""
    mask = image.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
    return mask.getbbox()


# --------------------------------------------------------------------------------------------------
# scenes


def compose(drawings: Drawings, rng: np.random.Generator) -> Scene:
    """Compose a scene of one to four things, none of them hidden by more than a little."""
    # Choose and pose things until they fit on the canvas.
    names = list(drawings)
    corners = None
    while corners is None:
        count = int(rng.choice(len(HOW_MANY), p=HOW_MANY)) + 1
        thing_names = choose_names(names, count, rng)
        images = [pose(drawings[name], SIDES[count], rng) for name in thing_names]
        corners = lay_out([image.size for image in images], rng)

    # Paste them in order; `owner` is the number of each pixel's uppermost thing, -1 for none.
    canvas = background(rng)
    owner = np.full((CANVAS, CANVAS), -1)
    for number, (image, (x, y)) in enumerate(zip(images, corners)):
        canvas.paste(image, (x, y), image)
        covered = np.asarray(image.getchannel("A")) > 127
        owner[y : y + image.height, x : x + image.width][covered] = number

    # Annotations of what is visible.
    classes = np.array([names.index(name) for name in thing_names], np.uint8)
    label_map = np.where(owner < 0, np.uint8(IGNORE), classes[owner])
    things = [Thing(name, box_of(owner == number)) for number, name in enumerate(thing_names)]
    return Scene(canvas, label_map, things)


def choose_names(names: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` random names; each repeats the previous one with the chance TWIN."""
    thing_names: list[str] = []
    for _ in range(count):
        if thing_names and rng.random() < TWIN:
            thing_names.append(thing_names[-1])
        else:
            thing_names.append(names[rng.integers(len(names))])
    return thing_names


def pose(
    images: list[Image.Image], sides: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """Return one of the drawings, tilted, perhaps mirrored, at a random size."""
    image = images[rng.integers(len(images))]
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(solid(image))
    least, most = sides
    scale = rng.integers(least, most + 1) / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def lay_out(
    sizes: list[tuple[int, int]], rng: np.random.Generator, tries: int = 40
) -> list[tuple[int, int]] | None:
    """Return a corner (x, y) for each box of these sizes, such that they hardly overlap.

    None if a box found no room in that many tries.
    """
    placed: list[tuple[int, int, int, int]] = []
    for width, height in sizes:
        for _ in range(tries):
            x = int(rng.integers(CANVAS - width + 1))
            y = int(rng.integers(CANVAS - height + 1))
            box = (x, y, x + width, y + height)
            if all(overlap(box, other) <= OVERLAP for other in placed):
                placed.append(box)
                break
        else:
            return None
    return [box[:2] for box in placed]


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the area that two boxes share, as a part of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((right - left) * (bottom - top) for left, top, right, bottom in (a, b))
    return max(0, width) * max(0, height) / smaller


def background(rng: np.random.Generator) -> Image.Image:
    """Return a white canvas, one color, or a gradient from one to another in any direction."""
    # Two colors; one background in five is dark.
    colors = rng.uniform(90, 255, (2, 1, 1, 3))
    brightness = 1 if rng.random() < 0.8 else 0.4
    colors = colors * brightness
    kind = rng.choice(["white", "plain", "gradient"], p=(0.2, 0.3, 0.5))
    if kind == "white":
        return Image.new("RGB", (CANVAS, CANVAS), "white")

    # The share of the second color, 0 to 1 along the direction `angle`.
    y, x = np.mgrid[:CANVAS, :CANVAS] / (CANVAS - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)  # at most sqrt(2) / 2
    share = (0.5 + along / np.sqrt(2))[..., None]
    if kind == "plain":
        share = np.zeros_like(share)
    pixels = colors[0] + share * (colors[1] - colors[0])
    return Image.fromarray(pixels.round().astype(np.uint8))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the (left, top, right, bottom) of the True pixels; right and bottom are exclusive."""
    ys = np.flatnonzero(mask.any(axis=1))
    xs = np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


# --------------------------------------------------------------------------------------------------
# writing


class _Source(NamedTuple):
    """The part, drawings and seed of all scenes that a worker process makes."""

    part: str
    drawings: Drawings
    seed: tuple[int, int]


_source: _Source | None = None  # set in worker processes alone


def write_scenes(
    out: Path, part: str, drawings: Drawings, seed: tuple[int, int], count: int, progress: Progress
) -> None:
    """Write `count` scenes, drawn on all cores, to OUT/train or OUT/test, and their index."""
    folder = out / ("train" if part == "train" else "test")
    folder.mkdir(parents=True)
    with workers(_hold, part, drawings, seed) as results:
        # The samples come in the order of their numbers.
        samples = iter(progress(results(_sample, range(count)), f"{part} scenes"))
        shards = -(-count // SHARD)
        for shard in range(shards):
            size = min(SHARD, count - shard * SHARD)
            write_shard(folder / f"{shard}.tar", (next(samples) for _ in range(size)))
    (folder / "nshards.txt").write_text(f"{shards}\n")
    build_index(folder)


def _hold(part: str, drawings: Drawings, seed: tuple[int, int]) -> None:
    """Keep in a worker process what all its scenes are made of."""
    global _source
    _source = _Source(part, drawings, seed)


def _sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Return (key, parts) of a scene, in a worker process."""
    if _source is None:
        raise RuntimeError("composites: _hold was not called in this process")
    part, drawings, seed = _source
    rng = np.random.default_rng((*seed, number))
    return f"{part}_{number:06d}", sample(drawings, rng, captions_file=part != "train")


def sample(drawings: Drawings, rng: np.random.Generator, captions_file: bool) -> dict[str, bytes]:
    """Return the members of a scene.

    The txt lists all captions. A training set has none, as its txt would be one caption: there the
    captions are in the json alone.
    """
    names = list(drawings)
    scene = compose(drawings, rng)
    about: dict[str, list] = dict(
        caption=captions(scene.things, CANVAS, rng),
        boxes=[],
        questions=questions(scene.things, CANVAS, names, rng),
    )
    for thing in scene.things:
        box = {"name": thing.name, "class": names.index(thing.name), "box": thing.box}
        about["boxes"].append(box)

    parts = {
        "webp": encoded(scene.image, format="WEBP", quality=90, method=0),
        "json": json.dumps(about).encode(),
        "seg.png": encoded(Image.fromarray(scene.label_map), format="PNG"),
    }
    if captions_file:
        parts["txt"] = "\n".join(about["caption"]).encode()
    return parts


def encoded(image: Image.Image, **options) -> bytes:
    """Return the bytes of the image's file; options: of PIL's Image.save."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()
