"""k nearest neighbours: an image's class is what those of the train split's images that lie nearest
vote for; nothing is fitted.

The vote is weighted as in Wu et al. 2018 (arXiv 1805.01978, section 3.4) and DINO: a neighbour of
cosine s counts exp(s / temperature),
k = 20, temperature 0.07; temperature=inf is a plain majority. Names: N train images, n queries of
this rank, D width, C classes.

The train split's features stay on disk and pass by in chunks, so that ImageNet's 1.28M x 768 take 4
GB there and megabytes in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.features import KINDS, Features, check_splits, check_view, splits
from glimpse.run.evals.metrics import accuracies
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import rank, to_device, world

CHUNK = 4096  # train images compared at once
QUERIES = 256  # with so many test images
PLACES = 31  # bits of a key for the train image's number, below those for its cosine


@dataclass(frozen=True)
class Options:
    features: str = "pooled"  # of features.KINDS
    k: int = 20  # neighbours that vote
    temperature: float = 0.07

    def __post_init__(self):
        check_choice("knn(features=...)", self.features, KINDS)
        if self.k < 1:
            raise ValueError(f"knn(k={self.k}): it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"knn(temperature={self.temperature}): it must be above 0")


check, fits = check_splits, check_view


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """top1, mean_per_class and chance, as shares."""
    train, test = splits(model, images, options.features)
    classes, labels = len(images.classes()), train.labels()
    mine = torch.arange(len(test)).split(QUERIES)[rank() :: world()]
    found = [torch.empty(0, classes)]  # of a rank without a share
    for cosines, numbers in neighbours(train, [test.rows(block) for block in mine], options.k):
        votes = vote(cosines.cpu(), labels[numbers.cpu()], classes, options.temperature)
        # argmax: of equal votes, the first class's
        found.append(F.one_hot(votes.argmax(1), classes).float())
    return accuracies(
        torch.cat(found), test.labels()[torch.cat([*mine, torch.empty(0, dtype=torch.int64)])]
    )


def neighbours(train: Features, queries: list[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
    """For each block of queries (n, D): the cosines (n, k), largest first, and the numbers (n, k)
    of the nearest train images.

    The same on any device and however queries are shared out: cosines are made in float64 and kept
    to 30 bits, in one integer with the image's number, so that equal ones fall in order of their
    numbers.
    """
    queries = [directions(block) for block in queries]
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=block.device) for block in queries]
    for chunk in torch.arange(len(train)).split(CHUNK):
        bank = directions(train.rows(chunk))
        place = 2**PLACES - 1 - to_device(chunk)
        for i, block in enumerate(queries):
            cosine = (block @ bank.T).nan_to_num(-1.0).clamp(-1, 1)
            keys = torch.cat([best[i], (cosine * 2**30).round().long() * 2**PLACES + place], dim=1)
            best[i] = keys.topk(min(k, keys.shape[1]), dim=1).values
    return [
        ((keys >> PLACES).double() / 2**30, 2**PLACES - 1 - (keys & (2**PLACES - 1)))
        for keys in best
    ]


def directions(features: Tensor) -> Tensor:
    """(n, ...) -> unit vectors (n, D), float64, on the device."""
    return F.normalize(to_device(features).flatten(1).double(), dim=1)


def vote(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Neighbours (n, k) -> votes (n, C), float64."""
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    weights = ((cosines - 1) / temperature).exp()  # less 1, so that none overflows
    # one after another: the order of a sum is part of its value
    for one, weight in zip(labels.T, weights.T):
        votes[torch.arange(len(votes)), one] += weight
    return votes
