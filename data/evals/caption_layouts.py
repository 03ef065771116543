"""Evaluation sets stored as a json beside folders of images.

COCO captions, nocaps, Karpathy's splits and VQAv2. A layout is a class; data/evals/layouts.py lists
them.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from glimpse.data.evals.clip_benchmark import Question
from glimpse.data.evals.segmentation_layouts import FileSet


def find_file(folder: Path, pattern: str) -> Path | None:
    """Return the first file that matches the pattern in the folder or in its annotations/."""
    for place in (folder, folder / "annotations"):
        matches = sorted(place.glob(pattern))
        if matches:
            return matches[0]
    return None


def require_file(folder: Path, pattern: str) -> Path:
    """Return the file that `found` returns; ValueError if there is none."""
    path = find_file(folder, pattern)
    if path is None:
        raise ValueError(f"evals: {folder}: it needs {pattern}")
    return path


@contextmanager
def read_json(path: Path) -> Iterator[dict]:
    """Yield the content of a json; a key it lacks becomes one ValueError that names the file."""
    try:
        yield json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"evals: {path}: cut off, or no json ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"evals: {path}: not in the layout of its name ({why})") from None


def locate_images(path: Path, folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the files of these names, all in the first of the folders that has the first name.

    ValueError: `path`, the json, lists no images, or some of them are missing.
    """
    if not names:
        raise ValueError(f"evals: {path}: no images of this split in it")
    home = next((folder for folder in folders if (folder / names[0]).exists()), None)
    if home is None:
        places = ", ".join(map(str, folders))
        raise ValueError(f"evals: {path}: its images, the first is {names[0]}, are not in {places}")

    # One listing a folder is much faster than a call of exists() an image.
    @cache
    def listing(folder: Path) -> set[str]:
        return set(os.listdir(folder)) if folder.is_dir() else set()

    missing = [name for name in names if Path(name).name not in listing((home / name).parent)]
    if missing:
        raise ValueError(
            f"evals: {home} lacks {len(missing):,} of {len(names):,} images that {path.name} lists,"
            f" the first is {missing[0]}"
        )
    return [home / name for name in names]


class CaptionedFiles(FileSet):
    """Images with captions: `texts`, a list for each image."""

    content = "captions"
    texts: list[list[str]]

    def captions(self, i: int) -> list[str]:
        return self.texts[i]

    def set_captions(self, path: Path, texts: list[list[str]]) -> None:
        """Keep the captions of all images, stripped.

        ValueError: an image has none but empty ones.
        """
        self.texts = [[line.strip() for line in lines if line.strip()] for lines in texts]
        silent = [i for i, lines in enumerate(self.texts) if not lines]
        if silent:
            raise ValueError(
                f"evals: {path}: {len(silent):,} of {len(texts):,} images have no caption, the"
                f" first is {self.key(silent[0])}"
            )


class CocoCaptions(CaptionedFiles):
    """annotations/captions_val2017.json (or 2014) and val2017/."""

    splits = {"test": "val", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return any(
            find_file(folder, f"captions_{part}201[47].json") for part in cls.splits.values()
        )

    def read_split(self, part: str) -> None:
        path = find_file(self.folder, f"captions_{part}2017.json")
        if path is None:
            path = find_file(self.folder, f"captions_{part}2014.json")
        if path is None:
            raise ValueError(
                f"evals: {self.folder}: it needs captions_{part}2017.json in annotations/"
            )
        images = path.stem.removeprefix("captions_")
        self.read(path, [self.folder / images, self.folder / "images" / images])

    def read(self, path: Path, folders: Sequence[Path]) -> None:
        """Read COCO's json: images, and annotations that belong to them."""
        with read_json(path) as content:
            self.images = {row["id"]: row for row in content["images"]}
            texts: dict[int, list[str]] = {number: [] for number in self.images}
            for row in content["annotations"]:
                number = row["image_id"]
                if number not in texts:
                    raise ValueError(
                        f"evals: {path}: a caption belongs to image {number}, which it does not"
                        " list"
                    )
                texts[number].append(row["caption"])
            names = [row["file_name"] for row in self.images.values()]
        self.paths = locate_images(path, folders, names)
        self.set_captions(path, list(texts.values()))


class Nocaps(CocoCaptions):
    """nocaps_val_4500_captions.json and val/ or images/.

    Its groups are in-domain, near-domain and out-domain. Its captions are there to score by; a
    model is fitted to COCO's: captions_train2017.json and train2017/ in the same folder.
    """

    splits = {"test": "val"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return find_file(folder, "nocaps_val*.json") is not None

    def read_split(self, part: str) -> None:
        path = require_file(self.folder, "nocaps_val*.json")
        places = ("val", "images", "validation", "images/val")
        self.read(path, [self.folder / place for place in places])
        with read_json(path):
            self.domains = [row["domain"] for row in self.images.values()]

    def group(self, i: int) -> str:
        return self.domains[i]

    def open_split(self, split: str) -> FileSet:
        if split == "train":
            return CocoCaptions(self.folder, split)
        return super().open_split(split)


class Karpathy(CaptionedFiles):
    """dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json, and the images.

    restval belongs to the train split, as is usual.
    """

    splits = {"test": "test", "val": "val", "train": "train"}

    @classmethod
    def file(cls, folder: Path) -> Path | None:
        return find_file(folder, "dataset_coco.json") or find_file(folder, "dataset_flickr*.json")

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return cls.file(folder) is not None

    def read_split(self, part: str) -> None:
        path = self.file(self.folder)
        if path is None:
            raise ValueError(
                f"evals: {self.folder}: it needs dataset_coco.json or dataset_flickr*.json"
            )
        parts = ("train", "restval") if part == "train" else (part,)
        with read_json(path) as content:
            rows = [row for row in content["images"] if row["split"] in parts]
            names = [str(Path(row.get("filepath", ""), row["filename"])) for row in rows]
            texts = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]

        data_set = path.stem.removeprefix("dataset_")
        places = ("", "images", f"{data_set}-images", f"{data_set}_images")
        self.paths = locate_images(path, [self.folder / place for place in places], names)
        self.set_captions(path, texts)


class Vqa(FileSet):
    """VQAv2: its questions, annotations and val2014/; a question's kind is its answer_type.

    v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json.
    """

    content = "questions"
    splits = {"test": "val2014", "train": "train2014"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return find_file(folder, "v2_OpenEnded_mscoco_*_questions.json") is not None

    def read_split(self, part: str) -> None:
        questions_file = require_file(self.folder, f"v2_OpenEnded_mscoco_{part}_questions.json")
        answers_file = require_file(self.folder, f"v2_mscoco_{part}_annotations.json")

        # By question: its answers and its kind.
        answered: dict[int, tuple[tuple[str, ...], str]] = {}
        with read_json(answers_file) as content:
            for row in content["annotations"]:
                answers = tuple(answer["answer"] for answer in row["answers"])
                answered[row["question_id"]] = (answers, row["answer_type"])

        by_image: dict[int, list[Question]] = defaultdict(list)
        with read_json(questions_file) as content:
            for row in content["questions"]:
                number = row["question_id"]
                if number not in answered:
                    raise ValueError(
                        f"evals: {answers_file}: no answers to question {number}; do both files"
                        " come from one split?"
                    )
                answers, kind = answered[number]
                by_image[row["image_id"]].append(Question(row["question"], answers, kind))

        names = [f"COCO_{part}_{number:012d}.jpg" for number in by_image]
        places = [self.folder / part, self.folder / "images" / part, self.folder / "images"]
        self.paths = locate_images(questions_file, places, names)
        self.asked = list(by_image.values())

    def questions(self, i: int) -> list[Question]:
        return self.asked[i]
