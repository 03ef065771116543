"""Classified images of one's own, as a tree or a table, become an evaluation set.

bash run/test.sh tests/data/builders/test_imagefolder.py
"""

import json
import sys

import pytest
from PIL import Image

from glimpse.data.builders.imagefolder import WORDNET, build
from glimpse.data.builders.packaged import build as packaged
from glimpse.data.evals.clip_benchmark import Benchmark, Frame
from glimpse.data.transforms import decode
from glimpse.run import prepare
from glimpse.run.evals import parse


def image(path, shade, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (shade, shade, 0)).save(path, kind)
    return path


def shades(images):
    """(class, shade of the picture) of each image."""
    return [(images.label(i), int(decode(images.image(i))[0, 0, 0])) for i in range(len(images))]


def test_a_tree_without_splits(tmp_path):
    for name, shade in (
        ("red_panda/b.png", 20),
        ("red_panda/more/a.webp", 30),
        ("ape/z.bmp", 10),
        ("ape/notes.txt", 0),
    ):
        if name.endswith("txt"):
            (tmp_path / "in" / name).write_text("not an image")
        else:
            image(tmp_path / "in" / name, shade, "WEBP" if "webp" in name else None)

    assert build(tmp_path / "in", tmp_path / "out") == {
        "classes": ["ape", "red panda"],
        "left_out": 0,
        "test": 3,
    }

    images = parse([f"zero_shot:{tmp_path}/out"])[0].images

    assert images.prompts() == [["a photo of a ape."], ["a photo of a red panda."]]
    assert shades(images) == [(0, 10), (1, 20), (1, pytest.approx(30, abs=2))]
    assert images.image(0).startswith(b"\x89PNG")
    assert images.image(1) == (tmp_path / "in/red_panda/b.png").read_bytes()


def test_a_tree_with_splits_and_numbers(tmp_path):
    """Classes 2 and 10 in the order of numbers; validation is what is tested where there is no
    test.
    """
    for split, label, shade in (
        ("train", "10", 1),
        ("train", "2", 2),
        ("val", "10", 3),
        ("val", "2", 4),
    ):
        image(tmp_path / "in" / split / label / "x.png", shade)
    (tmp_path / "names.txt").write_text("two;deux\nten\n")
    result = build(tmp_path / "in", tmp_path / "out", names=tmp_path / "names.txt", prompts="7")

    assert result == {"classes": ["two;deux", "ten"], "left_out": 0, "test": 2, "train": 2}

    test = Benchmark(tmp_path / "out")

    assert shades(test) == [(1, 3), (0, 4)]
    assert shades(test.other("train")) == [(1, 1), (0, 2)]
    assert test.names() == [["two", "deux"], ["ten"]]
    assert len(test.templates()) == 7

    (tmp_path / "names.txt").write_text("10\tten\n2\ttwo\n")

    assert build(tmp_path / "in", tmp_path / "again", names=tmp_path / "names.txt")["classes"] == [
        "two",
        "ten",
    ]

    (tmp_path / "names.txt").write_text("10\tten\n")

    assert build(tmp_path / "in", tmp_path / "one", names=tmp_path / "names.txt") == dict(
        classes=["ten"], left_out=1, test=1, train=1
    )
    assert shades(Benchmark(tmp_path / "one")) == [(0, 3)]


def test_wordnet_numbers_in_imagenets_order(tmp_path):
    rows = [line.split("\t") for line in WORDNET.read_text().splitlines()]

    assert len(rows) == 1000
    assert rows == sorted(rows)
    assert rows[0] == ["n01440764", "tench"]
    assert rows[999] == ["n15075141", "toilet paper"]

    for wordnet in ("n02099601", "n01443537", "n15075141"):  # a subset, as ImageNet-A has
        image(tmp_path / "in" / wordnet / "x.png", 5)

    assert build(tmp_path / "in", tmp_path / "out")["classes"] == [
        "goldfish",
        "Golden Retriever",
        "toilet paper",
    ]


def test_a_table(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.jpg", 40 * i)
    (tmp_path / "in.csv").write_text(
        "file,label,split\n0.jpg,dog,test\n1.jpg,cat,train\n2.jpg,cat,TEST\n3.jpg,dog,train\n"
    )

    assert build(tmp_path / "in.csv", tmp_path / "out") == {
        "classes": ["cat", "dog"],
        "left_out": 0,
        "test": 2,
        "train": 2,
    }
    assert [label for label, _ in shades(Benchmark(tmp_path / "out"))] == [1, 0]

    (tmp_path / "two.tsv").write_text("where\twhat\n0.jpg\tdog\n")
    result = build(
        tmp_path / "two.tsv", tmp_path / "two", image_column="where", class_column="what"
    )

    assert result == {"classes": ["dog"], "left_out": 0, "test": 1}


def test_image_net_vid_robust_as_it_is_unpacked(tmp_path):
    """Two anchors, one with two neighbours; the class of a neighbour of the first is not its
    own.
    """
    root, first = tmp_path / "in", "val/v1/000020.JPEG"
    for i, name in enumerate(
        (first, "val/v1/000011.JPEG", "val/v1/000025.JPEG", "val/v2/000007.JPEG")
    ):
        image(root / name, 10 * i)
    for name, value in (
        (
            "metadata/pmsets.json",
            {first: ["val/v1/000011.JPEG", "val/v1/000025.JPEG"], "val/v2/000007.JPEG": []},
        ),
        (
            "metadata/labels.json",
            {
                first: [1],
                "val/v1/000011.JPEG": [0],
                "val/v1/000025.JPEG": [1, 0],
                "val/v2/000007.JPEG": [0],
            },
        ),
        (
            "misc/imagenet_vid_class_index.json",
            {"1": ["n02", "giant_panda"], "0": ["n01", "airplane"]},
        ),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(value))

    assert build(root, tmp_path / "out") == {
        "classes": ["airplane", "giant panda"],
        "left_out": 0,
        "test": 4,
    }

    images = parse([f"zero_shot(metric=pm):{tmp_path}/out"])[0].images

    assert [images.frame(i) for i in range(4)] == [
        Frame(first, 0, (1,)),
        Frame(first, -9, (0,)),
        Frame(first, 5, (1, 0)),
        Frame("val/v2/000007.JPEG", 0, (0,)),
    ]

    (root / "metadata/labels.json").write_text(json.dumps({first: [1]}))

    with pytest.raises(ValueError, match="labels.json: no classes of val/v1/000011.JPEG"):
        build(root, tmp_path / "again")


def test_what_cannot_become_a_set(tmp_path):
    def refused(words, source, **how):
        with pytest.raises(ValueError, match=words):
            build(source, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()

    image(tmp_path / "in" / "ape" / "a.png", 1)
    refused(
        "names.txt has 2 lines; the classes are 1: ape",
        tmp_path / "in",
        names=written(tmp_path / "names.txt", "a\nb"),
    )
    refused(
        "names bee; there are no images",
        tmp_path / "in",
        names=written(tmp_path / "names.txt", "bee\tbee"),
    )
    refused("has no name for ape", tmp_path / "in", names=written(tmp_path / "names.txt", "ape\t "))
    refused("templates: '8'", tmp_path / "in", prompts="8")
    written(tmp_path / "in" / "ape" / "b.jpg", "no picture")
    refused("ape/b.jpg: cannot read the image", tmp_path / "in")
    refused(
        "no images in folders in it; it must be CLASS/image.jpg",
        image(tmp_path / "flat" / "a.png", 1).parent,
    )
    refused("not a source; it must be a folder", tmp_path / "nothing")
    refused(
        "no column with a usual name for the class; .*--class-column",
        written(tmp_path / "in.csv", "file,thing\na.png,ape\n"),
    )
    refused(
        "row 1: it needs an image, a class and",
        written(tmp_path / "in.csv", "file,class\na.png,\n"),
    )
    refused(
        "no rows of the split test",
        written(tmp_path / "in.csv", "file,class,split\na.png,ape,train\n"),
    )


def written(path, text):
    path.write_text(text)
    return path


def test_the_command(tmp_path, monkeypatch, capsys):
    for i, label in enumerate(("one_thing", "another")):
        image(tmp_path / "in" / label / "x.png", i)
    arguments = ["set", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--templates", "80"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])

    assert prepare.main() is None

    output = capsys.readouterr().out

    assert f"{tmp_path}/out: 2 classes: another, one thing\n  test: 2 images\n" in output
    assert f"zero_shot:{tmp_path}/out" in output
    assert len(Benchmark(tmp_path / "out").templates()) == 80


def test_many_images_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "SHARD", 3)
    for i in range(7):
        image(tmp_path / "in" / "x" / f"{i}.png", i)
    build(tmp_path / "in", tmp_path / "out")

    assert (tmp_path / "out/test/nshards.txt").read_text() == "3\n"
    assert [shade for _, shade in shades(Benchmark(tmp_path / "out"))] == list(range(7))
