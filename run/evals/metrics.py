"""What classification is measured by: exact sums over all ranks in float64, from this rank's share
of the images.

    top1, top5       share of images whose class is the nearest, among the five nearest
    mean_per_class   top1 of each class that has images, averaged over these classes
    top1_top5        their mean (Kinetics700)
    roc_auc          of two classes: how often a positive image scores above a negative one, a tie
                     counts half (HatefulMemes)
    map              several classes an image: mean over the classes of the 11-point average
                     precision (VOC2007)
    pm               of video frames, pm_0: share of anchor frames that are right; pm_10: right with
                     all frames at most 10 away
                     (ImageNet-Vid-Robust, YTBB-Robust: Shankar et al. 2019, section 3)

Names: n images on this rank, N on all, C classes.
"""

import torch
from torch import Tensor

from glimpse.run.lib.distributed import to_device, total

METRICS = ("top1", "mean_per_class", "top1_top5", "roc_auc", "map", "pm")
MAIN = {name: name for name in METRICS} | {"pm": "pm_10"}  # the one number that stands for a set


def counted(scores: Tensor, labels: Tensor) -> Tensor:
    """(3, C) float64 over all ranks: of each class its images, and how many of these are right at 1
    and at 5.

    scores (n, C), labels (n,).
    """
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    rows = torch.stack(
        [torch.ones_like(labels, dtype=torch.float64), hits[:, 0].double(), hits.any(1).double()]
    )
    return total(
        torch.zeros(3, scores.shape[1], dtype=torch.float64, device=scores.device).index_add_(
            1, labels, rows
        )
    )


def top1(counts: Tensor) -> float:
    return float(counts[1].sum() / counts[0].sum())


def top5(counts: Tensor) -> float:
    return float(counts[2].sum() / counts[0].sum())


def mean_per_class(counts: Tensor) -> float:
    images, right, _ = counts[:, counts[0] > 0]
    return float((right / images).mean())


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Of a classifier that was fitted: top1, mean_per_class and chance, over all ranks; scores (n,
    C), labels (n,).
    """
    counts = counted(to_device(scores), to_device(labels))
    return dict(
        top1=top1(counts), mean_per_class=mean_per_class(counts), chance=1 / scores.shape[1]
    )


def everyone(indices: Tensor, values: Tensor, count: int) -> Tensor:
    """(N, ...) float64 on every rank, from each rank's values (n, ...) of the images of these
    numbers.
    """
    whole = torch.zeros(count, *values.shape[1:], dtype=torch.float64, device=values.device)
    whole[indices.to(values.device)] = values.double()
    return total(whole)


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """scores (N,), positive (N,) bool: the area under the curve, by the rank sum of the positives
    (Mann-Whitney U).
    """
    scores = scores.nan_to_num(0)  # of a model that has no numbers: all alike, which is chance
    _, which, times = scores.unique(return_inverse=True, return_counts=True)
    # from 1; those that are alike share the mean of theirs
    places = (times.cumsum(0) - (times - 1) / 2)[which].double()
    P, N = positive.sum().double(), (~positive).sum().double()
    return float((places[positive].sum() - P * (P + 1) / 2) / (P * N))


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """scores (N,), positive (N,) bool: the mean over recalls of 0, 0.1, ... 1 of the best precision
    at that recall or above (VOC2007).
    """
    right = positive[scores.nan_to_num(0).argsort(descending=True, stable=True)].double()
    found, seen = (
        right.cumsum(0),
        torch.arange(1, len(right) + 1, dtype=torch.float64, device=right.device),
    )
    precision = found / seen
    # 10 x found >= step x positives, in whole numbers: 3 of 10 is a recall of 0.3, whatever its
    # rounding
    best = [precision[10 * found >= step * right.sum()].max() for step in range(11)]
    return float(torch.stack(best).mean())


def mean_average_precision(scores: Tensor, positive: Tensor) -> float:
    """(N, C) each; classes without an image do not count."""
    return sum(
        values := [average_precision(s, p) for s, p in zip(scores.T, positive.T) if p.any()]
    ) / len(values)


def perturbed(right: Tensor, anchors: list[str], offsets: Tensor, within: int) -> float:
    """right (N,) bool, the anchor that each frame belongs to, and how many frames it is away (N,):
    PM-`within`.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(anchors))}
    owner = torch.tensor([number[name] for name in anchors], device=right.device)
    wrong = torch.zeros(len(number), dtype=torch.int64, device=right.device)
    wrong.index_add_(0, owner, (~right & (offsets.abs() <= within)).long())
    return float((wrong == 0).double().mean())
