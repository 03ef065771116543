"""Sets in CLIP_benchmark's layout: an error names the set, the sample and the part, in one line.

Run: pytest tests/data/evals/test_clip_benchmark.py
"""

import io

import pytest
from PIL import Image

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.shards import write_shard


def png():
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    return file.getvalue()


def made(folder, **parts):
    """A set of one sample, a, with a png and the parts; seg_png is for seg.png."""
    content = {"png": png()}
    for name, part in parts.items():
        content[name.replace("_", ".")] = part
    (folder / "set/test").mkdir(parents=True)
    write_shard(folder / "set/test/0.tar", [("a", content)])
    return ClipBenchmarkSet(folder / "set")


@pytest.mark.parametrize(
    "parts, method, complaint",
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
            r"0.tar a: its captions cannot be read \(none but empty ones",
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
    ],
)
def test_what_is_wrong_with_a_sample_is_named(tmp_path, parts, method, complaint):
    images = made(tmp_path, **parts)

    with pytest.raises(ValueError, match=f"^evals: {tmp_path}/set: {complaint}"):
        getattr(images, method)(0)


def test_class_names_that_are_not_utf8(tmp_path):
    images = made(tmp_path, cls=b"0")
    (tmp_path / "set/classnames.txt").write_bytes("café".encode("latin-1"))

    with pytest.raises(ValueError, match="classnames.txt: not UTF-8"):
        images.class_names()
