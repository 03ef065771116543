"""Glyphs: the default data set, 15 thousand captioned images (25 thousand with skin tones) made
from npm packages in about a minute.

What is written (`build`), from the drawings in data/builders/glyphs/sources.py and, on demand,
data/builders/glyphs/icons.py and data/builders/glyphs/extras.py:

    OUT/train/glyphs-00000.tar ...   what may be trained on: seen styles x train concepts, styles
                                     mixed
    OUT/heldout/STYLE-00000.tar ... the rest: a tenth of the concepts, and three styles of one maker
        (`UNSEEN_STYLES`)
    OUT/eval/NAME/                   evaluation sets in CLIP_benchmark's webdataset layout, on white
    OUT/LICENSES.txt, OUT/glyphs.json   where each style comes from; settings, versions and counts
                                        of this build

A sample is STYLE__NAME.png|webp (transparent where the drawing is), .txt (its English name) and
.json (`Vocabulary.about`).
Two builds are byte-identical, whatever the number of processes.
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
SHARD = 1000  # samples in a shard at most
SEEN_STYLE, UNSEEN_STYLE = "noto", "fluent3d"  # whose drawings the classification sets show
STAMPS = "tuxstamps"
ENCODING = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "quality": 90, "method": 0}}
RETRIEVAL = 1000  # image-caption pairs in eval/retrieval
TEMPLATES = "{c}\n"  # captions here are bare names, and so are the prompts
Progress = Callable[[Iterable, str], Iterable]


def bar(items: Iterable, text: str) -> Iterable:
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
    """Make the data set in `out`, or find it finished there; returns what glyphs.json holds.

    cache: where packages are kept between builds; tones: keep skin-tone variants; extras: Debian's
    clip art, stamps and photographs too; icons: the colour sets of @iconify/json too, and training
    shards of equal size, a multiple of five of them;
    progress(items, text): wraps what is iterated over, to show how far it is.
    """
    settings = dict(
        format=FORMAT,
        tones=tones,
        extras=extras,
        packages=PACKAGES | (glyphs_icons.PACKAGES if icons else {}),
    )
    if out.exists() and (done := finished(out, settings)):
        say(f"{out}: already built with these settings")
        return done
    glyphs, credits = collect(cache, tones, extras, icons)
    glyphs = one_per_image(draw(glyphs, progress, "drawing"))
    out.parent.mkdir(parents=True, exist_ok=True)
    # broken off, a build leaves no `out`
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        summary = dict(settings=settings, credits=credits, **write(new, glyphs, progress))
        (new / "LICENSES.txt").write_text(licences(credits))
        for package, text in glyphs_extras.copyrights(cache / "debian").items() if extras else ():
            (new / f"copyright-{package}.txt").write_text(text)
        (new / "glyphs.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        os.rename(new, out)
    return summary


def finished(out: Path, settings: dict, kind: str = "glyphs") -> dict | None:
    """The summary (KIND.json) of a finished build with the same settings; None for an empty folder;
    ValueError for anything else.
    """
    if (record := out / f"{kind}.json").exists():
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
    """All drawings, not yet drawn, and style or set of icons -> {package, version, licence, author,
    url}.
    """
    if installed(cache / "node_modules") != PACKAGES:
        say(f"fetching {len(PACKAGES)} npm packages (about 250 MB unpacked) into {cache}")
    modules = install(cache)
    glyphs, words = icons(modules, tones)
    # an icon set's style is its package's last name
    sources = {package.split("/")[-1]: package for package in PACKAGES}
    sources["fluent3d"] = FLUENT3D
    origins = {style: sources[style] for style in sorted({g.style for g in glyphs})}
    credits = {
        style: dict(package=p, version=PACKAGES[p], **licence(modules, p))
        for style, p in origins.items()
    }
    if extras:
        say(
            f"unpacking {len(glyphs_extras.PACKAGES)} Debian packages (230 MB to fetch the first"
            f" time) in {cache}"
        )
        more, more_credits = glyphs_extras.collect(cache / "debian", words)
        glyphs, credits = glyphs + more, credits | more_credits
    if with_icons:
        if not (cache / "iconify/node_modules").exists():
            say(
                f"fetching {' '.join(glyphs_icons.PACKAGES)} (465 MB unpacked) into"
                f" {cache / 'iconify'}"
            )
        more, more_credits = glyphs_icons.collect(cache / "iconify", words)
        glyphs, credits = glyphs + more, credits | more_credits
    return glyphs, credits


def draw(glyphs: list[Glyph], progress: Progress, text: str) -> list[Glyph]:
    """Get the images, on all cores; leaves out what cannot be drawn."""
    with workers() as results:
        images = results(image_of, glyphs)  # in the order given
        drawn = [replace(glyph, image=next(images)) for glyph in progress(glyphs, text)]
    return [glyph for glyph in drawn if glyph.image]


def image_of(glyph: Glyph) -> bytes:
    return glyph.image if isinstance(glyph.image, bytes) else glyph.image()


def one_per_image(glyphs: Iterable[Glyph]) -> list[Glyph]:
    """Of identical images of one style, the one with the shortest caption: 'farmer', not 'man
    farmer'; France, not Clipperton Island.
    """
    return first_of(
        glyphs,
        same=lambda g: (g.style, hashlib.md5(g.image).digest()),
        order=lambda g: (len(g.caption), g.caption, g.name),
    )


# --------------------------------------------------------------------------------------------------
# shards


def trainable(glyph: Glyph) -> bool:
    return glyph.about["style_split"] == glyph.about["concept_split"] == "train"


def write(out: Path, glyphs: list[Glyph], progress: Progress) -> dict:
    """Write the shards and evaluation sets; returns the counts."""
    assert len({g.key for g in glyphs}) == len(glyphs), (
        "two glyphs share a key: a source gives one name twice"
    )
    files = {out / "train" / "glyphs": [g for g in glyphs if trainable(g)]}
    for style in sorted({g.style for g in glyphs}):
        files[out / "heldout" / style] = [
            g for g in glyphs if g.style == style and not trainable(g)
        ]
    for stem, members in progress(list(files.items()), "writing"):
        write_shards(
            stem,
            members,
            fifths(len(members)) if any(g.style == glyphs_icons.STYLE for g in members) else SHARD,
        )
    for folder in ("train", "heldout"):
        build_index(out / folder)
    pairs: dict[str, Counter] = defaultdict(Counter)
    for g in glyphs:
        pairs[g.style]["train" if trainable(g) else "heldout"] += 1
    totals = Counter("train" if trainable(g) else "heldout" for g in glyphs)
    styles = {style: dict(pairs[style]) for style in sorted(pairs)}
    return dict(pairs=dict(totals), styles=styles, eval=write_evals(out / "eval", glyphs, progress))


def fifths(samples: int) -> int:
    """The samples in a shard, such that a fifth of the shards holds a fifth of the samples."""
    return ceil(samples / (5 * ceil(samples / (5 * SHARD))))


def write_shards(stem: Path, glyphs: list[Glyph], size: int) -> None:
    """STEM-00000.tar ...: shuffled once, always the same way, so that any of the shards are a
    random draw of the samples.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    glyphs = sorted(glyphs, key=lambda g: g.key)
    random.Random(0).shuffle(glyphs)
    for shard, start in enumerate(range(0, len(glyphs), size)):
        write_shard(
            stem.with_name(f"{stem.name}-{shard:05d}.tar"),
            map(sample, glyphs[start : start + size]),
        )


def sample(glyph: Glyph) -> tuple[str, dict[str, bytes]]:
    about = json.dumps(glyph.about, ensure_ascii=False).encode()
    return glyph.key, {glyph.extension: glyph.image, "txt": glyph.caption.encode(), "json": about}


def licences(credits: dict[str, dict]) -> str:
    head = (
        "The images and names of this data set come from these packages, under the licences that"
        " their own metadata state.\n"
    )
    names = (
        "captions, keywords, groups: cldr-annotations-full and -derived-full"
        f" {PACKAGES['cldr-annotations-full']} (Unicode-3.0), "
    )
    names += f"unicode-emoji-json {PACKAGES['unicode-emoji-json']} (MIT)\n"
    rows = (
        f"{s}: {c['package']} {c['version']}, {c['licence']} {c['author']} {c['url']}".rstrip()
        for s, c in credits.items()
    )
    return head + "\n" + "\n".join(rows) + "\n\n" + names


# --------------------------------------------------------------------------------------------------
# evaluation sets


def write_evals(out: Path, glyphs: list[Glyph], progress: Progress) -> dict[str, dict]:
    """Every evaluation set; returns name -> {images, classes?}.

    'seen_concepts_seen_style' shows images that are trained on: it measures fit, not
    generalisation.
    A seen concept is one that the training shards hold in some style.
    """
    seen = {g.about["concept"] for g in glyphs if trainable(g)}
    shown = [
        g for g in glyphs if g.style in (SEEN_STYLE, UNSEEN_STYLE, STAMPS) and not g.about["toned"]
    ]
    shown = draw(
        [replace(g, image=partial(on_white, g.image, g.extension)) for g in shown],
        progress,
        "evaluation sets",
    )
    plain = [g for g in shown if g.about["emoji"] and g.style != STAMPS]
    sides = {
        "seen": [g for g in plain if g.about["concept"] in seen],
        "unseen": [g for g in plain if g.about["concept_split"] == "test"],
    }
    counts = {}
    for side, members in sides.items():
        for kind, style in (("seen", SEEN_STYLE), ("unseen", UNSEEN_STYLE)):
            name = f"{side}_concepts_{kind}_style"
            counts[name] = write_classification(
                out / name, [g for g in members if g.style == style]
            )
    hidden = [g for g in plain if g.style == UNSEEN_STYLE]
    # unseen concepts, then others
    hidden.sort(
        key=lambda g: (g.about["concept_split"] != "test", hashlib.md5(g.key.encode()).digest())
    )
    counts["retrieval"] = write_retrieval(out / "retrieval", by_caption(hidden)[:RETRIEVAL])
    if stamps := [g for g in shown if g.style == STAMPS]:
        counts[STAMPS] = write_retrieval(out / STAMPS, by_caption(stamps))
    return counts


def on_white(image: bytes, extension: str) -> bytes:
    """The image without transparency, in the same format: CLIP_benchmark's reader would show what
    lies behind it, mostly black.
    """
    with Image.open(io.BytesIO(image)) as opened:
        opened = opened.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB")
    file = io.BytesIO()
    white.save(file, **ENCODING[extension])
    return file.getvalue()


def by_caption(glyphs: list[Glyph]) -> list[Glyph]:
    """The first image of every caption."""
    chosen: dict[str, Glyph] = {}
    for glyph in glyphs:
        chosen.setdefault(glyph.caption, glyph)
    return list(chosen.values())


def write_classification(out: Path, glyphs: list[Glyph]) -> dict:
    """CLIP_benchmark's layout: one class for each caption, a sample is the image and .cls, the
    class's line in classnames.txt.
    """
    members = sorted(by_caption(glyphs), key=lambda g: g.caption)
    write_test_shard(
        out,
        [
            (g.key, {g.extension: g.image, "cls": str(label).encode()})
            for label, g in enumerate(members)
        ],
    )
    (out / "classnames.txt").write_text("".join(f"{g.caption}\n" for g in members))
    (out / "zeroshot_classification_templates.txt").write_text(TEMPLATES)
    return dict(images=len(members), classes=len(members))


def write_retrieval(out: Path, glyphs: list[Glyph]) -> dict:
    """CLIP_benchmark's layout: a sample is the image and .txt, its captions one a line (here
    one).
    """
    write_test_shard(
        out, [(g.key, {g.extension: g.image, "txt": g.caption.encode()}) for g in glyphs]
    )
    (out / "dataset_type.txt").write_text("retrieval\n")
    return dict(images=len(glyphs))


def write_test_shard(out: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    (out / "test").mkdir(parents=True)
    write_shard(out / "test" / "0.tar", samples)
    (out / "test" / "nshards.txt").write_text("1\n")


def say(text: str) -> None:
    print(f"glyphs: {text}", file=sys.stderr, flush=True)
