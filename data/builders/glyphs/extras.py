"""Extras for glyphs from three Debian packages: clip art to train on, and stamps and photographs
that are only evaluated on.

    openclipart  openclipart-svg           5 thousand drawings with web-like titles; trained on
                                           where its title is no held-out concept
    tuxstamps    tuxpaint-stamps-default   cut-out photographs and drawings with sentences in many
                 languages; held out
    gcompris     gcompris-qt-data          photographs and cartoons inside Qt resource files, named
                 by file; held out

The packages are downloaded and unpacked, not installed, so nothing of theirs runs; whichever
version the distribution has is taken.
"""

import html
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import resvg_py
from PIL import Image

from glimpse.data.builders.glyphs.sources import Glyph, Vocabulary
from glimpse.data.builders.packages import copyright_of, debian

# style -> (package, licence as its copyright file has it, what to unpack: None is everything)
PACKAGES = {
    "openclipart": ("openclipart-svg", "public domain", None),
    # not its 8 thousand sounds
    "tuxstamps": ("tuxpaint-stamps-default", "GPL-2", ("*.png", "*.svg", "*.txt", "*/copyright")),
    "gcompris": (
        "gcompris-qt-data",
        "GPL-3+ and others, file by file in copyright-gcompris-qt-data.txt",
        None,
    ),
}
CLIPART_PIXELS, PHOTO_PIXELS = 128, 224  # the longer side
ADULT = re.compile("stripper|nude|naked|pantyhose|lingerie|sex")
SERIES = 4  # a title on so many drawings is a series', unless their files are called so too
RESOURCES = (
    "categorization",
    "lang",
    "erase",
    "explore_monuments",
    "explore_world_animals",
    "explore_farm_animals",
)


def collect(cache: Path, words: Vocabulary) -> tuple[list[Glyph], dict[str, dict]]:
    """All drawings, not yet drawn, and style -> {package, version, licence, author, url}."""
    readers = {"openclipart": openclipart, "tuxstamps": tuxstamps, "gcompris": gcompris}
    glyphs, credits = [], {}
    for style, (package, licence, patterns) in PACKAGES.items():
        folder, version = debian(cache, package, patterns)
        glyphs += readers[style](folder, words)
        credits[style] = dict(
            package=f"Debian {package}", version=version, licence=licence, author="", url=""
        )
    return glyphs, credits


def copyrights(cache: Path) -> dict[str, str]:
    """package -> its copyright file."""
    packages = [package for package, _, _ in PACKAGES.values()]
    return {package: copyright_of(cache, package) for package in packages}


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a Qt binary resource, as (path, content): a header, a tree of fixed-size nodes,
    a table of names, the contents.
    """
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise ValueError(
            f"{path}: not a Qt resource file (starts with {data[:4]!r}); remove its folder to"
            " unpack it again"
        )
    version, tree, contents, names = struct.unpack(">IIII", data[4:20])
    size = 14 if version < 2 else 22  # version 2 added a time to every node
    folder, zipped, zstd = 2, 1, 4  # flags

    def walk(node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags, first, second = struct.unpack(">IHII", data[tree + node * size :][:14])
        # the root has no name
        length = struct.unpack(">H", data[names + name_at :][:2])[0] if node else 0
        name = prefix + data[names + name_at + 6 :][: 2 * length].decode("utf-16-be")
        if flags & folder:  # first: how many children, second: the first one's node
            for child in range(second, second + first):
                yield from walk(child, f"{name}/")
        elif not flags & zstd:
            length = struct.unpack(">I", data[contents + second :][:4])[0]
            content = data[contents + second + 4 :][:length]
            # 4: the size before compression
            yield name, zlib.decompress(content[4:]) if flags & zipped else content

    return walk(0, "")


# --------------------------------------------------------------------------------------------------
# styles


def openclipart(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    base = folder / "usr/share/openclipart/svg"
    drawings = []
    for path in sorted(p for p in base.rglob("*.svg") if not p.is_symlink()):
        name = path.relative_to(base).with_suffix("").as_posix()
        if name.startswith(("shapes/stars/star_", "special/")) or ADULT.search(name):
            continue  # the first two: 1.6 thousand drawings made by a formula
        drawings.append((path, name, path.read_text(encoding="utf-8", errors="replace")))
    titles = Counter(field(text, "title") for _, _, text in drawings)
    for path, name, text in drawings:
        title = field(text, "title")
        caption = (
            title.replace("_", " ")
            if names_one(title, titles[title], path.stem)
            else from_file(path.stem)
        )
        keywords = [
            word.replace("_", " ") for word in field(text, "subject").split() if word != "hash"
        ]
        if glyph := extra(
            words,
            "openclipart",
            name,
            caption,
            partial(draw_clipart, path),
            name.split("/")[0],
            keywords,
        ):
            yield glyph


def names_one(title: str, uses: int, stem: str) -> bool:
    """Whether a title names the drawing: 'Clipart by N.

    B. - pear' is on his apple too, 'Part of the Flat Icon Collection' on 900.
    """
    return (
        bool(title)
        and not title.startswith("Clipart by")
        and (uses < SERIES or title.split()[0].lower() in stem.lower())
    )


def from_file(stem: str) -> str:
    """'aiga_bus1' -> 'bus', '001_star_butterfly' -> 'star butterfly'."""
    return " ".join(
        re.sub(r"^(aiga_|\d+_)|[_\-\d]+$", "", stem).replace("_", " ").replace("-", " ").split()
    )


def field(text: str, tag: str) -> str:
    """A Dublin Core field of the drawing itself (not of its author, which has a title too)."""
    work = re.search("<cc:Work.*?</cc:Work>", text, re.DOTALL)
    found = re.search(
        f"<dc:{tag}[^>]*>(.*?)</dc:{tag}>", work.group() if work else text[:4000], re.DOTALL
    )
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", found.group(1))).split()) if found else ""


def tuxstamps(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    """NAME.txt beside an image: the English sentence, then lines such as `de.utf8=Ein Löwe.`"""
    base = folder / "usr/share/tuxpaint/stamps"
    # of both kinds of one drawing: the SVG
    images = {p.with_suffix(""): p for kind in ("*.png", "*.svg") for p in base.rglob(kind)}
    for path in sorted(p for p in images.values() if p.with_suffix(".txt").exists()):
        first, *others = (
            path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").splitlines()
        )
        captions = {"en": first.strip()} | dict(
            re.match(r"([A-Za-z_@]+)\.utf8=(.+)", line).groups()
            for line in others
            if ".utf8=" in line
        )
        name = path.relative_to(base).with_suffix("").as_posix()
        if glyph := extra(
            words,
            "tuxstamps",
            name,
            captions["en"],
            partial(draw_photo, path),
            name.split("/")[0],
            captions=captions,
        ):
            yield glyph


def gcompris(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    for resource in RESOURCES:
        for path, content in sorted(read_rcc(folder / f"usr/share/gcompris-qt/rcc/{resource}.rcc")):
            stem, _, kind = Path(path).name.rpartition(".")
            if kind == "webp":
                # 'polarBear2' -> 'polar bear'
                caption = from_file(re.sub("(?<=[a-z])(?=[A-Z])", " ", stem)).lower()
                group = f"{resource}/{Path(path).parent.name}"
                if glyph := extra(
                    words,
                    "gcompris",
                    f"{resource}-{stem}",
                    caption,
                    partial(draw_photo, content),
                    group,
                ):
                    yield glyph


def extra(
    words: Vocabulary,
    style: str,
    name: str,
    caption: str,
    draw,
    group: str,
    keywords=(),
    captions=None,
) -> Glyph | None:
    """A glyph whose concept is the emoji that its caption names, so that a held-out concept is held
    out here too.
    """
    if len(re.findall("[^\\W\\d_]", caption)) < 3:  # letters
        return None
    about = words.about(style, words.find(caption), caption, PACKAGES[style][1]) | dict(
        group=group, keywords=list(keywords)
    )
    about |= dict(
        captions=captions or {"en": caption},
        style_split="train" if style == "openclipart" else "test",
    )
    return Glyph(style, re.sub("[/.]", "-", name)[:80], "webp", caption, about, draw)


# --------------------------------------------------------------------------------------------------
# drawing


def draw_clipart(path: Path) -> bytes:
    """b'' for what cannot be rendered, is nearly invisible or is a thin line."""
    try:
        image = fit(render(path, CLIPART_PIXELS), CLIPART_PIXELS)
    except ValueError:
        return b""
    return (
        webp(image)
        if min(image.size) >= 12 and image.getchannel("A").getextrema()[1] >= 128
        else b""
    )


def draw_photo(source: Path | bytes) -> bytes:
    if isinstance(source, Path) and source.suffix == ".svg":
        return webp(fit(render(source, 256), PHOTO_PIXELS))
    return webp(
        fit(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source), PHOTO_PIXELS)
    )


def render(path: Path, width: int) -> Image.Image:
    return Image.open(
        io.BytesIO(
            bytes(
                resvg_py.svg_to_bytes(
                    svg_path=str(path), width=width, dpi=96, skip_system_fonts=True
                )
            )
        )
    )


def fit(image: Image.Image, pixels: int) -> Image.Image:
    image = image.convert("RGBA")
    image.thumbnail((pixels, pixels), Image.Resampling.BICUBIC)
    return image


def webp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88, method=0)
    return file.getvalue()
