"""Layouts of evaluation sets with a JSON file next to folders of images.

COCO captions, nocaps, Karpathy's splits and VQAv2. Each layout is a class; data/evals/layouts.py
lists them.
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
    for directory in (folder, folder / "annotations"):
        matches = sorted(directory.glob(pattern))
        if matches:
            return matches[0]
    return None


def require_file(folder: Path, pattern: str) -> Path:
    """Return the result of `find_file`; ValueError if no file matches."""
    path = find_file(folder, pattern)
    if path is None:
        raise ValueError(f"evals: {folder}: it needs {pattern}")
    return path


@contextmanager
def read_json(path: Path) -> Iterator[dict]:
    """Yield the content of a JSON file.

    Convert errors of its syntax, and errors in the block about keys and types, to a ValueError
    that names the file.
    """
    try:
        yield json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"evals: {path}: truncated or not JSON ({error})") from None
    except KeyError as error:
        raise ValueError(
            f"evals: {path}: an entry has no key {error}; is it the data set's file of this name?"
        ) from None
    except (TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"evals: {path}: not structured as the data set's file of this name ({reason})"
        ) from None


def locate_images(path: Path, folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the paths of images, in the first of the folders that contains the first image.

    path: the JSON file that lists the images. Raise ValueError if `names` is empty, or images are
    missing.
    """
    if not names:
        raise ValueError(f"evals: {path}: no images of this split in it")
    image_folder = next((folder for folder in folders if (folder / names[0]).exists()), None)
    if image_folder is None:
        searched = ", ".join(map(str, folders))
        raise ValueError(
            f"evals: {path}: its images, the first is {names[0]}, are not in {searched}"
        )

    # Listing a folder once is much faster than calling exists() for each image.
    @cache
    def list_folder(folder: Path) -> set[str]:
        return set(os.listdir(folder)) if folder.is_dir() else set()

    paths = [image_folder / name for name in names]
    missing = []
    for name, image in zip(names, paths):
        if image.name not in list_folder(image.parent):
            missing.append(name)
    if missing:
        raise ValueError(
            f"evals: {image_folder}: {len(missing):,} of {len(names):,} images that {path.name}"
            f" lists are missing, the first is {missing[0]}"
        )
    return paths


class CaptionedFiles(FileSet):
    """Base class of layouts with captions; `texts` is the list of captions of each image."""

    content = "captions"
    texts: list[list[str]]

    def captions(self, i: int) -> list[str]:
        return self.texts[i]

    def set_captions(self, path: Path, texts: list[list[str]]) -> None:
        """Set the captions of all images, stripped; path: the file they come from.

        Raise ValueError if an image has no captions, or only empty ones.
        """
        self.texts = [[line.strip() for line in lines if line.strip()] for lines in texts]
        uncaptioned = [i for i, lines in enumerate(self.texts) if not lines]
        if uncaptioned:
            raise ValueError(
                f"evals: {path}: {len(uncaptioned):,} of {len(texts):,} images have no caption, the"
                f" first is {self.key(uncaptioned[0])}"
            )


class CocoCaptions(CaptionedFiles):
    """COCO captions: annotations/captions_val2017.json (or 2014) and val2017/."""

    splits = {"test": "val", "train": "train"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        patterns = [f"captions_{name}201[47].json" for name in cls.splits.values()]
        return any(find_file(folder, pattern) for pattern in patterns)

    def read_split(self, name: str) -> None:
        path = find_file(self.folder, f"captions_{name}2017.json")
        if path is None:
            path = find_file(self.folder, f"captions_{name}2014.json")
        if path is None:
            raise ValueError(
                f"evals: {self.folder}: it needs captions_{name}2017.json in annotations/"
            )
        images = path.stem.removeprefix("captions_")
        self.read_captions(path, [self.folder / images, self.folder / "images" / images])

    def read_captions(self, path: Path, folders: Sequence[Path]) -> None:
        """Read a JSON file in COCO's format, whose images are in one of the folders."""
        with read_json(path) as content:
            self.images = {row["id"]: row for row in content["images"]}
            texts: dict[int, list[str]] = {image_id: [] for image_id in self.images}
            for row in content["annotations"]:
                image_id = row["image_id"]
                if image_id not in texts:
                    raise ValueError(
                        f"evals: {path}: a caption belongs to image {image_id}, which the file does"
                        " not list"
                    )
                texts[image_id].append(row["caption"])
            names = [row["file_name"] for row in self.images.values()]
        self.paths = locate_images(path, folders, names)
        self.set_captions(path, list(texts.values()))


class Nocaps(CocoCaptions):
    """nocaps: nocaps_val_4500_captions.json, and val/ or images/.

    Its groups are in-domain, near-domain and out-domain. nocaps has no train split: models are
    trained on COCO's, captions_train2017.json and train2017/ in the same folder.
    """

    splits = {"test": "val"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return find_file(folder, "nocaps_val*.json") is not None

    def read_split(self, name: str) -> None:
        path = require_file(self.folder, "nocaps_val*.json")
        folders = ("val", "images", "validation", "images/val")
        self.read_captions(path, [self.folder / folder for folder in folders])
        with read_json(path):
            self.domains = [row["domain"] for row in self.images.values()]

    def group(self, i: int) -> str:
        return self.domains[i]

    def open_split(self, split: str) -> FileSet:
        if split == "train":
            return CocoCaptions(self.folder, split)
        return super().open_split(split)


class Karpathy(CaptionedFiles):
    """Karpathy's splits: dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json.

    As usual, restval belongs to the train split.
    """

    splits = {"test": "test", "val": "val", "train": "train"}

    @classmethod
    def file(cls, folder: Path) -> Path | None:
        return find_file(folder, "dataset_coco.json") or find_file(folder, "dataset_flickr*.json")

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return cls.file(folder) is not None

    def read_split(self, name: str) -> None:
        path = self.file(self.folder)
        if path is None:
            raise ValueError(
                f"evals: {self.folder}: it needs dataset_coco.json or dataset_flickr*.json"
            )
        names = ("train", "restval") if name == "train" else (name,)
        with read_json(path) as content:
            rows = [row for row in content["images"] if row["split"] in names]
            files = [str(Path(row.get("filepath", ""), row["filename"])) for row in rows]
            texts = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]

        data_set = path.stem.removeprefix("dataset_")
        folders = ("", "images", f"{data_set}-images", f"{data_set}_images")
        self.paths = locate_images(path, [self.folder / folder for folder in folders], files)
        self.set_captions(path, texts)


class Vqa(FileSet):
    """VQAv2: its questions, annotations and images; the kind of a question is its answer_type.

    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/.
    """

    content = "questions"
    splits = {"test": "val2014", "train": "train2014"}

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return find_file(folder, "v2_OpenEnded_mscoco_*_questions.json") is not None

    def read_split(self, name: str) -> None:
        questions_file = require_file(self.folder, f"v2_OpenEnded_mscoco_{name}_questions.json")
        answers_file = require_file(self.folder, f"v2_mscoco_{name}_annotations.json")

        # Answers and kind by question.
        annotations: dict[int, tuple[tuple[str, ...], str]] = {}
        with read_json(answers_file) as content:
            for row in content["annotations"]:
                answers = tuple(answer["answer"] for answer in row["answers"])
                annotations[row["question_id"]] = (answers, row["answer_type"])

        # Questions by image.
        by_image: dict[int, list[Question]] = defaultdict(list)
        with read_json(questions_file) as content:
            for row in content["questions"]:
                question_id = row["question_id"]
                if question_id not in annotations:
                    raise ValueError(
                        f"evals: {answers_file}: no answers to question {question_id}; do both"
                        " files come from one split?"
                    )
                answers, kind = annotations[question_id]
                by_image[row["image_id"]].append(Question(row["question"], answers, kind))

            files = [f"COCO_{name}_{int(image_id):012d}.jpg" for image_id in by_image]
        folders = [self.folder / name, self.folder / "images" / name, self.folder / "images"]
        self.paths = locate_images(questions_file, folders, files)
        self.questions_by_image = list(by_image.values())

    def questions(self, i: int) -> list[Question]:
        return self.questions_by_image[i]
