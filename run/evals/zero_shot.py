"""Zero-shot classification (CLIP section 3.1.4).

An image's class is the one whose prompts' mean embedding lies nearest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet, Images
from glimpse.data.transforms import decode
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.config import check_choice


@dataclass(frozen=True)
class Options:
    templates: str = ""  # 7, 80, 85 (data/evals/prompts.py) or a file; default: the set's own
    # one of run.evals.metrics.METRICS; if images have one class, top1 and top5 are reported too
    metric: str = "top1"

    def __post_init__(self):
        check_choice("evals: zero_shot.metric", self.metric, metrics.METRICS)


def check_set(benchmark: ClipBenchmarkSet, options: Options) -> set[int]:
    """Read every label and return the classes that have images.

    ValueError: the labels do not fit the set's names or the metric; so such a set is refused before
    anything is computed.
    """
    classes = len(benchmark.prompts(options.templates))
    try:
        decode(benchmark.image(0))
    except ValueError as error:
        raise ValueError(f"evals: {benchmark.folder}: {benchmark.key(0)}: {error}") from None
    if options.metric == "roc_auc" and classes != 2:
        raise ValueError(
            f"evals: {benchmark.folder}: roc_auc is for two classes; {classes} are named"
        )
    if options.metric == "pm":
        check_anchors(benchmark)

    seen: set[int] = set()
    for i in range(len(benchmark)):
        seen.update(read_labels(benchmark, i, options.metric, classes))

    needed = 2 if options.metric == "roc_auc" else 1
    if len(seen) < needed:
        raise ValueError(
            f"evals: {benchmark.folder}: its images are of {len(seen)} classes; {options.metric}"
            " needs more"
        )
    return seen


def check_anchors(benchmark: ClipBenchmarkSet) -> None:
    """Raise ValueError if the anchor frame of a frame is not in the set."""
    frames = [benchmark.frame(i) for i in range(len(benchmark))]
    anchors = {frame.anchor for frame in frames if frame.offset == 0}
    lone = {frame.anchor for frame in frames} - anchors
    if lone:
        raise ValueError(
            f"evals: {benchmark.folder}: frames of the anchor {min(lone)!r}, but not itself"
            " (offset 0)"
        )


def read_labels(benchmark: ClipBenchmarkSet, i: int, metric: str, classes: int) -> list[int]:
    """Return the classes of image i as the metric needs them.

    ValueError: one of them has no name; `classes` have.
    """
    if metric == "map":
        present = benchmark.multi_hot(i)
        if len(present) != classes:
            raise ValueError(
                f"evals: {benchmark.folder}: {benchmark.key(i)} tells of {len(present)} classes;"
                f" {classes} are named"
            )
        return np.nonzero(present)[0].tolist()
    labels = list(benchmark.frame(i).labels) if metric == "pm" else [benchmark.label(i)]
    if max(labels) >= classes:
        raise ValueError(
            f"evals: {benchmark.folder}: {benchmark.key(i)} is of class {max(labels)};"
            f" classnames.txt names {classes}, from 0"
        )
    return labels


def evaluate(model: Embedder, benchmark: ClipBenchmarkSet, options: Options) -> dict[str, float]:
    """Return the metric, as a share.

    For images of one class also top1, top5 and chance: the top1 of guessing.
    """
    classes = class_embeddings(model, benchmark, options.templates)
    indices, images = model.embed_images(benchmark)
    scores = images @ classes.T.to(images.device)  # (n, C)
    if options.metric == "map":
        return dict(map=multilabel_map(benchmark, indices, scores))
    if options.metric == "pm":
        return video_accuracies(benchmark, indices, scores)

    labels = [benchmark.label(i) for i in indices.tolist()]
    labels = torch.tensor(labels, dtype=torch.int64, device=images.device)
    counts = metrics.count_hits(scores, labels)
    results = dict(top1=metrics.top1(counts), top5=metrics.top5(counts), chance=1 / len(classes))
    if options.metric == "mean_per_class":
        results["mean_per_class"] = metrics.mean_per_class(counts)
    if options.metric == "top1_top5":
        results["top1_top5"] = (results["top1"] + results["top5"]) / 2
    if options.metric == "roc_auc":
        margins = metrics.gather_by_index(indices, scores[:, 1] - scores[:, 0], len(benchmark))
        positive = metrics.gather_by_index(indices, labels, len(benchmark)) > 0
        results["roc_auc"] = metrics.roc_auc(margins, positive)
    return results


def multilabel_map(benchmark: ClipBenchmarkSet, indices: Tensor, scores: Tensor) -> float:
    """Return the mean average precision over all ranks.

    scores (n, C): those of this rank's images, `indices`.
    """
    present = np.zeros((len(indices), scores.shape[1]))
    for row, i in enumerate(indices.tolist()):
        present[row] = benchmark.multi_hot(i)
    present = torch.from_numpy(present).to(scores.device)

    count = len(benchmark)
    all_scores = metrics.gather_by_index(indices, scores, count)
    all_present = metrics.gather_by_index(indices, present, count)
    return metrics.mean_average_precision(all_scores, all_present > 0)


def video_accuracies(
    benchmark: ClipBenchmarkSet, indices: Tensor, scores: Tensor
) -> dict[str, float]:
    """Return pm_0, pm_10 and chance over all ranks.

    scores (n, C): those of this rank's frames, `indices`.
    """
    frames = [benchmark.frame(i) for i in range(len(benchmark))]
    offsets = torch.tensor([frame.offset for frame in frames], device=scores.device)
    anchors = [frame.anchor for frame in frames]

    predictions = zip(indices.tolist(), scores.argmax(1).tolist())
    hits = [prediction in frames[i].labels for i, prediction in predictions]
    hits = torch.tensor(hits, device=scores.device)
    right = metrics.gather_by_index(indices, hits, len(benchmark)) > 0

    results = {
        f"pm_{k}": metrics.perturbation_accuracy(right, anchors, offsets, k) for k in (0, 10)
    }
    return results | dict(chance=1 / scores.shape[1])


def class_embeddings(model: Embedder, benchmark: Images, templates: str = "") -> Tensor:
    """Return the mean of each class's prompt embeddings, (C, E), of length 1.

    All names of a class weigh the same.
    """
    prompts = benchmark.prompts(templates)
    texts = model.embed_texts([text for several in prompts for text in several])
    parts = texts.split([len(several) for several in prompts])
    means = torch.stack([part.mean(0) for part in parts])
    return F.normalize(means, dim=-1)
