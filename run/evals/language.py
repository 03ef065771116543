"""What captioning and VQA share: texts as rows of ids, patch tokens of both splits, a reader fitted
to them, what all ranks found.

A text's ids are the pieces of the run's own tokenizer that occur in the training texts, renumbered:
a vocabulary of what can be learned.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from glimpse.data.evals.clip_benchmark import Images
from glimpse.model.downstream.decoders import PAD, Seeing
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.features import Features, features
from glimpse.run.evals.supervised import Exact, cosine, fit, mean_loss, mine, order, steps
from glimpse.run.lib.distributed import device, rank, to_device, total, world
from glimpse.run.train.engine import unwrapped, wrapped

START, UNKNOWN = 1, 2
TOLD = 128  # samples that are read at once, whichever rank does it
SLICE = 16  # samples of a batch whose gradient one rank makes


@dataclass(frozen=True)
class Reading:
    """How a reader is built and fitted: AdamW, a tenth of warm-up, cosine, gradients clipped at
    1.
    """

    epochs: float = 10.0
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    tower: float = 0.0  # 0: it stays as it is; above: it is trained, too, at so many times the rate
    width: int = 0  # 0: as wide as the tower's tokens
    depth: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "lr", "depth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"evals: {name}={getattr(self, name)}: it must be above 0")
        if self.tower < 0:
            raise ValueError(
                f"evals: tower={self.tower}: 0, or by what the tower's learning rate is multiplied"
            )
        if self.width < 0 or self.width % 64:
            raise ValueError(
                f"evals: width={self.width}: a multiple of 64 (64 to an attention head), or 0 for"
                " the tower's own"
            )

    def shape(self, model: Embedder) -> dict:
        """The keywords of a reader of its tokens."""
        image = 1 + model.mask.visible(model.grid[0] * model.grid[1]), model.cfg.model.shape.width
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
        return torch.tensor([START, *pieces][: self.context])

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.spell(
            [self.known[i - UNKNOWN - 1] for i in ids if i > UNKNOWN]
        ).strip()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of unlike length -> (B, N) on the device."""
    return to_device(pad_sequence(list(rows), batch_first=True, padding_value=PAD))


def tokens(model: Embedder, images: Images) -> Features:
    """The tower's patch tokens of a split, (images, K, D), the class token first.

    All ranks must call.
    """
    return features(model, images, "tokens")


def fits(model: Embedder, options: Reading) -> None:
    if model.ensemble > 1:
        raise ValueError("--ensemble: what reads patch tokens sees one view; leave it out")
    if options.tower and not model.whole:
        raise ValueError("--mask: a tower is tuned on all patches; leave it out, or tower=0")
    if options.tower and options.batch % world():
        raise ValueError(
            f"evals: batch={options.batch}: where the tower is trained, too, a multiple of"
            f" {world()} ranks"
        )


def trains_tower(options: Reading) -> bool:
    return options.tower > 0


def fitted(
    model: Embedder,
    train: Images,
    how: Reading,
    build: Callable[..., nn.Module],
    owner: Sequence[int],
    losses_of: Callable,
    weight: Callable = len,
) -> tuple[nn.Module, Embedder]:
    """A reader, trained on the samples of a split, and the model whose patch tokens it reads. All
    ranks must call.

    owner: the image of each sample. losses_of(read, samples (b,), image) -> losses (n,), where
    read(ids, image) gives the reader's logits; weight(samples (B,)) -> how many such losses a
    global batch has.
    """
    # an evaluation during training draws nothing from the training's generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(how.seed)
        reader = build(**how.shape(model))
    reader, model, losses = (tuned if how.tower else frozen)(
        model, train, how, reader, torch.tensor(owner), losses_of, weight
    )
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"evals: lr={how.lr}: the loss of what is trained on the tokens is not finite; take a"
            " lower one"
        )
    model.say(
        f"  {len(owner):,} samples, {len(losses):,} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return reader.eval(), model


def frozen(
    model, train, how, reader, owner, losses_of, weight
) -> tuple[nn.Module, Embedder, list[float]]:
    """The tower stays as it is: its tokens are made once.

    To the bit the same on any number of ranks.
    """
    seen, reader = tokens(model, train), reader.to(device())
    trainer = Exact(
        reader, torch.optim.AdamW(reader.parameters(), weight_decay=how.weight_decay), clip=1.0
    )

    def loss_of(trainer: Exact, samples: Tensor) -> Tensor:
        whole, loss = weight(samples), torch.zeros((), device=device())
        for part in samples.split(SLICE)[rank() :: world()]:
            loss += trainer.learn(
                losses_of(reader, part, to_device(seen.rows(owner[part]))).sum() / whole
            )
        return loss * world()

    count = len(owner), how.batch, how.epochs
    return (
        reader,
        model,
        fit(
            trainer,
            order(*count, how.seed),
            loss_of,
            cosine(how.lr, warmup=0.1),
            steps(*count),
            model.say,
        ),
    )


def tuned(
    model, train, how, reader, owner, losses_of, weight
) -> tuple[nn.Module, Embedder, list[float]]:
    """A copy of the tower is trained with the reader, at `tower` times its rate, under the run's
    DeepSpeed JSON.
    """
    together = Seeing(copy.deepcopy(model.towers.vision).requires_grad_(True), reader)
    plain = copy.deepcopy(together)
    groups = [
        dict(params=list(part.parameters()), weight_decay=how.weight_decay, scale=scale)
        for part, scale in ((together.vision, how.tower), (together.reader, 1.0))
    ]
    trainer = wrapped(together, groups, model.cfg.deepspeed)
    trainer.train()
    every = list(order(len(owner), how.batch, how.epochs, how.seed))
    images = owner[torch.cat([mine(samples) for samples in every])].tolist()
    rounds = train.rounds(
        model.pre, how.batch // world(), images, len(every), min(model.cfg.data.workers, 2)
    )

    def loss_of(trainer, batch: tuple) -> Tensor:
        samples, (_, patches, positions) = batch
        losses = losses_of(
            lambda ids, image: trainer(ids, *image).float(),
            mine(samples),
            (to_device(patches), to_device(positions)),
        )
        return mean_loss(losses, weight(samples))

    losses = fit(
        trainer, zip(every, rounds), loss_of, cosine(how.lr, warmup=0.1), len(every), model.say
    )
    plain.load_state_dict(unwrapped(trainer))
    trainer.destroy()
    shown, plain = copy.copy(model), plain.to(device()).eval()
    shown.encoders, shown.tag = model.encoders | {"tokens": plain.vision}, f"{model.tag}-tuned"
    shown.forget()  # tokens of another tuning
    return plain.reader, shown, losses


@torch.no_grad()
def found(count: int, width: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(samples (b,)) -> (b, width) int64, of samples 0 to count - 1, each by one rank ->
    (count, width), whole on every rank.
    """
    out = torch.zeros(count, width, dtype=torch.int64)
    for samples in torch.arange(count).split(TOLD)[rank() :: world()]:
        out[samples] = make(samples).cpu()
    return total(out).cpu()


def keep(model: Embedder, kind: str, images: Images, rows: Iterable[dict]) -> None:
    """RUN/KIND/TAG-SET.jsonl: what was said about each image, a line each."""
    if not rank():
        path = model.home / kind / f"{model.tag}-{images.name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
