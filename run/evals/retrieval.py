"""Retrieval both ways: recall at 1, 5, 10, with one or several captions to an image.

A query counts as found at K if any of its matches is among its K nearest; a tie is a miss, so that
a model whose embeddings are all
alike (or nan) finds nothing. Similarities are held a tile at a time. Of a million pairs and 512
numbers an embedding, each rank holds images and captions whole: 2 GB each in fp32 (five captions an
image: 10 GB), and the captions' text. Names: N images, M captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.distributed import rank, total, world

AT = (1, 5, 10)
CHUNK, TILE = 1024, 8192  # queries and targets whose similarities are held at once
READS = "captions"


@dataclass(frozen=True)
class Options:
    pass


def check(benchmark: Benchmark, options: Options) -> None:
    benchmark.captions(0)


def evaluate(model: Embedder, benchmark: Benchmark, options: Options) -> dict[str, float]:
    """image_to_text and text_to_image R@K (shares), from raw captions without a prompt."""
    captions = [benchmark.captions(i) for i in range(len(benchmark))]
    # (M,): the image of each caption
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    texts = model.texts([text for texts in captions for text in texts])  # (M, E)
    indices, mine = model.images(benchmark)
    images = torch.zeros(len(captions), texts.shape[1])
    images[indices] = mine.cpu()
    images = total(images)  # (N, E), the whole on every rank
    every, owner = torch.arange(len(images), device=images.device), owner.to(images.device)
    return {
        **recalls("image_to_text", images, every, texts, owner),
        **recalls("text_to_image", texts, owner, images, every),
    }


def recalls(
    name: str, queries: Tensor, query_ids: Tensor, targets: Tensor, target_ids: Tensor
) -> dict[str, float]:
    """R@K over all queries, each rank blocks of them; query q matches target t if their ids, which
    ascend, agree.
    """
    found = torch.zeros(len(AT), dtype=torch.float64, device=queries.device)
    tiles = list(zip(targets.split(TILE), target_ids.split(TILE)))
    spans = [(int(ids[0]), int(ids[-1])) for _, ids in tiles]
    for first in range(rank() * CHUNK, len(queries), world() * CHUNK):
        block, ids = queries[first : first + CHUNK], query_ids[first : first + CHUNK]
        lowest, highest = int(ids[0]), int(ids[-1])
        best = torch.full((len(block), 1), -torch.inf, device=queries.device)
        for (tile, of), (low, high) in zip(tiles, spans):
            if low <= highest and lowest <= high:  # else no match is in it
                best = best.maximum(
                    similar(block, tile)
                    .masked_fill(ids[:, None] != of, -torch.inf)
                    .amax(1, keepdim=True)
                )
        # others as near as the nearest match, or nearer
        nearer = torch.zeros(len(block), dtype=torch.int64, device=queries.device)
        for tile, of in tiles:
            nearer += (~(similar(block, tile) < best) & (ids[:, None] != of)).sum(1)
        found += torch.stack([(nearer < k).sum() for k in AT])
    found = total(found) / len(queries)
    return {f"{name}_r{k}": float(value) for k, value in zip(AT, found)}


def similar(block: Tensor, tile: Tensor) -> Tensor:
    """(queries, targets) of a block and a tile, always multiplied at their full size: then what is
    alike gives the same bits anywhere.
    """
    whole = F.pad(block, (0, 0, 0, CHUNK - len(block))) @ F.pad(tile, (0, 0, 0, TILE - len(tile))).T
    return whole[: len(block), : len(tile)]
