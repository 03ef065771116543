"""data/builders/pairs.py: folders and tables become shards, byte for byte and always the same; what
cannot
be used is skipped and named.

A conversion that fails or is broken off leaves nothing behind.
"""

import csv
import json
import sys

import numpy as np
import pytest

from glimpse.data.builders.pairs import convert
from glimpse.data.shards import Shards
from glimpse.tests.helpers.tiny import picture


def image(kind="png", seed=0):
    return picture("red circle", np.random.default_rng(seed), kind)


def samples(folder):
    shards = Shards([folder])
    return [
        (s.key, s.image, s.caption, json.loads(s.parts["json"])["source"])
        for s in (shards[i] for i in range(len(shards)))
    ]


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three good pairs below a folder, in the order of their paths."""
    (tmp_path / "in/b").mkdir(parents=True)
    for name, kind, seed in (
        ("in/a.JPG", "jpg", 0),
        ("in/b/c.v2.png", "png", 1),
        ("in/b/d.webp", "webp", 2),
    ):
        (tmp_path / name).write_bytes(image(kind, seed))
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf a caption with a BOM\n")
    (tmp_path / "in/b/c.v2.txt").write_text("Käse, zwei")
    (tmp_path / "in/b/d.json").write_text('{"text": "from json", "licence": "CC0"}')
    return tmp_path / "in"


def test_a_folder_is_stored_as_it_is(folder, tmp_path):
    result = convert([folder], tmp_path / "out", per_shard=2)

    assert samples(tmp_path / "out") == [
        ("000000001", image("jpg", 0), "a caption with a BOM", "a.JPG"),
        ("000000002", image("png", 1), "Käse, zwei", "b/c.v2.png"),
        ("000000003", image("webp", 2), "from json", "b/d.webp"),
    ]
    assert (result.written, result.skipped.total()) == (3, 0)
    assert [(row["name"], row["samples"]) for row in result.index["shards"]] == [
        ("pairs-00000.tar", 2),
        ("pairs-00001.tar", 1),
    ]


def test_two_conversions_are_identical(folder, tmp_path):
    outs = tmp_path / "one", tmp_path / "two"
    for out in outs:
        convert([folder], out, per_shard=2)
    first, second = (
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs
    )

    assert first == second
    assert len(first) == 5  # two tars, their tables, the index


def test_the_order_of_a_folder_is_that_of_names(tmp_path):
    for name in ("z/b", "z/a", "m/q/1", "m/c", "k/x", "a/x", "y"):  # made in another order
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/{name}.png").write_bytes(image())
        (tmp_path / f"in/{name}.txt").write_text(name)
    convert([tmp_path / "in"], tmp_path / "out")

    assert [caption for _, _, caption, _ in samples(tmp_path / "out")] == [
        "y",
        "a/x",
        "k/x",
        "m/c",
        "m/q/1",
        "z/a",
        "z/b",
    ]


def test_what_cannot_be_used_is_counted_and_named(folder, tmp_path):
    for name, content in (
        ("e.png", b""),
        ("g.gif", b"GIF89a"),
        ("h.jpg", b"<html>404"),
        ("n.png", image()),
        ("w.png", image()),
        ("._a.jpg", b"resource fork"),
        ("notes.md", b""),
    ):
        (folder / name).write_bytes(content)
    for name, caption in (("e", "x"), ("g", "x"), ("h", "x"), ("w", " \n")):
        (folder / f"{name}.txt").write_text(caption)
    (folder / "l.png").write_bytes(image())
    (folder / "l.json").write_text("[1]")
    result = convert([folder], tmp_path / "out")

    assert result.written == 3
    assert [line.split(": ")[:2] for line in result.named] == [
        ["e.png", "empty image"],
        ["g.gif", "the image is neither jpg, png nor webp"],
        ["h.jpg", "the image is neither jpg, png nor webp"],
        ["l.png", "no caption"],
        ["n.png", "no caption file beside it (same name, .txt or .json)"],
        ["w.png", "empty caption"],
    ]
    assert result.skipped["the image is neither jpg, png nor webp"] == 2
    assert [key for key, *_ in samples(tmp_path / "out")] == ["000000001", "000000008", "000000009"]


@pytest.mark.parametrize(
    "delimiter, name", [(",", "t.csv"), (";", "t.csv"), ("\t", "t.csv"), ("\t", "t.tsv")]
)
def test_a_table_of_paths(folder, tmp_path, delimiter, name):
    caption = 'a "quoted", caption\nof two lines'
    rows = [
        ["url", "Title", "FilePath"],
        ["u", caption, "a.JPG"],
        ["u", "absolute", str(folder / "b/d.webp")],
        ["u", "missing", "none.png"],
        ["u", "", "a.JPG"],
        ["u", "link", "https://host/x.png"],
        ["short row"],
    ]
    result = convert([write_csv(folder / name, rows, delimiter)], tmp_path / "out")

    assert [s[1:3] for s in samples(tmp_path / "out")] == [
        (image("jpg", 0), caption),
        (image("webp", 2), "absolute"),
    ]
    assert result.named == [
        f"{name} row 3 (none.png): No such file or directory",
        f"{name} row 4 (a.JPG): no caption",
        (
            f"{name} row 5 (https://host/x.png): the image is a URL; download the images first,"
            " e.g. with img2dataset"
        ),
        f"{name} row 6: no caption",
    ]


def test_parquet_tables_hold_bytes_paths_or_both(folder, tmp_path):
    plain = write_parquet(folder / "a.parquet", {"img": [image("png", 5)], "text": ["bytes"]})
    images = [{"bytes": image("png", 6), "path": "x.png"}, {"bytes": None, "path": "a.JPG"}, None]
    face = write_parquet(
        folder / "b.parquet",
        {"image": images, "caption": ["struct", "struct with a path", "no image"]},
    )
    result = convert([plain, face], tmp_path / "out")

    assert [s[1:] for s in samples(tmp_path / "out")] == [
        (image("png", 5), "bytes", "a.parquet row 1"),
        (image("png", 6), "struct", "b.parquet row 1 (x.png)"),
        (image("jpg", 0), "struct with a path", "b.parquet row 2 (a.JPG)"),
    ]
    assert result.named == ["b.parquet row 3: no image"]


def test_columns_by_name(folder, tmp_path):
    table = write_csv(
        folder / "t.csv",
        [["image", "caption", "photo", "alt"], ["none.png", "wrong", "a.JPG", "right"]],
    )
    convert([table], tmp_path / "out", image_column="photo", caption_column="alt")

    assert [s[1:3] for s in samples(tmp_path / "out")] == [(image("jpg", 0), "right")]


def test_progress_sees_every_row(folder, tmp_path):
    seen, totals = [], []

    def progress(rows, total):
        totals.append(total)
        for row in rows:
            seen.append(row[0])
            yield row

    convert(
        [folder, write_csv(folder / "t.csv", [["image", "caption"], ["a.JPG", "x"]])],
        tmp_path / "out",
        progress=progress,
    )

    assert seen == ["a.JPG", "b/c.v2.png", "b/d.webp", "t.csv row 1 (a.JPG)"]
    assert totals == [4]


def bad_inputs(folder):
    (folder / "no.csv").write_text("url,words\nu,w\n")
    (folder / "empty.csv").write_text("")
    (folder / "latin.csv").write_bytes("image,caption\na.JPG,Käse\n".encode("latin1"))
    (folder / "nothing.csv").write_text("image,caption\nnone.png,x\n")
    (folder / "no.parquet").write_bytes(b"not a table")
    (folder / "x.xlsx").write_bytes(b"")
    (folder / "tables").mkdir()
    (folder / "tables/a.csv").write_text("")
    write_parquet(folder / "list.parquet", {"image": ["a.JPG"], "caption": [["one", "two"]]})
    return {
        "no.csv": ["image", "its columns: url, words", "--image-column"],
        "empty.csv": ["its columns: none"],
        "latin.csv": ["not UTF-8", "iconv"],
        "nothing.csv": ["nothing to write", "nothing.csv row 1 (none.png): No such file"],
        "no.parquet": ["no.parquet", "Parquet"],
        "x.xlsx": ["not a source", ".csv"],
        "tables": ["no images below it", "tables/a.csv"],
        "gone": ["no such file or folder"],
        "list.parquet": ["the caption is of type list"],
    }


def test_bad_sources_are_told_and_leave_nothing(folder, tmp_path):
    for name, expected in bad_inputs(folder).items():
        with pytest.raises(ValueError) as error:
            convert([folder / name], tmp_path / "out")
        assert all(part in str(error.value) for part in expected), (name, str(error.value))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"], name


def test_bad_settings_are_told(folder, tmp_path, monkeypatch):
    table = write_csv(folder / "t.csv", [["image", "caption"], ["a.JPG", "x"]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")

    for options, expected in (
        (dict(caption_column="words"), "no column 'words'; its columns: image, caption"),
        (dict(per_shard=0), "--per-shard: 0"),
        (dict(out=tmp_path / "full"), "not an empty folder"),
    ):
        with pytest.raises(ValueError, match=expected):
            convert([table], **{"out": tmp_path / "out", **options})
    assert (tmp_path / "full/precious").exists()

    parquet = write_parquet(folder / "a.parquet", {"image": ["a.JPG"], "caption": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(ValueError, match="pip install pyarrow"):
        convert([parquet], tmp_path / "out")


def test_an_empty_folder_is_filled_and_a_broken_off_conversion_leaves_none(folder, tmp_path):
    (tmp_path / "out").mkdir()
    convert([folder], tmp_path / "out")

    assert len(samples(tmp_path / "out")) == 3

    def break_off(rows, total):
        yield next(iter(rows))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([folder], tmp_path / "later", progress=break_off)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
