"""k nearest neighbors: the nearest images of the train split vote for an image's class.

Nothing is fitted. The vote is weighted as in Wu et al. 2018 (arXiv 1805.01978, section 3.4) and
DINO: a neighbor of cosine s counts exp(s / temperature), k = 20, temperature 0.07; temperature=inf
is a plain majority. Names: N train images, n queries of this rank, D width, C classes.

The train split's features stay on disk and are read in chunks, so that ImageNet's 1.28M x 768 take
4 GB there and megabytes in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.features import (
    FEATURE_KINDS,
    Features,
    check_train_and_test,
    check_visible_patches,
    train_test_features,
)
from glimpse.run.evals.metrics import accuracies
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import rank, to_device, world_size

CHUNK = 4096  # train images compared at once
QUERY_BATCH = 256  # with so many test images
INDEX_BITS = 31  # low bits of a key: the train image's number; its cosine is in the bits above


@dataclass(frozen=True)
class Options:
    features: str = "pooled"  # of features.KINDS
    k: int = 20  # neighbors that vote
    temperature: float = 0.07

    def __post_init__(self):
        check_choice("knn(features=...)", self.features, FEATURE_KINDS)
        if self.k < 1:
            raise ValueError(f"knn(k={self.k}): it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"knn(temperature={self.temperature}): it must be above 0")


check_set, check_model = check_train_and_test, check_visible_patches


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, mean_per_class and chance, as shares."""
    train, test = train_test_features(model, images, options.features)
    classes = len(images.class_names())
    labels = train.labels()
    blocks = torch.arange(len(test)).split(QUERY_BATCH)[rank() :: world_size()]
    queries = [test.rows(block) for block in blocks]

    predictions = [torch.empty(0, classes)]  # for a rank without a share
    for cosines, numbers in nearest_neighbors(train, queries, options.k):
        votes = count_votes(cosines.cpu(), labels[numbers.cpu()], classes, options.temperature)
        # argmax takes the first class of equal votes.
        predictions.append(F.one_hot(votes.argmax(1), classes).float())

    indices = torch.cat([*blocks, torch.empty(0, dtype=torch.int64)])
    return accuracies(torch.cat(predictions), test.labels()[indices])


def nearest_neighbors(
    train: Features, queries: list[Tensor], k: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the nearest train images of each block of queries (n, D).

    For each block: their cosines (n, k), largest first, and their numbers (n, k). These are the
    same on any device and for any split of the queries: cosines are computed in float64 and rounded
    to 30 bits, in one integer with the image's number, which orders equal cosines.
    """
    queries = [unit_vectors(block) for block in queries]
    best = [block.new_empty(len(block), 0, dtype=torch.int64) for block in queries]  # keys
    last = 2**INDEX_BITS - 1
    for chunk in torch.arange(len(train)).split(CHUNK):
        bank = unit_vectors(train.rows(chunk))
        place = last - to_device(chunk)  # of equal cosines, the lower number has the larger key
        for i, block in enumerate(queries):
            cosine = (block @ bank.T).nan_to_num(-1.0).clamp(-1, 1)
            new = (cosine * 2**30).round().long() * 2**INDEX_BITS + place
            keys = torch.cat([best[i], new], dim=1)
            best[i] = keys.topk(min(k, keys.shape[1]), dim=1).values

    # Take the keys apart again.
    results = []
    for keys in best:
        cosines = (keys >> INDEX_BITS).double() / 2**30
        numbers = last - (keys & last)
        results.append((cosines, numbers))
    return results


def unit_vectors(features: Tensor) -> Tensor:
    """Normalize (n, ...) to unit vectors (n, D), float64, on the device."""
    return F.normalize(to_device(features).flatten(1).double(), dim=1)


def count_votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum the votes of neighbors (n, k), as (n, C) float64."""
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    weights = ((cosines - 1) / temperature).exp()  # less 1, so that none overflows
    # One neighbor after another: the order of a sum is part of its value.
    rows = torch.arange(len(votes))
    for label, weight in zip(labels.T, weights.T):
        votes[rows, label] += weight
    return votes
