"""The layout of each set is detected and read correctly; errors name a broken set in one line.

tests/helpers/tiny_layouts.py writes a small set of every layout.

Run: pytest tests/data/evals/test_layouts.py
"""

import json

import numpy as np
import pytest
from PIL import Image

from glimpse.data.evals import caption_layouts, segmentation_layouts
from glimpse.data.evals.clip_benchmark import IGNORE, ClipBenchmarkSet, Question
from glimpse.data.evals.layouts import LAYOUTS, open_set
from glimpse.data.shards import write_shard
from glimpse.run.evals import parse_evaluations
from glimpse.tests.helpers.tiny_layouts import (
    SIZE,
    write_ade20k,
    write_coco,
    write_coco_stuff,
    write_context,
    write_custom_folders,
    write_image,
    write_karpathy,
    write_label_map,
    write_nocaps,
    write_text,
    write_vqa,
)


def first_classes(images, i):
    """Return the classes of the first pixels of label map i."""
    return images.label_map(i).reshape(-1)[:5].tolist()


def assert_refused_on_opening(folder, message):
    """Assert that opening the folder raises a one-line error that contains the message."""
    with pytest.raises(ValueError, match="^evals: ") as error:
        open_set(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# label maps


def test_ade20k(tmp_path):
    images = open_set(write_ade20k(tmp_path))

    assert type(images) is segmentation_layouts.Ade20k
    assert images.key(0) == "images/validation/ADE_val_1.jpg"
    assert images.key(1) == "images/validation/ADE_val_2.jpg"
    assert images.image(0) == (tmp_path / "images/validation/ADE_val_1.jpg").read_bytes()
    assert first_classes(images, 0) == [IGNORE, 0, 1, 149, 149]
    assert images.label_map(0).shape == (4, 6)
    assert images.label_map(0).dtype == np.uint8
    assert images.class_names()[:3] == ["wall", "building", "thing 3"]
    assert len(images.class_synonyms()) == 150
    assert images.prompts("7")[1][0].count("building") == 1
    assert images.open_split("train").key(0) == "images/training/ADE_train_1.jpg"
    assert len(images.open_split("validation")) == 2
    with pytest.raises(ValueError, match="no split 'extra'; it has test, train"):
        images.open_split("extra")


def test_pascal_context(tmp_path):
    images = open_set(write_context(tmp_path))

    assert type(images) is segmentation_layouts.PascalContext
    assert [images.key(i)[-5] for i in range(len(images))] == ["3", "1"]
    assert first_classes(images, 0) == [IGNORE, 0, 1, 58, 58]
    classes = images.class_names()
    assert len(classes) == 59
    assert classes[:3] == ["aeroplane", "bag", "bed"] == sorted(classes)[:3]

    # With a class for the background.
    write_text(
        tmp_path / "classnames.txt",
        "\n".join(["background", *segmentation_layouts.CONTEXT_CLASSES]),
    )
    images = open_set(tmp_path)
    assert first_classes(images, 0) == [0, 1, 2, 59, 59]
    assert len(images.class_names()) == 60

    write_text(tmp_path / "classnames.txt", "one\ntwo")
    with pytest.raises(
        ValueError, match="2 class names; Pascal Context has 59, or 60 with the background"
    ):
        open_set(tmp_path)


def test_pascal_context_with_its_original_maps(tmp_path):
    """The classes of these maps are in the order of 59_labels.txt."""
    with pytest.raises(ValueError, match="it needs 59_labels.txt, the data set's list of classes"):
        open_set(write_context(tmp_path, "59_context_labels"))

    write_text(tmp_path / "59_labels.txt", "\n".join(f"{i}: name {i}" for i in range(1, 60)))
    images = open_set(tmp_path)

    assert images.class_names()[0] == "name 1"
    assert first_classes(images, 1) == [IGNORE, 0, 1, 58, 58]


@pytest.mark.parametrize("maps, where", [("stuffthingmaps", "."), ("annotations", "images")])
def test_coco_stuff(tmp_path, maps, where):
    images = open_set(write_coco_stuff(tmp_path, maps, where), content="label_map")

    assert type(images) is segmentation_layouts.CocoStuff
    assert len(images) == 2
    assert len(images.open_split("train")) == 1
    names = images.class_names()
    assert len(names) == 171
    assert names[0] == "class 1"
    assert names[-1] == "class 182"
    assert "class 12" not in names
    assert names[11] == "class 13"
    assert first_classes(images, 0) == [IGNORE, 0, 10, 11, 170]

    # 11 would be the stored value of class 12, which does not exist.
    write_label_map(tmp_path / maps / "val2017/000000000139.png", (11, 0))
    message = (
        "000000000139.png has pixels of class 11; this layout stores its 171 classes as 0 to 181"
    )
    with pytest.raises(ValueError, match=message):
        images.label_map(0)


def test_custom_folders(tmp_path):
    images = open_set(write_custom_folders(tmp_path))

    assert type(images) is segmentation_layouts.CustomFolders
    assert images.class_names() == ["cat", "dog", "tree"]
    assert images.class_synonyms()[0] == ["cat", "pussycat"]
    assert first_classes(images, 2) == [0, 1, 2, IGNORE, IGNORE]
    with pytest.raises(ValueError, match="it needs images/train/"):
        images.open_split("train")

    # With several splits.
    for part in ("train", "test"):
        write_image(tmp_path / f"images/{part}/x.jpg")
        write_label_map(tmp_path / f"labels/{part}/x.png", (1, 1))
    images = open_set(tmp_path)
    assert images.key(0) == "images/test/x.jpg"
    assert images.open_split("train").key(0) == "images/train/x.jpg"


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: write_label_map(f / "labels/1.png", (3, 0)),
            "1.png has pixels of class 3; this layout stores its 3 classes as 0 to 2",
        ),
        (
            lambda f: Image.new("RGB", SIZE).save(f / "labels/1.png"),
            "map stores one value from 0 to 255 per pixel, but this image has mode RGB",
        ),
        (
            lambda f: write_label_map(f / "labels/1.png", (300, 0), "I;16"),
            "map stores one value from 0 to 255 per pixel, but this image has mode I;16",
        ),
        (
            lambda f: Image.new("L", (4, 6)).save(f / "labels/1.png"),
            "labels/1.png has 6 x 4 pixels, its image 4 x 6",
        ),
        (
            lambda f: (f / "labels/1.png").write_bytes(b"PNG?"),
            "labels/1.png or its image: cannot read the image",
        ),
        (
            lambda f: (f / "images/1.png").write_bytes(b"PNG?"),
            "labels/1.png or its image: cannot read the image",
        ),
        (
            lambda f: write_text(f / "classnames.txt", "cat\n\ndog"),
            "classnames.txt has an empty line; line i + 1 must name class i",
        ),
        (
            lambda f: (f / "labels/1.png").unlink(),
            "labels: 1 of 3 images have no file in it, the first is 1",
        ),
    ],
)
def test_a_bad_map_is_named(tmp_path, damage, message):
    damage(write_custom_folders(tmp_path))

    with pytest.raises(ValueError, match="^evals: ") as error:
        open_set(tmp_path).label_map(1)

    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "write, damage, message",
    [
        (write_ade20k, lambda f: (f / "objectInfo150.txt").unlink(), "it needs objectInfo150.txt"),
        (
            write_ade20k,
            lambda f: write_text(f / "objectInfo150.txt", "Idx\tName\n1\twall\n"),
            "it is not the benchmark's table of the classes 1 to 150",
        ),
        (write_ade20k, lambda f: (f / "images/validation/ADE_val_1.jpg").rename(f / "x.jpg"), ""),
        (
            write_context,
            lambda f: write_text(f / "ImageSets/SegmentationContext/val.txt", "2008_000002"),
            "Context: 1 of 1 images have no file in it",
        ),
        (
            write_context,
            lambda f: (f / "ImageSets/SegmentationContext/val.txt").unlink(),
            "it needs ImageSets/SegmentationContext/val.txt",
        ),
        (
            write_coco_stuff,
            lambda f: (f / "labels.txt").unlink(),
            "it needs labels.txt, the data set's list of classes",
        ),
        (
            write_coco_stuff,
            lambda f: write_text(f / "labels.txt", "0: unlabeled\nperson"),
            "labels.txt: line 2 is not 'NUMBER: NAME'",
        ),
        (
            write_coco_stuff,
            lambda f: write_text(f / "labels.txt", "0: unlabeled\n1: person"),
            "labels.txt: it is not COCO-Stuff's list",
        ),
    ],
)
def test_a_bad_set_is_named_when_opened(tmp_path, write, damage, message):
    damage(write(tmp_path))

    if message:
        assert_refused_on_opening(tmp_path, message)
    else:
        assert len(open_set(tmp_path)) == 1, "a label map without an image is ignored"


# --------------------------------------------------------------------------------------------------
# captions and questions


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_coco_captions(tmp_path, year):
    images = open_set(write_coco(tmp_path, year))

    assert type(images) is caption_layouts.CocoCaptions
    assert images.key(0) == f"val{year}/000000000002.jpg"
    assert images.key(1) == f"val{year}/000000000001.jpg"
    assert images.key(2) == f"val{year}/000000000000.jpg"
    assert images.captions(0) == ["val 2 one", "val 2 two"]
    assert images.open_split("train").captions(0) == ["train 0 one", "train 0 two"]
    assert images.image(0) == (tmp_path / images.key(0)).read_bytes()
    assert images.group(0) == ""
    with pytest.raises(ValueError, match="no label maps in it"):
        images.label_map(0)


def test_nocaps(tmp_path):
    images = open_set(write_nocaps(tmp_path))

    assert type(images) is caption_layouts.Nocaps
    groups = [images.group(i) for i in range(3)]
    assert groups == ["in-domain", "out-domain", "near-domain"]
    assert images.captions(1) == ["caption 1"]
    assert images.key(1) == "val/bb.jpg"
    assert len(images.open_split("val")) == 3
    with pytest.raises(ValueError, match="it needs captions_train2017.json"):
        images.open_split("train")

    # The train split is COCO's.
    write_coco(tmp_path)
    assert open_set(tmp_path).open_split("train").captions(0) == ["train 0 one", "train 0 two"]


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_karpathys_splits(tmp_path, name):
    first = {
        "coco": "val2014/COCO_val2014_000000000000.jpg",
        "flickr30k": "flickr30k-images/0.jpg",
    }

    images = open_set(write_karpathy(tmp_path, name))

    assert type(images) is caption_layouts.Karpathy
    assert images.captions(0) == ["0 a", "0 b"]
    assert images.captions(1) == ["4 a", "4 b"]
    assert images.open_split("train").captions(0)[0] == "1 a"
    assert images.open_split("train").captions(1)[0] == "2 a"
    assert images.open_split("val").captions(0)[0] == "3 a"
    assert images.key(0) == first[name]


def test_vqa(tmp_path):
    questions = []
    for i, kind in enumerate(("yes/no", "number", "other")):
        answers = tuple(f"{kind} {a}" for a in range(10))
        questions.append(Question(f"val2014 {i}?", answers, kind))

    images = open_set(write_vqa(tmp_path))

    assert type(images) is caption_layouts.Vqa
    assert images.key(0) == "val2014/COCO_val2014_000000000042.jpg"
    assert images.key(1) == "val2014/COCO_val2014_000000000009.jpg"
    assert images.questions(0) == [questions[0], questions[2]]
    assert images.questions(1) == [questions[1]]
    assert images.open_split("train").questions(1)[0].text == "train2014 1?"


def edit_json(path, edit):
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    write_text(path, content)


CAPTIONS = "annotations/captions_val2017.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    "write, damage, message",
    [
        (
            write_coco,
            lambda f: write_text(f / CAPTIONS, '{"images": ['),
            "captions_val2017.json: truncated or not JSON",
        ),
        (
            write_coco,
            lambda f: write_text(f / CAPTIONS, dict(annotations=[])),
            "captions_val2017.json: an entry has no key 'images'; is it the data set's file of this"
            " name?",
        ),
        (
            write_coco,
            lambda f: write_text(f / CAPTIONS, []),
            "captions_val2017.json: not structured as the data set's file of this name (TypeError",
        ),
        (
            write_coco,
            lambda f: edit_json(
                f / CAPTIONS, lambda c: c["annotations"].append(dict(image_id=1, caption="x"))
            ),
            "a caption belongs to image 1, which the file does not list",
        ),
        (
            write_coco,
            lambda f: edit_json(f / CAPTIONS, lambda c: c.update(annotations=c["annotations"][:1])),
            "2 of 3 images have no caption",
        ),
        (
            write_coco,
            lambda f: (f / "val2017/000000000001.jpg").unlink(),
            "val2017: 1 of 3 images that captions_val2017.json lists are missing",
        ),
        (
            write_coco,
            lambda f: (f / "val2017").rename(f / "pictures"),
            "its images, the first is 000000000002.jpg, are not in",
        ),
        (
            write_nocaps,
            lambda f: edit_json(
                f / "nocaps_val_4500_captions.json", lambda c: c["images"][0].pop("domain")
            ),
            "an entry has no key 'domain'",
        ),
        (
            write_karpathy,
            lambda f: edit_json(f / "dataset_coco.json", lambda c: c["images"][0].pop("split")),
            "an entry has no key 'split'",
        ),
        (
            write_karpathy,
            lambda f: edit_json(f / "dataset_coco.json", lambda c: c.update(images=[])),
            "no images of this split in it",
        ),
        (write_vqa, lambda f: (f / ANSWERS).unlink(), f"it needs {ANSWERS}"),
        (
            write_vqa,
            lambda f: edit_json(f / ANSWERS, lambda c: c["annotations"].pop()),
            "no answers to question 0; do both files come from one split?",
        ),
        (
            write_vqa,
            lambda f: edit_json(f / ANSWERS, lambda c: c["annotations"][0].pop("answers")),
            "an entry has no key 'answers'",
        ),
        (
            write_vqa,
            lambda f: edit_json(f / ANSWERS, lambda c: c["annotations"][0].clear()),
            f"{ANSWERS}: an entry has no key 'answers'",
        ),
        (
            write_vqa,
            lambda f: edit_json(f / QUESTIONS, lambda c: c["questions"][0].clear()),
            f"{QUESTIONS}: an entry has no key 'question_id'",
        ),
        (
            write_vqa,
            lambda f: edit_json(f / QUESTIONS, lambda c: c["questions"][0].update(image_id=None)),
            f"{QUESTIONS}: not structured as the data set's file of this name (TypeError",
        ),
        (
            write_vqa,
            lambda f: edit_json(
                f / QUESTIONS, lambda c: c["questions"].append(dict(c["questions"][0], image_id=5))
            ),
            "val2014: 1 of 3 images",
        ),
    ],
)
def test_a_bad_json_is_named(tmp_path, write, damage, message):
    damage(write(tmp_path))

    assert_refused_on_opening(tmp_path, message)


# --------------------------------------------------------------------------------------------------
# detection


WRITERS = (
    write_karpathy,
    write_nocaps,
    write_coco,
    write_vqa,
    write_ade20k,
    write_context,
    write_coco_stuff,
    write_custom_folders,
)


@pytest.mark.parametrize("layout, write", list(zip(LAYOUTS, WRITERS, strict=True)))
def test_each_layout_matches_only_its_sets(tmp_path, layout, write):
    write(tmp_path)
    write_text(tmp_path / "dataset_infos.json", {})  # a file of Hugging Face, not of COCO

    assert [candidate for candidate in LAYOUTS if candidate.matches(tmp_path)] == [layout]


def write_several(folder, *writers):
    """Write sets of several layouts to one folder, with COCO-Stuff's maps for all images."""
    for write in writers:
        write(folder)
    for image in (folder / "val2017").iterdir():
        write_label_map(folder / f"stuffthingmaps/val2017/{image.stem}.png", (0, 0))


def test_a_folder_with_several_layouts(tmp_path):
    """`content` selects the layout; Karpathy precedes COCO captions, shards precede all."""
    write_several(tmp_path, write_coco, write_vqa, write_coco_stuff)
    expected = {
        "captions": caption_layouts.CocoCaptions,
        "questions": caption_layouts.Vqa,
        "label_map": segmentation_layouts.CocoStuff,
        "": caption_layouts.CocoCaptions,
    }
    for content, layout in expected.items():
        assert type(open_set(tmp_path, content=content)) is layout

    write_karpathy(tmp_path)
    assert type(open_set(tmp_path, content="captions")) is caption_layouts.Karpathy

    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test/0.tar", [("a", {"jpg": b"x", "txt": b"y"})])
    assert type(open_set(tmp_path, content="captions")) is ClipBenchmarkSet


def test_evaluations_open_the_layout_they_need(tmp_path):
    write_several(tmp_path, write_coco, write_coco_stuff)
    write_text(tmp_path / "zeroshot_classification_templates.txt", "a {c}")

    retrieval, segmentation = parse_evaluations(
        [f"retrieval:{tmp_path}", f"segmentation:{tmp_path}"]
    )

    assert type(retrieval.images) is caption_layouts.CocoCaptions
    assert type(segmentation.images) is segmentation_layouts.CocoStuff
    assert retrieval.label == f"retrieval/{tmp_path.name}"
    assert segmentation.label == f"segmentation/{tmp_path.name}"
    with pytest.raises(
        ValueError,
        match="is not an evaluation set; it needs test/.*, or another layout of docs/evaluating.md",
    ):
        parse_evaluations([f"retrieval:{tmp_path / 'val2017'}"])
    with pytest.raises(ValueError, match="no captions in it, or not in a known layout"):
        parse_evaluations([f"retrieval:{write_ade20k(tmp_path / 'ade')}"])
