"""Retrieval both ways: recall at 1, 5, 10, with one or several captions to an image.

A query is a hit at K if any of its matches is among its K nearest; a tie is a miss, so that a model
whose embeddings are all alike (or nan) has no hits. Similarities are computed a tile at a time, but
each rank holds the embeddings of all images and captions, and the captions' text: of a million
pairs with 512 numbers an embedding 2 GB each in fp32 (five captions an image: 10 GB). Names: N
images, M captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.distributed import all_reduce_sum, rank, world_size

RECALL_AT = (1, 5, 10)
CHUNK = 1024  # queries whose similarities are held at once
TILE = 8192  # targets of these
ANNOTATION = "captions"


@dataclass(frozen=True)
class Options:
    pass


def check_set(benchmark: ClipBenchmarkSet, options: Options) -> None:
    benchmark.captions(0)


def evaluate(model: Embedder, benchmark: ClipBenchmarkSet, options: Options) -> dict[str, float]:
    """Return image_to_text and text_to_image R@K (shares), from raw captions without a prompt."""
    captions = [benchmark.captions(i) for i in range(len(benchmark))]
    # (M,): the image of each caption
    owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    texts = model.embed_texts([text for texts in captions for text in texts])  # (M, E)

    # (N, E): every rank embeds its share of the images, and gets all of them.
    indices, embeddings = model.embed_images(benchmark)
    images = torch.zeros(len(captions), texts.shape[1])
    images[indices] = embeddings.cpu()
    images = all_reduce_sum(images)

    every = torch.arange(len(images), device=images.device)
    owner = owner.to(images.device)
    return {
        **compute_recalls("image_to_text", images, every, texts, owner),
        **compute_recalls("text_to_image", texts, owner, images, every),
    }


def compute_recalls(
    name: str, queries: Tensor, query_ids: Tensor, targets: Tensor, target_ids: Tensor
) -> dict[str, float]:
    """Return R@K over all queries; each rank takes blocks of them.

    Query q matches target t if their ids, which ascend, are equal.
    """
    hits = torch.zeros(len(RECALL_AT), dtype=torch.float64, device=queries.device)
    tiles = list(zip(targets.split(TILE), target_ids.split(TILE)))
    spans = [(int(ids[0]), int(ids[-1])) for _, ids in tiles]
    for first in range(rank() * CHUNK, len(queries), world_size() * CHUNK):
        block = queries[first : first + CHUNK]
        ids = query_ids[first : first + CHUNK]
        lowest, highest = int(ids[0]), int(ids[-1])

        # 1. The similarity of each query's nearest match, (queries, 1).
        best = torch.full((len(block), 1), -torch.inf, device=queries.device)
        for (tile, tile_ids), (low, high) in zip(tiles, spans):
            if high < lowest or highest < low:  # no match is in it
                continue
            is_other = ids[:, None] != tile_ids
            matches = tile_similarities(block, tile).masked_fill(is_other, -torch.inf)
            best = best.maximum(matches.amax(1, keepdim=True))

        # 2. The number of other targets that are as near as it, or nearer. "Not less than" counts
        # nan, too.
        nearer = torch.zeros(len(block), dtype=torch.int64, device=queries.device)
        for tile, tile_ids in tiles:
            is_other = ids[:, None] != tile_ids
            nearer += (~(tile_similarities(block, tile) < best) & is_other).sum(1)
        hits += torch.stack([(nearer < k).sum() for k in RECALL_AT])

    recall = all_reduce_sum(hits) / len(queries)
    return {f"{name}_r{k}": float(value) for k, value in zip(RECALL_AT, recall)}


def tile_similarities(block: Tensor, tile: Tensor) -> Tensor:
    """Return the similarities (queries, targets) of a block and a tile.

    They are always multiplied at full size: equal embeddings then give the same bits anywhere.
    """
    queries = F.pad(block, (0, 0, 0, CHUNK - len(block)))
    targets = F.pad(tile, (0, 0, 0, TILE - len(tile)))
    products = queries @ targets.T
    return products[: len(block), : len(tile)]
