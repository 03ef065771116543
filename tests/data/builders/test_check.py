"""data/builders/check.py: each fault in a folder of shards is reported, the figures are exact, and
a clean folder is ready.
"""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glimpse.data.builders.check import check, describe, human_bytes, spread
from glimpse.data.shards import build_index, write_shard
from glimpse.tests.helpers.tiny import picture


def pair(i, kind="png", **parts):
    return f"{i:04d}", {
        kind: picture("blue square", np.random.default_rng(i), kind),
        "txt": b"a " * (i % 3) + b"square",
        **parts,
    }


@pytest.fixture
def folder(tmp_path):
    """Three indexed shards of 4, 4 and 2 good samples."""
    write_shard(tmp_path / "0.tar", [pair(i) for i in range(4)])
    write_shard(tmp_path / "1.tar", [pair(i, "jpg") for i in range(4)])
    write_shard(tmp_path / "2.tar", [pair(i, "webp") for i in range(2)])
    build_index(tmp_path)
    return tmp_path


def faults(folder, **options):
    report = check(folder, **options)
    return report, report.faults(0.01), describe(report, 0.01, readers=4)


def test_a_clean_folder_is_ready(folder):
    report, problems, text = faults(folder)

    assert problems == []
    assert f"ready: train with --set data.train={folder}" in text
    assert report.found.counts == Counter(seen=10, read=10)
    assert report.found.kinds == dict(png=4, jpg=4, webp=2)
    assert report.found.widths == {48: 10}
    assert report.found.heights == {40: 10}
    assert report.found.words == {1: 5, 2: 3, 3: 2}
    assert report.found.per_shard == {4: 2, 2: 1}
    assert report.sizes == [(folder / f"{i}.tar").stat().st_size for i in range(3)]
    assert "2 / 4 / 4 samples" in text
    assert "1 / 1 / 3 words" in text
    assert "48 / 48 / 48 pixels wide, 40 / 40 / 40 high" in text
    assert "index        up to date" in text
    assert "3 are too few" in text


def test_unreadable_samples_are_named_and_counted_against_the_limit(folder):
    cut = picture("red cross", np.random.default_rng(0), "jpg")[:200]
    samples = [
        pair(0),
        ("cut", {"jpg": cut, "txt": b"x"}),
        ("alone", {"jpg": cut}),
        ("list", {"json": b"[]", "png": pair(1)[1]["png"]}),
        ("html", {"jpg": b"<html>", "txt": b"x"}),
    ]
    write_shard(folder / "1.tar", samples)
    build_index(folder)

    report, problems, text = faults(folder)

    shards_and_keys = [line.split()[:2] for line in sorted(report.found.unreadable)]
    expected_keys = ("alone", "cut", "html", "list")
    assert shards_and_keys == [["1.tar", key] for key in expected_keys]
    assert problems == ["36.36% of the samples cannot be read, and data.max_bad is 1.00%"]
    assert "1.tar  html  cannot read the image" in text
    assert text.endswith(f"not ready: {problems[0]}")
    assert report.faults(0.37) == []


def test_empty_captions_and_repeated_keys_are_told_but_pass(folder):
    empty = dict(pair(5)[1], txt=b" \n")
    # 6 comes back later, 8 follows itself
    write_shard(folder / "0.tar", [("e", empty), pair(6), pair(7), pair(6), pair(8), pair(8)])
    build_index(folder)
    report, problems, text = faults(folder)

    assert problems == []
    assert report.found.empty == ["0.tar  e"]
    assert sorted(report.found.repeated) == ["0.tar  0006", "0.tar  0008"]
    assert "no caption   1 sample" in text
    assert "repeated key 2 samples" in text


def test_a_gif_that_calls_itself_jpg_counts_as_other(folder):
    path = folder / "x.gif"
    Image.new("RGB", (9, 9)).save(path)
    write_shard(folder / "2.tar", [("gif", {"jpg": path.read_bytes(), "txt": b"x"})])
    build_index(folder)

    report, _problems, _text = faults(folder)

    assert report.found.kinds["other"] == 1


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "truncated"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:4096] + b"x" * 600),
            "no header at byte 4096",
        ),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: write_shard(path, []), "empty shard"),
        (lambda path: write_shard(path, [("a", {"txt": b"x"})]), "no images (has txt"),
        (
            lambda path: write_shard(path, [("a", {"jpg": b"x", "cls": b"1"})]),
            "no captions (has cls, jpg;",
        ),
    ],
)
def test_a_shard_that_training_refuses_is_named(folder, spoil, expected):
    spoil(folder / "1.tar")
    report, problems, text = faults(folder)

    assert len(report.found.refused) == 1
    assert expected in next(iter(report.found.refused))
    assert "1.tar" in text
    assert "training refuses 1 shard" in problems


def test_an_index_that_is_not_that_of_the_files(folder):
    # the same number of samples, at other positions
    write_shard(folder / "1.tar", [pair(i, "jpg") for i in (1, 0, 2, 3)])

    _report, problems, text = faults(folder)

    assert problems == ["the index is stale"]
    assert "1.tar: changed since it was indexed; run: run/prepare.py index" in text

    (folder / "1.tar").unlink()

    assert faults(folder)[1] == ["the index is stale"]

    index = json.loads((folder / "shards.index.json").read_text())
    (folder / "shards.index.json").write_text(json.dumps(index | dict(version=0)))

    assert "version 0" in faults(folder)[2]


def test_no_index_is_no_fault_and_none_is_made(folder):
    (folder / "shards.index.json").unlink()

    _report, problems, text = faults(folder)

    assert problems == []
    assert "index        none yet" in text
    assert not (folder / "shards.index.json").exists()


def test_a_sample_is_spread_over_the_shards(folder):
    report, _problems, _text = faults(folder, sample=3)

    assert report.found.counts == Counter(seen=10, read=3)
    assert report.looked == 3
    assert report.found.kinds == dict(png=1, jpg=1, webp=1)

    report, _problems, text = faults(folder, sample=2)

    assert report.looked == 2
    assert report.found.counts["read"] == 2
    assert "6 samples in the 2 shards looked at" in text
    assert check(folder, sample=8).found.counts["read"] == 3 + 3 + 2
    assert check(folder, sample=1000).found.counts["read"] == 10
    with pytest.raises(ValueError, match="--sample: 0"):
        check(folder, sample=0)


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(ValueError, match="no \\*.tar in it"):
        check(tmp_path)


def test_figures():
    assert spread(Counter({5: 3, 1: 1, 9: 2})) == "1 / 5 / 9"
    assert spread(Counter({2: 1})) == "2 / 2 / 2"
    assert human_bytes(0) == "0 bytes"
    assert human_bytes(999) == "999 bytes"
    assert human_bytes(1000) == "1.0 kB"
    assert human_bytes(1_234_567) == "1.2 MB"
    assert human_bytes(5 * 10**14) == "500.0 TB"
