"""Icons for glyphs: names become captions, held-out concepts stay held out, and a fifth of the
shards has a fifth of the samples.

No network: the package is a small imitation of @iconify/json made in the test (the real one has 465
MB).
Run: pytest tests/data/builders/test_glyphs_icons.py
"""

import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from glimpse.data.builders.glyphs import icons as glyphs_icons
from glimpse.data.builders.glyphs.build import fifths, one_per_image, trainable, write_shards
from glimpse.data.builders.glyphs.icons import bare, collect, draw, flag, held_out, spoken
from glimpse.data.builders.glyphs.sources import Glyph, Vocabulary, split, svg
from glimpse.data.shards import Shards

SHORT = {"🐒": "monkey", "🐐": "goat", "🔑": "key", "🇫🇷": "flag: France", "🇧🇷": "flag: Brazil"}


def vocabulary():
    names = {emoji: {"tts": [name]} for emoji, name in SHORT.items()}
    return Vocabulary({"en": names}, dict.fromkeys(names, "Animals"))


def info(palette=True, category="UI Multicolor", author="Some One", **more):
    return dict(
        palette=palette,
        category=category,
        author={"name": author, "url": "about:one"},
        license={"spdx": "MIT"},
        **more,
    )


def imitation(cache):
    """Write three color sets, and sets that are left out.

    The latter are black, emoji, Noto's drawings as logos, or by Microsoft.
    """
    folder = cache / "node_modules/@iconify/json"
    (folder / "json").mkdir(parents=True)

    # set -> (its entry in collections.json, names of its icons, more of its own file)
    plain = [
        "credit-card-5-flat",
        "goat",
        "goat-2",
        "goat-2-flat",
        "monkey",
        "two-monkey-trees",
        "q-1",
        "blind-light",
    ]
    sets = {
        "plain": (info(), plain, {"suffixes": {"flat": "Flat"}}),
        "logos": (info(category="Logos"), ["goat-icon", "monkey"], {}),
        "cif": (info(category="Flags / Maps"), ["fr", "br", "zz", "lang-fr"], {}),
        "black": (info(palette=False), ["goat"], {}),
        "noto": (info(category="Emoji"), ["goat"], {}),
        "unjs": (info(category="Logos"), ["goat"], {}),
        "thesvg-color": (info(category="Logos"), ["nano-banana-google"], {}),
        "fluent-color": (info(author="Microsoft Corporation"), ["goat"], {}),
    }

    # Every icon is a rectangle of a size of its own.
    rectangle = '<path d="M0 0h{}v{}H0z" fill="#c00"/>'
    collections = {}
    for number, (name, (about, icons, more)) in enumerate(sets.items()):
        collections[name] = about
        drawings = {}
        for n, icon in enumerate(icons):
            drawings[icon] = {"body": rectangle.format(20 + n, 20 + number)}
        drawings["gone"] = {"body": "", "hidden": True}
        data = dict(prefix=name, icons=drawings, width=64, height=64, **more)
        if name == "plain":
            drawings["goat-2-flat"] = drawings["goat-2"]
            drawings["blind-light"] = {"body": rectangle.format(40, 40).replace("#c00", "#fff")}
            data["categories"] = {"Animals": ["goat"]}
        (folder / f"json/{name}.json").write_text(json.dumps(data))
    (folder / "collections.json").write_text(json.dumps(collections))

    # npm's record of a finished installation.
    versions = {"node_modules/@iconify/json": {"version": glyphs_icons.PACKAGES["@iconify/json"]}}
    lock = {"packages": versions}
    (cache / "node_modules/.package-lock.json").write_text(json.dumps(lock))
    return cache


@pytest.fixture
def cache(tmp_path):
    return imitation(tmp_path)


def test_icons_are_named_and_held_out(cache):
    glyphs, origins = collect(cache, vocabulary())

    captions = {g.name: g.caption for g in glyphs}
    assert captions == {
        "plain_credit-card-5-flat": "credit card",
        "plain_goat": "goat",
        "plain_goat-2": "goat",
        "plain_goat-2-flat": "goat",
        "plain_monkey": "monkey",
        "plain_two-monkey-trees": "two monkey trees",
        "plain_blind-light": "blind light",
        "logos_goat-icon": "goat logo",
        "logos_monkey": "monkey logo",
        "cif_fr": "flag: France",
        "cif_br": "flag: Brazil",
    }
    assert split("🐒") == split("🇧🇷") == "test", "what this test takes for held out"
    heldout = {g.name for g in glyphs if not trainable(g)}
    assert heldout >= {"plain_monkey", "plain_two-monkey-trees", "logos_monkey", "cif_br"}
    assert trainable(next(g for g in glyphs if g.name == "plain_goat"))

    about = {g.name: g.about for g in glyphs}
    assert about["plain_goat"]["emoji"] == "🐐"
    assert about["logos_goat-icon"]["emoji"] == "", "a brand of that name is no goat"
    assert about["plain_goat"]["group"] == "Animals"
    assert about["plain_goat-2"]["group"] == "UI Multicolor"
    assert about["cif_fr"] == about["cif_fr"] | {
        "style": "iconify",
        "set": "cif",
        "license": "MIT",
        "concept": "🇫🇷",
    }
    assert set(origins) == {"plain", "logos", "cif", "thesvg-color"}
    assert origins["cif"] == dict(
        package="@iconify/json",
        version="2.2.535",
        licence="MIT",
        author="Some One",
        url="about:one",
    )


def test_identical_drawings_once_and_what_is_nothing_on_white_not_at_all(cache):
    glyphs, _ = collect(cache, vocabulary())
    drawings = [replace(g, image=g.image()) for g in glyphs]

    assert [g.name for g in drawings if not g.image] == ["plain_blind-light"]

    unique = one_per_image(g for g in drawings if g.image)

    left_out = {g.name for g in drawings} - {g.name for g in unique}
    assert left_out == {"plain_blind-light", "plain_goat-2-flat"}
    assert Image.open(io.BytesIO(unique[0].image)).size == (64, 64)


@pytest.mark.parametrize(
    "body, drawable",
    [
        ('<path d="M0 0h40v40H0z"/>', True),
        ('<path d="M0 0h64v9H0z"/>', False),  # a line of text, too thin to read
        ('<path d="M0 0h40v40H0z" fill="#f0f0f0"/>', False),  # hardly to be seen
        ('<path d="M0 0h40v40H0z"', False),  # no XML
    ],
)
def test_what_is_too_faint_thin_or_broken(body, drawable):
    assert bool(draw(svg({"body": body}, (64, 64)))) == drawable


@pytest.mark.parametrize(
    "icon, name, category, caption",
    [
        ("folder-type-db-opened", "vscode-icons", "Programming", "db folder"),
        ("file-type-light-drone", "vscode-icons", "Programming", "drone file"),
        ("default-file", "vscode-icons", "Programming", "default file"),
        ("folder-open", "catppuccin", "Programming", "folder"),
        ("nginx", "material-icon-theme", "Programming", "nginx file"),
        ("salt-wordmark", "devicon", "Programming", "salt logo"),
        ("bzz", "token-branded", "Logos", "bzz token"),
        ("pod", "k8s", "Programming", "kubernetes pod"),
        ("fish-one", "icon-park", "UI Multicolor", "fish"),
        ("one", "icon-park", "UI Multicolor", "one"),
    ],
)
def test_a_caption_follows_its_sets_convention(icon, name, category, caption):
    assert spoken(bare(icon, [glyphs_icons.VARIANT.get(name, "")]), name, category) == caption


def test_flags():
    assert flag("fr") == "🇫🇷"
    assert flag("gb-eng") == "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


def test_held_out_names_are_whole_words():
    secret = held_out(vocabulary())

    assert secret.search("a monkey logo")
    assert not secret.search("monkeys")
    assert not secret.search("brazil goat key")


@pytest.mark.parametrize(
    "samples, size", [(1, 1), (50, 10), (5000, 1000), (5001, 501), (39273, 982)]
)
def test_a_fifth_of_the_shards_is_a_fifth_of_the_samples(samples, size):
    assert fifths(samples) == size <= 1000

    shards = -(-samples // size)

    if samples != 1:
        assert shards % 5 == 0
        assert abs(shards // 5 * size / samples - 0.2) < 0.005


def test_any_fifth_of_the_shards_is_a_random_draw(tmp_path):
    """It holds each kind of sample in about its share."""
    names = [f"b_{i:04d}" for i in range(500)] + [f"a_{i:04d}" for i in range(500, 2000)]
    glyphs = [Glyph("iconify", name, "png", "goat", {}, b"x") for name in names]

    write_shards(tmp_path / "glyphs", glyphs, fifths(len(glyphs)))

    fifth = Shards([f"{tmp_path}/glyphs-{{00003..00003}}.tar"])
    assert len(Shards([tmp_path])) == 2000
    assert len(fifth) == 400
    assert 0.2 < sum("b_" in fifth[i].key for i in range(400)) / 400 < 0.3
