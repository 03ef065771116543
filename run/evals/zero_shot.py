"""Zero-shot classification: an image's class is the one whose prompts' mean embedding lies nearest
(CLIP section 3.1.4).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Benchmark, Images
from glimpse.data.transforms import decode
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.config import check_choice


@dataclass(frozen=True)
class Options:
    templates: str = ""  # 7, 80, 85 (data/evals/prompts.py) or a file; default: the set's own
    # a row of run.evals.metrics.METRICS; top1 and top5 are told beside it where images have one
    # class
    metric: str = "top1"

    def __post_init__(self):
        check_choice("evals: zero_shot.metric", self.metric, metrics.METRICS)


def check(benchmark: Benchmark, options: Options) -> set[int]:
    """Every label is read, so that a set whose labels do not fit its names is refused before
    anything is computed.

    Returns the classes that have images.
    """
    seen: set[int] = set()
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
        frames = [benchmark.frame(i) for i in range(len(benchmark))]
        if lone := {frame.anchor for frame in frames} - {
            frame.anchor for frame in frames if frame.offset == 0
        }:
            raise ValueError(
                f"evals: {benchmark.folder}: frames of the anchor {min(lone)!r}, but not itself"
                " (offset 0)"
            )
    for i in range(len(benchmark)):
        if options.metric == "map":
            if len(row := benchmark.present(i)) != classes:
                raise ValueError(
                    f"evals: {benchmark.folder}: {benchmark.key(i)} tells of {len(row)} classes;"
                    f" {classes} are named"
                )
            seen.update(np.nonzero(row)[0].tolist())
            continue
        labels = benchmark.frame(i).labels if options.metric == "pm" else [benchmark.label(i)]
        if max(labels) >= classes:
            raise ValueError(
                f"evals: {benchmark.folder}: {benchmark.key(i)} is of class {max(labels)}; "
                f"classnames.txt names {classes}, from 0"
            )
        seen.update(labels)
    if not seen or options.metric == "roc_auc" and len(seen) < 2:
        raise ValueError(
            f"evals: {benchmark.folder}: its images are of {len(seen)} classes; {options.metric}"
            " needs more"
        )
    return seen


def evaluate(model: Embedder, benchmark: Benchmark, options: Options) -> dict[str, float]:
    """The metric, and for images of one class top1, top5 and chance: what guessing would get at
    top1; all are shares.
    """
    classes = class_embeddings(model, benchmark, options.templates)
    indices, images = model.images(benchmark)
    scores = images @ classes.T.to(images.device)  # (n, C)
    if options.metric == "map":
        present = torch.from_numpy(
            np.stack([benchmark.present(i) for i in indices.tolist()] or [np.zeros(len(classes))])
        )[: len(indices)]
        scores, present = (
            metrics.everyone(indices, x.to(scores.device), len(benchmark))
            for x in (scores, present)
        )
        return dict(map=metrics.mean_average_precision(scores, present > 0))
    if options.metric == "pm":
        frames = [benchmark.frame(i) for i in range(len(benchmark))]
        right = [
            best in frames[i].labels for i, best in zip(indices.tolist(), scores.argmax(1).tolist())
        ]
        right = (
            metrics.everyone(indices, torch.tensor(right, device=scores.device), len(benchmark)) > 0
        )
        offsets = torch.tensor([frame.offset for frame in frames], device=scores.device)
        anchors = [frame.anchor for frame in frames]
        return {f"pm_{k}": metrics.perturbed(right, anchors, offsets, k) for k in (0, 10)} | dict(
            chance=1 / len(classes)
        )
    labels = torch.tensor(
        [benchmark.label(i) for i in indices.tolist()], dtype=torch.int64, device=images.device
    )
    counts = metrics.counted(scores, labels)
    found = dict(top1=metrics.top1(counts), top5=metrics.top5(counts), chance=1 / len(classes))
    if options.metric == "mean_per_class":
        found["mean_per_class"] = metrics.mean_per_class(counts)
    if options.metric == "top1_top5":
        found["top1_top5"] = (found["top1"] + found["top5"]) / 2
    if options.metric == "roc_auc":
        above = metrics.everyone(indices, scores[:, 1] - scores[:, 0], len(benchmark))
        found["roc_auc"] = metrics.roc_auc(
            above, metrics.everyone(indices, labels, len(benchmark)) > 0
        )
    return found


def class_embeddings(model: Embedder, benchmark: Images, templates: str = "") -> Tensor:
    """(C, E): of each class the mean of its prompts' embeddings, of length 1; all names of a class
    weigh the same.
    """
    prompts = benchmark.prompts(templates)
    texts = model.texts([text for several in prompts for text in several])
    return F.normalize(
        torch.stack([part.mean(0) for part in texts.split(list(map(len, prompts)))]), dim=-1
    )
