"""Glyphs: the default data set, 15 thousand captioned images (25 thousand with skin tones) made
from npm packages in about a minute.

Files that `build` writes, from the drawings in data/builders/glyphs/sources.py and, on demand,
data/builders/glyphs/icons.py and data/builders/glyphs/extras.py:

    OUT/train/glyphs-00000.tar ...      to train on: seen styles x train concepts, styles mixed
    OUT/heldout/STYLE-00000.tar ...     the rest: a tenth of the concepts, and three styles of one
                                        maker (`UNSEEN_STYLES`)
    OUT/eval/NAME/                      evaluation sets in CLIP_benchmark's webdataset layout, on
                                        white
    OUT/LICENSES.txt, OUT/glyphs.json   origin and license of each style; settings, versions and
                                        counts of this build

A sample is STYLE__NAME.png|webp (transparent around the drawing), .txt (its English name) and .json
(`Vocabulary.about`). Two builds are byte-identical, whatever the number of processes.
"""

import hashlib
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import NotRequired, TypedDict

from PIL import Image
from tqdm import tqdm

from glimpse.data.builders.glyphs import extras as glyphs_extras
from glimpse.data.builders.glyphs import icons as glyphs_icons
from glimpse.data.builders.glyphs.sources import (
    FLUENT3D,
    PACKAGES,
    Glyph,
    first_of,
    icons,
    install,
    installed,
    licence,
)
from glimpse.data.builders.worker_pool import workers
from glimpse.data.shards import build_index, write_shard

FORMAT = 1  # raise it when a build of the same packages would come out otherwise
SHARD = 1000  # most samples in a shard
# styles of the drawings in the classification sets
SEEN_STYLE = "noto"
UNSEEN_STYLE = "fluent3d"
STAMPS = "tuxstamps"
RETRIEVAL = 1000  # image-caption pairs in eval/retrieval
TEMPLATES = "{c}\n"  # captions here are bare names, and so are the prompts
Progress = Callable[[Iterable, str], Iterable]


class SaveOptions(TypedDict):
    """Options of PIL's Image.save."""

    format: str
    quality: NotRequired[int]
    method: NotRequired[int]


ENCODING: dict[str, SaveOptions] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 90, "method": 0},
}


def bar(items: Iterable, text: str) -> Iterable:
    """Wrap items in a progress bar."""
    return tqdm(items, desc=text, file=sys.stderr, disable=None)  # None: shown on a terminal only


def build(
    out: Path,
    *,
    cache: Path,
    tones: bool = False,
    extras: bool = False,
    icons: bool = False,
    progress: Progress = bar,
) -> dict:
    """Build the data set in `out` unless it is finished; return the content of glyphs.json.

    cache: where packages are kept between builds; tones: keep skin-tone variants; extras: Debian's
    clip art, stamps and photographs too; icons: the color sets of @iconify/json too, and training
    shards of equal size, a multiple of five of them; progress(items, text): wraps an iterable, to
    show progress.
    """
    packages = PACKAGES | (glyphs_icons.PACKAGES if icons else {})
    settings = dict(format=FORMAT, tones=tones, extras=extras, packages=packages)
    if out.exists() and (summary := finished(out, settings)):
        say(f"{out}: already built with these settings")
        return summary

    glyphs, origins = collect(cache, tones, extras, icons)
    glyphs = one_per_image(draw(glyphs, progress, "drawing"))

    # Written to a temporary folder first: an interrupted build leaves no `out`.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        counts = write(new, glyphs, progress)
        summary = dict(settings=settings, credits=origins, **counts)
        (new / "LICENSES.txt").write_text(licences(origins))
        if extras:
            for package, text in glyphs_extras.copyrights(cache / "debian").items():
                (new / f"copyright-{package}.txt").write_text(text)
        (new / "glyphs.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        os.rename(new, out)
    return summary


def finished(out: Path, settings: dict, kind: str = "glyphs") -> dict | None:
    """Return the summary (KIND.json) of a finished build with the same settings.

    None for an empty folder; ValueError for anything else.
    """
    record = out / f"{kind}.json"
    if record.exists():
        summary = json.loads(record.read_text())
        if summary["settings"] == settings:
            return summary
        differ = [key for key in settings if summary["settings"].get(key) != settings[key]]
        raise ValueError(
            f"{out}: holds a {kind} set built with other {', '.join(differ)}; remove it or name"
            " another folder"
        )
    if not out.is_dir() or any(out.iterdir()):
        raise ValueError(
            f"{out}: exists and holds something else than a finished {kind} set; remove it or name"
            " another folder"
        )
    return None


def collect(
    cache: Path, tones: bool, extras: bool, with_icons: bool
) -> tuple[list[Glyph], dict[str, dict]]:
    """Return all glyphs, before drawing, and their origins.

    Origins: style or set of icons -> {package, version, licence, author, url}.
    """
    # Emoji, the default.
    if installed(cache / "node_modules") != PACKAGES:
        say(f"fetching {len(PACKAGES)} npm packages (about 250 MB unpacked) into {cache}")
    modules = install(cache)
    glyphs, words = icons(modules, tones)
    origins = npm_origins(modules, {glyph.style for glyph in glyphs})

    if extras:
        count = len(glyphs_extras.PACKAGES)
        say(f"unpacking {count} Debian packages (230 MB to fetch the first time) in {cache}")
        more, more_origins = glyphs_extras.collect(cache / "debian", words)
        glyphs = glyphs + more
        origins = origins | more_origins

    if with_icons:
        folder = cache / "iconify"
        if not (folder / "node_modules").exists():
            names = " ".join(glyphs_icons.PACKAGES)
            say(f"fetching {names} (465 MB unpacked) into {folder}")
        more, more_origins = glyphs_icons.collect(folder, words)
        glyphs = glyphs + more
        origins = origins | more_origins
    return glyphs, origins


def npm_origins(modules: Path, styles: set[str]) -> dict[str, dict]:
    """Return style -> {package, version, licence, author, url}."""
    # The style of an icon set is the last part of its package's name.
    packages = {package.split("/")[-1]: package for package in PACKAGES}
    packages["fluent3d"] = FLUENT3D
    origins = {}
    for style in sorted(styles):
        package = packages[style]
        credit = licence(modules, package)
        origins[style] = dict(package=package, version=PACKAGES[package], **credit)
    return origins


def draw(glyphs: list[Glyph], progress: Progress, text: str) -> list[Glyph]:
    """Return the glyphs with their images, drawn on all cores; leave out undrawable ones."""
    with workers() as results:
        images = results(image_of, glyphs)  # in the order of the glyphs
        drawings = [replace(glyph, image=next(images)) for glyph in progress(glyphs, text)]
    return [glyph for glyph in drawings if glyph.image]


def image_of(glyph: Glyph) -> bytes:
    """Return a glyph's image, drawn if it is not yet."""
    return glyph.image if isinstance(glyph.image, bytes) else glyph.image()


def one_per_image(glyphs: Iterable[Glyph]) -> list[Glyph]:
    """Return the glyph with the shortest caption for each of a style's identical images.

    'farmer', not 'man farmer'; France, not Clipperton Island.
    """

    def same(glyph: Glyph) -> tuple:
        return glyph.style, hashlib.md5(image_of(glyph)).digest()

    def order(glyph: Glyph) -> tuple:
        return len(glyph.caption), glyph.caption, glyph.name

    return first_of(glyphs, same, order)


# --------------------------------------------------------------------------------------------------
# shards


def trainable(glyph: Glyph) -> bool:
    """Return True if both the style and the concept are for training."""
    return glyph.about["style_split"] == glyph.about["concept_split"] == "train"


def write(out: Path, glyphs: list[Glyph], progress: Progress) -> dict:
    """Write the shards and evaluation sets; return the counts."""
    assert len({g.key for g in glyphs}) == len(glyphs), (
        "two glyphs share a key: a source gives one name twice"
    )

    # Shards: all trainable glyphs together, the others by style.
    names = sorted({g.style for g in glyphs})
    by_style: dict[str, list[Glyph]] = {style: [] for style in names}
    training = []
    for g in glyphs:
        if trainable(g):
            training.append(g)
        else:
            by_style[g.style].append(g)
    files = {out / "train" / "glyphs": training}
    for style, members in by_style.items():
        files[out / "heldout" / style] = members
    for stem, members in progress(list(files.items()), "writing"):
        # With icons the shards are in fifths of the samples.
        has_icons = any(g.style == glyphs_icons.STYLE for g in members)
        write_shards(stem, members, fifths(len(members)) if has_icons else SHARD)
    for folder in ("train", "heldout"):
        build_index(out / folder)

    # Counts, of all styles and of each.
    totals: Counter = Counter()
    pairs: dict[str, Counter] = defaultdict(Counter)
    for g in glyphs:
        part = "train" if trainable(g) else "heldout"
        totals[part] += 1
        pairs[g.style][part] += 1
    styles = {style: dict(pairs[style]) for style in sorted(pairs)}
    evals = write_evals(out / "eval", glyphs, progress)
    return dict(pairs=dict(totals), styles=styles, eval=evals)


def fifths(samples: int) -> int:
    """Return a size of shards such that a fifth of the shards holds a fifth of the samples."""
    shards_in_fifth = ceil(samples / (5 * SHARD))
    return ceil(samples / (5 * shards_in_fifth))


def write_shards(stem: Path, glyphs: list[Glyph], size: int) -> None:
    """Write STEM-00000.tar ..., `size` samples each, shuffled.

    The shuffle is always the same; any of the shards are a random draw of the samples.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    glyphs = sorted(glyphs, key=lambda g: g.key)
    random.Random(0).shuffle(glyphs)
    for shard, start in enumerate(range(0, len(glyphs), size)):
        path = stem.with_name(f"{stem.name}-{shard:05d}.tar")
        write_shard(path, map(sample, glyphs[start : start + size]))


def sample(glyph: Glyph) -> tuple[str, dict[str, bytes]]:
    """Return (key, parts) of a glyph."""
    about = json.dumps(glyph.about, ensure_ascii=False).encode()
    parts = {
        glyph.extension: image_of(glyph),
        "txt": glyph.caption.encode(),
        "json": about,
    }
    return glyph.key, parts


def licences(origins: dict[str, dict]) -> str:
    """Return the text of LICENSES.txt."""
    head = (
        "The images and names of this data set come from these packages, under the licences that"
        " their own metadata state.\n"
    )
    rows = []
    for style, origin in origins.items():
        package = f"{origin['package']} {origin['version']}"
        terms = f"{origin['licence']} {origin['author']} {origin['url']}"
        rows.append(f"{style}: {package}, {terms}".rstrip())
    names = (
        "captions, keywords, groups: cldr-annotations-full and -derived-full"
        f" {PACKAGES['cldr-annotations-full']} (Unicode-3.0),"
        f" unicode-emoji-json {PACKAGES['unicode-emoji-json']} (MIT)\n"
    )
    return head + "\n" + "\n".join(rows) + "\n\n" + names


# --------------------------------------------------------------------------------------------------
# evaluation sets


def write_evals(out: Path, glyphs: list[Glyph], progress: Progress) -> dict[str, dict]:
    """Write every evaluation set; return name -> {images, classes?}.

    'seen_concepts_seen_style' shows images that are trained on: it measures fit, not
    generalization. A seen concept is one that the training shards hold in some style.
    """
    # The glyphs of all sets, on white.
    styles = (SEEN_STYLE, UNSEEN_STYLE, STAMPS)
    used = [g for g in glyphs if g.style in styles and not g.about["toned"]]
    used = [replace(g, image=partial(on_white, image_of(g), g.extension)) for g in used]
    used = draw(used, progress, "evaluation sets")
    emoji = [g for g in used if g.about["emoji"] and g.style != STAMPS]

    # Classification: seen and unseen concepts, each in the seen and the unseen style.
    seen = {g.about["concept"] for g in glyphs if trainable(g)}
    seen_concepts = [g for g in emoji if g.about["concept"] in seen]
    unseen_concepts = [g for g in emoji if g.about["concept_split"] == "test"]
    counts = {}
    for side, members in (("seen", seen_concepts), ("unseen", unseen_concepts)):
        for kind, style in (("seen", SEEN_STYLE), ("unseen", UNSEEN_STYLE)):
            name = f"{side}_concepts_{kind}_style"
            in_style = [g for g in members if g.style == style]
            counts[name] = write_classification(out / name, in_style)

    # Retrieval: the unseen style, unseen concepts first.
    candidates = [g for g in emoji if g.style == UNSEEN_STYLE]
    candidates.sort(key=retrieval_order)
    counts["retrieval"] = write_retrieval(out / "retrieval", by_caption(candidates)[:RETRIEVAL])
    stamps = [g for g in used if g.style == STAMPS]
    if stamps:
        counts[STAMPS] = write_retrieval(out / STAMPS, by_caption(stamps))
    return counts


def retrieval_order(glyph: Glyph) -> tuple[bool, bytes]:
    """Return a sort key: unseen concepts first, each side in random but fixed order."""
    seen = glyph.about["concept_split"] != "test"
    return seen, hashlib.md5(glyph.key.encode()).digest()


def on_white(image: bytes, extension: str) -> bytes:
    """Return the image without transparency, in the same format.

    CLIP_benchmark's reader would show the color of transparent pixels, mostly black.
    """
    with Image.open(io.BytesIO(image)) as opened:
        drawing = opened.convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    flat = Image.alpha_composite(white, drawing).convert("RGB")
    file = io.BytesIO()
    flat.save(file, **ENCODING[extension])
    return file.getvalue()


def by_caption(glyphs: list[Glyph]) -> list[Glyph]:
    """Return the first glyph of every caption."""
    first: dict[str, Glyph] = {}
    for glyph in glyphs:
        first.setdefault(glyph.caption, glyph)
    return list(first.values())


def write_classification(out: Path, glyphs: list[Glyph]) -> dict:
    """Write a classification set, one class for each caption; return its counts.

    CLIP_benchmark's layout: a sample is the image and .cls, the class's line in classnames.txt.
    """
    members = sorted(by_caption(glyphs), key=lambda g: g.caption)
    samples = []
    for label, g in enumerate(members):
        samples.append((g.key, {g.extension: image_of(g), "cls": str(label).encode()}))
    write_test_shard(out, samples)
    (out / "classnames.txt").write_text("".join(f"{g.caption}\n" for g in members))
    (out / "zeroshot_classification_templates.txt").write_text(TEMPLATES)
    return dict(images=len(members), classes=len(members))


def write_retrieval(out: Path, glyphs: list[Glyph]) -> dict:
    """Write a retrieval set; return its counts.

    CLIP_benchmark's layout: a sample is the image and .txt, its captions one a line (here one).
    """
    samples = []
    for g in glyphs:
        samples.append((g.key, {g.extension: image_of(g), "txt": g.caption.encode()}))
    write_test_shard(out, samples)
    (out / "dataset_type.txt").write_text("retrieval\n")
    return dict(images=len(glyphs))


def write_test_shard(out: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Write a test split of one shard."""
    (out / "test").mkdir(parents=True)
    write_shard(out / "test" / "0.tar", samples)
    (out / "test" / "nshards.txt").write_text("1\n")


def say(text: str) -> None:
    print(f"glyphs: {text}", file=sys.stderr, flush=True)
