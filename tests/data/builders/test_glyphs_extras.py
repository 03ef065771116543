"""Extras for glyphs: Qt resources are read, clip art and stamps get their captions, and a held-out
concept stays held out.

No network and no Debian tools.  Run: pytest tests/data/builders/test_glyphs_extras.py
"""

import io
import struct
import zlib

import pytest
from PIL import Image

from glimpse.data.builders import packages
from glimpse.data.builders.glyphs import extras
from glimpse.data.builders.glyphs.build import trainable
from glimpse.data.builders.glyphs.sources import Vocabulary


def vocabulary():
    names = {"🐒": {"tts": ["monkey"]}, "🐐": {"tts": ["goat"]}}
    return Vocabulary({"en": names}, dict.fromkeys(names, "Animals"))


def picture(color, mode="RGBA"):
    file = io.BytesIO()
    Image.new(mode, (8, 8), color).save(file, "PNG")
    return file.getvalue()


def rcc(files):
    """Return a version 1 Qt resource: a root folder with files {name: (flags, content)}."""
    names = data = b""
    nodes = [struct.pack(">IHII", 0, 2, len(files), 1)]
    for name, (flags, content) in files.items():
        nodes.append(struct.pack(">IHHHI", len(names), flags, 0, 0, len(data)))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        data += struct.pack(">I", len(content)) + content
    tree = b"".join(nodes)

    # The header: version, then the offsets of the tree, the contents and the names.
    contents_offset = 20 + len(tree)
    names_offset = contents_offset + len(data)
    header = b"qres" + struct.pack(">IIII", 1, 20, contents_offset, names_offset)
    return header + tree + data + names


def test_qt_resources_are_read(tmp_path):
    path = tmp_path / "a.rcc"
    compressed = struct.pack(">I", 4) + zlib.compress(b"long")
    files = {"plain.webp": (0, b"abc"), "packed.svg": (1, compressed), "other": (4, b"zstd")}
    path.write_bytes(rcc(files))

    assert list(extras.read_rcc(path)) == [("/plain.webp", b"abc"), ("/packed.svg", b"long")]

    path.write_bytes(b"nonsense")

    with pytest.raises(ValueError, match="not a Qt resource file"):
        extras.read_rcc(path)


def drawing(title):
    work = f"<cc:Work xmlns:cc='c' xmlns:dc='d'><dc:title>{title}</dc:title></cc:Work>"
    square = "<rect width='20' height='20'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' width='9mm' height='9mm'>{work}{square}</svg>"


def test_clip_art_is_named_by_its_title_or_its_file(tmp_path):
    base = tmp_path / "usr/share/openclipart/svg/food"
    base.mkdir(parents=True)
    titles = dict(
        old_dog="A dog &amp; a cat",
        apple2="Clipart by N. B. - pear",
        a12="",
        a_goat="Goat",
        monkey="monkey",
        saucer="broken",
    )
    titles |= {f"series_{c}": "Nice icons" for c in "abcd"}
    for stem, title in titles.items():
        (base / f"{stem}.svg").write_text(drawing(title))
    (base / "saucer.svg").write_text("<svg>")

    glyphs = {g.name: g for g in extras.openclipart(tmp_path, vocabulary())}

    captions = {name.removeprefix("food-"): g.caption for name, g in glyphs.items()}
    series = {f"series_{c}": f"series {c}" for c in "abcd"}

    assert captions == {
        "old_dog": "A dog & a cat",
        "apple2": "apple",
        "a_goat": "Goat",
        "monkey": "monkey",
        "saucer": "saucer",
        **series,
    }
    # the split holds monkeys out
    assert [name for name, g in glyphs.items() if not trainable(g)] == ["food-monkey"]

    images = {name: g.image() for name, g in glyphs.items()}

    assert images["food-saucer"] == b""
    assert max(Image.open(io.BytesIO(images["food-monkey"])).size) == 128


def test_stamps_have_sentences_and_one_image_each(tmp_path):
    base = tmp_path / "usr/share/tuxpaint/stamps/animals"
    base.mkdir(parents=True)
    (base / "lion.txt").write_text("A lion.\nde.utf8=Ein Löwe.\n")
    (base / "lion.svg").write_text(drawing("x"))
    (base / "lion.png").write_bytes(picture("red"))
    (base / "nameless.png").write_bytes(picture("red"))

    [stamp] = extras.tuxstamps(tmp_path, vocabulary())

    assert stamp.key == "tuxstamps__animals-lion"
    assert stamp.caption == "A lion."
    assert not trainable(stamp)
    assert stamp.about["captions"] == {"en": "A lion.", "de": "Ein Löwe."}
    assert max(Image.open(io.BytesIO(stamp.image())).size) == 224


def test_extras_need_debian_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="no apt-get here"):
        extras.collect(tmp_path, vocabulary())
