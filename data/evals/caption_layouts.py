"""Evaluation sets that are a json beside folders of images: COCO captions, nocaps, Karpathy's
splits, VQAv2.

A layout is a class; data/evals/layouts.py lists them.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from glimpse.data.evals.clip_benchmark import Images, Question
from glimpse.data.evals.segmentation_layouts import Files


def found(folder: Path, pattern: str) -> Path | None:
    """The first file of that pattern in the folder or in its annotations/."""
    return next(
        (
            path
            for place in (folder, folder / "annotations")
            for path in sorted(place.glob(pattern))
        ),
        None,
    )


@contextmanager
def reading(path: Path) -> Iterator[dict]:
    """The content of a json; what it lacks becomes one ValueError that names it."""
    try:
        yield json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"evals: {path}: cut off, or no json ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"evals: {path}: not in the layout of its name ({type(error).__name__}: {error})"
        ) from None


def located(path: Path, folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The files of these names, all in the first of the folders that has the first of them."""
    if not names:
        raise ValueError(f"evals: {path}: no images of this split in it")
    home = next((folder for folder in folders if (folder / names[0]).exists()), None)
    if home is None:
        raise ValueError(
            f"evals: {path}: its images, the first is {names[0]}, are not in"
            f" {', '.join(map(str, folders))}"
        )
    listing = cache(lambda folder: set(os.listdir(folder)) if folder.is_dir() else set())
    if missing := [name for name in names if Path(name).name not in listing((home / name).parent)]:
        raise ValueError(
            f"evals: {home} lacks {len(missing):,} of {len(names):,} images that {path.name} lists,"
            f" the first is {missing[0]}"
        )
    return [home / name for name in names]


class Captioned(Files):
    """Images with captions: `texts`, a list for each image."""

    holds = "captions"
    texts: list[list[str]]

    def captions(self, i: int) -> list[str]:
        return self.texts[i]

    def said(self, path: Path, texts: list[list[str]]) -> None:
        if silent := [
            i for i, lines in enumerate(texts) if not any(line.strip() for line in lines)
        ]:
            raise ValueError(
                f"evals: {path}: {len(silent):,} of {len(texts):,} images have no caption, the"
                f" first is {self.key(silent[0])}"
            )
        self.texts = [[line.strip() for line in lines if line.strip()] for lines in texts]


class CocoCaptions(Captioned):
    """annotations/captions_val2017.json (or 2014) and val2017/."""

    splits = {"test": "val", "train": "train"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return any(found(folder, f"captions_{part}201[47].json") for part in cls.splits.values())

    def open(self, part: str) -> None:
        path = found(self.folder, f"captions_{part}2017.json") or found(
            self.folder, f"captions_{part}2014.json"
        )
        if not path:
            raise ValueError(
                f"evals: {self.folder}: it needs captions_{part}2017.json in annotations/"
            )
        images = path.stem.removeprefix("captions_")
        self.read(path, [self.folder / images, self.folder / "images" / images])

    def read(self, path: Path, folders: Sequence[Path]) -> None:
        """COCO's json: images, and annotations that belong to them."""
        with reading(path) as content:
            self.images = {row["id"]: row for row in content["images"]}
            texts: dict[int, list[str]] = {number: [] for number in self.images}
            for row in content["annotations"]:
                if row["image_id"] not in texts:
                    raise ValueError(
                        f"evals: {path}: a caption belongs to image {row['image_id']}, which it"
                        " does not list"
                    )
                texts[row["image_id"]].append(row["caption"])
            names = [row["file_name"] for row in self.images.values()]
        self.paths = located(path, folders, names)
        self.said(path, list(texts.values()))


class Nocaps(CocoCaptions):
    """nocaps_val_4500_captions.json and val/ or images/; its groups are in-domain, near-domain and
    out-domain.

    Its captions are there to score by. What is fitted is fitted to COCO's: captions_train2017.json
    and train2017/ in the same folder.
    """

    splits = {"test": "val"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return found(folder, "nocaps_val*.json") is not None

    def open(self, part: str) -> None:
        path = found(self.folder, "nocaps_val*.json")
        self.read(
            path, [self.folder / name for name in ("val", "images", "validation", "images/val")]
        )
        with reading(path):
            self.domains = [row["domain"] for row in self.images.values()]

    def group(self, i: int) -> str:
        return self.domains[i]

    def other(self, split: str) -> Images:
        return CocoCaptions(self.folder, split) if split == "train" else super().other(split)


class Karpathy(Captioned):
    """dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json, and the images; restval
    is training, as its users have it.
    """

    splits = {"test": "test", "val": "val", "train": "train"}

    @classmethod
    def file(cls, folder: Path) -> Path | None:
        return found(folder, "dataset_coco.json") or found(folder, "dataset_flickr*.json")

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return cls.file(folder) is not None

    def open(self, part: str) -> None:
        path = self.file(self.folder)
        with reading(path) as content:
            rows = [
                row
                for row in content["images"]
                if row["split"] in (("train", "restval") if part == "train" else (part,))
            ]
            names = [str(Path(row.get("filepath", ""), row["filename"])) for row in rows]
            texts = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
        own = path.stem.removeprefix("dataset_")
        self.paths = located(
            path,
            [self.folder / name for name in ("", "images", f"{own}-images", f"{own}_images")],
            names,
        )
        self.said(path, texts)


class Vqa(Files):
    """VQAv2: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and
    val2014/; a kind is an answer_type.
    """

    holds = "questions"
    splits = {"test": "val2014", "train": "train2014"}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return found(folder, "v2_OpenEnded_mscoco_*_questions.json") is not None

    def open(self, part: str) -> None:
        files = [f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json"]
        asking, telling = (found(self.folder, name) for name in files)
        for path, name in zip((asking, telling), files):
            if not path:
                raise ValueError(f"evals: {self.folder}: it needs {name}")
        with reading(telling) as content:
            told = {
                row["question_id"]: (tuple(a["answer"] for a in row["answers"]), row["answer_type"])
                for row in content["annotations"]
            }
        self.asked: dict[int, list[Question]] = defaultdict(list)
        with reading(asking) as content:
            for row in content["questions"]:
                if row["question_id"] not in told:
                    raise ValueError(
                        f"evals: {telling}: no answers to question {row['question_id']}; do both"
                        " files come from one split?"
                    )
                self.asked[row["image_id"]].append(
                    Question(row["question"], *told[row["question_id"]])
                )
        names = [f"COCO_{part}_{number:012d}.jpg" for number in self.asked]
        self.paths = located(
            asking,
            [self.folder / part, self.folder / "images" / part, self.folder / "images"],
            names,
        )
        self.asked = list(self.asked.values())

    def questions(self, i: int) -> list[Question]:
        return self.asked[i]
