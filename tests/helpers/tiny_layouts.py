"""Every layout of evaluation sets (data/evals/layouts.py) in small, of real image files:
ade20k(folder),
coco(folder), ...; each returns it.
"""

import json

import numpy as np
from PIL import Image

SIZE = (6, 4)  # width, height


def picture(path, colour=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 80, 160)).save(path)


def label_map(path, values, mode="L"):
    """Values fill a 6 x 4 map, pixel by pixel, the last of them the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.array(
        [*values, *[values[-1]] * (24 - len(values))], np.uint16 if mode == "I;16" else np.uint8
    ).reshape(4, 6)
    image = Image.fromarray(stored)
    if mode == "P":
        image.putpalette([255, 0, 0] * 256)
    image.save(path)


def tell(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def ade20k(folder):
    for split, names in (
        ("validation", ("ADE_val_2", "ADE_val_1")),
        ("training", ("ADE_train_1",)),
    ):
        for name in names:
            picture(folder / "images" / split / f"{name}.jpg")
            label_map(folder / "annotations" / split / f"{name}.png", (0, 1, 2, 150))
    rows = [f"{i}\t0.1\t11\t7\t{name}" for i, name in ((1, "wall"), (2, "building, edifice"))]
    rows += [f"{i} \t0.1\t11\t7\tthing {i}, other" for i in range(3, 151)]
    tell(folder / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    return folder


def context(folder, maps="SegmentationClassContext"):
    for name in ("2008_000002", "2008_000003", "2008_000001"):
        picture(folder / "JPEGImages" / f"{name}.jpg")
    for name in ("2008_000003", "2008_000001"):
        label_map(folder / maps / f"{name}.png", (0, 1, 2, 59), "P")
    tell(folder / "ImageSets/SegmentationContext/val.txt", "2008_000003\n2008_000001\n")
    return folder


def coco_stuff(folder, maps="stuffthingmaps", images="."):
    for part in ("val2017", "train2017"):
        for name in ("000000000139", "000000000285")[: 2 if part == "val2017" else 1]:
            picture(folder / images / part / f"{name}.jpg")
            label_map(folder / maps / part / f"{name}.png", (255, 0, 10, 12, 181))
    tell(
        folder / "labels.txt",
        "\n".join(["0: unlabeled", *[f"{i}: class {i}" for i in range(1, 183)]]),
    )
    return folder


def folders(folder):
    for i in range(3):
        picture(folder / "images" / f"{i}.png")
        label_map(folder / "labels" / f"{i}.png", (0, 1, 2, 255))
    tell(folder / "classnames.txt", "cat;pussycat\ndog\ntree\n")
    return folder


def coco(folder, year="2017"):
    for part, count in (("val", 3), ("train", 1)):
        rows = [dict(id=i + 7, file_name=f"{i:012d}.jpg") for i in range(count)][::-1]
        told = [
            dict(image_id=7 + i, caption=f" {part} {i} {text}\n")
            for text in ("one", "two")
            for i in range(count)
        ]
        for row in rows:
            picture(folder / f"{part}{year}" / row["file_name"])
        tell(
            folder / f"annotations/captions_{part}{year}.json",
            dict(images=rows, annotations=told, info={}),
        )
    return folder


def nocaps(folder):
    names = {"in-domain": "aa", "out-domain": "bb", "near-domain": "cc"}
    rows = [
        dict(id=i, file_name=f"{name}.jpg", domain=domain, open_images_id=name)
        for i, (domain, name) in enumerate(names.items())
    ]
    for row in rows:
        picture(folder / "val" / row["file_name"])
    told = [dict(image_id=i, caption=f"caption {i}") for i in range(3)]
    tell(folder / "nocaps_val_4500_captions.json", dict(images=rows, annotations=told))
    return folder


def karpathy(folder, name="coco"):
    rows = []
    for i, split in enumerate(("test", "train", "restval", "val", "test")):
        file = (
            dict(filepath="val2014", filename=f"COCO_val2014_{i:012d}.jpg")
            if name == "coco"
            else dict(filename=f"{i}.jpg")
        )
        rows.append(
            dict(file, split=split, sentences=[dict(raw=f"{i} {text}", tokens=[]) for text in "ab"])
        )
        picture(folder / (file.get("filepath") or f"{name}-images") / file["filename"])
    tell(folder / f"dataset_{name}.json", dict(images=rows, dataset=name))
    return folder


def vqa(folder):
    for part in ("val2014", "train2014"):
        asked = [
            dict(image_id=number, question=f"{part} {q}?", question_id=q)
            for q, number in enumerate((42, 9, 42))
        ]
        kinds = ("yes/no", "number", "other")
        told = [
            dict(
                question_id=q,
                image_id=0,
                answer_type=kind,
                answers=[dict(answer=f"{kind} {a}") for a in range(10)],
            )
            for q, kind in reversed(list(enumerate(kinds)))
        ]
        tell(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", dict(questions=asked))
        tell(folder / f"v2_mscoco_{part}_annotations.json", dict(annotations=told))
        for number in (9, 42):
            picture(folder / part / f"COCO_{part}_{number:012d}.jpg")
    return folder
