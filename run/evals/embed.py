"""Images and texts to unit embeddings or features, on all ranks in step.

Names: N items, m this rank's share of a round, E embedding width, D tower width, L patches.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images, Preprocess
from glimpse.data.masking import complementary, parse
from glimpse.data.tokenizer import pack
from glimpse.model.losses import unit
from glimpse.model.methods.attentive import take
from glimpse.run.lib.config import Run
from glimpse.run.lib.distributed import rank, say, to_device, total, world

CELLS = 3  # of `grid` features, each way
BATCH = 64  # images, or texts, a rank embeds at once


class Embedder:
    """A method's two encoders with the preprocessing of its config. Every call is collective: all
    ranks must make it.

    weights: student, or teacher (the moving average). mask: which patches of an image are seen
    (FLIP table 1d). ensemble: an image's embedding is the mean of those of so many random views
    that together show every patch once. home: the run's folder, where features
    and pictures go, under names that hold `tag`, which tells these weights from others. say: tells
    people something, once.
    """

    def __init__(
        self,
        method,
        cfg: Run,
        tokenizer,
        *,
        home: Path,
        tag: str,
        weights: str = "student",
        mask: str = "none",
        ensemble: int = 1,
        say: Callable[[str], None] = say,
    ):
        self.mask, self.ensemble, self.grid = parse(mask), ensemble, cfg.model.grid
        self.towers, self.tokenizer, self.cfg, self.say = method.shown(weights), tokenizer, cfg, say
        view = next(iter(cfg.views.values()))
        self.pre = Preprocess(
            cfg.model.image_size, cfg.model.patch, cfg.eval_crop, view.interpolation
        )
        self.home, self.tag = (
            home,
            "-".join(
                [tag, weights, *[mask] * (mask != "none"), *[f"{ensemble}views"] * (ensemble > 1)]
            ),
        )
        self.encoders = {
            "embedded": self.embed,
            "pooled": self.towers.image_features,
            "tokens": self.towers.vision,
            "values": partial(self.towers.vision, alone=True),
            "grid": self.by_place,
            "pixels": self.pixels,
        }

    @property
    def whole(self) -> bool:
        """Is an image seen in one view, with all its patches?"""
        patches = self.grid[0] * self.grid[1]
        return self.ensemble == 1 and self.mask.visible(patches) == patches

    def forget(self) -> None:
        """Remove the features that were kept of these weights."""
        if not rank():
            shutil.rmtree(self.home / "features" / self.tag, ignore_errors=True)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, E), the whole on every rank."""
        out = torch.zeros(len(texts), self.cfg.model.shape.embed)
        for turn in range(0, len(texts), BATCH * world()):
            first = turn + rank() * BATCH
            mine = range(first, min(first + BATCH, len(texts)))
            made = self.read([texts[i] for i in mine or [0]])
            if mine:
                out[mine.start : mine.stop] = made.cpu()
        return total(out)

    def read(self, texts: Sequence[str]) -> Tensor:
        """(n, E) of a batch of texts, which is this rank's own."""
        ids, lengths = pack(
            [self.cfg.data.fill(self.tokenizer(text), self.tokenizer.pad_id) for text in texts]
        )
        return self.towers.encode_text(
            **to_device(dict(ids=ids, lengths=lengths, longest=int(lengths.max())))
        )

    def images(self, images: Images, what: str = "embedded") -> tuple[Tensor, Tensor]:
        """This rank's images of a set: (indices (n,), embeddings (n, E)); over the ranks, every
        image once. what: as in `passed`.
        """
        turns = -(-len(images) // (BATCH * world()))
        mine = [
            i
            for turn in range(turns)
            for i in range(len(images))[(turn * world() + rank()) * BATCH :][:BATCH]
        ]
        indices, embeddings = zip(*self.passed(images, what, mine, turns))
        return torch.cat(indices), torch.cat(embeddings)

    @torch.no_grad()
    def passed(
        self, images: Images, what: str, mine: Sequence[int], turns: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`turns` rounds, the same number on every rank, over this rank's images: (indices (m,),
        what the encoder makes of them (m, ...)).

        what: embedded (E), pooled (D, before the projection), grid (9 D, see by_place), tokens (1 +
        K, D, the class token first), values, which are tokens of a last block where each attends to
        itself alone, or pixels (L 3 P P), which do without the tower.
        """
        for indices, patches, positions in images.rounds(
            self.pre, BATCH, mine, turns, min(self.cfg.data.workers, 2)
        ):
            yield indices, self.encode(what, indices, patches, positions)[: len(indices)]

    def encode(self, what: str, indices: Tensor, patches: Tensor, positions: Tensor) -> Tensor:
        """Patches (n, L, 3 P P) at (n, L) of the images of these numbers -> (n, ...)."""
        patches, keeps = to_device(patches), self.keeps(indices, positions)
        if what in ("tokens", "values") and len(keeps) > 1:
            raise ValueError("--ensemble: what reads patches sees one view; leave it out")
        made = sum(
            self.encoders[what](patches if keep is positions else take(patches, place), place)
            for keep, place in zip(keeps, map(to_device, keeps))
        )
        return unit(made) if what == "embedded" else made / len(keeps)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        return self.towers.encode_image(patches, positions)

    def by_place(self, patches: Tensor, positions: Tensor) -> Tensor:
        """(n, CELLS^2 D): the mean of the patch tokens in each cell of the image, as Goyal et al.
        2019 probe feature maps.
        """
        tokens = self.towers.vision(patches, positions)[:, 1:]
        return F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, self.grid), CELLS).flatten(
            1
        )

    @staticmethod
    def pixels(patches: Tensor, positions: Tensor) -> Tensor:
        return patches.flatten(1) / 255

    def keeps(self, indices: Tensor, positions: Tensor) -> list[Tensor]:
        """Which patches of each image are seen in each view, (images, K); drawn for the image's
        number, whichever rank has it.
        """
        images, patches = positions.shape
        if self.whole:
            return [positions]  # all, as they lie
        # a rank without images goes through the tower in step
        numbers = indices.tolist() or [0] * images
        noise = torch.from_numpy(
            np.stack(
                [np.random.default_rng((0, i)).random(patches, dtype=np.float32) for i in numbers]
            )
        )
        return (
            complementary(noise, self.ensemble)
            if self.ensemble > 1
            else [self.mask(noise, self.grid)]
        )
