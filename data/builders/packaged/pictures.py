"""Packaged sets of pictures, for data/builders/packaged/build.py: one function a name, from the
cache of packages
to evaluation sets.

    tuxstamps         Debian tuxpaint-stamps-default   a retrieval set for each language: the same
                      pictures, translated sentences
    gcompris          Debian gcompris-qt-data          its photographs, named
    glyphs_families   a glyphs set that is there       the held-out drawing styles that its own
                      eval/ leaves out

Training never sees any of them: data/builders/glyphs/build.py holds them out.
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

NO_WORDS = Vocabulary({"en": {}}, {})  # which emoji a name means does not matter here


def unpacked(style: str, cache: Path) -> tuple[list[Glyph], dict[str, str]]:
    """The glyphs of one of data/builders/glyphs/extras.py's styles, and the last four fields of a
    Found.
    """
    package, licence, patterns = extras.PACKAGES[style]
    folder, version = debian(cache / "debian", package, patterns)
    credit = dict(
        package=f"Debian {package}",
        version=version,
        licence=licence.partition(",")[0],
        text=copyright_of(cache / "debian", package),
    )
    return list(getattr(extras, style)(folder, NO_WORDS)), credit


# --------------------------------------------------------------------------------------------------
# tuxstamps

FEWEST = 300  # captions of a language, else it is left out: recall among few is high by chance


def tuxstamps(cache: Path, glyphs: Path) -> Found:
    """tuxstamps_LANG, LANG as the package writes it (pt_BR): the first picture, of those that show
    on white, of every sentence.
    """
    stamps, credit = unpacked("tuxstamps", cache)
    images = {g.name: on_white(image_of(g), g.extension) for g in stamps}
    stamps = [g for g in stamps if not blank(images[g.name])]
    sets = []
    for language, _ in Counter(
        language for g in stamps for language in g.about["captions"]
    ).most_common():
        first: dict[str, Glyph] = {}
        for g in stamps:
            if caption := g.about["captions"].get(language, "").strip():
                first.setdefault(caption, g)
        if len(first) >= FEWEST:
            samples = [
                (g.name, {g.extension: images[g.name], "txt": caption.encode()})
                for caption, g in first.items()
            ]
            sets.append(EvalSet(f"tuxstamps_{language}", dict(test=samples)))
    return Found(sets, **credit)


def blank(image: bytes) -> bool:
    """Whether nothing is to be seen, as of a white drawing on white."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.convert("L").getextrema()[0] == 255


# --------------------------------------------------------------------------------------------------
# gcompris

PHOTOS = ("categorization", "erase", "explore")  # the folders of photographs; 'lang' holds cartoons
# what its file says -> what the photograph shows; "" leaves it out: no name, or one that fits
# another class too
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
    """Photographs of animals, monuments, tools and power plants; most classes have one, fish have
    28.
    """
    found, credit = unpacked("gcompris", cache)
    members = [
        (g, MENDED.get(g.caption, g.caption)) for g in found if g.about["group"].startswith(PHOTOS)
    ]
    return Found(
        [
            classified(
                "gcompris", [(g, name) for g, name in members if name], ("a photo of a {c}.", "{c}")
            )
        ],
        **credit,
    )


def classified(name: str, members: list[tuple[Glyph, str]], templates: tuple[str, ...]) -> EvalSet:
    """(glyph, the name of its class) -> a set with a test split, on white."""
    classes = tuple(sorted({c for _, c in members}))
    number = {c: str(i).encode() for i, c in enumerate(classes)}
    samples = [
        (g.name, {g.extension: on_white(image_of(g), g.extension), "cls": number[c]})
        for g, c in members
    ]
    return EvalSet(name, dict(test=samples), classes, templates)


# --------------------------------------------------------------------------------------------------
# glyphs families


def glyphs_families(cache: Path, glyphs: Path) -> Found:
    """SIDE_STYLE: of every held-out style that glyphs/eval has no sets of, the concepts that
    training saw in other styles, or did not.
    """
    if not (glyphs / "glyphs.json").exists():
        raise ValueError(
            f"--glyphs: {glyphs} holds no glyphs set; make it first: python run/prepare.py glyphs"
            f" --out {glyphs}"
        )
    train, heldout = (Shards([glyphs / split]) for split in ("train", "heldout"))
    seen = {about(train, i)["concept"] for i in range(len(train))}
    members: dict[str, list[Glyph]] = {}
    for i in range(len(heldout)):
        if (
            (told := about(heldout, i))["style"] in UNSEEN_STYLES
            and told["style"] != UNSEEN_STYLE
            and told["emoji"]
            and not told["toned"]
        ):
            side = (
                "unseen"
                if told["concept_split"] == "test"
                else "seen"
                if told["concept"] in seen
                else ""
            )
            sample = heldout[i]
            [extension] = set(sample.parts) & set(ENCODING)
            glyph = Glyph(told["style"], sample.key, extension, sample.caption, told, sample.image)
            members.setdefault(f"{side}_concepts_{told['style']}", []).append(glyph)
    sets = [
        classified(name, [(g, g.caption) for g in by_caption(found)], (TEMPLATES.strip(),))
        for name, found in sorted(members.items())
        if not name.startswith("_")
    ]
    version = json.loads((glyphs / "glyphs.json").read_text())["settings"]["format"]
    return Found(
        sets,
        "run/prepare.py glyphs",
        f"format {version}",
        "as below",
        (glyphs / "LICENSES.txt").read_text(),
    )


def about(shards: Shards, i: int) -> dict:
    return json.loads(shards.read(i, only=("json",)).parts["json"])
