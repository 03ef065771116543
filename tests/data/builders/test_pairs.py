"""data/builders/pairs.py: folders and tables become shards, byte for byte and always the same; rows
that cannot be used are skipped and listed.

A conversion that fails or is interrupted leaves nothing behind.
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
    """Return (key, image, caption, source) of each sample."""
    shards = Shards([folder])
    rows = []
    for i in range(len(shards)):
        sample = shards[i]
        source = json.loads(sample.files["json"])["source"]
        rows.append((sample.key, sample.image, sample.caption, source))
    return rows


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
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "a.JPG").write_bytes(image("jpg", 0))
    (folder / "b/c.v2.png").write_bytes(image("png", 1))
    (folder / "b/d.webp").write_bytes(image("webp", 2))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf a caption with a BOM\n")
    (folder / "b/c.v2.txt").write_text("Käse, zwei")
    (folder / "b/d.json").write_text('{"text": "from json", "licence": "CC0"}')
    return folder


def test_a_folder_is_stored_as_it_is(folder, tmp_path):
    result = convert([folder], tmp_path / "out", per_shard=2)

    assert samples(tmp_path / "out") == [
        ("000000001", image("jpg", 0), "a caption with a BOM", "a.JPG"),
        ("000000002", image("png", 1), "Käse, zwei", "b/c.v2.png"),
        ("000000003", image("webp", 2), "from json", "b/d.webp"),
    ]
    assert (result.written, result.skipped.total()) == (3, 0)
    shards = [(row["name"], row["samples"]) for row in result.index["shards"]]
    assert shards == [("pairs-00000.tar", 2), ("pairs-00001.tar", 1)]


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_two_conversions_are_identical(folder, tmp_path):
    for out in ("one", "two"):
        convert([folder], tmp_path / out, per_shard=2)

    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    assert len(first) == 5  # two tars, their tables, the index


def test_the_order_of_a_folder_is_that_of_names(tmp_path):
    for name in ("z/b", "z/a", "m/q/1", "m/c", "k/x", "a/x", "y"):  # written in another order
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(image())
        path.with_suffix(".txt").write_text(name)

    convert([tmp_path / "in"], tmp_path / "out")

    captions = [caption for _, _, caption, _ in samples(tmp_path / "out")]
    assert captions == ["y", "a/x", "k/x", "m/c", "m/q/1", "z/a", "z/b"]


def test_what_cannot_be_used_is_counted_and_named(folder, tmp_path):
    files = {
        "e.png": b"",
        "g.gif": b"GIF89a",
        "h.jpg": b"<html>404",
        "n.png": image(),
        "w.png": image(),
        "._a.jpg": b"resource fork",
        "notes.md": b"",
        "e.txt": b"x",
        "g.txt": b"x",
        "h.txt": b"x",
        "w.txt": b" \n",
        "l.png": image(),
        "l.json": b"[1]",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    result = convert([folder], tmp_path / "out")

    assert result.written == 3
    skipped = [line.split(": ")[:2] for line in result.named]
    assert skipped == [
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
    table = write_csv(folder / name, rows, delimiter)

    result = convert([table], tmp_path / "out")

    pairs = [sample[1:3] for sample in samples(tmp_path / "out")]
    assert pairs == [
        (image("jpg", 0), caption),
        (image("webp", 2), "absolute"),
    ]
    url_message = "the image is a URL; download the images first, e.g. with img2dataset"
    assert result.named == [
        f"{name} row 3 (none.png): No such file or directory",
        f"{name} row 4 (a.JPG): no caption",
        f"{name} row 5 (https://host/x.png): {url_message}",
        f"{name} row 6: no caption",
    ]


def test_parquet_tables_hold_bytes_paths_or_both(folder, tmp_path):
    plain = write_parquet(folder / "a.parquet", {"img": [image("png", 5)], "text": ["bytes"]})
    images = [{"bytes": image("png", 6), "path": "x.png"}, {"bytes": None, "path": "a.JPG"}, None]
    captions = ["struct", "struct with a path", "no image"]
    face = write_parquet(folder / "b.parquet", {"image": images, "caption": captions})

    result = convert([plain, face], tmp_path / "out")

    rows = [sample[1:] for sample in samples(tmp_path / "out")]
    assert rows == [
        (image("png", 5), "bytes", "a.parquet row 1"),
        (image("png", 6), "struct", "b.parquet row 1 (x.png)"),
        (image("jpg", 0), "struct with a path", "b.parquet row 2 (a.JPG)"),
    ]
    assert result.named == ["b.parquet row 3: no image"]


def test_columns_by_name(folder, tmp_path):
    rows = [["image", "caption", "photo", "alt"], ["none.png", "wrong", "a.JPG", "right"]]
    table = write_csv(folder / "t.csv", rows)

    convert([table], tmp_path / "out", image_column="photo", caption_column="alt")

    [sample] = samples(tmp_path / "out")
    assert sample[1:3] == (image("jpg", 0), "right")


def test_progress_sees_every_row(folder, tmp_path):
    names = []
    totals = []

    def progress(rows, total):
        totals.append(total)
        for row in rows:
            names.append(row[0])
            yield row

    table = write_csv(folder / "t.csv", [["image", "caption"], ["a.JPG", "x"]])

    convert([folder, table], tmp_path / "out", progress=progress)

    assert names == ["a.JPG", "b/c.v2.png", "b/d.webp", "t.csv row 1 (a.JPG)"]
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
        message = str(error.value)
        for part in expected:
            assert part in message, name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"], name


def test_bad_settings_are_told(folder, tmp_path, monkeypatch):
    table = write_csv(folder / "t.csv", [["image", "caption"], ["a.JPG", "x"]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")

    missing_column = "no column 'words'; its columns: image, caption"
    with pytest.raises(ValueError, match=missing_column):
        convert([table], tmp_path / "out", caption_column="words")
    with pytest.raises(ValueError, match="--per-shard: 0"):
        convert([table], tmp_path / "out", per_shard=0)
    with pytest.raises(ValueError, match="not an empty folder"):
        convert([table], tmp_path / "full")
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
