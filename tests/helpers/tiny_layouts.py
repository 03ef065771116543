"""Every layout of evaluation sets (data/evals/layouts.py) in small, of real image files.

ade20k(folder), coco(folder), ...; each returns the folder.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (6, 4)  # width, height


def picture(path: Path, colour: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 80, 160)).save(path)


def label_map(path: Path, values: tuple[int, ...], mode: str = "L") -> None:
    """Write a 6 x 4 map that values fill pixel by pixel, the last of them the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(24, values[-1], np.uint16 if mode == "I;16" else np.uint8)
    pixels[: len(values)] = values
    image = Image.fromarray(pixels.reshape(4, 6))
    if mode == "P":
        image.putpalette([255, 0, 0] * 256)
    image.save(path)


def tell(path: Path, content: str | dict | list) -> None:
    """Write a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def ade20k(folder: Path) -> Path:
    for split, names in (
        ("validation", ("ADE_val_2", "ADE_val_1")),
        ("training", ("ADE_train_1",)),
    ):
        for name in names:
            picture(folder / "images" / split / f"{name}.jpg")
            label_map(folder / "annotations" / split / f"{name}.png", (0, 1, 2, 150))
    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    rows += [f"{i}\t0.1\t11\t7\t{name}" for i, name in ((1, "wall"), (2, "building, edifice"))]
    rows += [f"{i} \t0.1\t11\t7\tthing {i}, other" for i in range(3, 151)]
    tell(folder / "objectInfo150.txt", "\n".join(rows) + "\n")
    return folder


def context(folder: Path, maps: str = "SegmentationClassContext") -> Path:
    for name in ("2008_000002", "2008_000003", "2008_000001"):
        picture(folder / "JPEGImages" / f"{name}.jpg")
    for name in ("2008_000003", "2008_000001"):
        label_map(folder / maps / f"{name}.png", (0, 1, 2, 59), "P")
    tell(folder / "ImageSets/SegmentationContext/val.txt", "2008_000003\n2008_000001\n")
    return folder


def coco_stuff(folder: Path, maps: str = "stuffthingmaps", images: str = ".") -> Path:
    for part, names in (
        ("val2017", ("000000000139", "000000000285")),
        ("train2017", ("000000000139",)),
    ):
        for name in names:
            picture(folder / images / part / f"{name}.jpg")
            label_map(folder / maps / part / f"{name}.png", (255, 0, 10, 12, 181))
    lines = ["0: unlabeled", *[f"{i}: class {i}" for i in range(1, 183)]]
    tell(folder / "labels.txt", "\n".join(lines))
    return folder


def folders(folder: Path) -> Path:
    for i in range(3):
        picture(folder / "images" / f"{i}.png")
        label_map(folder / "labels" / f"{i}.png", (0, 1, 2, 255))
    tell(folder / "classnames.txt", "cat;pussycat\ndog\ntree\n")
    return folder


def coco(folder: Path, year: str = "2017") -> Path:
    for part, count in (("val", 3), ("train", 1)):
        images = [dict(id=i + 7, file_name=f"{i:012d}.jpg") for i in range(count)]
        captions = []
        for text in ("one", "two"):
            for i in range(count):
                captions.append(dict(image_id=7 + i, caption=f" {part} {i} {text}\n"))
        for image in images:
            picture(folder / f"{part}{year}" / image["file_name"])
        tell(
            folder / f"annotations/captions_{part}{year}.json",
            dict(images=images[::-1], annotations=captions, info={}),
        )
    return folder


def nocaps(folder: Path) -> Path:
    images = []
    for i, (domain, name) in enumerate(
        (("in-domain", "aa"), ("out-domain", "bb"), ("near-domain", "cc"))
    ):
        picture(folder / "val" / f"{name}.jpg")
        images.append(dict(id=i, file_name=f"{name}.jpg", domain=domain, open_images_id=name))
    captions = [dict(image_id=i, caption=f"caption {i}") for i in range(3)]
    tell(folder / "nocaps_val_4500_captions.json", dict(images=images, annotations=captions))
    return folder


def karpathy(folder: Path, name: str = "coco") -> Path:
    rows = []
    for i, split in enumerate(("test", "train", "restval", "val", "test")):
        if name == "coco":
            row = dict(filepath="val2014", filename=f"COCO_val2014_{i:012d}.jpg")
            picture(folder / row["filepath"] / row["filename"])
        else:
            row = dict(filename=f"{i}.jpg")
            picture(folder / f"{name}-images" / row["filename"])
        sentences = [dict(raw=f"{i} {text}", tokens=[]) for text in "ab"]
        rows.append(dict(row, split=split, sentences=sentences))
    tell(folder / f"dataset_{name}.json", dict(images=rows, dataset=name))
    return folder


def vqa(folder: Path) -> Path:
    for part in ("val2014", "train2014"):
        questions = []
        for q, number in enumerate((42, 9, 42)):
            questions.append(dict(image_id=number, question=f"{part} {q}?", question_id=q))
        annotations = []
        for q, kind in enumerate(("yes/no", "number", "other")):
            answers = [dict(answer=f"{kind} {a}") for a in range(10)]
            annotations.append(dict(question_id=q, image_id=0, answer_type=kind, answers=answers))
        tell(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", dict(questions=questions))
        tell(folder / f"v2_mscoco_{part}_annotations.json", dict(annotations=annotations[::-1]))
        for number in (9, 42):
            picture(folder / part / f"COCO_{part}_{number:012d}.jpg")
    return folder
