"""Readers of patch tokens: what captioning and VQA have in common.

Texts as rows of ids, the patch tokens of both splits, the training of a reader on them, and
predictions gathered from all ranks. A text's ids are the tokenizer's pieces that occur in the
training texts, renumbered, so that every id of the vocabulary can be learned.
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
from glimpse.model.downstream.decoders import PAD, DecoderWithTower
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

START, UNKNOWN = 1, 2  # ids of the start of a text, and of pieces that are not in the vocabulary
# Batches and slices have the same samples on any number of ranks, so that results are the same.
INFERENCE_BATCH = 128
SLICE = 16  # samples of a training batch whose gradient one rank computes at once


@dataclass(frozen=True)
class ReaderOptions:
    """Options of captioning and vqa: the reader and its training.

    Training uses AdamW, a cosine schedule with a tenth of warm-up, and gradients clipped at 1.
    """

    epochs: float = 10.0
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    # 0: the tower stays frozen. Above 0: it is trained too, at `tower` times the learning rate.
    tower: float = 0.0
    width: int = 0  # of the reader; 0: the width of the tower's tokens
    depth: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "lr", "depth"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"evals: {name}={value}: it must be above 0")
        if self.tower < 0:
            raise ValueError(
                f"evals: tower={self.tower}: it must be 0 (frozen tower) or the positive factor of"
                " the tower's learning rate"
            )
        if self.width < 0 or self.width % 64:
            raise ValueError(
                f"evals: width={self.width}: it must be a multiple of 64 (attention heads have 64"
                " dimensions), or 0 for the tower's width"
            )

    def shape(self, model: Embedder) -> dict:
        """Return the keyword arguments that build a reader of this model's tokens."""
        rows, columns = model.grid
        token_count = 1 + model.mask.visible_count(rows * columns)  # with the class token
        token_width = model.cfg.model.shape.width
        # By default the tower's width, rounded up to whole attention heads of 64.
        width = self.width or -(-token_width // 64) * 64
        image = (token_count, token_width)
        return dict(image=image, width=width, depth=self.depth, heads=width // 64)


class PieceVocabulary:
    """A vocabulary of the tokenizer's pieces that occur in the given texts.

    A text has at most `context` ids, of which the first is START.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], context: int):
        self.tokenizer = tokenizer
        self.context = context
        self.pieces = sorted({piece for text in texts for piece in tokenizer.encode(text)})
        self.id_of_piece = {piece: i for i, piece in enumerate(self.pieces, UNKNOWN + 1)}

    def __len__(self) -> int:
        return UNKNOWN + 1 + len(self.pieces)

    def ids(self, text: str) -> Tensor:
        """Return the ids of a text."""
        ids = [self.id_of_piece.get(piece, UNKNOWN) for piece in self.tokenizer.encode(text)]
        return torch.tensor([START, *ids][: self.context])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without START, UNKNOWN and padding."""
        pieces = [self.pieces[i - UNKNOWN - 1] for i in ids if i > UNKNOWN]
        return self.tokenizer.decode_ids(pieces).strip()


def pad_texts(rows: Sequence[Tensor]) -> Tensor:
    """Pad rows of ids of different lengths to one batch (B, N) on the device."""
    return to_device(pad_sequence(list(rows), batch_first=True, padding_value=PAD))


def patch_tokens(model: Embedder, images: Images) -> Features:
    """Return the tower's patch tokens of a split, (images, K, D), class token first.

    All ranks must call.
    """
    return compute_features(model, images, "tokens")


def check_model(model: Embedder, options: ReaderOptions) -> None:
    """Raise ValueError if the model's views, or the number of ranks, do not fit the options."""
    if model.ensemble > 1:
        raise ValueError(
            "--ensemble: this evaluation reads the patch tokens of one view; remove the option"
        )
    if options.tower and not model.sees_all_patches:
        raise ValueError(
            "--mask: a tower is trained on all patches; remove the option, or set tower=0"
        )
    if options.tower and options.batch % world_size():
        raise ValueError(
            f"evals: batch={options.batch}: with tower above 0 it must be a multiple of the number"
            f" of ranks, {world_size()}"
        )


def trains_tower(options: ReaderOptions) -> bool:
    """Return True if the tower is trained with the reader."""
    return options.tower > 0


def train_reader(
    model: Embedder,
    train: Images,
    options: ReaderOptions,
    build: Callable[..., nn.Module],
    image_indices: Sequence[int],
    compute_losses: Callable,
    count_losses: Callable = len,
) -> tuple[nn.Module, Embedder]:
    """Train a reader on samples of a split; return it, and the model whose tokens it reads.

    All ranks must call.

    image_indices: the image of each sample.
    compute_losses(read, samples (b,), image): returns losses (n,), where read(ids, image) returns
    the reader's logits.
    count_losses(samples (B,)): returns the number of such losses of a global batch.
    """
    # An evaluation during training must not use the training's random generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        reader = build(**options.shape(model))
    train_function = train_with_tower if options.tower else train_on_frozen_tower
    reader, model, losses = train_function(
        model, train, options, reader, torch.tensor(image_indices), compute_losses, count_losses
    )
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"evals: lr={options.lr}: the loss of the reader is not finite; use a lower learning"
            " rate"
        )
    model.log(
        f"  {len(image_indices):,} samples, {len(losses):,} steps,"
        f" loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return reader.eval(), model


def train_on_frozen_tower(
    model: Embedder,
    train: Images,
    options: ReaderOptions,
    reader: nn.Module,
    image_indices: Tensor,
    compute_losses: Callable,
    count_losses: Callable,
) -> tuple[nn.Module, Embedder, list[float]]:
    """Train the reader on stored tokens of the frozen tower.

    The result is bitwise equal on any number of ranks.
    """
    image_tokens = patch_tokens(model, train)
    reader = reader.to(device())
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=options.weight_decay)
    trainer = ExactTrainer(reader, optimizer, clip=1.0)

    def compute_loss(trainer: ExactTrainer, samples: Tensor) -> Tensor:
        loss_count = count_losses(samples)
        loss = torch.zeros((), device=device())
        for slice_samples in samples.split(SLICE)[rank() :: world_size()]:
            image = to_device(image_tokens.rows(image_indices[slice_samples]))
            losses = compute_losses(reader, slice_samples, image)
            loss += trainer.add_gradient(losses.sum() / loss_count)
        return loss * world_size()

    count = len(image_indices)
    batches = global_batches(count, options.batch, options.epochs, options.seed)
    step_count = count_steps(count, options.batch, options.epochs)
    learning_rate = cosine_rate(options.lr, warmup=0.1)
    losses = fit(trainer, batches, compute_loss, learning_rate, step_count, model.log)
    return reader, model, losses


def train_with_tower(
    model: Embedder,
    train: Images,
    options: ReaderOptions,
    reader: nn.Module,
    image_indices: Tensor,
    compute_losses: Callable,
    count_losses: Callable,
) -> tuple[nn.Module, Embedder, list[float]]:
    """Train a copy of the tower with the reader, under the run's DeepSpeed JSON.

    The tower's learning rate is options.tower times the reader's.
    """
    # 1. Put both into one module. A second copy takes the trained weights out of DeepSpeed.
    vision = copy.deepcopy(model.towers.vision).requires_grad_(True)
    module = DecoderWithTower(vision, reader)
    plain_module = copy.deepcopy(module)
    groups = []
    for submodule, scale in ((module.vision, options.tower), (module.reader, 1.0)):
        parameters = list(submodule.parameters())
        groups.append(dict(params=parameters, weight_decay=options.weight_decay, scale=scale))
    trainer = initialize_supervised(module, groups, model.cfg.deepspeed)
    trainer.train()

    # 2. Load the images of this rank's share of each global batch.
    count = len(image_indices)
    batches = list(global_batches(count, options.batch, options.epochs, options.seed))
    share = torch.cat([rank_share(samples) for samples in batches])
    workers = min(model.cfg.data.workers, 2)
    rank_batch = options.batch // world_size()
    image_batches = train.batches(
        model.preprocess, rank_batch, image_indices[share].tolist(), len(batches), workers
    )

    def read(ids: Tensor, image: tuple[Tensor, Tensor]) -> Tensor:
        return trainer(ids, *image).float()

    def compute_loss(_trainer: nn.Module, batch: tuple) -> Tensor:
        samples, (_, patches, positions) = batch
        image = to_device(patches), to_device(positions)
        losses = compute_losses(read, rank_share(samples), image)
        return mean_loss(losses, count_losses(samples))

    # 3. Train.
    learning_rate = cosine_rate(options.lr, warmup=0.1)
    pairs = zip(batches, image_batches)
    losses = fit(trainer, pairs, compute_loss, learning_rate, len(batches), model.log)

    # 4. Return the model with the trained tower as the encoder of its tokens.
    plain_module.load_state_dict(gather_state_dict(trainer))
    trainer.destroy()
    plain_module = plain_module.to(device()).eval()
    trained_model = copy.copy(model)
    trained_model.encoders = model.encoders | {"tokens": plain_module.vision}
    trained_model.tag = f"{model.tag}-tuned"
    # An earlier evaluation may have stored tokens of another training under this tag.
    trained_model.delete_features()
    return plain_module.reader, trained_model, losses


@torch.no_grad()
def predict(count: int, width: int, predict_batch: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the predictions (count, width) of samples 0 to count - 1, on every rank.

    predict_batch(samples (b,)): returns rows (b, width) int64. Each sample is computed by one rank.
    """
    predictions = torch.zeros(count, width, dtype=torch.int64)
    for samples in torch.arange(count).split(INFERENCE_BATCH)[rank() :: world_size()]:
        predictions[samples] = predict_batch(samples).cpu()
    return all_reduce_sum(predictions).cpu()


def write_records(model: Embedder, kind: str, images: Images, records: Iterable[dict]) -> None:
    """Write RUN/KIND/TAG-SET.jsonl on rank 0, with one record per line."""
    if rank():
        return
    path = model.results_folder / kind / f"{model.tag}-{images.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
