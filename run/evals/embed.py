"""Compute unit embeddings or features of images and texts, on all ranks in step.

Names: N items, m this rank's share of a round, E embedding width, D tower width, L patches.
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
from glimpse.model.losses import unit
from glimpse.model.methods.attentive import take
from glimpse.model.methods.base import Method
from glimpse.run.lib.config import RunConfig
from glimpse.run.lib.distributed import all_reduce_sum, print_rank0, rank, to_device, world_size

CELLS = 3  # cells of `grid` features, each way
BATCH = 64  # images, or texts, that a rank embeds at once


class Embedder:
    """A method's two encoders with the preprocessing of its config.

    Every call is collective: all ranks must make it.

    weights: student, or teacher (the moving average). mask: which patches of an image are seen
    (FLIP table 1d). ensemble: an image's embedding is the mean of those of so many random views
    that together show every patch once. home: the run's folder, where features and pictures are
    stored, under names with `tag`, which distinguishes these weights from others. say: prints a
    message, once for all ranks.
    """

    def __init__(
        self,
        method: Method,
        cfg: RunConfig,
        tokenizer: Tokenizer,
        *,
        home: Path,
        tag: str,
        weights: str = "student",
        mask: str = "none",
        ensemble: int = 1,
        say: Callable[[str], None] = print_rank0,
    ):
        self.mask = parse_mask(mask)
        self.ensemble = ensemble
        self.grid = cfg.model.grid
        self.towers = method.eval_towers(weights)
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.log = say
        view = next(iter(cfg.views.values()))
        self.preprocess = Preprocess(
            cfg.model.image_size, cfg.model.patch, cfg.eval_crop, view.interpolation
        )

        self.results_folder = home
        self.tag = f"{tag}-{weights}"
        if mask != "none":
            self.tag += f"-{mask}"
        if ensemble > 1:
            self.tag += f"-{ensemble}views"

        # By the name of what they make of patches and positions, see `passed`.
        self.encoders = {
            "embedded": self.embed,
            "pooled": self.towers.image_features,
            "tokens": self.towers.vision,
            "values": partial(self.towers.vision, alone=True),
            "grid": self.grid_features,
            "pixels": self.pixel_features,
        }

    @property
    def sees_all_patches(self) -> bool:
        """True if an image is seen in one view, with all its patches."""
        patches = self.grid[0] * self.grid[1]
        return self.ensemble == 1 and self.mask.visible(patches) == patches

    def delete_features(self) -> None:
        """Remove the features of these weights from the disk."""
        if rank() == 0:
            shutil.rmtree(self.results_folder / "features" / self.tag, ignore_errors=True)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of the texts, (N, E), all of them on every rank."""
        out = torch.zeros(len(texts), self.cfg.model.shape.embed)
        for turn in range(0, len(texts), BATCH * world_size()):
            first = turn + rank() * BATCH
            last = min(first + BATCH, len(texts))
            if first < last:
                out[first:last] = self.embed_text_batch(texts[first:last]).cpu()
            else:  # no text is left for this rank, which goes through the tower in step
                self.embed_text_batch(texts[:1])
        return all_reduce_sum(out)

    def embed_text_batch(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (n, E) of one batch of texts, which only this rank has."""
        rows = [self.tokenizer(text) for text in texts]
        rows = [self.cfg.data.pad(ids, self.tokenizer.pad_id) for ids in rows]
        ids, lengths = pack(rows)
        batch = dict(ids=ids, lengths=lengths, longest=int(lengths.max()))
        return self.towers.encode_text(**to_device(batch))

    def embed_images(self, images: Images, what: str = "embedded") -> tuple[Tensor, Tensor]:
        """Embed this rank's images of a set: (indices (n,), embeddings (n, E)).

        Over the ranks, every image comes once. what: as in `passed`.
        """
        # Batches are dealt out to the ranks in turn.
        turns = math.ceil(len(images) / (BATCH * world_size()))
        everything = range(len(images))
        share: list[int] = []
        for turn in range(turns):
            first = (turn * world_size() + rank()) * BATCH
            share += everything[first : first + BATCH]

        indices, embeddings = zip(*self.iterate_features(images, what, share, turns))
        return torch.cat(indices), torch.cat(embeddings)

    @torch.no_grad()
    def iterate_features(
        self, images: Images, what: str, share: Sequence[int], turns: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices (m,), features (m, ...)) of this rank's images `share`, in `turns` rounds.

        turns: the same number on every rank. what: embedded (E), pooled (D, before the projection),
        grid (9 D, see by_place), tokens (1 + K, D, the class token first), values, which are tokens
        of a last block where each attends to itself alone, or pixels (L 3 P P), which need no
        tower.
        """
        workers = min(self.cfg.data.workers, 2)
        for indices, patches, positions in images.rounds(
            self.preprocess, BATCH, share, turns, workers
        ):
            features = self.encode_images(what, indices, patches, positions)
            yield indices, features[: len(indices)]

    def encode_images(
        self, what: str, indices: Tensor, patches: Tensor, positions: Tensor
    ) -> Tensor:
        """Encode patches (n, L, 3 P P) at (n, L) of the images of these numbers to (n, ...).

        ValueError: features of patches cannot be averaged over the views of an ensemble.
        """
        patches = to_device(patches)
        keeps = self.visible_patches(indices, positions)
        if what in ("tokens", "values") and len(keeps) > 1:
            raise ValueError("--ensemble: what reads patches sees one view; leave it out")

        encoder = self.encoders[what]
        outputs = []
        for keep in keeps:
            places = to_device(keep)
            seen = patches if keep is positions else take(patches, places)
            outputs.append(encoder(seen, places))
        summed = sum(outputs)
        return unit(summed) if what == "embedded" else summed / len(keeps)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        return self.towers.encode_image(patches, positions)

    def grid_features(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the mean of the patch tokens in each cell of the image, (n, CELLS^2 D).

        Goyal et al. 2019 probe feature maps in this way.
        """
        tokens = self.towers.vision(patches, positions)[:, 1:]
        feature_map = tokens.transpose(1, 2).unflatten(2, self.grid)  # (n, D, rows, columns)
        return F.adaptive_avg_pool2d(feature_map, CELLS).flatten(1)

    @staticmethod
    def pixel_features(patches: Tensor, positions: Tensor) -> Tensor:
        return patches.flatten(1) / 255

    def visible_patches(self, indices: Tensor, positions: Tensor) -> list[Tensor]:
        """Return the patches of each image that each view shows, (images, K) a view.

        They are random; the seed is the image's number, so every rank would choose the same.
        """
        images, patches = positions.shape
        if self.sees_all_patches:
            return [positions]  # all, in their order

        # A rank without images goes through the tower in step.
        numbers = indices.tolist() or [0] * images
        generators = [np.random.default_rng((0, i)) for i in numbers]
        rows = [generator.random(patches, dtype=np.float32) for generator in generators]
        noise = torch.from_numpy(np.stack(rows))
        if self.ensemble > 1:
            return complementary_masks(noise, self.ensemble)
        return [self.mask(noise, self.grid)]
