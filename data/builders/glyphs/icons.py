"""Icons for glyphs: the colour sets of the npm package @iconify/json, 31 sets of interface icons,
logos, file types, flags and weather.

All are of one style, `iconify`; a sample's json names its `set`. Taken are the sets with more than
one colour, without emoji (the default styles are drawings of the same ones) and without Microsoft's
(its family of styles is held out). A name becomes a caption without what
its set's convention adds: 'credit-card-5-flat' -> 'credit card'. Its concept is the emoji that the
caption names, if any, so that a held-out concept is held out here too; and so is any icon whose
caption has a held-out concept's name in it, such as 'bell ring'.
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
HELD_OUT_MAKER = "Microsoft"  # glyphs_sources.UNSEEN_STYLES
NOTOS = "unjs"  # a set of logos that are Noto's emoji
# emoji of default styles
COPIES = (
    "thesvg-color_nano-banana-google",
    "material-icon-theme_taze",
    "vscode-icons_file-type-snort",
)
# set -> what ends a name there, beside numbers and the suffixes that the set itself declares
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
SAYS = {  # set or category -> how a caption says what kind of picture it is: (pattern, replacement)
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
TAR_NAME = 100  # characters in the name of a file in a shard at most: two icons are left out
# an icon must differ from white by FAINT of 255 somewhere, over at least SMALL pixels each way
FAINT, SMALL = 64, 12


def collect(cache: Path, words: Vocabulary) -> tuple[list[Glyph], dict[str, dict]]:
    """All drawings, not yet drawn, and set -> {package, version, licence, author, url}."""
    folder = install(cache, PACKAGES) / "@iconify/json"
    glyphs, credits, secret = [], {}, held_out(words)
    for name, info in sorted(json.loads((folder / "collections.json").read_text()).items()):
        if wanted(name, info):
            glyphs += icons(
                json.loads((folder / f"json/{name}.json").read_text()), info, words, secret
            )
            row = dict(
                licence=info["license"].get("spdx") or info["license"]["title"],
                author=info["author"]["name"],
            )
            credits[name] = dict(
                package="@iconify/json",
                version=PACKAGES["@iconify/json"],
                **row,
                url=info["author"].get("url", ""),
            )
    return glyphs, credits


def wanted(name: str, info: dict) -> bool:
    emoji = "emoji" in name or info.get("category") == "Emoji" or name == NOTOS
    return bool(info.get("palette")) and not emoji and HELD_OUT_MAKER not in info["author"]["name"]


def held_out(words: Vocabulary) -> re.Pattern:
    """Finds the names of concepts that are never trained on; a flag's is that of its country, and
    no word of other captions.
    """
    names = {
        name.lower()
        for emoji, name in words.short.items()
        if split(words.concept(emoji)) == "test" and ":" not in name
    }
    return re.compile(f"\\b({'|'.join(sorted(map(re.escape, names)))})\\b" if names else "(?!)")


def icons(data: dict, info: dict, words: Vocabulary, secret: re.Pattern) -> Iterator[Glyph]:
    """The icons of a set; of a name that says nothing (fewer than three letters), or of a flag that
    is no emoji, none.
    """
    name, category, size = (
        data["prefix"],
        info.get("category", ""),
        (data.get("width", 16), data.get("height", 16)),
    )
    groups = {
        icon: group for group, members in data.get("categories", {}).items() for icon in members
    }
    for icon, drawing in sorted(data["icons"].items()):
        key = f"{name}_{icon}"
        if drawing.get("hidden") or key in COPIES or len(f"{STYLE}__{key}.json") > TAR_NAME:
            continue
        text = bare(icon, [*data.get("suffixes", {}), VARIANT.get(name, "")])
        emoji = flag(text) if category == FLAGS else ""
        caption = words.short.get(emoji, "") if category == FLAGS else spoken(text, name, category)
        if len(re.findall("[^\\W\\d_]", caption)) >= 3:
            about = words.about(
                STYLE, emoji or words.find(caption), caption, info["license"].get("spdx", "")
            )
            about |= dict(group=groups.get(icon, category), set=name)
            if secret.search(caption):
                about["concept_split"] = "test"
            yield Glyph(STYLE, key, "png", caption, about, partial(draw, svg(drawing, size)))


def bare(icon: str, variants: list[str]) -> str:
    """'credit-card-5-flat' -> 'credit-card', given 'flat'."""
    ends = "|".join([r"\d+", *filter(None, variants)])
    return re.sub(f"(-({ends}))+$", "", icon)


def spoken(text: str, name: str, category: str) -> str:
    """'folder-type-db' of vscode-icons -> 'db folder', 'salt' of a set of logos -> 'salt logo'."""
    for pattern, replacement in SAYS.get(name, SAYS.get(category, ())):
        text = re.sub(pattern, replacement, text, count=1)
    return text.replace("-", " ")


def flag(code: str) -> str:
    """'fr' -> the flag of France; 'gb-eng' -> England's, spelled in tags after a black flag."""
    if re.fullmatch("[a-z]{2}", code):
        return "".join(chr(ord("🇦") + ord(letter) - ord("a")) for letter in code)
    return (
        "🏴"
        + "".join(
            chr(0xE0000 + ord(letter)) for letter in code.replace("-", "") if letter.isascii()
        )
        + "\U000e007f"
    )


def draw(source: str) -> bytes:
    """b'' for what cannot be rendered, or is nothing on white: white variants for dark pages, and
    lines of text too thin to read.
    """
    try:
        image = draw_svg(source)
    except ValueError:
        return b""
    with Image.open(io.BytesIO(image)) as opened:
        shown = opened.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    difference = ImageChops.difference(Image.alpha_composite(white, shown), white).convert("RGB")
    red, green, blue = difference.split()
    seen = (
        ImageChops.lighter(ImageChops.lighter(red, green), blue)
        .point(lambda value: 255 * (value >= FAINT))
        .getbbox()
    )
    return image if seen and min(seen[2] - seen[0], seen[3] - seen[1]) >= SMALL else b""
