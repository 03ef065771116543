"""Packaged sets of pictures, for data/builders/packaged/build.py.

Each set has one function, which turns the cache of packages into evaluation sets:

    tuxstamps         Debian tuxpaint-stamps-default   a retrieval set for each language: the same
                                                       pictures, translated sentences
    gcompris          Debian gcompris-qt-data          its photographs, named
    glyphs_families   a finished glyphs set            the held-out drawing styles that its eval/
                                                       leaves out

Training never sees any of these pictures: data/builders/glyphs/build.py holds them out.
"""

import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from glimpse.data.builders.glyphs import extras
from glimpse.data.builders.glyphs.build import (
    ENCODING,
    TEMPLATES,
    UNSEEN_STYLE,
    by_caption,
    image_of,
    on_white,
)
from glimpse.data.builders.glyphs.sources import UNSEEN_STYLES, Glyph, Vocabulary
from glimpse.data.builders.packaged.arrays import EvalSet, Found
from glimpse.data.builders.packages import copyright_of, debian
from glimpse.data.shards import Shards

NO_WORDS = Vocabulary({"en": {}}, {})  # the emoji that a name means is not used here


def unpacked(style: str, cache: Path) -> tuple[list[Glyph], dict[str, str]]:
    """Return the glyphs of a style of glyphs/extras.py, and the last four fields of a Found."""
    package, licence, patterns = extras.PACKAGES[style]
    folder, version = debian(cache / "debian", package, patterns)
    credit = dict(
        package=f"Debian {package}",
        version=version,
        licence=licence.partition(",")[0],
        text=copyright_of(cache / "debian", package),
    )
    read_glyphs = getattr(extras, style)
    return list(read_glyphs(folder, NO_WORDS)), credit


# --------------------------------------------------------------------------------------------------
# tuxstamps

# A language with fewer captions is left out: recall among few is high by chance.
FEWEST = 300


def tuxstamps(cache: Path, glyphs: Path) -> Found:
    """Read one retrieval set a language, tuxstamps_LANG, LANG as the package writes it (pt_BR).

    A set has the first picture of every sentence; pictures that do not show on white are left out.
    """
    stamps, credit = unpacked("tuxstamps", cache)
    images = {g.name: on_white(image_of(g), g.extension) for g in stamps}
    stamps = [g for g in stamps if not blank(images[g.name])]

    # The languages with the most captions come first.
    languages = Counter(language for g in stamps for language in g.about["captions"])
    sets = []
    for language, _ in languages.most_common():
        first: dict[str, Glyph] = {}
        for g in stamps:
            caption = g.about["captions"].get(language, "").strip()
            if caption:
                first.setdefault(caption, g)
        if len(first) < FEWEST:
            continue
        samples = []
        for caption, g in first.items():
            parts = {g.extension: images[g.name], "txt": caption.encode()}
            samples.append((g.name, parts))
        sets.append(EvalSet(f"tuxstamps_{language}", dict(test=samples)))
    return Found(sets, **credit)


def blank(image: bytes) -> bool:
    """Return True if every pixel is white, as of a white drawing on white."""
    with Image.open(io.BytesIO(image)) as opened:
        darkest, _brightest = opened.convert("L").getextrema()
    return darkest == 255


# --------------------------------------------------------------------------------------------------
# gcompris

PHOTOS = ("categorization", "erase", "explore")  # the folders of photographs; 'lang' holds cartoons
# Caption from the file's name -> what the photograph shows; "" leaves the photograph out: it has no
# usable name, or one that fits another class too.
MENDED = {
    "alphabets": "letter blocks",
    "blackslate": "blackboard",
    "buffetset": "",
    "bulb": "light bulb",
    "burj": "burj khalifa",
    "cabrillo": "cabrillo national monument",
    "camels": "camel",
    "canyonde chelly": "canyon de chelly",
    "castillode san marcos": "castillo de san marcos",
    "cathedral": "",
    "chamaeleon": "chameleon",
    "chateaude chambord": "chateau de chambord",
    "chateaude chenonceau": "chateau de chenonceau",
    "citede carcassonne": "cite de carcassonne",
    "cutting tool": "side cutter",
    "dragon": "komodo dragon",
    "empire state": "empire state building",
    "erasers": "eraser",
    "gatewayof india": "gateway of india",
    "geothermal": "geothermal steam",
    "great pyramid": "great pyramid of giza",
    "great wall": "great wall of china",
    "great wallof china": "great wall of china",
    "knife": "cutlery",
    "kutub minar": "qutub minar",
    "le musee": "louvre",
    "long nosed monkey": "proboscis monkey",
    "meerkats": "meerkat",
    "mont st michel": "mont saint michel",
    "monument": "",
    "nail cutter": "nail clipper",
    "navajo": "navajo national monument",
    "numbers": "number blocks",
    "opera house": "sydney opera house",
    "palaisdes papes": "palais des papes",
    "plier": "pliers",
    "pontdu gard": "pont du gard",
    "screw driver": "screwdriver",
    "solar": "solar power",
    "spoonbills": "spoonbill",
    "spray": "spray bottle",
    "statueof liberty": "statue of liberty",
    "swans": "swan",
    "tweezer": "tweezers",
    "us capitol": "united states capitol",
    "weighing machine": "weighing scale",
    "zimni palace": "winter palace",
}


def gcompris(cache: Path, glyphs: Path) -> Found:
    """Read the photographs of animals, monuments, tools and power plants of GCompris.

    Most classes have one photograph; fish have 28.
    """
    pictures, credit = unpacked("gcompris", cache)
    members = []
    for g in pictures:
        name = MENDED.get(g.caption, g.caption)
        if name and g.about["group"].startswith(PHOTOS):
            members.append((g, name))
    sets = [classified("gcompris", members, ("a photo of a {c}.", "{c}"))]
    return Found(sets, **credit)


def classified(name: str, members: list[tuple[Glyph, str]], templates: tuple[str, ...]) -> EvalSet:
    """Make a set with a test split, on white, of (glyph, name of its class)."""
    classes = tuple(sorted({class_name for _, class_name in members}))
    number = {class_name: str(i).encode() for i, class_name in enumerate(classes)}
    samples = []
    for g, class_name in members:
        parts = {g.extension: on_white(image_of(g), g.extension), "cls": number[class_name]}
        samples.append((g.name, parts))
    return EvalSet(name, dict(test=samples), classes, templates)


# --------------------------------------------------------------------------------------------------
# glyphs_families


def glyphs_families(cache: Path, glyphs: Path) -> Found:
    """Read sets SIDE_concepts_STYLE of every held-out style that glyphs/eval has no sets of.

    SIDE: "seen" concepts are those that the training shards hold in other styles, "unseen" those
    that are held out.
    """
    if not (glyphs / "glyphs.json").exists():
        raise ValueError(
            f"--glyphs: {glyphs} holds no glyphs set; make it first: python run/prepare.py glyphs"
            f" --out {glyphs}"
        )
    train = Shards([glyphs / "train"])
    heldout = Shards([glyphs / "heldout"])
    seen = {about(train, i)["concept"] for i in range(len(train))}

    # Sort the held-out emoji by set; a concept on neither side is in none.
    members: dict[str, list[Glyph]] = {}
    for i in range(len(heldout)):
        record = about(heldout, i)
        side = side_of(record, seen)
        if not in_families(record) or not side:
            continue
        style = record["style"]
        sample = heldout[i]
        [extension] = set(sample.files) & set(ENCODING)
        glyph = Glyph(style, sample.key, extension, sample.caption, record, sample.image)
        members.setdefault(f"{side}_concepts_{style}", []).append(glyph)

    templates = (TEMPLATES.strip(),)
    sets = []
    for name, pictures in sorted(members.items()):
        captioned = [(g, g.caption) for g in by_caption(pictures)]
        sets.append(classified(name, captioned, templates))

    version = json.loads((glyphs / "glyphs.json").read_text())["settings"]["format"]
    text = (glyphs / "LICENSES.txt").read_text()
    return Found(sets, "run/prepare.py glyphs", f"format {version}", "as below", text)


def in_families(record: dict) -> bool:
    """Return True for an emoji without skin tone, in a held-out style that eval/ leaves out."""
    if record["style"] not in UNSEEN_STYLES or record["style"] == UNSEEN_STYLE:
        return False
    return bool(record["emoji"] and not record["toned"])


def side_of(record: dict, seen: set[str]) -> str:
    """Return "unseen" for a held-out concept, "seen" for one that training saw, or ""."""
    if record["concept_split"] == "test":
        return "unseen"
    return "seen" if record["concept"] in seen else ""


def about(shards: Shards, i: int) -> dict:
    """Return the json member of sample number i."""
    return json.loads(shards.read(i, extensions=("json",)).files["json"])
