"""Shards: samples are read as they were written, with the help of an index.

The order of a run is a pure function that visits every sample once an epoch.

    bash run/test.sh tests/data/test_shards.py
"""

import hashlib
import json
import os
import pickle
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import base_plus_ext

from glimpse.data.shards import (
    Order,
    Sample,
    Shards,
    build_index,
    list_files,
    read_index,
    replace_json,
    split_name,
    write_shard,
)


def make_samples(count, start=0):
    """Samples of different sizes, with several extensions, and keys with folders and dots."""
    samples = []
    for i in range(start, start + count):
        files = {
            "jpg": bytes([i % 256]) * (i * 97 % 2000),
            "txt": b"caption %d" % i,
            "seg.png": b"s" * (i % 5),
        }
        samples.append((f"part.{i % 3}/{i:04d}", files))
    return samples


@pytest.fixture
def folder(tmp_path):
    """Three shards of 7, 5 and 9 samples."""
    for n, (start, count) in enumerate(((0, 7), (7, 5), (12, 9))):
        assert write_shard(tmp_path / f"{n:05d}.tar", make_samples(count, start)) == count
    return tmp_path


def test_several_jobs_may_index_a_folder_at_once(tmp_path):
    path = tmp_path / "index.json"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: replace_json(path, [n] * 1000), range(400)))

    assert len(json.loads(path.read_text())) == 1000
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_read(folder):
    shards = Shards([folder])

    assert len(shards) == 21
    for i, (key, files) in enumerate(make_samples(21)):
        shard = f"{(i >= 7) + (i >= 12):05d}.tar"
        assert shards[i] == Sample(shard, key, files)
        assert shards.name(i) == (shard, key)
        assert shards[i].caption == f"caption {i}"
        assert shards[i].image == files["jpg"]
    copy = pickle.loads(pickle.dumps(shards))
    assert copy[13] == shards[13], "pickled, as for worker processes that are not forked"

    twice = Shards([folder, folder])
    assert len(twice) == 42
    assert twice[41] == twice[20]


def test_some_shards_of_a_folder(folder):
    """Braces select shards, each once, in the order of the index."""
    selection = Shards([str(folder / "{00002,00000,00002}.tar")])

    assert [path.name for path in selection.paths] == ["00000.tar", "00002.tar"]
    assert len(selection) == 16
    keys = [key for key, _ in make_samples(21)]
    assert [selection[i].key for i in range(16)] == keys[:7] + keys[12:]

    assert Shards([f"{folder}/{{00000..00002}}.tar"]).paths == Shards([folder]).paths
    assert len(Shards([folder / "00001.tar"])) == 5
    with pytest.raises(
        ValueError,
        match=r"00003\.tar: no such shard; the folder has 3, 00000\.tar to 00002\.tar; see"
        r" data\.train",
    ):
        Shards([f"{folder}/{{00001..00003}}.tar"])
    with pytest.raises(ValueError, match=r"Unbalanced braces.*see data\.train"):
        Shards([f"{folder}/{{00001.tar"])


def test_only_some_members_are_read(folder, monkeypatch):
    """Reading a label or a caption does not read the image."""
    shards = Shards([folder])
    key, files = make_samples(21)[20]
    sizes = []
    pread = os.pread

    def recording_pread(file, count, offset):
        sizes.append(count)
        return pread(file, count, offset)

    monkeypatch.setattr("os.pread", recording_pread)

    sample = shards.read(20, extensions=("cls", "txt"))

    assert sample == Sample("00002.tar", key, {"txt": files["txt"]})
    assert sizes == [len(files["txt"])]
    assert shards.read(20, extensions=("cls",)).files == files, (
        "without a match all files are read, so that messages can list them"
    )


def test_same_samples_same_bytes(tmp_path):
    """Shards contain no time and no owner, in USTAR format: any release of tarfile agrees."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", iter(make_samples(9)))

    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    assert hashlib.sha256(data).hexdigest()[:16] == "8a4cfec20ed7b025"
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert member.mtime == member.uid == member.gid == 0
            assert member.uname == ""
            assert member.mode == 0o644


def test_a_failed_write_leaves_no_shard(tmp_path):
    def failing_samples():
        yield from make_samples(2)
        raise OSError("the disk is full")

    with pytest.raises(OSError):
        write_shard(tmp_path / "0.tar", failing_samples())
    assert not list(tmp_path.glob("*.tar"))


def test_index(folder):
    index = build_index(folder)

    assert [row["name"] for row in index["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [row["samples"] for row in index["shards"]] == [7, 5, 9]
    samples = dict(make_samples(21))
    for row in index["shards"]:
        path = folder / row["name"]
        data = path.read_bytes()
        assert row["bytes"] == len(data)
        assert row["extensions"] == dict.fromkeys(("jpg", "seg.png", "txt"), row["samples"])
        table = json.loads((folder / "shards.index" / f"{path.name}.json").read_text())
        for key, files in table:
            content = {}
            for extension, (offset, size) in files.items():
                content[extension] = data[offset : offset + size]
            assert content == samples[key]
    assert read_index(folder) == index, "the index is stored"


def test_stale_index(folder):
    build_index(folder)

    # A new shard.
    write_shard(folder / "00003.tar", make_samples(2))
    with pytest.raises(ValueError, match=r"00003\.tar.*prepare\.py index"):
        Shards([folder])
    build_index(folder)
    assert len(Shards([folder])) == 23

    # A missing shard.
    (folder / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"00000\.tar"):
        Shards([folder])

    # An index of another version.
    saved = folder / "shards.index.json"
    saved.write_text(json.dumps(dict(json.loads(saved.read_text()), version=0)))
    with pytest.raises(ValueError, match="version 0"):
        Shards([folder])


def test_a_shard_that_became_shorter_is_named(folder):
    shards = Shards([folder])
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:8000])

    assert shards[7].key == "part.1/0007"
    with pytest.raises(ValueError, match="00001.tar: shorter than in its index"):
        shards[11]


@pytest.mark.parametrize("keep", [300, 700, 1024, 2048, 9000])
def test_a_tar_cut_off_anywhere_is_refused(tmp_path, keep):
    """Within a header, within a file, and at the beginning of a header."""
    write_shard(tmp_path / "0.tar", make_samples(9, start=3))
    data = (tmp_path / "0.tar").read_bytes()
    assert keep < len(data)
    cut = data[:keep]
    if keep % 512 == 0:  # at the beginning of a header: put garbage there
        cut += b"x" * 512
    (tmp_path / "0.tar").write_bytes(cut)

    with pytest.raises(ValueError, match="0.tar: truncated or not a tar"):
        list_files(tmp_path / "0.tar")


@pytest.mark.parametrize(
    "name", ["0017.jpg", "a.b/0017.seg.png", "a.b/c.d/x.JPG", "./0001.txt", "/abs.olute/key.a.b.c"]
)
def test_names_split_as_webdataset_splits(name):
    key, extension = base_plus_ext(name)

    assert split_name(name) == (key, extension.lower())


def test_webdataset_reads_what_we_write(folder):
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(folder / "00002.tar")]), webdataset.tarfile_to_samples()
    )

    samples = []
    for sample in pipeline:
        files = {key: value for key, value in sample.items() if isinstance(value, bytes)}
        samples.append((sample["__key__"], files))

    assert samples == make_samples(9, start=12)


def test_we_read_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, files in make_samples(6):
            writer.write({"__key__": key, **files})

    shards = Shards([tmp_path])

    assert [(shards[i].key, shards[i].files) for i in range(6)] == make_samples(6)


def test_captions():
    def caption(**files):
        return Sample("s", "k", files).caption

    assert caption(json=b'{"TEXT": " b ", "url": 1}') == "b"
    assert caption(txt=b" a\n", json=b'{"caption": "c"}') == "a"
    assert caption(txt=b"caf\xe9") == "caf\ufffd", (
        "a caption in another encoding does not make the sample unreadable"
    )
    several = Sample("s", "k", {"json": b'{"caption": [" title ", "", "description"]}'})
    assert several.captions == ["title", "description"]
    assert Sample("s", "k", {"json": b'{"caption": [" "]}'}).captions == [""]
    for broken in (
        {"json": b"[]"},
        {"json": b"{"},
        {"json": b'{"caption": null}'},
        {"json": b'{"caption": [1]}'},
        {},
    ):
        with pytest.raises(ValueError):
            caption(**broken)


COUNTS = [7, 1, 5, 9, 3, 12, 4]


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_every_sample_once_an_epoch(window):
    order = Order(COUNTS, 3, window)
    total = sum(COUNTS)

    draws = [order(position) for position in range(4 * total)]

    assert [epoch for epoch, _ in draws] == [position // total for position in range(4 * total)]
    samples = [i for _, i in draws]
    epochs = [tuple(samples[start : start + total]) for start in range(0, 4 * total, total)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(total))
    assert len(set(epochs)) == 4, "epochs differ"

    shuffled = np.random.default_rng(0).permutation(4 * total)
    copy = pickle.loads(pickle.dumps(order))
    assert [copy(position) for position in shuffled] == [
        draws[position] for position in shuffled
    ], "the order does not depend on earlier calls or the process"

    other = Order(COUNTS, 4, window)
    assert [other(position) for position in range(total)] != draws[:total], "the seed matters"


def test_a_window_reads_few_shards_at_a_time():
    """Samples are mixed within a window, and only its shards are open."""
    order = Order(COUNTS, 0, 3)
    total = sum(COUNTS)
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)

    shards = [shard_of[order(position)[1]] for position in range(total)]

    spans = []
    for shard in set(shards):
        first = shards.index(shard)
        last = total - 1 - shards[::-1].index(shard)
        spans.append((first, last))
    open_counts = [sum(first <= p <= last for first, last in spans) for p in range(total)]
    assert max(open_counts) == 3, "three shards are open at a time"
    assert shards != sorted(shards, key=shards.index), "and mixed"


def test_memory_is_not_needed_for_the_order():
    """A position far into a long run needs one window, not all earlier epochs."""
    epoch, sample = Order([10_000] * 300, 0, 16)(12_800_000_000 - 1)

    assert epoch == 12_800_000_000 // 3_000_000
    assert 0 <= sample < 3_000_000


def test_an_empty_folder_and_an_empty_shard(tmp_path):
    with pytest.raises(ValueError, match="no \\*.tar"):
        build_index(tmp_path)
    (tmp_path / "0.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="an empty shard"):
        build_index(tmp_path)
    (tmp_path / "1.tar").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="(?s)2 of 2 shards.*0.tar.*1.tar"):
        build_index(tmp_path)
