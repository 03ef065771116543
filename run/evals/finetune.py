"""Fine-tuning: train a copy of the vision tower and a linear classifier on a set's train/.

The classifier is tested on test/. It is trained under the run's DeepSpeed JSON with the recipe of

    beit       arXiv 2106.08254, its command for weights pretrained without labels; SLIP's too
    mae        arXiv 2111.06377, its FINETUNE.md; FLIP follows it
    maskclip   arXiv 2208.12262: BEiT's with another learning rate and decay

Shapes: B images, L patches, D width, C classes.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from glimpse.data.evals.clip_benchmark import Images
from glimpse.data.evals.finetune import (
    EpochSample,
    LabeledImages,
    MixupCutmix,
    checked_label,
    mixup_pairs_of_rank,
    rand_augment,
    timm_module,
)
from glimpse.data.loader import worker_kwargs
from glimpse.data.patches import patchify
from glimpse.model.layers import Linear, make_drop_path_mask
from glimpse.model.vision import VisionTower
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.supervised import cosine_rate, count_steps, fit, global_batches, mean_loss
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import rank, rank0_first, to_device, world_size
from glimpse.run.train.engine import initialize_supervised
from glimpse.run.train.optim import parameter_kind

# {option: upper bound}; their lower bound is 0
UPPER_BOUNDS = dict(decay=1, drop_path=0.99, warmup=0.99, smoothing=1, erase=1, crop=1)
# Kinds of parameters (see parameter_kind) without weight decay, as in BEiT's and MAE's code.
NO_DECAY = ("bias", "norm", "positions", "cls")


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe for one depth of the tower.

    An option of the same name overrides each of them.
    """

    lr: float  # peak of the last layer for a batch of 256; it is scaled with the batch
    decay: float  # factor of the learning rate from each layer to the one below
    drop_path: float  # of the last block; it grows linearly from 0 in the first
    epochs: float
    warmup: float  # fraction of the training
    batch: int = 1024  # global batch
    weight_decay: float = 0.05
    min_lr: float = 1e-6
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    crop: float = 0.08  # smallest fraction of an image's area
    augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25


BASE_DEPTH = 12  # blocks of ViT-S and ViT-B
RECIPES = {  # for towers of up to 12 blocks, up to 24, and more
    "beit": (
        Recipe(1e-3, 0.65, 0.1, 100, 0.2),
        Recipe(2.5e-4, 0.75, 0.2, 50, 0.1),
        Recipe(2.5e-4, 0.75, 0.2, 50, 0.1),
    ),
    "mae": (
        Recipe(5e-4, 0.65, 0.1, 100, 0.05),
        Recipe(1e-3, 0.75, 0.2, 50, 0.1),
        Recipe(1e-3, 0.75, 0.3, 50, 0.1),
    ),
    "maskclip": (Recipe(1.5e-4, 0.7, 0.1, 100, 0.2),) * 3,
}


@dataclass(frozen=True)
class Options:
    """Options of finetune; None leaves a setting to the recipe."""

    recipe: str = "beit"
    samples: int = 0  # random subset of train/ to train on; 0: all images
    accumulate: int = 1  # backward passes of each step
    seed: int = 0
    # Save the weights in RUN/finetuned/TAG/NAME, where TAG identifies the pretrained weights.
    save: str = ""
    lr: float | None = None
    decay: float | None = None
    drop_path: float | None = None
    epochs: float | None = None
    warmup: float | None = None
    batch: int | None = None
    weight_decay: float | None = None
    min_lr: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    smoothing: float | None = None
    crop: float | None = None
    augment: str | None = None
    erase: float | None = None

    def __post_init__(self):
        check_choice("finetune(recipe=...)", self.recipe, RECIPES)
        recipe = self.resolve(BASE_DEPTH)
        for name, upper in UPPER_BOUNDS.items():
            value = getattr(recipe, name)
            if not 0 <= value <= upper:
                raise ValueError(f"finetune({name}={value}): it must be from 0 to {upper}")
        for name in ("lr", "epochs", "decay", "crop"):
            value = getattr(recipe, name)
            if not value > 0:
                raise ValueError(f"finetune({name}={value}): it must be above 0")
        at_least_0 = dict(samples=self.samples, mixup=recipe.mixup, cutmix=recipe.cutmix)
        for name, value in at_least_0.items():
            if value < 0:
                raise ValueError(f"finetune({name}={value}): it must be 0 or more")
        if self.accumulate < 1 or recipe.batch < 1 or recipe.batch % (2 * self.accumulate):
            raise ValueError(
                f"finetune(batch={recipe.batch}, accumulate={self.accumulate}): the batch must be a"
                " multiple of 2 x accumulate, because mixup mixes pairs of images"
            )
        if "/" in self.save:
            raise ValueError(
                f"finetune(save={self.save!r}): use a name, not a path; the weights are saved in"
                " RUN/finetuned/TAG/NAME"
            )

    def resolve(self, depth: int) -> Recipe:
        """Return the recipe for a tower of this depth, overridden by these options."""
        size = (depth > BASE_DEPTH) + (depth > 2 * BASE_DEPTH)  # index of the recipe's sizes
        overrides = {}
        for field in fields(Recipe):
            value = getattr(self, field.name)
            if value is not None:
                overrides[field.name] = value
        return replace(RECIPES[self.recipe][size], **overrides)


def trains_tower(options: Options) -> bool:
    """Return True: fine-tuning always trains the tower."""
    return True


def check_set(images: Images, options: Options) -> None:
    """Raise ValueError unless test/ and train/ have labels, and train/ enough images.

    Also checks the installation of timm and the augmentation's name.
    """
    train = images.open_split("train")
    classes = len(images.class_names())
    for i in range(len(images)):  # labels of train/ are checked when they are read
        checked_label(images, i, classes)
    checked_label(train, 0, classes)
    if len(train) < options.samples:
        raise ValueError(
            f"evals: finetune(samples={options.samples}): {images.folder}/train has {len(train)}"
            " images; use at most that many"
        )
    timm_module("mixup")
    augment = options.resolve(BASE_DEPTH).augment
    if augment != "none":
        rand_augment(augment, 224, (0.5, 0.5, 0.5))


def check_model(model: Embedder, options: Options) -> None:
    """Raise ValueError if the batch is too small for the ranks, or options.save already exists."""
    batch = options.resolve(model.cfg.model.shape.depth).batch
    if batch < 2 * options.accumulate * world_size():
        raise ValueError(
            f"finetune(batch={batch}): less than one pair of images for each of {world_size()}"
            f" ranks and each of {options.accumulate} backward passes; use a larger batch"
        )
    if options.save:
        folder = save_folder(model, options)
        if rank0_first(folder.exists):
            raise ValueError(f"finetune(save={options.save}): {folder} exists; give another name")


def save_folder(model: Embedder, options: Options) -> Path:
    """Return the folder in which the weights are saved."""
    return model.results_folder / "finetuned" / model.tag / options.save


class Classifier(nn.Module):
    """A copy of a vision tower, and a linear layer on its pooled tokens (class token or mean).

    As in BEiT's and MAE's code (fc_norm), a mean is normalized by a new norm, which replaces the
    tower's norm of the tokens. A tower that already normalizes the mean keeps its norm.
    """

    def __init__(self, vision: VisionTower, width: int, classes: int):
        super().__init__()
        self.vision = copy.deepcopy(vision).requires_grad_(True)
        self.norm = nn.Identity()
        if vision.cfg.pool in ("mean", "mean_with_cls"):
            self.vision.norm = nn.Identity()
            self.norm = nn.LayerNorm(width, vision.cfg.eps)
        self.head = Linear(width, classes, 2e-5)

    def forward(
        self, patches: Tensor, positions: Tensor, drop_path_mask: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, C) fp32 of patches (B, L, 3 P P) at positions (B, L).

        drop_path_mask: the drop-path masks, see model.layers.make_drop_path_mask.
        """
        only_cls = self.vision.cfg.pool == "cls"
        tokens = self.vision(patches, positions, only_cls=only_cls, drop_path_mask=drop_path_mask)
        return self.head(self.norm(self.vision.pool(tokens))).float()


def layer_index(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 the embedding, 1 to depth the blocks, depth + 1 the rest."""
    parts = name.split(".")
    if parts[:2] == ["vision", "blocks"]:
        return 1 + int(parts[2])
    return 0 if parts[0] == "vision" and parts[1] != "norm" else depth + 1


def parameter_groups(model: Classifier, recipe: Recipe) -> list[dict]:
    """Return parameter groups by layer and weight decay.

    scale: the layer's factor of the learning rate, decay ** (number of layers above).
    """
    depth = len(model.vision.blocks)
    parameters: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_undecayed = parameter_kind(module, name) in NO_DECAY
            key = layer_index(f"{prefix}.{name}", depth), is_undecayed
            parameters.setdefault(key, []).append(parameter)
    groups = []
    for layer, is_undecayed in sorted(parameters):
        weight_decay = 0.0 if is_undecayed else recipe.weight_decay
        scale = recipe.decay ** (depth + 1 - layer)
        params = parameters[layer, is_undecayed]
        groups.append(dict(params=params, weight_decay=weight_decay, scale=scale))
    return groups


def format_rates(depth: int, recipe: Recipe) -> str:
    """Return a table of the peak learning rate of each layer."""
    peak = recipe.lr * recipe.batch / 256
    names = ["embedding", *[f"block {i + 1}" for i in range(depth)], "head"]
    scales = [recipe.decay ** (depth + 1 - layer) for layer in range(depth + 2)]
    return "\n".join(
        f"  {name:10} x {scale:.4f}  peak lr {peak * scale:.3e}"
        for name, scale in zip(names, scales)
    )


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, top5 and mean_per_class on test/ after training on train/.

    chance: the top1 of guessing.
    """
    # Check again: an earlier evaluation of the same command may have used the name.
    check_model(model, options)
    classes = len(images.class_names())
    folder = save_folder(model, options)
    trainer, _losses = train_classifier(model, images, options)

    # Test with an Embedder whose only encoder is the classifier.
    trainer.eval()
    classifier_model = copy.copy(model)
    classifier_model.encoders = {"logits": trainer}
    indices, logits = classifier_model.embed_images(images, "logits")
    labels = [images.label(i) for i in indices.tolist()]
    labels = torch.tensor(labels, dtype=torch.int64, device=logits.device)
    counts = metrics.count_hits(logits, labels)
    results = dict(
        top1=metrics.top1(counts),
        top5=metrics.top5(counts),
        mean_per_class=metrics.mean_per_class(counts),
        chance=1 / classes,
    )
    if options.save:
        # In spite of its name, the method saves the weights in the precision of training.
        trainer.save_16bit_model(str(folder), "classifier.pt")
        if rank() == 0:
            record = dict(set=str(images.folder), **asdict(options), **results)
            (folder / "finetuned.json").write_text(json.dumps(record, indent=1))
        model.log(f"saved {folder}")
    trainer.destroy()
    return results


def train_classifier(
    model: Embedder, images: Images, options: Options
) -> tuple[nn.Module, list[float]]:
    """Train a classifier; return its DeepSpeed engine and the loss of each backward pass."""
    train = images.open_split("train")
    classes = len(images.class_names())
    depth = model.cfg.model.shape.depth
    recipe = options.resolve(depth)

    # 1. The classifier's weights and the choice of images depend only on the seed.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        classifier = Classifier(model.towers.vision, model.cfg.model.shape.width, classes)
        train_indices = torch.randperm(len(train))[: options.samples or None]
    trainer = initialize_supervised(
        classifier,
        parameter_groups(classifier, recipe),
        model.cfg.deepspeed,
        accumulate=options.accumulate,
    )
    trainer.train()
    steps = count_steps(len(train_indices), recipe.batch, recipe.epochs)
    model.log(
        f"finetune {images.name}: recipe {options.recipe}, {len(train_indices):,} images of"
        f" {classes} classes, {steps} steps of {recipe.batch}, with a learning rate per layer:\n"
        + format_rates(depth, recipe)
    )

    # 2. Load augmented images. Each has the noise of its drop-path masks, so that these do not
    #    depend on the number of ranks.
    vision = model.cfg.model.vision
    data = LabeledImages(
        train,
        classes,
        size=model.preprocess.image_size,
        interpolation=model.preprocess.interpolation,
        mean=vision.mean,
        std=vision.std,
        crop=recipe.crop,
        augment=recipe.augment,
        erase=recipe.erase,
        noise=(depth, 2),
        seed=options.seed,
    )
    sampler = rank_batches(train_indices, recipe, options)
    loader = DataLoader(data, batch_size=None, sampler=sampler, **worker_kwargs(model.cfg.data))
    mix = MixupCutmix(classes, recipe.mixup, recipe.cutmix, recipe.smoothing)

    def compute_loss(trainer: nn.Module, batch: tuple) -> Tensor:
        number, tensors = batch
        pixels, labels, noise = map(to_device, tensors)
        pixels, targets = mix(pixels, labels, options.seed, number, 2)
        patches = patchify(pixels, model.preprocess.patch)
        positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        logits = trainer(patches, positions, make_drop_path_mask(noise, recipe.drop_path))
        losses = F.cross_entropy(logits, targets, reduction="none")
        return mean_loss(losses, recipe.batch // options.accumulate)

    # 3. Train. `fit` counts backward passes, of which `accumulate` form an optimizer step; the
    #    learning rate may only change between steps.
    step_rate = cosine_rate(recipe.lr * recipe.batch / 256, recipe.warmup, recipe.min_lr)
    passes = steps * options.accumulate

    def learning_rate(progress: float) -> float:
        step = round(progress * passes) // options.accumulate
        return step_rate(step / steps)

    losses = fit(trainer, enumerate(loader), compute_loss, learning_rate, passes, model.log)
    return trainer, losses


def rank_batches(
    train_indices: Tensor, recipe: Recipe, options: Options
) -> Iterator[list[EpochSample]]:
    """Yield this rank's (epoch, sample) pairs of each backward pass.

    The epoch counts how often the sample came before, so that its augmentation differs each time.
    """
    pass_size = recipe.batch // options.accumulate
    batches = global_batches(len(train_indices), recipe.batch, recipe.epochs, options.seed)
    for step, samples in enumerate(batches):
        rows = []
        for position, i in enumerate(samples.tolist(), step * recipe.batch):
            epoch = position // len(train_indices)
            rows.append((epoch, int(train_indices[i])))
        for first in range(0, recipe.batch, pass_size):
            yield mixup_pairs_of_rank(rows[first : first + pass_size], rank(), world_size())
