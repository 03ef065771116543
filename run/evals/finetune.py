"""Fine-tuning: a copy of the whole vision tower and a linear classifier.

They are trained on a set's train/ and tested on its test/, under the run's DeepSpeed JSON. The
recipes are those of BEiT (arXiv 2106.08254, its code's command for weights that saw no labels;
SLIP's, too), MAE (arXiv 2111.06377, its FINETUNE.md; FLIP follows it) and MaskCLIP (arXiv
2208.12262: BEiT's, but for rate and decay). Names: B images, L patches, D width, C classes.
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
from glimpse.model.layers import Linear, drop_path
from glimpse.model.vision import VisionTower
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.supervised import cosine_rate, count_steps, fit, global_batches, mean_loss
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import rank, rank0_first, to_device, world_size
from glimpse.run.train.engine import initialize_supervised
from glimpse.run.train.optim import parameter_kind

# the options in [0, upper bound]
UPPER_BOUNDS = dict(decay=1, drop_path=0.99, warmup=0.99, smoothing=1, erase=1, crop=1)
# kinds of parameters without weight decay, in both codes
NO_DECAY = ("bias", "norm", "positions", "cls")


@dataclass(frozen=True)
class Recipe:
    """The settings that a recipe's name and the tower's depth determine.

    An option of the same name overrides each.
    """

    lr: float  # the last layer's peak for 256 images of a batch
    decay: float  # of the learning rate, from each layer to the one below
    drop_path: float  # of the last block; blocks below less
    epochs: float
    warmup: float  # share of the training
    batch: int = 1024  # of all ranks
    weight_decay: float = 0.05
    min_lr: float = 1e-6
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    crop: float = 0.08  # smallest share of an image's area
    augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25


BASE_DEPTH = 12  # blocks
RECIPES = {  # for towers of up to 12, 24 and more blocks
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
    recipe: str = "beit"
    samples: int = 0  # of train/, drawn at random; 0: all
    accumulate: int = 1  # backward passes to a step
    seed: int = 0
    # keep the weights in RUN/finetuned/TAG/NAME, where TAG names the weights that it began with
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
        recipe = self.resolved(BASE_DEPTH)
        for name, most in UPPER_BOUNDS.items():
            value = getattr(recipe, name)
            if not 0 <= value <= most:
                raise ValueError(f"finetune({name}={value}): it must be from 0 to {most}")
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
                f"finetune(batch={recipe.batch}, accumulate={self.accumulate}): mixup mixes pairs,"
                " so that the batch must be a multiple of 2 x accumulate"
            )
        if "/" in self.save:
            raise ValueError(
                f"finetune(save={self.save!r}): a name, not a path; it becomes"
                " RUN/finetuned/TAG/NAME"
            )

    def resolved(self, depth: int) -> Recipe:
        """Return the recipe for a tower of this depth, overridden by the options."""
        size = (depth > BASE_DEPTH) + (depth > 2 * BASE_DEPTH)
        overrides = {}
        for field in fields(Recipe):
            value = getattr(self, field.name)
            if value is not None:
                overrides[field.name] = value
        return replace(RECIPES[self.recipe][size], **overrides)


def trains_tower(options: Options) -> bool:
    return True


def check_set(images: Images, options: Options) -> None:
    train = images.open_split("train")
    classes = len(images.class_names())
    for i in range(len(images)):  # those of train/ are checked as they are read
        checked_label(images, i, classes)
    checked_label(train, 0, classes)
    if len(train) < options.samples:
        raise ValueError(
            f"evals: finetune(samples={options.samples}): {images.folder}/train has {len(train)}"
            " images"
        )
    timm_module("mixup")
    augment = options.resolved(BASE_DEPTH).augment
    if augment != "none":
        rand_augment(augment, 224, (0.5, 0.5, 0.5))


def check_model(model: Embedder, options: Options) -> None:
    batch = options.resolved(model.cfg.model.shape.depth).batch
    if batch < 2 * options.accumulate * world_size():
        raise ValueError(
            f"finetune(batch={batch}): less than a pair of images for each of {world_size()} ranks"
            f" x accumulate {options.accumulate}"
        )
    if options.save:
        home = save_folder(model, options)
        if rank0_first(home.exists):
            raise ValueError(f"finetune(save={options.save}): {home} exists; give another name")


def save_folder(model: Embedder, options: Options) -> Path:
    """Return the folder for the weights."""
    return model.results_folder / "finetuned" / model.tag / options.save


class Classifier(nn.Module):
    """A copy of a vision tower, and a linear layer on its pooled tokens (class token or mean).

    A mean is normalized after it is taken, by a new norm in the place of the tower's, as in both
    codes (fc_norm); by the tower's own, where that already comes after the mean.
    """

    def __init__(self, vision: VisionTower, width: int, classes: int):
        super().__init__()
        self.vision = copy.deepcopy(vision).requires_grad_(True)
        self.norm = nn.Identity()
        if vision.cfg.pool in ("mean", "mean_with_cls"):
            self.vision.norm = nn.Identity()
            self.norm = nn.LayerNorm(width, vision.cfg.eps)
        self.head = Linear(width, classes, 2e-5)

    def forward(self, patches: Tensor, positions: Tensor, paths: Tensor | None = None) -> Tensor:
        """Return logits (B, C) fp32 of patches (B, L, 3 P P) at (B, L); paths: of drop_path."""
        only_cls = self.vision.cfg.pool == "cls"
        tokens = self.vision(patches, positions, only_cls=only_cls, paths=paths)
        return self.head(self.norm(self.vision.pool(tokens))).float()


def layer_index(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 the embedding, then each block, last what follows."""
    parts = name.split(".")
    if parts[:2] == ["vision", "blocks"]:
        return 1 + int(parts[2])
    return 0 if parts[0] == "vision" and parts[1] != "norm" else depth + 1


def parameter_groups(model: Classifier, recipe: Recipe) -> list[dict]:
    """Return parameter groups by layer and weight decay.

    scale: the factor of the learning rate, decay ** (layers above).
    """
    depth = len(model.vision.blocks)
    parameters: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for where, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = layer_index(f"{where}.{name}", depth), parameter_kind(module, name) in NO_DECAY
            parameters.setdefault(key, []).append(parameter)
    result = []
    for at, undecayed in sorted(parameters):
        weight_decay = 0.0 if undecayed else recipe.weight_decay
        scale = recipe.decay ** (depth + 1 - at)
        params = parameters[at, undecayed]
        result.append(dict(params=params, weight_decay=weight_decay, scale=scale))
    return result


def format_rates(depth: int, recipe: Recipe) -> str:
    """Return a table of the peak learning rate of each layer."""
    peak = recipe.lr * recipe.batch / 256
    names = ["embedding", *[f"block {i + 1}" for i in range(depth)], "head"]
    scales = [recipe.decay ** (depth + 1 - at) for at in range(depth + 2)]
    return "\n".join(
        f"  {name:10} x {scale:.4f}  peak lr {peak * scale:.3e}"
        for name, scale in zip(names, scales)
    )


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, top5 and mean_per_class on test/ after training on train/, and chance.

    chance: the top1 of guessing.
    """
    check_model(model, options)  # again: another evaluation of this command may have taken the name
    classes = len(images.class_names())
    home = save_folder(model, options)
    trainer, _losses = train_classifier(model, images, options)

    # The classifier takes the place of the model's encoders.
    trainer.eval()
    classifying = copy.copy(model)
    classifying.encoders = {"logits": trainer}
    indices, logits = classifying.embed_images(images, "logits")
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
        # DeepSpeed's name for the method; the weights are in the precision of training
        trainer.save_16bit_model(str(home), "classifier.pt")
        if not rank():
            record = dict(set=str(images.folder), **asdict(options), **results)
            (home / "finetuned.json").write_text(json.dumps(record, indent=1))
        model.log(f"saved {home}")
    trainer.destroy()
    return results


def train_classifier(
    model: Embedder, images: Images, options: Options
) -> tuple[nn.Module, list[float]]:
    """Return the trained classifier, under DeepSpeed, and the loss of each backward pass."""
    train = images.open_split("train")
    classes = len(images.class_names())
    depth = model.cfg.model.shape.depth
    recipe = options.resolved(depth)

    # The classifier's weights and the training images depend on the seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        classifier = Classifier(model.towers.vision, model.cfg.model.shape.width, classes)
        chosen = torch.randperm(len(train))[: options.samples or None]
    layers = parameter_groups(classifier, recipe)
    trainer = initialize_supervised(
        classifier, layers, model.cfg.deepspeed, accumulate=options.accumulate
    )
    trainer.train()
    count = count_steps(len(chosen), recipe.batch, recipe.epochs)
    model.log(
        f"finetune {images.name}: recipe {options.recipe}, {len(chosen):,} images of {classes}"
        f" classes, {count} steps of {recipe.batch}, a rate a layer:\n{format_rates(depth, recipe)}"
    )

    # Augmented images, with the noise of drop_path, so that it does not depend on the ranks.
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
    sampler = rank_batches(chosen, recipe, options)
    loader = DataLoader(data, batch_size=None, sampler=sampler, **worker_kwargs(model.cfg.data))
    mix = MixupCutmix(classes, recipe.mixup, recipe.cutmix, recipe.smoothing)

    def loss_of(trainer: nn.Module, batch: tuple) -> Tensor:
        number, tensors = batch
        pixels, labels, noise = map(to_device, tensors)
        pixels, targets = mix(pixels, labels, options.seed, number, 2)
        patches = patchify(pixels, model.preprocess.patch)
        positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        logits = trainer(patches, positions, drop_path(noise, recipe.drop_path))
        losses = F.cross_entropy(logits, targets, reduction="none")
        return mean_loss(losses, recipe.batch // options.accumulate)

    # The learning rate changes at optimizer steps, each of `accumulate` backward passes.
    rate = cosine_rate(recipe.lr * recipe.batch / 256, recipe.warmup, recipe.min_lr)
    passes = count * options.accumulate

    def of_step(progress: float) -> float:
        step = round(progress * passes) // options.accumulate
        return rate(step / count)

    losses = fit(trainer, enumerate(loader), loss_of, of_step, passes, model.log)
    return trainer, losses


def rank_batches(chosen: Tensor, recipe: Recipe, options: Options) -> Iterator[list[EpochSample]]:
    """Yield this rank's (epoch, sample) pairs of each backward pass.

    A sample that comes again has another epoch.
    """
    size = recipe.batch // options.accumulate
    batches = global_batches(len(chosen), recipe.batch, recipe.epochs, options.seed)
    for step, samples in enumerate(batches):
        rows = []
        for place, i in enumerate(samples.tolist(), step * recipe.batch):
            epoch = place // len(chosen)
            rows.append((epoch, int(chosen[i])))
        for first in range(0, recipe.batch, size):
            yield mixup_pairs_of_rank(rows[first : first + size], rank(), world_size())
