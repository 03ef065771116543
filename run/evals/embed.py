"""Compute embeddings and features of images and texts with a model, on all ranks in step.

Shapes: N items, m images of this rank in a round, E embedding width, D tower width, L patches.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images, Preprocess
from glimpse.data.masking import complementary_masks, parse_mask
from glimpse.data.tokenizer import Tokenizer, pack
from glimpse.model.losses import l2_normalize
from glimpse.model.methods.attentive import gather_patches
from glimpse.model.methods.base import Method
from glimpse.run.lib.config import RunConfig
from glimpse.run.lib.distributed import all_reduce_sum, print_rank0, rank, to_device, world_size

CELLS = 3  # rows and columns of cells in `grid` features
BATCH = 64  # images, or texts, that a rank embeds at once


class Embedder:
    """The two encoders of a method, with the preprocessing of its config.

    All ranks must call each method together.

    results_folder: folder of the run, in which features and pictures are stored.
    tag: part of the stored files' names that distinguishes these weights from others.
    weights: student, or teacher (the moving average).
    mask: selects the patches of an image that the tower sees (FLIP table 1d).
    ensemble: number of random views that together show every patch once; an image's embedding is
    the mean over these views.
    log: prints a line on rank 0.
    """

    def __init__(
        self,
        method: Method,
        cfg: RunConfig,
        tokenizer: Tokenizer,
        *,
        results_folder: Path,
        tag: str,
        weights: str = "student",
        mask: str = "none",
        ensemble: int = 1,
        log: Callable[[str], None] = print_rank0,
    ):
        self.mask = parse_mask(mask)
        self.ensemble = ensemble
        self.grid = cfg.model.grid
        self.towers = method.eval_towers(weights)
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.log = log
        view = next(iter(cfg.views.values()))
        self.preprocess = Preprocess(
            cfg.model.image_size, cfg.model.patch_size, cfg.eval_crop, view.interpolation
        )

        self.results_folder = results_folder
        self.tag = f"{tag}-{weights}"
        if mask != "none":
            self.tag += f"-{mask}"
        if ensemble > 1:
            self.tag += f"-{ensemble}views"

        # Functions of (patches, positions), by the kind of features that they compute.
        self.encoders = {
            "embedded": self.towers.encode_image,
            "pooled": self.towers.image_features,
            "tokens": self.towers.vision,
            "values": partial(self.towers.vision, value_attention_only=True),
            "grid": self.grid_features,
            "pixels": self.pixel_features,
        }

    @property
    def sees_all_patches(self) -> bool:
        """True if each image is encoded once, with all its patches."""
        patches = self.grid[0] * self.grid[1]
        return self.ensemble == 1 and self.mask.visible_count(patches) == patches

    def delete_features(self) -> None:
        """Delete the stored features of these weights."""
        if rank() == 0:
            shutil.rmtree(self.results_folder / "features" / self.tag, ignore_errors=True)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of the texts, (N, E), all of them on every rank."""
        embeddings = torch.zeros(len(texts), self.cfg.model.shape.embed)
        for round_start in range(0, len(texts), BATCH * world_size()):
            first = round_start + rank() * BATCH
            last = min(first + BATCH, len(texts))
            if first < last:
                embeddings[first:last] = self.embed_text_batch(texts[first:last]).cpu()
            else:
                # No text is left for this rank. Under ZeRO-3 it must still run the tower when the
                # other ranks do.
                self.embed_text_batch(texts[:1])
        return all_reduce_sum(embeddings)

    def embed_text_batch(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (n, E) of a batch of texts that only this rank has."""
        rows = [self.tokenizer(text) for text in texts]
        rows = [self.cfg.data.pad(ids, self.tokenizer.pad_id) for ids in rows]
        ids, lengths = pack(rows)
        batch = dict(ids=ids, lengths=lengths, longest=int(lengths.max()))
        return self.towers.encode_text(**to_device(batch))

    def embed_images(self, images: Images, kind: str = "embedded") -> tuple[Tensor, Tensor]:
        """Return (indices (n,), features (n, ...)) of this rank's share of a set's images.

        The shares of all ranks contain every image once. kind: see `iterate_features`.
        """
        # Batches are assigned to the ranks in turn.
        rounds = math.ceil(len(images) / (BATCH * world_size()))
        all_indices = range(len(images))
        share: list[int] = []
        for number in range(rounds):
            first = (number * world_size() + rank()) * BATCH
            share += all_indices[first : first + BATCH]

        indices, features = zip(*self.iterate_features(images, kind, share, rounds))
        return torch.cat(indices), torch.cat(features)

    @torch.no_grad()
    def iterate_features(
        self, images: Images, kind: str, share: Sequence[int], rounds: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices (m,), features (m, ...)) of the images `share` in `rounds` batches.

        share: indices of this rank's images.
        rounds: must be the same on every rank; m is 0 when this rank's images are used up.
        kind: embedded (E,); pooled (D,), before the projection; grid (9 D,), see grid_features;
        tokens (1 + K, D), class token first; values, tokens of a last block in which each token
        attends only to itself; or pixels (L 3 P P,), which need no tower.
        """
        workers = min(self.cfg.data.workers, 2)
        batches = images.batches(self.preprocess, BATCH, share, rounds, workers)
        for indices, patches, positions in batches:
            features = self.encode_images(kind, indices, patches, positions)
            yield indices, features[: len(indices)]

    def encode_images(
        self, kind: str, indices: Tensor, patches: Tensor, positions: Tensor
    ) -> Tensor:
        """Return the features (n, ...) of images from their patches (n, L, 3 P P) at (n, L).

        indices: the images' numbers in their set, which determine their random views.
        Raises ValueError if the features are of patches and there are several views.
        """
        patches = to_device(patches)
        views = self.visible_patches(indices, positions)
        if kind in ("tokens", "values") and len(views) > 1:
            raise ValueError(
                "--ensemble: this evaluation reads patch tokens, which cannot be averaged over"
                " views; remove the option"
            )

        encoder = self.encoders[kind]
        outputs = []
        for view in views:
            view_positions = to_device(view)
            visible = patches if view is positions else gather_patches(patches, view_positions)
            outputs.append(encoder(visible, view_positions))
        summed = sum(outputs)
        return l2_normalize(summed) if kind == "embedded" else summed / len(views)

    def grid_features(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the mean patch token of each of the image's CELLS x CELLS cells, (n, CELLS^2 D).

        Goyal et al. 2019 train probes on such features.
        """
        tokens = self.towers.vision(patches, positions)[:, 1:]
        feature_map = tokens.transpose(1, 2).unflatten(2, self.grid)  # (n, D, rows, columns)
        return F.adaptive_avg_pool2d(feature_map, CELLS).flatten(1)

    @staticmethod
    def pixel_features(patches: Tensor, positions: Tensor) -> Tensor:
        """Return the pixels as numbers from 0 to 1, (n, L 3 P P)."""
        return patches.flatten(1) / 255

    def visible_patches(self, indices: Tensor, positions: Tensor) -> list[Tensor]:
        """Return the positions of the patches that each view shows, (n, K) for each view.

        Random views are seeded by the image's index, so they do not depend on the rank.
        """
        images, patches = positions.shape
        if self.sees_all_patches:
            return [positions]

        # A rank without images has no indices, but still encodes a batch.
        seeds = indices.tolist() or [0] * images
        generators = [np.random.default_rng((0, seed)) for seed in seeds]
        rows = [generator.random(patches, dtype=np.float32) for generator in generators]
        noise = torch.from_numpy(np.stack(rows))
        if self.ensemble > 1:
            return complementary_masks(noise, self.ensemble)
        return [self.mask(noise, self.grid)]
