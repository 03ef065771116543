"""Images and texts to unit embeddings, on all ranks in step.  Names: N items, E embedding width, C classes."""
import numpy as np
import torch
from torch import Tensor

from data.benchmarks import Benchmark, Preprocess
from data.masking import complementary, parse
from data.tokenizer import pack
from model.attentive import take
from model.losses import unit
from run.lib.config import Run
from run.lib.ranks import rank, to_device, total, world

BATCH = 64  # images, or texts, a rank embeds at once


class Embedder:
    """A method's two encoders with the preprocessing of its config.  Every call is collective: all ranks must make it.

    mask: which patches of an image are seen (FLIP table 1d).  ensemble: an image's embedding is the mean of those of so many random views
    that together show every patch once.
    """

    def __init__(self, method, cfg: Run, tokenizer, mask: str = "none", ensemble: int = 1):
        self.mask, self.ensemble, self.grid = parse(mask), ensemble, cfg.model.grid
        self.towers, self.tokenizer, self.data = method.towers, tokenizer, cfg.data
        view = next(iter(cfg.views.values()))
        self.pre = Preprocess(cfg.model.image_size, cfg.model.patch, cfg.eval_crop, view.interpolation)
        self.width = cfg.model.shape.embed

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """(N, E), the whole on every rank."""
        out = torch.zeros(len(texts), self.width)
        for turn in range(0, len(texts), BATCH * world()):
            first = turn + rank() * BATCH
            mine = range(first, min(first + BATCH, len(texts)))
            rows = [self.data.fill(self.tokenizer(texts[i]), self.tokenizer.pad_id) for i in mine or [0]]
            ids, lengths = pack(rows)
            made = self.towers.encode_text(**to_device(dict(ids=ids, lengths=lengths, longest=int(lengths.max()))))
            if mine:
                out[mine.start:mine.stop] = made.cpu()
        return total(out)

    @torch.no_grad()
    def images(self, benchmark: Benchmark) -> tuple[Tensor, Tensor]:
        """This rank's images of a set: (indices (n,), embeddings (n, E)); over the ranks, every image once."""
        indices, embeddings = [], []
        for mine, patches, positions in benchmark.rounds(self.pre, BATCH, rank(), world(), min(self.data.workers, 2)):
            patches, keeps = to_device(patches), self.keeps(mine, positions)
            made = unit(sum(self.towers.encode_image(patches if keep is positions else take(patches, place), place)
                            for keep, place in zip(keeps, map(to_device, keeps))))
            indices.append(mine)
            embeddings.append(made[:len(mine)])
        return torch.cat(indices), torch.cat(embeddings)

    def keeps(self, indices: Tensor, positions: Tensor) -> list[Tensor]:
        """Which patches of each image are seen in each view, (images, K); drawn for the image's number, whichever rank has it."""
        images, patches = positions.shape
        if self.ensemble == 1 and self.mask.visible(patches) == patches:
            return [positions]  # all, as they lie
        numbers = indices.tolist() or [0] * images  # a rank without images goes through the tower in step
        noise = torch.from_numpy(np.stack([np.random.default_rng((0, i)).random(patches, dtype=np.float32) for i in numbers]))
        return complementary(noise, self.ensemble) if self.ensemble > 1 else [self.mask(noise, self.grid)]
