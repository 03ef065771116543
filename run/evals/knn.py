"""k-nearest-neighbor classification: the nearest train images vote for an image's class.

Nothing is trained. Votes are weighted as in Wu et al. 2018 (arXiv 1805.01978, section 3.4) and
DINO: a neighbor with cosine s counts exp(s / temperature), with k = 20 and temperature 0.07. With
temperature=inf all votes count the same.

The features of train/ stay on disk and are read in chunks. ImageNet's 1.28M x 768 take 4 GB there
and megabytes in memory.

Shapes: N train images, n queries of this rank, D width, C classes.
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
QUERY_BATCH = 256  # test images compared with them
# A neighbor is sorted by one integer: its cosine, and in the lowest bits its index.
INDEX_BITS = 31


@dataclass(frozen=True)
class Options:
    """Options of knn."""

    features: str = "pooled"  # one of features.FEATURE_KINDS
    k: int = 20  # neighbors that vote
    temperature: float = 0.07

    def __post_init__(self):
        check_choice("knn(features=...)", self.features, FEATURE_KINDS)
        if self.k < 1:
            raise ValueError(f"knn(k={self.k}): it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(
                f"knn(temperature={self.temperature}): it must be above 0; inf weights all"
                " neighbors equally"
            )


check_set = check_train_and_test
check_model = check_visible_patches


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, mean_per_class and chance, as fractions."""
    train, test = train_test_features(model, images, options.features)
    classes = len(images.class_names())
    labels = train.labels()
    query_indices = torch.arange(len(test)).split(QUERY_BATCH)[rank() :: world_size()]
    queries = [test.rows(indices) for indices in query_indices]

    predictions = [torch.empty(0, classes)]  # for a rank without queries
    for cosines, neighbors in nearest_neighbors(train, queries, options.k):
        neighbor_labels = labels[neighbors.cpu()]
        votes = count_votes(cosines.cpu(), neighbor_labels, classes, options.temperature)
        # argmax takes the first class of equal votes.
        predictions.append(F.one_hot(votes.argmax(1), classes).float())

    indices = torch.cat([*query_indices, torch.empty(0, dtype=torch.int64)])
    return accuracies(torch.cat(predictions), test.labels()[indices])


def nearest_neighbors(
    train: Features, queries: list[Tensor], k: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the nearest train images of each batch of queries (n, D).

    For each batch: cosines (n, k), largest first, and indices of train images (n, k).

    The result is the same on any device and for any split of the queries. Cosines are computed in
    float64 and rounded to 30 bits. Together with the index they form one integer key, so that equal
    cosines are ordered by index.
    """
    queries = [unit_vectors(batch) for batch in queries]
    best_keys = [batch.new_empty(len(batch), 0, dtype=torch.int64) for batch in queries]
    max_index = 2**INDEX_BITS - 1
    for chunk in torch.arange(len(train)).split(CHUNK):
        neighbors = unit_vectors(train.rows(chunk))
        # Of equal cosines, the image with the lower index must have the larger key.
        index_key = max_index - to_device(chunk)
        for i, batch in enumerate(queries):
            cosines = (batch @ neighbors.T).nan_to_num(-1.0).clamp(-1, 1)
            chunk_keys = (cosines * 2**30).round().long() * 2**INDEX_BITS + index_key
            keys = torch.cat([best_keys[i], chunk_keys], dim=1)
            best_keys[i] = keys.topk(min(k, keys.shape[1]), dim=1).values

    # Split the keys into cosines and indices.
    results = []
    for keys in best_keys:
        cosines = (keys >> INDEX_BITS).double() / 2**30
        indices = max_index - (keys & max_index)
        results.append((cosines, indices))
    return results


def unit_vectors(features: Tensor) -> Tensor:
    """Normalize features (n, ...) to unit vectors (n, D) in float64, on the device."""
    return F.normalize(to_device(features).flatten(1).double(), dim=1)


def count_votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum the weighted votes of neighbors with cosines and labels (n, k), as (n, C) float64."""
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    weights = ((cosines - 1) / temperature).exp()  # minus 1, so that no weight overflows
    # Neighbors are added one after another, because the order of additions affects the rounding.
    rows = torch.arange(len(votes))
    for label, weight in zip(labels.T, weights.T):
        votes[rows, label] += weight
    return votes
