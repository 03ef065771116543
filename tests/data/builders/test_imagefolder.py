"""Classified images, as a tree or a table, become an evaluation set.

bash run/test.sh tests/data/builders/test_imagefolder.py
"""

import json
import sys

import pytest
from PIL import Image

from glimpse.data.builders.imagefolder import WORDNET, build
from glimpse.data.builders.packaged import build as packaged
from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet, Frame
from glimpse.data.transforms import decode
from glimpse.run import prepare
from glimpse.run.evals import parse_evaluations


def image(path, shade, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (shade, shade, 0)).save(path, kind)
    return path


def shades(images):
    """Return (class, shade of the picture) of each image."""
    rows = []
    for i in range(len(images)):
        first_pixel = decode(images.image(i))[0, 0]
        rows.append((images.label(i), int(first_pixel[0])))
    return rows


def test_a_tree_without_splits(tmp_path):
    source = tmp_path / "in"
    image(source / "red_panda/b.png", 20)
    image(source / "red_panda/more/a.webp", 30, "WEBP")
    image(source / "ape/z.bmp", 10)
    (source / "ape/notes.txt").write_text("not an image")

    result = build(source, tmp_path / "out")

    assert result == {"classes": ["ape", "red panda"], "left_out": 0, "test": 3}
    images = parse_evaluations([f"zero_shot:{tmp_path}/out"])[0].images
    assert images.prompts() == [["a photo of a ape."], ["a photo of a red panda."]]
    assert shades(images) == [(0, 10), (1, 20), (1, pytest.approx(30, abs=2))]
    assert images.image(0).startswith(b"\x89PNG")
    assert images.image(1) == (source / "red_panda/b.png").read_bytes()


def test_a_tree_with_splits_and_numbers(tmp_path):
    """Classes 2 and 10 are in the order of numbers; without a test split, val is the test."""
    source = tmp_path / "in"
    names = tmp_path / "names.txt"
    image(source / "train/10/x.png", 1)
    image(source / "train/2/x.png", 2)
    image(source / "val/10/x.png", 3)
    image(source / "val/2/x.png", 4)

    # a name a line
    names.write_text("two;deux\nten\n")
    result = build(source, tmp_path / "out", names=names, prompts="7")

    assert result == {"classes": ["two;deux", "ten"], "left_out": 0, "test": 2, "train": 2}
    test = ClipBenchmarkSet(tmp_path / "out")
    assert shades(test) == [(1, 3), (0, 4)]
    assert shades(test.open_split("train")) == [(1, 1), (0, 2)]
    assert test.class_synonyms() == [["two", "deux"], ["ten"]]
    assert len(test.templates()) == 7

    # folders and names
    names.write_text("10\tten\n2\ttwo\n")
    result = build(source, tmp_path / "again", names=names)

    assert result["classes"] == ["two", "ten"]

    # one of the folders
    names.write_text("10\tten\n")
    result = build(source, tmp_path / "one", names=names)

    assert result == dict(classes=["ten"], left_out=1, test=1, train=1)
    assert shades(ClipBenchmarkSet(tmp_path / "one")) == [(0, 3)]


def test_wordnet_numbers_in_imagenets_order(tmp_path):
    rows = [line.split("\t") for line in WORDNET.read_text().splitlines()]

    assert len(rows) == 1000
    assert rows == sorted(rows)
    assert rows[0] == ["n01440764", "tench"]
    assert rows[999] == ["n15075141", "toilet paper"]

    for wordnet in ("n02099601", "n01443537", "n15075141"):  # a subset, as ImageNet-A has
        image(tmp_path / "in" / wordnet / "x.png", 5)
    result = build(tmp_path / "in", tmp_path / "out")

    assert result["classes"] == ["goldfish", "Golden Retriever", "toilet paper"]


def test_a_table(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.jpg", 40 * i)
    (tmp_path / "in.csv").write_text(
        "file,label,split\n0.jpg,dog,test\n1.jpg,cat,train\n2.jpg,cat,TEST\n3.jpg,dog,train\n"
    )

    result = build(tmp_path / "in.csv", tmp_path / "out")

    assert result == {"classes": ["cat", "dog"], "left_out": 0, "test": 2, "train": 2}
    assert [label for label, _ in shades(ClipBenchmarkSet(tmp_path / "out"))] == [1, 0]

    columns = dict(image_column="where", class_column="what")
    (tmp_path / "two.tsv").write_text("where\twhat\n0.jpg\tdog\n")
    result = build(tmp_path / "two.tsv", tmp_path / "two", **columns)

    assert result == {"classes": ["dog"], "left_out": 0, "test": 1}


def test_image_net_vid_robust_as_it_is_unpacked(tmp_path):
    """Two anchors, one with two neighbors, of which one is of another class."""
    root = tmp_path / "in"
    anchor = "val/v1/000020.JPEG"
    before = "val/v1/000011.JPEG"
    after = "val/v1/000025.JPEG"
    lone_anchor = "val/v2/000007.JPEG"
    for i, name in enumerate((anchor, before, after, lone_anchor)):
        image(root / name, 10 * i)
    metadata = {
        "metadata/pmsets.json": {anchor: [before, after], lone_anchor: []},
        "metadata/labels.json": {anchor: [1], before: [0], after: [1, 0], lone_anchor: [0]},
        "misc/imagenet_vid_class_index.json": {
            "1": ["n02", "giant_panda"],
            "0": ["n01", "airplane"],
        },
    }
    for name, value in metadata.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(value))

    result = build(root, tmp_path / "out")

    assert result == {"classes": ["airplane", "giant panda"], "left_out": 0, "test": 4}
    images = parse_evaluations([f"zero_shot(metric=pm):{tmp_path}/out"])[0].images
    frames = [images.frame(i) for i in range(4)]
    assert frames == [
        Frame(anchor, 0, (1,)),
        Frame(anchor, -9, (0,)),
        Frame(anchor, 5, (1, 0)),
        Frame(lone_anchor, 0, (0,)),
    ]

    (root / "metadata/labels.json").write_text(json.dumps({anchor: [1]}))

    with pytest.raises(ValueError, match="labels.json: no classes of val/v1/000011.JPEG"):
        build(root, tmp_path / "again")


def test_what_cannot_become_a_set(tmp_path):
    def refused(words, source, **options):
        with pytest.raises(ValueError, match=words):
            build(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    # a tree, with bad names
    tree = tmp_path / "in"
    image(tree / "ape" / "a.png", 1)
    names = written(tmp_path / "names.txt", "a\nb")
    refused("names.txt has 2 lines; the classes are 1: ape", tree, names=names)
    written(names, "bee\tbee")
    refused("names bee; there are no images", tree, names=names)
    written(names, "ape\t ")
    refused("has no name for ape", tree, names=names)
    refused("templates: unknown '8'", tree, prompts="8")

    # trees with bad images
    written(tree / "ape" / "b.jpg", "no picture")
    refused("ape/b.jpg: cannot read the image", tree)
    flat = image(tmp_path / "flat" / "a.png", 1).parent
    refused("no images in folders in it; it must be CLASS/image.jpg", flat)
    refused("not a source; it must be a folder", tmp_path / "nothing")

    # tables
    table = written(tmp_path / "in.csv", "file,thing\na.png,ape\n")
    refused("no column with a usual name for the class; .*--class-column", table)
    written(table, "file,class\na.png,\n")
    refused("row 1: it needs an image, a class and", table)
    written(table, "file,class,split\na.png,ape,train\n")
    refused("no rows of the split test", table)


def written(path, text):
    path.write_text(text)
    return path


def test_the_command(tmp_path, monkeypatch, capsys):
    source = tmp_path / "in"
    out = tmp_path / "out"
    image(source / "one_thing" / "x.png", 0)
    image(source / "another" / "x.png", 1)
    arguments = ["set", str(source), "--out", str(out), "--templates", "80"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])

    assert prepare.main() is None

    output = capsys.readouterr().out
    assert f"{out}: 2 classes: another, one thing\n  test: 2 images\n" in output
    assert f"zero_shot:{out}" in output
    assert len(ClipBenchmarkSet(out).templates()) == 80


def test_many_images_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "SHARD", 3)
    for i in range(7):
        image(tmp_path / "in" / "x" / f"{i}.png", i)

    build(tmp_path / "in", tmp_path / "out")

    assert (tmp_path / "out/test/nshards.txt").read_text() == "3\n"
    assert [shade for _, shade in shades(ClipBenchmarkSet(tmp_path / "out"))] == list(range(7))
