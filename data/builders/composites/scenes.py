"""Composites: scenes of several drawings (data/builders/glyphs/build.py) on a canvas, of which
everything is known
exactly.

    OUT/train/0.tar ...          scenes to train on: key.webp, .seg.png, .json; a training set, as
                                 its json lists the captions
    OUT/test/0.tar ...           the same of drawings that OUT/train never shows (in styles that it
                                 does), and .txt, a caption a line
    OUT/unseen_style/test/...    the same of styles that it never shows; OUT/unseen_style/train is
                                 OUT/train
    OUT/classnames.txt, OUT/zeroshot_classification_templates.txt, OUT/composites.json,
        OUT/LICENSES.txt

So OUT and OUT/unseen_style are evaluation sets (data/evals/clip_benchmark.py). key.seg.png: of each
pixel the
class of the uppermost drawing that covers more than half of it; IGNORE on the background. key.json:
{caption: [...], boxes: [{name, class, box: [left, top, right, bottom]}], questions: [{question,
answers, kind}]}, where a box just holds what is visible. A scene depends on the seed, its set and
its number alone.
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
TWIN = 0.3  # chance that a thing is of the same name as the one before
OVERLAP = 0.1  # of a smaller box, that another may cover
TILT = 12  # degrees to either side
STORED = 64  # pixels: drawings are kept at this size
# the third of that family is bare strokes: its alpha is no mask of the thing
UNSEEN = ("fluent3d", "fluent-emoji-flat")
SHARD = 1000
Drawings = Mapping[str, list[Image.Image]]  # name -> RGBA drawings, cut to what is drawn


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
    """Make the set in `out`, or find it finished there; returns what composites.json holds.

    glyphs: a finished glyphs set; train, test, unseen: scenes; concepts: name -> caption of its
    glyphs.
    """
    if not (record := glyphs / "glyphs.json").exists():
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
    if out.exists() and (done := finished(out, settings, "composites")):
        return done
    drawings = read_drawings(glyphs, concepts)
    out.parent.mkdir(parents=True, exist_ok=True)
    # broken off, a build leaves no `out`
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        counts = {
            part: {name: len(images) for name, images in by_name.items()}
            for part, by_name in drawings.items()
        }
        parts = (
            ("train", new, train),
            ("test", new, test),
            ("unseen", new / "unseen_style", unseen),
        )
        for number, (part, where, scenes) in enumerate(parts):
            write_scenes(where, part, drawings[part], (seed, number), scenes, progress)
            (where / "classnames.txt").write_text("".join(f"{name}\n" for name in concepts))
            (where / "zeroshot_classification_templates.txt").write_text(
                "".join(f"{line}\n" for line in TEMPLATES)
            )
        (new / "unseen_style" / "train").symlink_to("../train")
        shutil.copy(glyphs / "LICENSES.txt", new / "LICENSES.txt")
        summary = dict(settings=settings, drawings=counts)
        (new / "composites.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        )
        os.rename(new, out)
    return summary


# --------------------------------------------------------------------------------------------------
# drawings


def read_drawings(glyphs: Path, concepts: Mapping[str, str]) -> dict[str, Drawings]:
    """{train, test, unseen} -> the drawings of each: a third of the seen styles' for test, the
    unseen styles' for unseen.
    """
    found: dict[str, dict[str, list]] = {"train": defaultdict(list), "heldout": defaultdict(list)}
    names = {caption: name for name, caption in concepts.items()}
    for part, by_name in found.items():
        shards = Shards([glyphs / part])
        for sample in map(shards.__getitem__, range(len(shards))):
            about = json.loads(sample.parts["json"])
            if (
                sample.caption in names
                and about["emoji"]
                and not about["toned"]
                and (part == "train" or about["style"] in UNSEEN)
            ):
                by_name[names[sample.caption]].append(
                    (hashlib.md5(sample.key.encode()).digest(), sample.key, sample.image)
                )
    drawings: dict[str, dict] = {"train": {}, "test": {}, "unseen": {}}
    for name, caption in concepts.items():
        seen, unseen = sorted(found["train"][name]), sorted(found["heldout"][name])
        if len(seen) < 3 or not unseen:
            raise ValueError(
                f"{glyphs}: {caption!r} has {len(seen)} drawings to train on and {len(unseen)} in"
                f" {', '.join(UNSEEN)}; composites need 3 and 1"
            )
        rows = dict(train=seen[len(seen) // 3 :], test=seen[: len(seen) // 3], unseen=unseen)
        for part, members in rows.items():
            drawings[part][name] = [cut_out(image, key) for _, key, image in members]
    return drawings


def cut_out(image: bytes, key: str) -> Image.Image:
    """An encoded drawing -> RGBA, cut to its pixels that are more than half opaque and at most
    STORED a side.
    """
    with Image.open(io.BytesIO(image)) as opened:
        opened = opened.convert("RGBA")
    if not (box := solid(opened)):
        raise ValueError(f"glyphs: {key} has no opaque pixel")
    opened = opened.crop(box)
    opened.thumbnail((STORED, STORED), Image.Resampling.LANCZOS)
    return opened


def solid(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of the pixels that are more than half opaque."""
    return image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()


# --------------------------------------------------------------------------------------------------
# scenes


def compose(drawings: Drawings, rng: np.random.Generator) -> Scene:
    """One scene of one to four things, none of them hidden by more than a little."""
    names = list(drawings)
    while True:
        count = int(rng.choice(len(HOW_MANY), p=HOW_MANY)) + 1
        chosen: list[str] = []
        for _ in range(count):
            chosen.append(
                chosen[-1] if chosen and rng.random() < TWIN else names[rng.integers(len(names))]
            )
        posed = [pose(drawings[name], SIDES[count], rng) for name in chosen]
        if (corners := lay_out([image.size for image in posed], rng)) is not None:
            break
    canvas, owner = background(rng), np.full((CANVAS, CANVAS), -1)
    for number, (image, (x, y)) in enumerate(zip(posed, corners)):
        canvas.paste(image, (x, y), image)
        covered = np.asarray(image.getchannel("A")) > 127
        owner[y : y + image.height, x : x + image.width][covered] = number
    classes = np.array([names.index(name) for name in chosen], np.uint8)
    label_map = np.where(owner < 0, np.uint8(IGNORE), classes[owner])
    return Scene(
        canvas,
        label_map,
        [Thing(name, box_of(owner == number)) for number, name in enumerate(chosen)],
    )


def pose(
    images: list[Image.Image], sides: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """One of the drawings, tilted, perhaps mirrored, at a random size."""
    image = images[rng.integers(len(images))]
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(solid(image))
    scale = rng.integers(sides[0], sides[1] + 1) / max(image.size)
    return image.resize(
        [max(1, round(scale * side)) for side in image.size], Image.Resampling.LANCZOS
    )


def lay_out(
    sizes: list[tuple[int, int]], rng: np.random.Generator, tries: int = 40
) -> list[tuple[int, int]] | None:
    """A corner (x, y) for each box of that size, so that they hardly overlap; None if there is no
    room.
    """
    placed: list[tuple[int, int, int, int]] = []
    for width, height in sizes:
        for _ in range(tries):
            x, y = int(rng.integers(CANVAS - width + 1)), int(rng.integers(CANVAS - height + 1))
            if all(overlap((x, y, x + width, y + height), other) <= OVERLAP for other in placed):
                placed.append((x, y, x + width, y + height))
                break
        else:
            return None
    return [box[:2] for box in placed]


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """What two boxes share, as a part of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def background(rng: np.random.Generator) -> Image.Image:
    """White, one colour, or a soft passage from one to another, in any direction."""
    # one in five is dark
    colours = rng.uniform(90, 255, (2, 1, 1, 3)) * (1 if rng.random() < 0.8 else 0.4)
    kind = rng.choice(3, p=(0.2, 0.3, 0.5))
    if kind == 0:
        return Image.new("RGB", (CANVAS, CANVAS), "white")
    y, x = np.mgrid[:CANVAS, :CANVAS] / (CANVAS - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    passage = (0.5 + (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2))[..., None] * (kind == 2)
    return Image.fromarray(
        (colours[0] + passage * (colours[1] - colours[0])).round().astype(np.uint8)
    )


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


# --------------------------------------------------------------------------------------------------
# writing


def write_scenes(
    out: Path, part: str, drawings: Drawings, seed: tuple[int, int], count: int, progress: Progress
) -> None:
    """OUT/train/*.tar or OUT/test/*.tar with that many scenes, drawn on all cores, and its
    index.
    """
    folder = out / ("train" if part == "train" else "test")
    folder.mkdir(parents=True)
    with workers(_hold, part, drawings, seed) as results:
        # in the order given
        samples = iter(progress(results(_sample, range(count)), f"{part} scenes"))
        shards = -(-count // SHARD)
        for shard in range(shards):
            write_shard(
                folder / f"{shard}.tar",
                (next(samples) for _ in range(min(SHARD, count - shard * SHARD))),
            )
    (folder / "nshards.txt").write_text(f"{shards}\n")
    build_index(folder)


def _hold(*held) -> None:
    """In a worker process: what all its scenes are made of."""
    global _held
    _held = held


def _sample(number: int) -> tuple[str, dict[str, bytes]]:
    part, drawings, seed = _held
    return f"{part}_{number:06d}", sample(
        drawings, np.random.default_rng((*seed, number)), captions_file=part != "train"
    )


def sample(drawings: Drawings, rng: np.random.Generator, captions_file: bool) -> dict[str, bytes]:
    """The members of one scene.

    The txt lists all captions; in a training set, where a txt is one caption, the json alone has
    them.
    """
    scene, names = compose(drawings, rng), list(drawings)
    texts = captions(scene.things, CANVAS, rng)
    boxes = [{"name": t.name, "class": names.index(t.name), "box": t.box} for t in scene.things]
    about = dict(caption=texts, boxes=boxes, questions=questions(scene.things, CANVAS, names, rng))
    parts = {
        "webp": encoded(scene.image, format="WEBP", quality=90, method=0),
        "json": json.dumps(about).encode(),
        "seg.png": encoded(Image.fromarray(scene.label_map), format="PNG"),
    }
    return parts | ({"txt": "\n".join(texts).encode()} if captions_file else {})


def encoded(image: Image.Image, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()
