"""Composites match their labels: label maps are the drawings' alpha, boxes enclose them, captions
and answers are true.

The drawings are discs and squares of one color a concept, so that the picture itself shows which
concept is where.
Run: pytest tests/data/builders/test_composites.py
"""

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from glimpse.data.builders.composites import scenes
from glimpse.data.builders.composites.scenes import CANVAS, build, compose, cut_out
from glimpse.data.builders.composites.texts import (
    CONCEPTS,
    Thing,
    captions,
    one,
    place,
    plural,
    questions,
    relations,
)
from glimpse.data.evals.clip_benchmark import IGNORE, ClipBenchmarkSet
from glimpse.data.shards import Shards, build_index, write_shard

COLORS = {
    "ant": (255, 0, 0),
    "bus": (0, 255, 0),
    "owl": (0, 0, 255),
    "mouse": (255, 0, 255),
    "key": (0, 255, 255),
}
STYLES = {
    "train": ("noto", "twemoji", "openmoji"),
    "heldout": ("fluent3d", "noto", "fluent-emoji-high-contrast"),
}


def quiet(items, text):
    return items


def drawing(name, style):
    image = Image.new("RGBA", (40, 40))
    shape = ImageDraw.Draw(image).ellipse if len(style) % 2 else ImageDraw.Draw(image).rectangle
    shape((6, 8, 33, 30), fill=(*COLORS[name], 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    for part, styles in STYLES.items():
        rows = []
        for style in styles:
            for name in COLORS:
                about = dict(style=style, emoji="x", toned=False)
                texts = {"txt": f"the {name}".encode(), "json": json.dumps(about).encode()}
                rows.append((f"{style}__{name}", {"png": drawing(name, style), **texts}))
        (folder / part).mkdir()
        write_shard(folder / part / "0.tar", rows)
        build_index(folder / part)
    (folder / "glyphs.json").write_text('{"settings": {"format": 1}}')
    (folder / "LICENSES.txt").write_text("mine\n")
    return folder


def make(glyphs, out, **more):
    options = dict(train=20, test=12, unseen=5, concepts=concepts(), progress=quiet)
    return build(out, glyphs=glyphs, **options | more)


def concepts():
    return {name: f"the {name}" for name in COLORS}


@pytest.fixture(scope="module")
def composites(glyphs, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "composites"
    make(glyphs, out)
    return out


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_label_maps_agree_with_alpha(glyphs):
    """The picture is red (but for soft edges) where the map has a red thing, and nowhere else."""
    drawings = scenes.read_drawings(glyphs, concepts())["train"]
    names = list(COLORS)
    for number in range(30):
        scene = compose(drawings, np.random.default_rng(number))
        pixels = np.asarray(scene.image, int)
        for label, color in enumerate(COLORS.values()):
            inside = scene.label_map == label
            near = np.abs(pixels - color).sum(-1)
            assert (near[inside] < 30).sum() >= 0.7 * inside.sum()
            assert not (near[~inside] < 30).any()
        labels = set(np.unique(scene.label_map)) - {IGNORE}
        assert labels == {names.index(t.name) for t in scene.things}


def test_boxes_just_hold_what_is_visible(composites):
    images = ClipBenchmarkSet(composites)
    for i in range(len(images)):
        labels = images.label_map(i)
        boxes = json.loads(images.read_member(i, "json"))["boxes"]
        assert labels.shape == (CANVAS, CANVAS)

        union = np.zeros_like(labels, bool)
        for row in boxes:
            assert images.class_names()[row["class"]] == row["name"]
            left, top, right, bottom = row["box"]
            inside = labels[top:bottom, left:right] == row["class"]
            # The first and the last column and row of the box have pixels of the thing.
            message = "the box is larger than what it holds"
            assert inside.any(0)[[0, -1]].all(), message
            assert inside.any(1)[[0, -1]].all(), message
            union[top:bottom, left:right] = True
        assert (labels[~union] == IGNORE).all()


def read_back(caption, names):
    """Return how many things of each name a caption mentions, as a Counter."""
    # phrase -> (name, number)
    words = {}
    for name in names:
        words[one(name)] = (name, 1)
        for word, number in {"two": 2, "three": 3, "four": 4}.items():
            words[f"{word} {plural(name)}"] = (name, number)

    # longer phrases first
    alternatives = [rf"\b{phrase}\b" for phrase in sorted(words, key=len, reverse=True)]
    counts = Counter()
    for phrase in re.findall("|".join(alternatives), caption):
        name, number = words[phrase]
        counts[name] += number
    return counts


def check_relations(text, boxes):
    """Check every "an ant above a bus" in a caption; return how many there are."""
    # Twice the centers, by name.
    centers = {}
    for row in boxes:
        left, top, right, bottom = row["box"]
        centers[row["name"]] = [left + right, top + bottom]

    pattern = r"an? (\w+) (to the left of|to the right of|above|below) an? (\w+)"
    matches = re.findall(pattern, text)
    for a, relation, b in matches:
        axis = 1 if relation in ("above", "below") else 0
        smaller = relation in ("to the left of", "above")
        assert (centers[a][axis] < centers[b][axis]) == smaller
    return len(matches)


def test_captions_name_what_is_there(composites):
    relational = 0
    for split in ("train", "test"):
        images = ClipBenchmarkSet(composites, split)
        for i in range(len(images)):
            boxes = json.loads(images.read_member(i, "json"))["boxes"]
            names = Counter(row["name"] for row in boxes)
            texts = images.captions(i)
            assert 2 <= len(texts) <= 5
            assert len(set(texts)) == len(texts)
            for text in texts:
                assert read_back(text, COLORS) == names, text
                relational += check_relations(text, boxes)

    assert relational > 3


def test_a_training_set_draws_one_of_the_captions(composites):
    sample = Shards([composites / "train"])[0]

    assert len(sample.captions) >= 2
    assert not any("\n" in caption for caption in sample.captions)


SCENE = [
    Thing("ant", (0, 40, 20, 60)),
    Thing("bus", (70, 42, 90, 58)),
    Thing("owl", (40, 0, 50, 10)),
    Thing("owl", (40, 80, 50, 90)),
]


def asked(things):
    """Return every question and its answer, over many draws: {question: answer}."""
    answers = {}
    for seed in range(300):
        for row in questions(things, 96, [*COLORS], np.random.default_rng(seed)):
            assert len(row["answers"]) == 10
            assert len(set(row["answers"])) == 1
            answers[row["question"]] = row["answers"][0]
    return answers


def test_questions_of_a_scene_by_hand():
    assert asked(SCENE) == {
        "where is the ant?": "left",
        "where is the bus?": "right",
        "on which side of the bus is the ant?": "left",
        "on which side of the ant is the bus?": "right",
        "how many things are there?": "4",
        "how many owls are there?": "2",
        "how many ants are there?": "1",
        "how many buses are there?": "1",
        "how many mice are there?": "0",
        "how many keys are there?": "0",
        "is there an ant?": "yes",
        "is there a bus?": "yes",
        "is there an owl?": "yes",
        "is there a mouse?": "no",
        "is there a key?": "no",
    }

    two = asked(SCENE[:2])

    assert two["what is to the left of the bus?"] == "ant"
    assert two["what is there besides the ant?"] == "bus"
    assert asked(SCENE[:1])["what is in the picture?"] == "ant"
    assert asked(SCENE[2:])["what are these?"] == "owls"
    assert "where is the owl?" not in asked(SCENE)


def test_questions_of_built_scenes_are_true(composites):
    images = ClipBenchmarkSet(composites)
    kinds = Counter()
    for i in range(len(images)):
        boxes = json.loads(images.read_member(i, "json"))["boxes"]
        counts = Counter(row["name"] for row in boxes)
        for question in images.questions(i):
            kinds[question.kind] += 1
            check_answer(question, counts)

    assert kinds["is there"] == kinds["how many"] == len(images)
    assert kinds["where"]
    assert kinds["what"]


def check_answer(question, counts):
    """Check an answer by the numbers of things in the scene."""
    answer = question.answers[0]
    if question.kind == "is there":
        name = re.match(r"is there an? (.*)\?", question.text)[1]
        assert answer == ("yes" if counts[name] else "no")
    if question.kind == "how many":
        name = re.match("how many (.*) are there", question.text)[1]
        of_name = [count for n, count in counts.items() if name in ("things", plural(n))]
        assert int(answer) == sum(of_name)
    if question.kind == "what":
        assert answer in counts or answer in map(plural, counts)


def test_sides_and_places():
    corner = Thing("a", (0, 0, 10, 10))
    slanting = Thing("b", (30, 30, 40, 40))
    beside = Thing("b", (5, 0, 15, 10))

    assert relations([corner, slanting], 96) == [], "on the slant: neither above nor left"
    assert relations([corner, beside], 96) == [], "too near"
    assert place(Thing("a", (40, 40, 54, 54)), 96) == "middle"
    assert place(Thing("a", (0, 80, 10, 90)), 96) == "bottom left"

    ant = Thing("ant", (0, 0, 9, 9))
    texts = set()
    for seed in range(50):
        texts.update(captions([ant], 96, np.random.default_rng(seed)))

    assert {"an ant at the top left", "there is an ant", "an ant"} <= texts


def test_drawings_of_test_are_not_those_of_train(glyphs):
    drawings = scenes.read_drawings(glyphs, {"ant": "the ant"})
    unseen = cut_out(drawing("ant", "fluent3d"), "x")

    counts = {part: len(by_name["ant"]) for part, by_name in drawings.items()}
    assert counts == {"train": 2, "test": 1, "unseen": 1}
    assert drawings["unseen"]["ant"][0].tobytes() == unseen.tobytes(), (
        "neither strokes alone nor a seen style's held-out concept"
    )


def test_same_seed_same_bytes(glyphs, composites, tmp_path):
    make(glyphs, tmp_path / "again")
    make(glyphs, tmp_path / "other", seed=1)

    first = contents(composites)
    other = contents(tmp_path / "other")
    assert contents(tmp_path / "again") == first
    for folder in ("train", "test", "unseen_style/test"):
        assert other[f"{folder}/0.tar"] != first[f"{folder}/0.tar"]
    assert len(ClipBenchmarkSet(composites / "unseen_style", "train")) == 20
    assert len(ClipBenchmarkSet(composites / "unseen_style")) == 5


def test_an_existing_folder_is_kept(glyphs, composites, tmp_path):
    before = contents(composites)

    assert make(glyphs, composites)["settings"]["scenes"] == [20, 12, 5]
    with pytest.raises(ValueError, match="holds a composites set built with other seed"):
        make(glyphs, composites, seed=3)
    assert contents(composites) == before

    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(ValueError, match="something else than a finished composites set"):
        make(glyphs, tmp_path)


def test_what_is_missing_is_told(glyphs, tmp_path):
    with pytest.raises(
        ValueError, match="no finished glyphs set; run: run/prepare.py glyphs --out"
    ):
        build(tmp_path / "out", glyphs=tmp_path)
    with pytest.raises(
        ValueError, match="'automobile' has 0 drawings to train on and 0 in fluent3d"
    ):
        make(glyphs, tmp_path / "out", concepts={"car": "automobile"})
    with pytest.raises(ValueError, match="composites: train is 0 scenes; it must be at least 1"):
        make(glyphs, tmp_path / "out", train=0)
    assert not (tmp_path / "out").exists()


def test_names_can_be_said():
    plurals = {plural(name) for name in CONCEPTS}
    spoken = ("fox", "butterfly", "key", "bus", "watch", "mouse")

    assert len(plurals) == len(CONCEPTS) == len(set(CONCEPTS.values()))
    assert len(CONCEPTS) >= 90
    assert [plural(n) for n in spoken] == [
        "foxes",
        "butterflies",
        "keys",
        "buses",
        "watches",
        "mice",
    ]
