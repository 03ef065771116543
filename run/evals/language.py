"""Code that captioning and VQA share.

Texts as rows of ids, patch tokens of both splits, a reader fitted to them, and the results of all
ranks gathered. A text's ids are the pieces of the run's tokenizer that occur in the training texts,
renumbered, so that every id of the vocabulary can be learned.
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
from glimpse.data.tokenizer import Tokenizer
from glimpse.model.downstream.decoders import PAD, Seeing
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.features import Features, compute_features
from glimpse.run.evals.supervised import (
    ExactTrainer,
    cosine_rate,
    count_steps,
    fit,
    global_batches,
    mean_loss,
    rank_share,
)
from glimpse.run.lib.distributed import all_reduce_sum, device, rank, to_device, world_size
from glimpse.run.train.engine import gather_state_dict, initialize_supervised

START, UNKNOWN = 1, 2
INFERENCE_BATCH = 128  # samples of an inference batch, whichever rank takes it
SLICE = 16  # samples of a training batch whose gradient one rank computes


@dataclass(frozen=True)
class ReaderOptions:
    """Settings of a reader and its training.

    AdamW, a tenth of warm-up, cosine, gradients clipped at 1.
    """

    epochs: float = 10.0
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    tower: float = 0.0  # 0: it stays frozen; above: it is trained, too, at so many times the rate
    width: int = 0  # 0: as wide as the tower's tokens
    depth: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "lr", "depth"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"evals: {name}={value}: it must be above 0")
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
        """Return the keyword arguments of a reader of this model's tokens."""
        rows, columns = model.grid
        token_count = 1 + model.mask.visible(rows * columns)  # with the class token
        token_width = model.cfg.model.shape.width
        # the tower's width, rounded up to whole attention heads of 64
        width = self.width or -(-token_width // 64) * 64
        image = (token_count, token_width)
        return dict(image=image, width=width, depth=self.depth, heads=width // 64)


class PieceVocabulary:
    """A map from texts to ids (the first is START, at most `context` of them) and back."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], context: int):
        self.tokenizer = tokenizer
        self.context = context
        self.known = sorted({piece for text in texts for piece in tokenizer.encode(text)})
        self.numbers = {piece: i for i, piece in enumerate(self.known, UNKNOWN + 1)}

    def __len__(self) -> int:
        return UNKNOWN + 1 + len(self.known)

    def ids(self, text: str) -> Tensor:
        pieces = [self.numbers.get(piece, UNKNOWN) for piece in self.tokenizer.encode(text)]
        return torch.tensor([START, *pieces][: self.context])

    def text(self, ids: Sequence[int]) -> str:
        pieces = [self.known[i - UNKNOWN - 1] for i in ids if i > UNKNOWN]
        return self.tokenizer.spell(pieces).strip()


def pad_texts(rows: Sequence[Tensor]) -> Tensor:
    """Return rows of different lengths as one batch (B, N) on the device."""
    return to_device(pad_sequence(list(rows), batch_first=True, padding_value=PAD))


def patch_tokens(model: Embedder, images: Images) -> Features:
    """Return the tower's patch tokens of a split, (images, K, D), the class token first.

    All ranks must call.
    """
    return compute_features(model, images, "tokens")


def check_model(model: Embedder, options: ReaderOptions) -> None:
    if model.ensemble > 1:
        raise ValueError("--ensemble: what reads patch tokens sees one view; leave it out")
    if options.tower and not model.sees_all_patches:
        raise ValueError("--mask: a tower is tuned on all patches; leave it out, or tower=0")
    if options.tower and options.batch % world_size():
        raise ValueError(
            f"evals: batch={options.batch}: where the tower is trained, too, a multiple of"
            f" {world_size()} ranks"
        )


def trains_tower(options: ReaderOptions) -> bool:
    return options.tower > 0


def train_reader(
    model: Embedder,
    train: Images,
    how: ReaderOptions,
    build: Callable[..., nn.Module],
    owner: Sequence[int],
    losses_of: Callable,
    weight: Callable = len,
) -> tuple[nn.Module, Embedder]:
    """Return a reader trained on the samples of a split, and the model whose patch tokens it reads.

    All ranks must call.

    owner: the image of each sample. losses_of(read, samples (b,), image) -> losses (n,), where
    read(ids, image) gives the reader's logits; weight(samples (B,)) -> how many such losses a
    global batch has.
    """
    # an evaluation during training must not use the training's random generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(how.seed)
        reader = build(**how.shape(model))
    train_reader = train_with_tower if how.tower else train_on_frozen_tower
    reader, model, losses = train_reader(
        model, train, how, reader, torch.tensor(owner), losses_of, weight
    )
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"evals: lr={how.lr}: the loss of what is trained on the tokens is not finite; take a"
            " lower one"
        )
    model.log(
        f"  {len(owner):,} samples, {len(losses):,} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return reader.eval(), model


def train_on_frozen_tower(
    model: Embedder,
    train: Images,
    how: ReaderOptions,
    reader: nn.Module,
    owner: Tensor,
    losses_of: Callable,
    weight: Callable,
) -> tuple[nn.Module, Embedder, list[float]]:
    """Train the reader on tokens of the frozen tower, which are computed once.

    Bitwise equal on any number of ranks.
    """
    image_tokens = patch_tokens(model, train)
    reader = reader.to(device())
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=how.weight_decay)
    trainer = ExactTrainer(reader, optimizer, clip=1.0)

    def loss_of(trainer: ExactTrainer, samples: Tensor) -> Tensor:
        loss_count = weight(samples)
        loss = torch.zeros((), device=device())
        for part in samples.split(SLICE)[rank() :: world_size()]:
            image = to_device(image_tokens.rows(owner[part]))
            loss += trainer.learn(losses_of(reader, part, image).sum() / loss_count)
        return loss * world_size()

    batches = global_batches(len(owner), how.batch, how.epochs, how.seed)
    step_count = count_steps(len(owner), how.batch, how.epochs)
    rate = cosine_rate(how.lr, warmup=0.1)
    losses = fit(trainer, batches, loss_of, rate, step_count, model.log)
    return reader, model, losses


def train_with_tower(
    model: Embedder,
    train: Images,
    how: ReaderOptions,
    reader: nn.Module,
    owner: Tensor,
    losses_of: Callable,
    weight: Callable,
) -> tuple[nn.Module, Embedder, list[float]]:
    """Train a copy of the tower with the reader, under the run's DeepSpeed JSON.

    The tower's learning rate is `tower` times the reader's.
    """
    vision = copy.deepcopy(model.towers.vision).requires_grad_(True)
    module = Seeing(vision, reader)
    plain = copy.deepcopy(module)  # takes the trained weights, without DeepSpeed
    groups = []
    for part, scale in ((module.vision, how.tower), (module.reader, 1.0)):
        parameters = list(part.parameters())
        groups.append(dict(params=parameters, weight_decay=how.weight_decay, scale=scale))
    trainer = initialize_supervised(module, groups, model.cfg.deepspeed)
    trainer.train()

    # Each step's global batch, and the images of this rank's share.
    batches = list(global_batches(len(owner), how.batch, how.epochs, how.seed))
    share = torch.cat([rank_share(samples) for samples in batches])
    workers = min(model.cfg.data.workers, 2)
    rounds = train.rounds(
        model.preprocess, how.batch // world_size(), owner[share].tolist(), len(batches), workers
    )

    def read(ids: Tensor, image: tuple[Tensor, Tensor]) -> Tensor:
        return trainer(ids, *image).float()

    def loss_of(_trainer: nn.Module, batch: tuple) -> Tensor:
        samples, (_, patches, positions) = batch
        image = to_device(patches), to_device(positions)
        losses = losses_of(read, rank_share(samples), image)
        return mean_loss(losses, weight(samples))

    rate = cosine_rate(how.lr, warmup=0.1)
    losses = fit(trainer, zip(batches, rounds), loss_of, rate, len(batches), model.log)

    # The model, with the trained tower in the place of its own.
    plain.load_state_dict(gather_state_dict(trainer))
    trainer.destroy()
    plain = plain.to(device()).eval()
    embedder = copy.copy(model)
    embedder.encoders = model.encoders | {"tokens": plain.vision}
    embedder.tag = f"{model.tag}-tuned"
    embedder.delete_features()  # cached tokens of another tuning
    return plain.reader, embedder, losses


@torch.no_grad()
def predict(count: int, width: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return make's rows for samples 0 to count - 1, (count, width) on every rank.

    make(samples (b,)) -> (b, width) int64; each sample is computed by one rank.
    """
    out = torch.zeros(count, width, dtype=torch.int64)
    for samples in torch.arange(count).split(INFERENCE_BATCH)[rank() :: world_size()]:
        out[samples] = make(samples).cpu()
    return all_reduce_sum(out).cpu()


def write_records(model: Embedder, kind: str, images: Images, rows: Iterable[dict]) -> None:
    """Write RUN/KIND/TAG-SET.jsonl, one row a line."""
    if rank():
        return
    path = model.results_folder / kind / f"{model.tag}-{images.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
