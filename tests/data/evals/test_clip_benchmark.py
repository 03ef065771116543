"""Sets in CLIP_benchmark's layout: errors name the set, the sample and its file, in one line.

Run: pytest tests/data/evals/test_clip_benchmark.py
"""

import io

import pytest
from PIL import Image

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.shards import write_shard


def encode_png():
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    return file.getvalue()


def make_set(folder, **contents):
    """Make a set of one sample, a, with a png and files of these contents; seg_png is seg.png."""
    files = {"png": encode_png()}
    for name, content in contents.items():
        files[name.replace("_", ".")] = content
    (folder / "set/test").mkdir(parents=True)
    write_shard(folder / "set/test/0.tar", [("a", files)])
    return ClipBenchmarkSet(folder / "set")


@pytest.mark.parametrize(
    "contents, method, message",
    [
        (dict(cls=b"cat"), "label", "the class of 0.tar a is 'cat'; it must be a number"),
        (
            dict(cls=b"0"),
            "captions",
            r"0.tar a: its captions cannot be read \(no caption: has png, cls",
        ),
        (
            dict(txt=b" \n"),
            "captions",
            r"0.tar a: its captions cannot be read \(all of them are empty",
        ),
        (
            dict(json=b"{bad"),
            "captions",
            r"0.tar a: its captions cannot be read \(Expecting property name",
        ),
        (dict(json=b"[1]"), "questions", "no questions in it"),
        (dict(json=b"{}"), "questions", "no questions in it"),
        (dict(json=b"nonsense"), "questions", "0.tar a: its json cannot be read"),
        (
            dict(json=b'{"questions": [{"question": "what?"}]}'),
            "questions",
            r"0.tar a: its json cannot be read \(KeyError: 'answers'",
        ),
        (
            dict(json=b'{"questions": 3}'),
            "questions",
            r"0.tar a: its json cannot be read \(TypeError",
        ),
        (dict(cls=b"0"), "questions", "0.tar a has no json"),
        (
            dict(seg_png=b"cut off"),
            "label_map",
            r"0.tar a: its seg.png cannot be read \(cannot read the image",
        ),
        (dict(npy=b"?"), "multi_hot", "0.tar a: its npy cannot be read"),
        (dict(json=b'{"anchor": "x"}'), "frame", "no video frames"),
        (
            dict(json=b'{"anchor": "x", "offset": "far", "labels": [0]}'),
            "frame",
            "0.tar a: its json cannot be read",
        ),
        (
            dict(json=b'{"anchor": "x", "offset": 0, "labels": [1, -1]}'),
            "frame",
            r"0.tar a: its json cannot be read \(labels: -1 is not a class number, 0 or more",
        ),
        (
            dict(json=b'{"anchor": "x", "offset": 0, "labels": ["cat"]}'),
            "frame",
            r"0.tar a: its json cannot be read \(labels: 'cat' is not a class number",
        ),
    ],
)
def test_what_is_wrong_with_a_sample_is_named(tmp_path, contents, method, message):
    images = make_set(tmp_path, **contents)

    with pytest.raises(ValueError, match=f"^evals: {tmp_path}/set: {message}"):
        getattr(images, method)(0)


def test_class_names_that_are_not_utf8(tmp_path):
    images = make_set(tmp_path, cls=b"0")
    (tmp_path / "set/classnames.txt").write_bytes("café".encode("latin-1"))

    with pytest.raises(ValueError, match="classnames.txt: not UTF-8"):
        images.class_names()
