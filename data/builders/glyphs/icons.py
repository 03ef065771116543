"""Icons for glyphs: the color sets of the npm package @iconify/json, 31 sets of interface icons,
logos, file types, flags and weather.

All are of one style, `iconify`; a sample's json has the name of its `set`. Used are the sets with
more than one color, without emoji (the default styles are drawings of the same ones) and without
Microsoft's (its family of styles is held out). A caption is the icon's name without what the
convention of its set adds: 'credit-card-5-flat' -> 'credit card'. Its concept is the emoji that the
caption names, if any, so that a held-out concept is held out here too. An icon is also held out if
its caption contains the name of a held-out concept, such as 'bell ring'.
"""

import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image, ImageChops

from glimpse.data.builders.glyphs.sources import Glyph, Vocabulary, draw_svg, install, split, svg

PACKAGES = {"@iconify/json": "2.2.535"}  # npm package -> version
STYLE = "iconify"
HELD_OUT_MAKER = "Microsoft"  # maker of sources.UNSEEN_STYLES
NOTOS = "unjs"  # a set of logos that are emoji of Noto's
# icons that are emoji of the default styles
COPIES = (
    "thesvg-color_nano-banana-google",
    "material-icon-theme_taze",
    "vscode-icons_file-type-snort",
)
# set -> pattern of the endings of its names, beside numbers and the suffixes that it declares
VARIANT = {
    "icon-park": "one|two|three|four|five|six|seven|eight|nine|ten",
    "streamline-stickies-color": "duo",
    "vscode-icons": "opened",
    "material-icon-theme": "open|light",
    "catppuccin": "open",
    "devicon": "wordmark",
    "skill-icons": "light|dark",
    "logos": "icon|light|dark",
    "thesvg-color": "light|dark",
}
FILES = (
    (r"^(file|folder)-type-(?:light-)?(.+)$", r"\2-\1"),
    (r"^folder-(.+)$", r"\1-folder"),
    (r"(?<!folder)(?<!file)$", "-file"),
)
# set or category -> (pattern, replacement), which add the kind of picture to the caption
SAYS = {
    "Logos": ((r"$", "-logo"),),
    "token-branded": ((r"$", "-token"),),
    "cryptocurrency-color": ((r"$", "-token"),),
    "devicon": ((r"$", "-logo"),),
    "skill-icons": ((r"$", "-logo"),),
    "gcp": ((r"^", "google-cloud-"),),
    "k8s": ((r"^", "kubernetes-"),),
    "vscode-icons": FILES,
    "material-icon-theme": FILES,
    "catppuccin": FILES,
}
FLAGS = "Flags / Maps"  # the category whose icons are named by the codes of countries
TAR_NAME = 100  # most characters in the name of a file in a shard: two icons are left out
# An icon's pixels that differ from white by FAINT of 255 must extend over SMALL pixels each way.
FAINT = 64
SMALL = 12


def collect(cache: Path, words: Vocabulary) -> tuple[list[Glyph], dict[str, dict]]:
    """Return all glyphs, before drawing, and set -> {package, version, licence, author, url}."""
    folder = install(cache, PACKAGES) / "@iconify/json"
    collections = json.loads((folder / "collections.json").read_text())
    secret = held_out(words)
    glyphs: list[Glyph] = []
    origins = {}
    for name, info in sorted(collections.items()):
        if not wanted(name, info):
            continue
        data = json.loads((folder / f"json/{name}.json").read_text())
        glyphs += icons(data, info, words, secret)
        licence = info["license"].get("spdx") or info["license"]["title"]
        author = info["author"]
        origins[name] = dict(
            package="@iconify/json",
            version=PACKAGES["@iconify/json"],
            licence=licence,
            author=author["name"],
            url=author.get("url", ""),
        )
    return glyphs, origins


def wanted(name: str, info: dict) -> bool:
    """Return True for a color set that is neither emoji nor by the held-out maker."""
    if not info.get("palette"):
        return False
    if "emoji" in name or info.get("category") == "Emoji" or name == NOTOS:
        return False
    return HELD_OUT_MAKER not in info["author"]["name"]


def held_out(words: Vocabulary) -> re.Pattern:
    """Return a pattern of the names of concepts that are never trained on.

    A flag is named after its country, which other captions may mention, so flags are left out.
    """
    names = set()
    for emoji, name in words.short.items():
        if split(words.concept(emoji)) == "test" and ":" not in name:
            names.add(name.lower())
    if not names:
        return re.compile("(?!)")  # matches nothing
    alternatives = "|".join(sorted(map(re.escape, names)))
    return re.compile(f"\\b({alternatives})\\b")


def icons(data: dict, info: dict, words: Vocabulary, secret: re.Pattern) -> Iterator[Glyph]:
    """Yield the icons of a set.

    Left out are captions of fewer than three letters, and flags that are no emoji.
    """
    # What the icons of the set have in common.
    name = data["prefix"]
    category = info.get("category", "")
    size = (data.get("width", 16), data.get("height", 16))
    endings = [*data.get("suffixes", {}), VARIANT.get(name, "")]
    groups = {}
    for group, members in data.get("categories", {}).items():
        for icon in members:
            groups[icon] = group

    for icon, drawing in sorted(data["icons"].items()):
        key = f"{name}_{icon}"
        if drawing.get("hidden") or key in COPIES or len(f"{STYLE}__{key}.json") > TAR_NAME:
            continue

        # The caption; a flag is named by its country's code, and needs its emoji's name.
        text = bare(icon, endings)
        if category == FLAGS:
            emoji = flag(text)
            caption = words.short.get(emoji, "")
        else:
            emoji = ""
            caption = spoken(text, name, category)
        letters = re.findall("[^\\W\\d_]", caption)
        if len(letters) < 3:
            continue

        # An icon is also held out if its caption contains the name of a held-out concept.
        terms = info["license"].get("spdx", "")
        about = words.about(STYLE, emoji or words.find(caption), caption, terms)
        about |= dict(group=groups.get(icon, category), set=name)
        if secret.search(caption):
            about["concept_split"] = "test"
        yield Glyph(STYLE, key, "png", caption, about, partial(draw, svg(drawing, size)))


def bare(icon: str, variants: list[str]) -> str:
    """Remove endings: 'credit-card-5-flat' -> 'credit-card', given 'flat'."""
    ends = "|".join([r"\d+", *filter(None, variants)])
    return re.sub(f"(-({ends}))+$", "", icon)


def spoken(text: str, name: str, category: str) -> str:
    """Return a caption that includes the kind of picture.

    'folder-type-db' of vscode-icons -> 'db folder', 'salt' of a set of logos -> 'salt logo'.
    """
    for pattern, replacement in SAYS.get(name, SAYS.get(category, ())):
        text = re.sub(pattern, replacement, text, count=1)
    return text.replace("-", " ")


def flag(code: str) -> str:
    """Return a flag's emoji: 'fr' -> France's; 'gb-eng' -> England's, tags after a black flag."""
    if re.fullmatch("[a-z]{2}", code):
        return "".join(chr(ord("🇦") + ord(letter) - ord("a")) for letter in code)
    letters = [letter for letter in code.replace("-", "") if letter.isascii()]
    tags = "".join(chr(0xE0000 + ord(letter)) for letter in letters)
    return "🏴" + tags + "\U000e007f"


def draw(source: str) -> bytes:
    """Return a PNG; b'' if the SVG cannot be rendered, or shows nothing on white.

    The latter are white variants for dark pages, and lines of text too thin to read.
    """
    try:
        image = draw_svg(source)
    except ValueError:
        return b""

    # The greatest difference from white of the three colors, on a white background.
    with Image.open(io.BytesIO(image)) as opened:
        icon = opened.convert("RGBA")
    white = Image.new("RGBA", icon.size, "white")
    difference = ImageChops.difference(Image.alpha_composite(white, icon), white).convert("RGB")
    red, green, blue = difference.split()
    greatest = ImageChops.lighter(ImageChops.lighter(red, green), blue)

    visible = greatest.point(lambda value: 255 if value >= FAINT else 0)
    box = visible.getbbox()
    if not box:
        return b""
    left, top, right, bottom = box
    return image if min(right - left, bottom - top) >= SMALL else b""
