"""Zero-shot classification (CLIP section 3.1.4).

An image gets the class whose mean prompt embedding has the highest cosine similarity.

Shapes: N images, n images of this rank, C classes, E embedding width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.data.transforms import decode
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.config import check_choice


@dataclass(frozen=True)
class Options:
    """Options of zero_shot."""

    templates: str = ""  # 7, 80, 85 (data/evals/prompts.py) or a file; "": the set's own
    # One of run.evals.metrics.METRICS. If each image has one class, top1 and top5 are reported too.
    metric: str = "top1"

    def __post_init__(self):
        check_choice("evals: zero_shot.metric", self.metric, metrics.METRICS)


def check_set(images: Images, options: Options) -> set[int]:
    """Return the classes that have images.

    Reads the labels of all images, so that a bad set is refused before anything is computed.
    Raises ValueError if the labels do not fit the class names or the metric.
    """
    classes = len(images.prompts(options.templates))
    try:
        decode(images.image(0))
    except ValueError as error:
        raise ValueError(f"evals: {images.folder}: {images.key(0)}: {error}") from None
    if options.metric == "roc_auc" and classes != 2:
        raise ValueError(
            f"evals: {images.folder}: roc_auc needs two classes; classnames.txt names {classes}"
        )
    if options.metric == "pm":
        check_anchors(images)

    classes_with_images: set[int] = set()
    for i in range(len(images)):
        classes_with_images.update(read_labels(images, i, options.metric, classes))

    minimum = 2 if options.metric == "roc_auc" else 1
    if len(classes_with_images) < minimum:
        raise ValueError(
            f"evals: {images.folder}: its images are of {len(classes_with_images)} classes;"
            f" {options.metric} needs at least {minimum}"
        )
    return classes_with_images


def check_anchors(images: Images) -> None:
    """Raise ValueError if a frame's anchor frame is not in the set."""
    frames = [images.frame(i) for i in range(len(images))]
    anchors = {frame.anchor for frame in frames if frame.offset == 0}
    missing = {frame.anchor for frame in frames} - anchors
    if missing:
        raise ValueError(
            f"evals: {images.folder}: there are frames of the anchor {min(missing)!r}, but not the"
            " anchor itself (offset 0)"
        )


def read_labels(images: Images, i: int, metric: str, classes: int) -> list[int]:
    """Return the classes of image i for a metric.

    Raises ValueError if one of them is not among the `classes` that have names.
    """
    if metric == "map":
        present = images.multi_hot(i)
        if len(present) != classes:
            raise ValueError(
                f"evals: {images.folder}: {images.key(i)} lists {len(present)} classes;"
                f" classnames.txt names {classes}"
            )
        return np.nonzero(present)[0].tolist()
    labels = list(images.frame(i).labels) if metric == "pm" else [images.label(i)]
    if max(labels) >= classes:
        raise ValueError(
            f"evals: {images.folder}: {images.key(i)} is of class {max(labels)};"
            f" classnames.txt names {classes}, from 0"
        )
    return labels


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return the metric, as a fraction.

    If each image has one class: also top1, top5, and chance, the top1 of guessing.
    """
    classes = class_embeddings(model, images, options.templates)
    indices, embeddings = model.embed_images(images)
    scores = embeddings @ classes.T.to(embeddings.device)  # (n, C)
    if options.metric == "map":
        return dict(map=multilabel_map(images, indices, scores))
    if options.metric == "pm":
        return video_accuracies(images, indices, scores)

    labels = [images.label(i) for i in indices.tolist()]
    labels = torch.tensor(labels, dtype=torch.int64, device=embeddings.device)
    counts = metrics.count_hits(scores, labels)
    results = dict(top1=metrics.top1(counts), top5=metrics.top5(counts), chance=1 / len(classes))
    if options.metric == "mean_per_class":
        results["mean_per_class"] = metrics.mean_per_class(counts)
    if options.metric == "top1_top5":
        results["top1_top5"] = (results["top1"] + results["top5"]) / 2
    if options.metric == "roc_auc":
        margins = metrics.gather_by_index(indices, scores[:, 1] - scores[:, 0], len(images))
        positive = metrics.gather_by_index(indices, labels, len(images)) > 0
        results["roc_auc"] = metrics.roc_auc(margins, positive)
    return results


def multilabel_map(images: Images, indices: Tensor, scores: Tensor) -> float:
    """Return the mean average precision over all ranks.

    indices, scores: (n,) and (n, C), those of this rank's images.
    """
    present = np.zeros((len(indices), scores.shape[1]))
    for row, i in enumerate(indices.tolist()):
        present[row] = images.multi_hot(i)
    present = torch.from_numpy(present).to(scores.device)

    count = len(images)
    all_scores = metrics.gather_by_index(indices, scores, count)
    all_present = metrics.gather_by_index(indices, present, count)
    return metrics.mean_average_precision(all_scores, all_present > 0)


def video_accuracies(images: Images, indices: Tensor, scores: Tensor) -> dict[str, float]:
    """Return pm_0, pm_10 and chance over all ranks.

    indices, scores: (n,) and (n, C), those of this rank's frames.
    """
    frames = [images.frame(i) for i in range(len(images))]
    offsets = torch.tensor([frame.offset for frame in frames], device=scores.device)
    anchors = [frame.anchor for frame in frames]

    predictions = zip(indices.tolist(), scores.argmax(1).tolist())
    hits = [prediction in frames[i].labels for i, prediction in predictions]
    hits = torch.tensor(hits, device=scores.device)
    is_right = metrics.gather_by_index(indices, hits, len(images)) > 0

    results = {}
    for k in (0, 10):
        results[f"pm_{k}"] = metrics.perturbation_accuracy(is_right, anchors, offsets, k)
    return results | dict(chance=1 / scores.shape[1])


def class_embeddings(model: Embedder, images: Images, templates: str = "") -> Tensor:
    """Return the normalized mean of each class's prompt embeddings, (C, E).

    The prompts of all names of a class have the same weight.
    """
    prompts = images.prompts(templates)
    all_prompts = [prompt for class_prompts in prompts for prompt in class_prompts]
    embeddings = model.embed_texts(all_prompts)
    by_class = embeddings.split([len(class_prompts) for class_prompts in prompts])
    means = torch.stack([class_embedding.mean(0) for class_embedding in by_class])
    return F.normalize(means, dim=-1)
