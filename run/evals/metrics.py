"""Metrics of classification, summed exactly over all ranks in float64.

    top1, top5       share of images whose class has the highest score, or one of the five highest
    mean_per_class   top1 of each class that has images, averaged over these classes
    top1_top5        mean of top1 and top5 (Kinetics700)
    roc_auc          for two classes: share of pairs in which the positive image scores above the
                     negative one; a tie counts half (HatefulMemes)
    map              for images with several classes: mean over classes of the 11-point average
                     precision (VOC2007)
    pm               for video frames: pm_0 is the share of anchor frames that are right, pm_10 the
                     share that are right together with all frames at most 10 away
                     (ImageNet-Vid-Robust, YTBB-Robust: Shankar et al. 2019, section 3)

Shapes: n images on this rank, N on all ranks, C classes.
"""

import torch
from torch import Tensor

from glimpse.run.lib.distributed import all_reduce_sum, to_device

METRICS = ("top1", "mean_per_class", "top1_top5", "roc_auc", "map", "pm")
# {metric of a set: the result that enters a suite's average}
MAIN_METRIC = {name: name for name in METRICS} | {"pm": "pm_10"}


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Count the images of each class over all ranks, and those right at 1 and at 5.

    scores: (n, C). labels: (n,). Returns (3, C) float64.
    """
    classes = scores.shape[1]
    hits = scores.topk(min(5, classes), dim=1).indices == labels[:, None]
    images = torch.ones_like(labels, dtype=torch.float64)
    rows = torch.stack([images, hits[:, 0].double(), hits.any(1).double()])
    counts = torch.zeros(3, classes, dtype=torch.float64, device=scores.device)
    return all_reduce_sum(counts.index_add_(1, labels, rows))


def top1(counts: Tensor) -> float:
    """Return the top-1 accuracy from the counts of `count_hits`."""
    return float(counts[1].sum() / counts[0].sum())


def top5(counts: Tensor) -> float:
    """Return the top-5 accuracy from the counts of `count_hits`."""
    return float(counts[2].sum() / counts[0].sum())


def mean_per_class(counts: Tensor) -> float:
    """Return the top-1 accuracy averaged over classes, from the counts of `count_hits`."""
    images, hits, _ = counts[:, counts[0] > 0]
    return float((hits / images).mean())


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top1, mean_per_class and chance of a classifier, over all ranks.

    scores: (n, C). labels: (n,).
    """
    counts = count_hits(to_device(scores), to_device(labels))
    return dict(
        top1=top1(counts), mean_per_class=mean_per_class(counts), chance=1 / scores.shape[1]
    )


def gather_by_index(indices: Tensor, values: Tensor, count: int) -> Tensor:
    """Gather the values of all images on every rank, (N, ...) float64, ordered by index.

    indices, values: (n,) and (n, ...), those of this rank's images. count: N.
    """
    all_values = torch.zeros(count, *values.shape[1:], dtype=torch.float64, device=values.device)
    all_values[indices.to(values.device)] = values.double()
    return all_reduce_sum(all_values)


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve, from the rank sum of the positives (Mann-Whitney U).

    scores: (N,). positive: (N,) bool.
    """
    scores = scores.nan_to_num(0)  # if all scores are nan they become equal, which is chance
    _, value_index, repeats = scores.unique(return_inverse=True, return_counts=True)
    # Ranks start at 1; equal scores share the mean of their ranks.
    score_ranks = (repeats.cumsum(0) - (repeats - 1) / 2)[value_index].double()
    positives = positive.sum().double()
    negatives = (~positive).sum().double()
    smallest_sum = positives * (positives + 1) / 2  # if all positives score lowest
    return float((score_ranks[positive].sum() - smallest_sum) / (positives * negatives))


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return VOC2007's average precision.

    It is the mean, over recalls of 0, 0.1, ... 1, of the highest precision at that recall or above.
    scores: (N,). positive: (N,) bool.
    """
    ranked = positive[scores.nan_to_num(0).argsort(descending=True, stable=True)].double()
    hits = ranked.cumsum(0)
    seen = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=ranked.device)
    precision = hits / seen
    # Recalls are compared as integers, 10 * hits >= step * positives, so that rounding does not
    # move 3 of 10 below a recall of 0.3.
    best = [precision[10 * hits >= step * ranked.sum()].max() for step in range(11)]
    return float(torch.stack(best).mean())


def mean_average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the mean average precision over the classes that have images.

    scores: (N, C). positive: (N, C) bool.
    """
    columns = zip(scores.T, positive.T)
    values = [
        average_precision(class_scores, class_positive)
        for class_scores, class_positive in columns
        if class_positive.any()
    ]
    return sum(values) / len(values)


def perturbation_accuracy(
    is_right: Tensor, anchors: list[str], offsets: Tensor, max_offset: int
) -> float:
    """Return PM-k: the share of anchors with no wrong frame at most k = `max_offset` away.

    is_right: (N,) bool. anchors: the anchor of each frame. offsets: (N,), the frames' distances
    from their anchors.
    """
    numbers = {name: i for i, name in enumerate(dict.fromkeys(anchors))}
    anchor_of_frame = torch.tensor([numbers[name] for name in anchors], device=is_right.device)
    wrong = torch.zeros(len(numbers), dtype=torch.int64, device=is_right.device)
    wrong.index_add_(0, anchor_of_frame, (~is_right & (offsets.abs() <= max_offset)).long())
    return float((wrong == 0).double().mean())
