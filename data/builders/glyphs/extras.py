"""Extras for glyphs from three Debian packages: clip art to train on, and stamps and photographs
that are only evaluated on.

    openclipart  openclipart-svg           5 thousand drawings with web-like titles; trained on
                                           where the title is no held-out concept
    tuxstamps    tuxpaint-stamps-default   cut-out photographs and drawings with sentences in many
                                           languages; held out
    gcompris     gcompris-qt-data          photographs and cartoons inside Qt resource files, named
                                           by file; held out

The packages are downloaded and unpacked, not installed, so none of their code runs; any version
that the distribution has is accepted.
"""

import html
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from glimpse.data.builders.glyphs.sources import Glyph, Vocabulary
from glimpse.data.builders.packages import copyright_of, debian

# style -> (package, license as in its copyright file, patterns of the files to unpack or None: all)
PACKAGES = {
    "openclipart": ("openclipart-svg", "public domain", None),
    # without its 8 thousand sounds
    "tuxstamps": ("tuxpaint-stamps-default", "GPL-2", ("*.png", "*.svg", "*.txt", "*/copyright")),
    "gcompris": (
        "gcompris-qt-data",
        "GPL-3+ and others, file by file in copyright-gcompris-qt-data.txt",
        None,
    ),
}
# pixels of the longer side
CLIPART_PIXELS = 128
PHOTO_PIXELS = 224
ADULT = re.compile("stripper|nude|naked|pantyhose|lingerie|sex")
# A title on so many drawings names their series, unless a drawing's file has that name, too.
SERIES = 4
RESOURCES = (
    "categorization",
    "lang",
    "erase",
    "explore_monuments",
    "explore_world_animals",
    "explore_farm_animals",
)


def collect(cache: Path, words: Vocabulary) -> tuple[list[Glyph], dict[str, dict]]:
    """Return all glyphs, before drawing, and style -> {package, version, licence, author, url}."""
    readers = {"openclipart": openclipart, "tuxstamps": tuxstamps, "gcompris": gcompris}
    glyphs: list[Glyph] = []
    origins = {}
    for style, (package, licence, patterns) in PACKAGES.items():
        folder, version = debian(cache, package, patterns)
        read_glyphs = readers[style]
        glyphs += read_glyphs(folder, words)
        origins[style] = dict(
            package=f"Debian {package}", version=version, licence=licence, author="", url=""
        )
    return glyphs, origins


def copyrights(cache: Path) -> dict[str, str]:
    """Return package -> text of its copyright file."""
    packages = [package for package, _, _ in PACKAGES.values()]
    return {package: copyright_of(cache, package) for package in packages}


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return an iterator of (path, content) of the files in a Qt binary resource.

    The format: a header, a tree of nodes of fixed size, a table of names, the contents. Files that
    are compressed by zstd are left out. ValueError: it is no Qt resource.
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

    def name_of(node: int, offset: int) -> str:
        length = 0  # the root has no name
        if node:
            [length] = struct.unpack(">H", data[names + offset :][:2])
        # after the length, 2 bytes, and a hash, 4 bytes
        characters = data[names + offset + 6 :][: 2 * length]
        return characters.decode("utf-16-be")

    def content_of(offset: int, flags: int) -> bytes:
        [length] = struct.unpack(">I", data[contents + offset :][:4])
        content = data[contents + offset + 4 :][:length]
        if flags & zipped:
            return zlib.decompress(content[4:])  # after the size before compression
        return content

    def walk(node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        start = tree + node * size
        name_offset, flags, first, second = struct.unpack(">IHII", data[start:][:14])
        name = prefix + name_of(node, name_offset)
        if flags & folder:
            # first: the number of children; second: the node of the first child
            for child in range(second, second + first):
                yield from walk(child, f"{name}/")
        elif not flags & zstd:
            yield name, content_of(second, flags)

    return walk(0, "")


# --------------------------------------------------------------------------------------------------
# styles


def openclipart(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    """Yield the clip art; its captions are the titles, or else the names of the files."""
    base = folder / "usr/share/openclipart/svg"
    drawings = []
    for path in sorted(p for p in base.rglob("*.svg") if not p.is_symlink()):
        name = path.relative_to(base).with_suffix("").as_posix()
        # 1.6 thousand drawings were generated by a formula
        generated = name.startswith(("shapes/stars/star_", "special/"))
        if not generated and not ADULT.search(name):
            drawings.append((path, name, path.read_text(encoding="utf-8", errors="replace")))

    titles = Counter(field(text, "title") for _, _, text in drawings)
    for path, name, text in drawings:
        title = field(text, "title")
        if names_one(title, titles[title], path.stem):
            caption = title.replace("_", " ")
        else:
            caption = from_file(path.stem)
        subjects = field(text, "subject").split()
        keywords = [word.replace("_", " ") for word in subjects if word != "hash"]
        draw = partial(draw_clipart, path)
        group = name.split("/")[0]
        glyph = extra(words, "openclipart", name, caption, draw, group, keywords)
        if glyph:
            yield glyph


def names_one(title: str, uses: int, stem: str) -> bool:
    """Return True if a title names its drawing.

    'Clipart by N. B. - pear' is also on that author's apple, 'Part of the Flat Icon Collection' on
    900 drawings.
    """
    if not title or title.startswith("Clipart by"):
        return False
    return uses < SERIES or title.split()[0].lower() in stem.lower()


def from_file(stem: str) -> str:
    """Return a caption: 'aiga_bus1' -> 'bus', '001_star_butterfly' -> 'star butterfly'."""
    name = re.sub(r"^(aiga_|\d+_)|[_\-\d]+$", "", stem)
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def field(text: str, tag: str) -> str:
    """Return a Dublin Core field of the drawing itself (not of its author, who has a title, too).

    '' if it has none.
    """
    work = re.search("<cc:Work.*?</cc:Work>", text, re.DOTALL)
    metadata = work.group() if work else text[:4000]
    element = re.search(f"<dc:{tag}[^>]*>(.*?)</dc:{tag}>", metadata, re.DOTALL)
    if not element:
        return ""
    content = re.sub("<[^>]+>", " ", element.group(1))
    return " ".join(html.unescape(content).split())


def tuxstamps(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    """Yield the stamps: images with a text file beside each.

    NAME.txt has the English sentence, then lines such as `de.utf8=Ein Löwe.`.
    """
    base = folder / "usr/share/tuxpaint/stamps"
    # An SVG replaces the PNG of the same drawing.
    images = {path.with_suffix(""): path for path in base.rglob("*.png")}
    images |= {path.with_suffix(""): path for path in base.rglob("*.svg")}
    for path in sorted(p for p in images.values() if p.with_suffix(".txt").exists()):
        text = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        first, *others = text.splitlines()
        captions = {"en": first.strip()}
        for line in others:
            if ".utf8=" in line:
                translation = re.match(r"([A-Za-z_@]+)\.utf8=(.+)", line)
                if translation is None:
                    raise ValueError(f"{path.with_suffix('.txt')}: no LANGUAGE.utf8=TEXT: {line!r}")
                language, sentence = translation.groups()
                captions[language] = sentence

        name = path.relative_to(base).with_suffix("").as_posix()
        draw = partial(draw_photo, path)
        group = name.split("/")[0]
        glyph = extra(words, "tuxstamps", name, captions["en"], draw, group, captions=captions)
        if glyph:
            yield glyph


def gcompris(folder: Path, words: Vocabulary) -> Iterator[Glyph]:
    """Yield the pictures in the resource files; the names of their files are the captions."""
    for resource in RESOURCES:
        files = read_rcc(folder / f"usr/share/gcompris-qt/rcc/{resource}.rcc")
        for path, content in sorted(files):
            stem, _, kind = Path(path).name.rpartition(".")
            if kind != "webp":
                continue
            # 'polarBear2' -> 'polar bear'
            separated = re.sub("(?<=[a-z])(?=[A-Z])", " ", stem)
            caption = from_file(separated).lower()
            name = f"{resource}-{stem}"
            draw = partial(draw_photo, content)
            group = f"{resource}/{Path(path).parent.name}"
            glyph = extra(words, "gcompris", name, caption, draw, group)
            if glyph:
                yield glyph


def extra(
    words: Vocabulary,
    style: str,
    name: str,
    caption: str,
    draw: Callable[[], bytes],
    group: str,
    keywords: Sequence[str] = (),
    captions: dict[str, str] | None = None,
) -> Glyph | None:
    """Return a glyph; None if its caption has fewer than three letters.

    Its concept is the emoji that the caption names, so that a held-out concept is held out here
    too.
    """
    letters = re.findall("[^\\W\\d_]", caption)
    if len(letters) < 3:
        return None
    _package, licence, _patterns = PACKAGES[style]
    about = words.about(style, words.find(caption), caption, licence)
    about["group"] = group
    about["keywords"] = list(keywords)
    about["captions"] = captions or {"en": caption}
    about["style_split"] = "train" if style == "openclipart" else "test"
    key = re.sub("[/.]", "-", name)[:80]
    return Glyph(style, key, "webp", caption, about, draw)


# --------------------------------------------------------------------------------------------------
# drawing


def draw_clipart(path: Path) -> bytes:
    """Return a WebP; b'' if the drawing cannot be rendered, is nearly invisible or a thin line."""
    try:
        image = fit(render(path, CLIPART_PIXELS), CLIPART_PIXELS)
    except ValueError:
        return b""
    opacity = np.asarray(image.getchannel("A"))
    if min(image.size) < 12 or opacity.max() < 128:
        return b""
    return webp(image)


def draw_photo(source: Path | bytes) -> bytes:
    """Return a WebP of an image: its path, which may be an SVG, or its bytes."""
    image: Image.Image
    if isinstance(source, bytes):
        image = Image.open(io.BytesIO(source))
    elif source.suffix == ".svg":
        image = render(source, 256)
    else:
        image = Image.open(source)
    return webp(fit(image, PHOTO_PIXELS))


def render(path: Path, width: int) -> Image.Image:
    """Render an SVG at a width in pixels."""
    import resvg_py  # of the extra `demo`: only this data set is drawn

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=width, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def fit(image: Image.Image, pixels: int) -> Image.Image:
    """Return the image as RGBA, its longer side reduced to at most `pixels`."""
    image = image.convert("RGBA")
    image.thumbnail((pixels, pixels), Image.Resampling.BICUBIC)
    return image


def webp(image: Image.Image) -> bytes:
    """Encode an image as WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88, method=0)
    return file.getvalue()
