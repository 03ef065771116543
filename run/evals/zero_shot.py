"""Zero-shot classification: an image's class is the one whose prompts' mean embedding lies nearest (CLIP section 3.1.4)."""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.benchmarks import Benchmark, Images
from run.evals.embed import Embedder
from run.lib.ranks import total


@dataclass(frozen=True)
class Options:
    pass


def check(benchmark: Benchmark, options: Options) -> None:
    benchmark.prompts(), benchmark.label(0)


def evaluate(model: Embedder, benchmark: Benchmark, options: Options) -> dict[str, float]:
    """top1 and top5, as shares, and chance: what guessing would get at top1."""
    classes = class_embeddings(model, benchmark)
    indices, images = model.images(benchmark)
    labels = torch.tensor([benchmark.label(i) for i in indices.tolist()], dtype=torch.int64, device=images.device)
    top = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices == labels[:, None]  # (n, 5)
    hits = total(torch.stack([top[:, 0].sum(), top.sum(), torch.tensor(len(top), device=top.device)]).double())
    return dict(top1=float(hits[0] / hits[2]), top5=float(hits[1] / hits[2]), chance=1 / len(classes))


def class_embeddings(model: Embedder, benchmark: Images) -> Tensor:
    """(C, E): of each class the mean of its prompts' embeddings, of length 1."""
    prompts = benchmark.prompts()
    texts = model.texts([text for names in prompts for text in names])
    return F.normalize(texts.unflatten(0, (len(prompts), -1)).mean(1), dim=-1)
