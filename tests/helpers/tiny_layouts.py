"""Small evaluation sets of every layout in data/evals/layouts.py, with real image files.

write_ade20k(folder), write_coco(folder), ... each return the folder.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (6, 4)  # width, height


def write_image(path: Path, red: int = 0, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 80, 160)).save(path)


def write_label_map(path: Path, values: tuple[int, ...], mode: str = "L") -> None:
    """Write a 6 x 4 label map; the last value fills the remaining pixels.

    mode: L, I;16 (values above 255) or P (a palette).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(24, values[-1], np.uint16 if mode == "I;16" else np.uint8)
    pixels[: len(values)] = values
    image = Image.fromarray(pixels.reshape(4, 6))
    if mode == "P":
        image.putpalette([255, 0, 0] * 256)
    image.save(path)


def write_text(path: Path, content: str | dict | list) -> None:
    """Write a text, or a dict or list as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_ade20k(folder: Path) -> Path:
    for split, names in (
        ("validation", ("ADE_val_2", "ADE_val_1")),
        ("training", ("ADE_train_1",)),
    ):
        for name in names:
            write_image(folder / "images" / split / f"{name}.jpg")
            write_label_map(folder / "annotations" / split / f"{name}.png", (0, 1, 2, 150))
    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    rows += [f"{i}\t0.1\t11\t7\t{name}" for i, name in ((1, "wall"), (2, "building, edifice"))]
    rows += [f"{i} \t0.1\t11\t7\tthing {i}, other" for i in range(3, 151)]
    write_text(folder / "objectInfo150.txt", "\n".join(rows) + "\n")
    return folder


def write_context(folder: Path, maps: str = "SegmentationClassContext") -> Path:
    for name in ("2008_000002", "2008_000003", "2008_000001"):
        write_image(folder / "JPEGImages" / f"{name}.jpg")
    for name in ("2008_000003", "2008_000001"):
        write_label_map(folder / maps / f"{name}.png", (0, 1, 2, 59), "P")
    write_text(folder / "ImageSets/SegmentationContext/val.txt", "2008_000003\n2008_000001\n")
    return folder


def write_coco_stuff(folder: Path, maps: str = "stuffthingmaps", images: str = ".") -> Path:
    for layout_split, names in (
        ("val2017", ("000000000139", "000000000285")),
        ("train2017", ("000000000139",)),
    ):
        for name in names:
            write_image(folder / images / layout_split / f"{name}.jpg")
            write_label_map(folder / maps / layout_split / f"{name}.png", (255, 0, 10, 12, 181))
    lines = ["0: unlabeled", *[f"{i}: class {i}" for i in range(1, 183)]]
    write_text(folder / "labels.txt", "\n".join(lines))
    return folder


def write_custom_folders(folder: Path) -> Path:
    for i in range(3):
        write_image(folder / "images" / f"{i}.png")
        write_label_map(folder / "labels" / f"{i}.png", (0, 1, 2, 255))
    write_text(folder / "classnames.txt", "cat;pussycat\ndog\ntree\n")
    return folder


def write_coco(folder: Path, year: str = "2017") -> Path:
    for layout_split, count in (("val", 3), ("train", 1)):
        images = [dict(id=i + 7, file_name=f"{i:012d}.jpg") for i in range(count)]
        captions = []
        for text in ("one", "two"):
            for i in range(count):
                captions.append(dict(image_id=7 + i, caption=f" {layout_split} {i} {text}\n"))
        for image in images:
            write_image(folder / f"{layout_split}{year}" / image["file_name"])
        write_text(
            folder / f"annotations/captions_{layout_split}{year}.json",
            dict(images=images[::-1], annotations=captions, info={}),
        )
    return folder


def write_nocaps(folder: Path) -> Path:
    images = []
    for i, (domain, name) in enumerate(
        (("in-domain", "aa"), ("out-domain", "bb"), ("near-domain", "cc"))
    ):
        write_image(folder / "val" / f"{name}.jpg")
        images.append(dict(id=i, file_name=f"{name}.jpg", domain=domain, open_images_id=name))
    captions = [dict(image_id=i, caption=f"caption {i}") for i in range(3)]
    write_text(folder / "nocaps_val_4500_captions.json", dict(images=images, annotations=captions))
    return folder


def write_karpathy(folder: Path, name: str = "coco") -> Path:
    rows = []
    for i, split in enumerate(("test", "train", "restval", "val", "test")):
        if name == "coco":
            row = dict(filepath="val2014", filename=f"COCO_val2014_{i:012d}.jpg")
            write_image(folder / row["filepath"] / row["filename"])
        else:
            row = dict(filename=f"{i}.jpg")
            write_image(folder / f"{name}-images" / row["filename"])
        sentences = [dict(raw=f"{i} {text}", tokens=[]) for text in "ab"]
        rows.append(dict(row, split=split, sentences=sentences))
    write_text(folder / f"dataset_{name}.json", dict(images=rows, dataset=name))
    return folder


def write_vqa(folder: Path) -> Path:
    for layout_split in ("val2014", "train2014"):
        questions = []
        for q, image_id in enumerate((42, 9, 42)):
            questions.append(
                dict(image_id=image_id, question=f"{layout_split} {q}?", question_id=q)
            )
        annotations = []
        for q, kind in enumerate(("yes/no", "number", "other")):
            answers = [dict(answer=f"{kind} {a}") for a in range(10)]
            annotations.append(dict(question_id=q, image_id=0, answer_type=kind, answers=answers))
        write_text(
            folder / f"v2_OpenEnded_mscoco_{layout_split}_questions.json", dict(questions=questions)
        )
        write_text(
            folder / f"v2_mscoco_{layout_split}_annotations.json",
            dict(annotations=annotations[::-1]),
        )
        for image_id in (9, 42):
            write_image(folder / layout_split / f"COCO_{layout_split}_{image_id:012d}.jpg")
    return folder
