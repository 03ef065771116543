"""Retrieval both ways: recall at 1, 5, 10, with one or several captions to an image.

A query counts as found at K if any of its matches is among its K nearest; a tie is a miss, so that a model whose embeddings are all
alike (or nan) finds nothing.  Names: N images, M captions.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from data.benchmarks import Benchmark
from run.evals.embed import Embedder
from run.lib.ranks import rank, total, world

AT = (1, 5, 10)
CHUNK = 1024  # queries whose similarities are held at once
READS = "captions"


@dataclass(frozen=True)
class Options:
    pass


def check(benchmark: Benchmark, options: Options) -> None:
    benchmark.captions(0)


def evaluate(model: Embedder, benchmark: Benchmark, options: Options) -> dict[str, float]:
    """image_to_text and text_to_image R@K (shares), from raw captions without a prompt."""
    captions = [benchmark.captions(i) for i in range(len(benchmark))]
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])  # (M,): the image of each caption
    texts = model.texts([text for texts in captions for text in texts])  # (M, E)
    indices, mine = model.images(benchmark)
    images = torch.zeros(len(captions), texts.shape[1])
    images[indices] = mine.cpu()
    images = total(images)  # (N, E), the whole on every rank
    every, owner = torch.arange(len(images), device=images.device), owner.to(images.device)
    return {**recalls("image_to_text", images, every, texts, owner), **recalls("text_to_image", texts, owner, images, every)}


def recalls(name: str, queries: Tensor, query_ids: Tensor, targets: Tensor, target_ids: Tensor) -> dict[str, float]:
    """R@K over all queries, each rank a share of them; query q matches target t if their ids agree."""
    found = torch.zeros(len(AT), dtype=torch.float64, device=queries.device)
    for chunk in torch.arange(rank(), len(queries), world(), device=queries.device).split(CHUNK):
        similar = queries[chunk] @ targets.T  # (chunk, targets)
        match = query_ids[chunk, None] == target_ids[None]
        best = similar.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        nearer = (~(similar < best) & ~match).sum(1)  # how many others are as near as the nearest match, or nearer
        found += torch.stack([(nearer < k).sum() for k in AT])
    found = total(found) / len(queries)
    return {f"{name}_r{k}": float(value) for k, value in zip(AT, found)}
