"""Glyphs: drawings get the right names, held-out ones stay out of training, and two builds are the
same bytes.

No network: the packages are a small imitation made in the test. A slow test builds from the real
ones if npm reaches its registry.
Run: pytest tests/data/builders/test_glyphs.py
"""

import io
import json
import os
import tarfile
import unicodedata

import pytest
from PIL import Image

from glimpse.data.builders.glyphs import build as glyphs
from glimpse.data.builders.glyphs import icons as glyphs_icons
from glimpse.data.builders.glyphs import sources
from glimpse.data.builders.glyphs.build import (
    build,
    one_per_image,
    write_classification,
    write_retrieval,
)
from glimpse.data.builders.glyphs.sources import PACKAGES, UNSEEN_STYLES, Glyph
from glimpse.tests.data.builders.test_glyphs_icons import imitation

# rat .. pig nose: one emoji, one name each
ANIMALS = [chr(code) for code in range(0x1F400, 0x1F43D)]
UNSEEN = ["🐒", "🐟", "🐡", "🐨", "🐸"]  # held out by the split
NAMES = {animal: unicodedata.name(animal).lower() for animal in ANIMALS}
SHORT = {
    **NAMES,
    "👋": "waving hand",
    "👋🏽": "waving hand: medium skin tone",
    "🇹🇩": "flag: Chad",
    "🏴‍☠": "pirate flag",
    "💏": "kiss",
}


def quiet(items, text):
    return items


def glyph(
    name, caption="", image=b"x", style="noto", emoji="", concept_split="train", extension="png"
):
    about = dict(
        style=style, emoji=emoji, concept=emoji or caption, toned=False, concept_split=concept_split
    )
    about["style_split"] = "test" if style in UNSEEN_STYLES else "train"
    return Glyph(style, name, extension, caption or name, about, image)


def read(folder):
    """Return key -> {extension: content} of every tar below a folder; a key is in one tar only."""
    samples = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in samples.get(key, {}), f"{member.name} twice"
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_one_caption_for_an_image_in_a_style():
    same = [
        glyph("a", "man farmer"),
        glyph("b", "farmer"),
        glyph("c", "man farmer", style="twemoji"),
        glyph("d", "man", image=b"y"),
    ]
    assert [g.key for g in one_per_image(same)] == ["noto__b", "noto__d", "twemoji__c"]


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_evaluation_images_lie_on_white(extension):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file, extension)
    image = Image.open(io.BytesIO(glyphs.on_white(file.getvalue(), extension)))

    assert image.format.lower() == extension
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_classification_is_in_clip_benchmarks_layout(tmp_path):
    members = [
        glyph("1", "zebra", b"z"),
        glyph("2", "ape", b"a"),
        glyph("3", "ape", b"b", extension="webp"),
    ]

    counts = write_classification(tmp_path, members)

    templates = (tmp_path / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert counts == {"images": 2, "classes": 2}
    assert (tmp_path / "classnames.txt").read_text() == "ape\nzebra\n"
    assert templates[0].format(c="ape") == "ape"
    assert (tmp_path / "test/nshards.txt").read_text().strip() == "1"
    assert read(tmp_path / "test") == {
        "noto__2": {"png": b"a", "cls": b"0"},
        "noto__1": {"png": b"z", "cls": b"1"},
    }


def test_retrieval_is_in_clip_benchmarks_layout(tmp_path):
    counts = write_retrieval(tmp_path, [glyph("1", "a zebra", b"z")])

    assert counts == {"images": 1}
    assert (tmp_path / "dataset_type.txt").read_text().strip() == "retrieval"
    assert read(tmp_path / "test") == {"noto__1": {"png": b"z", "txt": b"a zebra"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An imitation of npm's packages: every icon set draws every animal in a color of its own.

    Each also has a hand in two skin tones, and drawings to be left out.
    """
    root = tmp_path_factory.mktemp("cache")
    modules = root / "node_modules"

    # Icon sets.
    for number, package in enumerate(PACKAGES):
        put(
            modules / package / "package.json",
            {"license": "MIT", "author": {"name": "Some One"}},
        )
        if package.startswith("@iconify-json/"):
            put_icon_set(modules / package, color=f"{number + 1:03d}")

    # The unseen style.
    assets = modules / "@lobehub/fluent-emoji-3d/assets"
    assets.mkdir(parents=True)
    for i, animal in enumerate(ANIMALS):
        image = Image.new("RGBA", (8, 8), (4 * i, 0, 0, 99))
        image.save(assets / f"{ord(animal):x}.webp", lossless=True)

    # CLDR's names, and Unicode's groups.
    english = {emoji: {"tts": [name], "default": [name]} for emoji, name in SHORT.items()}
    for language in sources.LANGUAGES:
        annotations = english
        if language != "en":
            annotations = {emoji: {"tts": [f"{language} {SHORT[emoji]}"]} for emoji in english}
        put(
            modules / f"cldr-annotations-full/annotations/{language}/annotations.json",
            {"annotations": {"annotations": annotations}},
        )
        put(
            modules
            / f"cldr-annotations-derived-full/annotationsDerived/{language}/annotations.json",
            {"annotationsDerived": {"annotations": {}}},
        )
    groups = {emoji: {"group": "Animals"} for emoji in SHORT if not sources.TONE.search(emoji)}
    put(modules / "unicode-emoji-json/data-by-emoji.json", groups)

    # npm's record of a finished installation.
    versions = {f"node_modules/{name}": {"version": v} for name, v in PACKAGES.items()}
    put(modules / ".package-lock.json", {"packages": versions})
    return root


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def put_icon_set(folder, color):
    bodies = {}
    for i, name in enumerate(NAMES.values()):
        bodies[name.replace(" ", "-")] = f'<circle fill="#{color}" r="{i + 8}"/>'
    bodies |= {
        "waving-hand": "<path d='M0 0h9v9z'/>",
        "waving-hand-medium-skin-tone": "<path d='M0 0h8v9z'/>",
        "second-rat": bodies["rat"],
        "flying-saucer": "<path d='M0 0h7v9z'/>",
        "gone": "<path/>",
    }
    icons = {name: {"body": body, "hidden": name == "gone"} for name, body in bodies.items()}
    put(
        folder / "icons.json",
        {"prefix": folder.name, "icons": icons, "width": 64, "height": 64},
    )
    put(
        folder / "info.json",
        {"license": {"spdx": "MIT"}, "author": {"name": "Artist", "url": "about:artist"}},
    )
    put(folder / "chars.json", {"1f44b-1f3fd": "waving-hand-medium-skin-tone"})


@pytest.fixture(scope="module")
def default_build(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "glyphs"
    return out, build(out, cache=cache, progress=quiet)


def test_nothing_held_out_is_trained_on(default_build):
    out, summary = default_build
    train = read(out / "train")
    heldout = read(out / "heldout")

    assert not set(train) & set(heldout)
    assert len(train) == summary["pairs"]["train"]
    assert len(heldout) == summary["pairs"]["heldout"]
    for sample in train.values():
        about = json.loads(sample["json"])
        assert about["style"] not in UNSEEN_STYLES
        assert about["concept"] not in UNSEEN
    for sample in heldout.values():
        about = json.loads(sample["json"])
        assert about["style"] in UNSEEN_STYLES or about["concept"] in UNSEEN

    emoji = {json.loads(sample["json"])["emoji"] for sample in train.values()}
    # '' is the flying saucer
    assert emoji == {*ANIMALS, "👋", ""} - set(UNSEEN)
    assert (out / "train/shards.index.json").exists()
    assert (out / "heldout/shards.index.json").exists()


def test_a_sample_is_image_caption_and_what_is_known(default_build):
    out, _summary = default_build
    sample = read(out / "train")["noto__rat"]
    about = json.loads(sample["json"])

    assert Image.open(io.BytesIO(sample["png"])).mode == "RGBA"
    assert sample["txt"] == b"rat"
    assert about["emoji"] == about["concept"] == "🐀"
    assert about["license"] == "MIT"
    assert about["group"] == "Animals"
    assert about["captions"]["de"] == "de rat"
    assert len(about["captions"]) == 10


def test_duplicates_hidden_icons_and_unreadable_names_are_left_out(default_build):
    out, _summary = default_build
    keys = set(read(out / "train")) | set(read(out / "heldout"))

    assert "noto__flying-saucer" in keys
    assert "fxemoji__flying-saucer" not in keys
    assert not [k for k in keys if k.endswith(("__second-rat", "__gone", "skin-tone"))]


def test_evaluation_sets_ask_for_what_their_name_says(default_build):
    out, summary = default_build
    evals = out / "eval"
    train = read(out / "train")
    trained_captions = {sample["txt"].decode() for sample in train.values()}
    unseen_names = {NAMES[emoji] for emoji in UNSEEN}

    def classes(name):
        return (evals / name / "classnames.txt").read_text().splitlines()

    styles = {"unseen_concepts_seen_style": "noto", "unseen_concepts_unseen_style": "fluent3d"}
    for name, style in styles.items():
        assert classes(name) == sorted(unseen_names)
        assert not trained_captions & set(classes(name))
        assert {key.split("__")[0] for key in read(evals / name)} == {style}
    for name in ("seen_concepts_seen_style", "seen_concepts_unseen_style"):
        assert set(classes(name)) <= trained_captions
    assert set(read(evals / "seen_concepts_seen_style")) <= set(train)

    retrieval = read(evals / "retrieval")
    first = next(iter(retrieval.values()))
    assert len(retrieval) == len(ANIMALS) == summary["eval"]["retrieval"]["images"]
    assert first["txt"].decode() in unseen_names, "unseen concepts come first"


def test_licences_name_every_style(default_build):
    out, summary = default_build
    text = (out / "LICENSES.txt").read_text()

    for style in summary["styles"]:
        assert f"\n{style}: " in text
    assert f"@iconify-json/noto {PACKAGES['@iconify-json/noto']}, MIT Artist about:artist" in text


def test_a_build_is_the_same_bytes_with_any_number_of_processes(
    default_build, cache, tmp_path, monkeypatch
):
    out, _summary = default_build
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})

    build(tmp_path / "again", cache=cache, progress=quiet)

    assert contents(tmp_path / "again") == contents(out)


def test_skin_tones_are_kept_on_demand(default_build, cache, tmp_path):
    _out, default_summary = default_build

    summary = build(tmp_path / "toned", cache=cache, tones=True, progress=quiet)

    samples = read(tmp_path / "toned/train") | read(tmp_path / "toned/heldout")
    toned_keys = [key for key, s in samples.items() if json.loads(s["json"])["toned"]]
    styles = [p.split("/")[1] for p in PACKAGES if "@iconify-json/" in p]
    assert sorted(toned_keys) == sorted(f"{s}__waving-hand-medium-skin-tone" for s in styles)
    assert summary["eval"] == default_summary["eval"]  # they are in no class list


def test_icons_are_taken_on_demand(default_build, cache, tmp_path):
    default_out, default_summary = default_build
    before = read(default_out / "train")
    imitation(cache / "iconify")
    out = tmp_path / "icons"

    summary = build(out, cache=cache, icons=True, progress=quiet)

    train = read(out / "train")
    new_keys = set(train) - set(before)
    version = glyphs_icons.PACKAGES["@iconify/json"]
    credit = f"\nplain: @iconify/json {version}, MIT Some One about:one"
    assert {key: train[key] for key in before} == before
    assert {key.split("__")[0] for key in new_keys} == {"iconify"}
    assert summary["styles"]["iconify"]["train"] == len(train) - len(before)
    assert len(list((out / "train").glob("*.tar"))) == 5
    assert summary["eval"] == default_summary["eval"]
    assert credit in (out / "LICENSES.txt").read_text()
    with pytest.raises(ValueError, match="built with other packages"):
        build(out, cache=cache)


def test_a_finished_build_is_found_and_anything_else_refused(default_build, cache, tmp_path):
    def fail(items, text):
        raise AssertionError("built again")

    out, summary = default_build

    assert build(out, cache=cache, progress=fail) == summary
    with pytest.raises(ValueError, match="built with other tones; remove it"):
        build(out, cache=cache, tones=True)

    (tmp_path / "mine.txt").write_text("precious")

    with pytest.raises(ValueError, match="holds something else"):
        build(tmp_path, cache=cache)


def test_a_broken_off_build_leaves_nothing(cache, tmp_path):
    def interrupt(items, text):
        if text == "writing":
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", cache=cache, progress=interrupt)

    assert list(tmp_path.iterdir()) == []


def test_npm_is_not_asked_for_what_is_there(cache, monkeypatch):
    monkeypatch.setattr(sources, "npm", lambda arguments: pytest.fail("npm was asked"))
    assert sources.install(cache) == cache / "node_modules"


@pytest.mark.slow
def test_the_real_packages_build(tmp_path):
    try:
        summary = build(tmp_path / "out", cache=tmp_path / "cache", progress=quiet)
    except ValueError as error:
        pytest.skip(str(error))

    assert 8800 < summary["pairs"]["train"] < 9000
    assert 5900 < summary["pairs"]["heldout"] < 6100
    assert summary["eval"]["unseen_concepts_unseen_style"]["classes"] > 170

    french_fries = read(tmp_path / "out/train")["noto__french-fries"]

    assert json.loads(french_fries["json"])["captions"]["de"] == "Pommes frites"
