"""Metrics of classification: exact sums over all ranks in float64, from each rank's images.

    top1, top5       share of images whose class is the nearest, among the five nearest
    mean_per_class   top1 of each class that has images, averaged over these classes
    top1_top5        their mean (Kinetics700)
    roc_auc          of two classes: how often a positive image scores above a negative one, a tie
                     counts half (HatefulMemes)
    map              several classes an image: mean over the classes of the 11-point average
                     precision (VOC2007)
    pm               of video frames, pm_0: share of anchor frames that are right; pm_10: right with
                     all frames at most 10 away (ImageNet-Vid-Robust, YTBB-Robust: Shankar et al.
                     2019, section 3)

Names: n images on this rank, N on all, C classes.
"""

import torch
from torch import Tensor

from glimpse.run.lib.distributed import all_reduce_sum, to_device

METRICS = ("top1", "mean_per_class", "top1_top5", "roc_auc", "map", "pm")
MAIN_METRIC = {name: name for name in METRICS} | {
    "pm": "pm_10"
}  # the one number that stands for a set


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Count each class's images over all ranks, and those right at 1 and at 5: (3, C) float64.

    scores (n, C), labels (n,).
    """
    classes = scores.shape[1]
    hits = scores.topk(min(5, classes), dim=1).indices == labels[:, None]
    images = torch.ones_like(labels, dtype=torch.float64)
    rows = torch.stack([images, hits[:, 0].double(), hits.any(1).double()])
    counts = torch.zeros(3, classes, dtype=torch.float64, device=scores.device)
    return all_reduce_sum(counts.index_add_(1, labels, rows))


def top1(counts: Tensor) -> float:
    return float(counts[1].sum() / counts[0].sum())


def top5(counts: Tensor) -> float:
    return float(counts[2].sum() / counts[0].sum())


def mean_per_class(counts: Tensor) -> float:
    images, right, _ = counts[:, counts[0] > 0]
    return float((right / images).mean())


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return a fitted classifier's top1, mean_per_class and chance, over all ranks.

    scores (n, C), labels (n,).
    """
    counts = count_hits(to_device(scores), to_device(labels))
    return dict(
        top1=top1(counts), mean_per_class=mean_per_class(counts), chance=1 / scores.shape[1]
    )


def gather_by_index(indices: Tensor, values: Tensor, count: int) -> Tensor:
    """Gather the values of all images on every rank, (N, ...) float64.

    values (n, ...): those of this rank's images, `indices`. count: N.
    """
    everything = torch.zeros(count, *values.shape[1:], dtype=torch.float64, device=values.device)
    everything[indices.to(values.device)] = values.double()
    return all_reduce_sum(everything)


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the curve, by the rank sum of the positives (Mann-Whitney U).

    scores (N,), positive (N,) bool.
    """
    scores = scores.nan_to_num(0)  # scores that are all nan become equal, which is chance
    _, which, times = scores.unique(return_inverse=True, return_counts=True)
    # Places count from 1; equal scores share the mean of their places.
    places = (times.cumsum(0) - (times - 1) / 2)[which].double()
    positives = positive.sum().double()
    negatives = (~positive).sum().double()
    lowest_sum = positives * (positives + 1) / 2  # of the places, if all positives score lowest
    return float((places[positive].sum() - lowest_sum) / (positives * negatives))


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the mean over recalls of 0, 0.1, ... 1 of the best precision at that recall or above.

    This is VOC2007's average precision. scores (N,), positive (N,) bool.
    """
    right = positive[scores.nan_to_num(0).argsort(descending=True, stable=True)].double()
    hits = right.cumsum(0)
    seen = torch.arange(1, len(right) + 1, dtype=torch.float64, device=right.device)
    precision = hits / seen
    # 10 x hits >= step x positives, in whole numbers: 3 of 10 is a recall of 0.3, whatever its
    # rounding.
    best = [precision[10 * hits >= step * right.sum()].max() for step in range(11)]
    return float(torch.stack(best).mean())


def mean_average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the mean average precision of (N, C) each; classes without an image do not count."""
    pairs = zip(scores.T, positive.T)
    values = [average_precision(score, images) for score, images in pairs if images.any()]
    return sum(values) / len(values)


def perturbation_accuracy(right: Tensor, anchors: list[str], offsets: Tensor, within: int) -> float:
    """Return PM-`within`: the share of anchors whose frames at most so far away are all right.

    right (N,) bool; anchors: that of each frame; offsets (N,): its distance from it in frames.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(anchors))}
    owner = torch.tensor([number[name] for name in anchors], device=right.device)
    wrong = torch.zeros(len(number), dtype=torch.int64, device=right.device)
    wrong.index_add_(0, owner, (~right & (offsets.abs() <= within)).long())
    return float((wrong == 0).double().mean())
