"""What captioning and VQA share: texts as rows of ids, patch tokens of both splits, a reader fitted to them, what all ranks found.

A text's ids are the pieces of the run's own tokenizer that occur in the training texts, renumbered: a vocabulary of what can be learned.
"""
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.benchmarks import Images
from model.decoders import PAD
from run.evals.embed import Embedder
from run.evals.features import Features, features
from run.lib.fit import Exact, cosine, fit, order, steps
from run.lib.ranks import device, rank, to_device, total, world

START, UNKNOWN = 1, 2
TOLD = 128  # samples that are read at once, whichever rank does it
SLICE = 16  # samples of a batch whose gradient one rank makes


@dataclass(frozen=True)
class Reading:
    """How a reader is built and fitted: AdamW, a tenth of warm-up, cosine, gradients clipped at 1."""

    epochs: float = 10.0
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    width: int = 0  # 0: as wide as the tower's tokens
    depth: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "lr", "depth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"evals: {name}={getattr(self, name)}: it must be above 0")
        if self.width < 0 or self.width % 64:
            raise ValueError(f"evals: width={self.width}: a multiple of 64 (64 to an attention head), or 0 for the tower's own")

    def shape(self, tokens: Features) -> dict:
        """The keywords of a reader over these tokens (K, D)."""
        image = tuple(tokens.rows([0]).shape[1:])
        width = self.width or -(-image[1] // 64) * 64
        return dict(image=image, width=width, depth=self.depth, heads=width // 64)


class Pieces:
    """Texts to ids (begun by START, at most `context` of them) and back."""

    def __init__(self, tokenizer, texts: Iterable[str], context: int):
        self.tokenizer, self.context = tokenizer, context
        self.known = sorted({piece for text in texts for piece in tokenizer.encode(text)})
        self.numbers = {piece: i for i, piece in enumerate(self.known, UNKNOWN + 1)}

    def __len__(self) -> int:
        return UNKNOWN + 1 + len(self.known)

    def ids(self, text: str) -> Tensor:
        pieces = [self.numbers.get(piece, UNKNOWN) for piece in self.tokenizer.encode(text)]
        return torch.tensor([START, *pieces][:self.context])

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.spell([self.known[i - UNKNOWN - 1] for i in ids if i > UNKNOWN]).strip()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of unlike length -> (B, N) on the device."""
    return to_device(pad_sequence(list(rows), batch_first=True, padding_value=PAD))


def tokens(model: Embedder, images: Images) -> Features:
    """The frozen tower's patch tokens of a split, (images, K, D), the class token first.  All ranks must call."""
    return features(model, images, "tokens")


def fitted(build: Callable[[], nn.Module], how: Reading, count: int, losses_of: Callable, weight: Callable = len
           ) -> tuple[nn.Module, list[float]]:
    """A reader trained on samples 0 to count - 1, and its losses; the same to the bit on any number of ranks, all of which must call.

    losses_of(reader, samples (b,)) -> losses (n,); weight(samples (B,)) -> how many such losses a global batch has.
    """
    with torch.random.fork_rng(devices=[]):  # an evaluation during training draws nothing from the training's generator
        torch.manual_seed(how.seed)
        reader = build().to(device())
    trainer = Exact(reader, torch.optim.AdamW(reader.parameters(), weight_decay=how.weight_decay), clip=1.0)

    def loss_of(trainer: Exact, samples: Tensor) -> Tensor:
        whole = weight(samples)
        return sum((trainer.learn(losses_of(reader, part).sum() / whole) for part in samples.split(SLICE)[rank()::world()]),
                   torch.zeros((), device=device())) * world()
    losses = fit(trainer, order(count, how.batch, how.epochs, how.seed), loss_of, cosine(how.lr, warmup=0.1),
                 steps(count, how.batch, how.epochs))
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"evals: lr={how.lr}: the loss of what is trained on the tokens is not finite; take a lower one")
    return reader.eval(), losses


@torch.no_grad()
def found(count: int, width: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(samples (b,)) -> (b, width) int64, of samples 0 to count - 1, each by one rank -> (count, width), whole on every rank."""
    out = torch.zeros(count, width, dtype=torch.int64)
    for samples in torch.arange(count).split(TOLD)[rank()::world()]:
        out[samples] = make(samples).cpu()
    return total(out).cpu()


def keep(model: Embedder, kind: str, images: Images, rows: Iterable[dict]) -> None:
    """RUN/KIND/TAG-SET.jsonl: what was said about each image, a line each."""
    if not rank():
        path = model.home / kind / f"{model.tag}-{images.name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
