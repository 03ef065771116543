"""Retrieval in both directions: recall at 1, 5 and 10, with one or more captions per image.

A query is a hit at K if one of its matches is among its K nearest targets. A tie is a miss, so a
model whose embeddings are all equal (or nan) has no hits. Similarities are computed one tile at a
time. Each rank holds the embeddings of all images and captions, and the texts of the captions: a
million images with a million captions of width 512 take 4 GB in fp32.

Shapes: N images, M captions, E embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib.distributed import all_reduce_sum, rank, world_size

RECALL_AT = (1, 5, 10)
# A tile of the similarity matrix has CHUNK queries and TILE targets.
CHUNK = 1024
TILE = 8192
CONTENT = "captions"


@dataclass(frozen=True)
class Options:
    """retrieval has no options."""


def check_set(images: Images, options: Options) -> None:
    """Raise ValueError unless the set has captions."""
    images.captions(0)


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return image_to_text_rK and text_to_image_rK, as fractions. Captions have no prompt."""
    captions = [images.captions(i) for i in range(len(images))]
    all_captions = [caption for image_captions in captions for caption in image_captions]
    text_embeddings = model.embed_texts(all_captions)  # (M, E)

    # Every rank embeds its share of the images, and gets the embeddings of all, (N, E).
    indices, embeddings = model.embed_images(images)
    image_embeddings = torch.zeros(len(captions), text_embeddings.shape[1])
    image_embeddings[indices] = embeddings.cpu()
    image_embeddings = all_reduce_sum(image_embeddings)

    # An image and a caption match if their ids are equal.
    image_ids = torch.arange(len(captions), device=image_embeddings.device)
    caption_counts = [len(image_captions) for image_captions in captions]
    text_ids = image_ids.repeat_interleave(
        torch.tensor(caption_counts, device=image_embeddings.device)
    )
    return {
        **compute_recalls("image_to_text", image_embeddings, image_ids, text_embeddings, text_ids),
        **compute_recalls("text_to_image", text_embeddings, text_ids, image_embeddings, image_ids),
    }


def compute_recalls(
    name: str, queries: Tensor, query_ids: Tensor, targets: Tensor, target_ids: Tensor
) -> dict[str, float]:
    """Return {NAME_rK: recall at K} over all queries; each rank computes a share of the queries.

    Query and target match if their ids are equal. Both lists of ids must be sorted.
    """
    hits = torch.zeros(len(RECALL_AT), dtype=torch.float64, device=queries.device)
    tiles = list(zip(targets.split(TILE), target_ids.split(TILE)))
    tile_ranges = [(int(ids[0]), int(ids[-1])) for _, ids in tiles]
    for start in range(rank() * CHUNK, len(queries), world_size() * CHUNK):
        chunk = queries[start : start + CHUNK]
        chunk_ids = query_ids[start : start + CHUNK]
        lowest, highest = int(chunk_ids[0]), int(chunk_ids[-1])

        # 1. The similarity of each query's nearest match, (queries, 1).
        best = torch.full((len(chunk), 1), -torch.inf, device=queries.device)
        for (tile, tile_ids), (tile_lowest, tile_highest) in zip(tiles, tile_ranges):
            if tile_highest < lowest or highest < tile_lowest:
                continue  # no match in this tile
            is_other = chunk_ids[:, None] != tile_ids
            matches = tile_similarities(chunk, tile).masked_fill(is_other, -torch.inf)
            best = best.maximum(matches.amax(1, keepdim=True))

        # 2. The number of other targets that are at least as near. `not (x < best)` also counts
        #    nan as nearer.
        nearer = torch.zeros(len(chunk), dtype=torch.int64, device=queries.device)
        for tile, tile_ids in tiles:
            is_other = chunk_ids[:, None] != tile_ids
            nearer += (~(tile_similarities(chunk, tile) < best) & is_other).sum(1)
        hits += torch.stack([(nearer < k).sum() for k in RECALL_AT])

    recalls = all_reduce_sum(hits) / len(queries)
    return {f"{name}_r{k}": float(recall) for k, recall in zip(RECALL_AT, recalls)}


def tile_similarities(chunk: Tensor, tile: Tensor) -> Tensor:
    """Return the similarities (queries, targets) of a chunk of queries and a tile of targets.

    Both are padded to full size before they are multiplied, because the rounding of a matrix
    product depends on its shape: equal embeddings must have bitwise equal similarities.
    """
    padded_chunk = F.pad(chunk, (0, 0, 0, CHUNK - len(chunk)))
    padded_tile = F.pad(tile, (0, 0, 0, TILE - len(tile)))
    products = padded_chunk @ padded_tile.T
    return products[: len(chunk), : len(tile)]
