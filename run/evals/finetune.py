"""Fine-tuning: the whole vision tower and a linear classifier, trained on a set's train/, tested on
its test/.

The recipes are those of BEiT (arXiv 2106.08254, its code's command for weights that saw no labels;
SLIP's, too), MAE
(arXiv 2111.06377, its FINETUNE.md; FLIP follows it) and MaskCLIP (arXiv 2208.12262: BEiT's, but for
rate and decay). A copy of the
tower is trained, under the run's own DeepSpeed JSON. Names: B images, L patches, D width, C
classes.
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
from glimpse.data.evals.finetune import Labelled, Mix, Row, label, paired, rand_augment, timm
from glimpse.data.loader import ahead
from glimpse.data.patches import patchify
from glimpse.model.init import Linear
from glimpse.model.layers import drop_path
from glimpse.model.vision import VisionTower
from glimpse.run.evals import metrics
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.supervised import cosine, fit, mean_loss, order, steps
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import once, rank, to_device, world
from glimpse.run.train.engine import wrapped
from glimpse.run.train.optim import kind

# what lies from 0 to so much
SHARES = dict(decay=1, drop_path=0.99, warmup=0.99, smoothing=1, erase=1, crop=1)
# kinds of parameters without weight decay, in both codes
NO_DECAY = ("bias", "norm", "positions", "cls")


@dataclass(frozen=True)
class Recipe:
    """What follows from the name of a recipe and the depth of the tower; an option of the same name
    overrides each.
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


BASE = 12  # blocks
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
    # keep the weights in RUN/finetuned/TAG/NAME, where TAG tells the weights that it began with
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
        found = self.resolved(BASE)
        for name, most in SHARES.items():
            if not 0 <= getattr(found, name) <= most:
                raise ValueError(
                    f"finetune({name}={getattr(found, name)}): it must be from 0 to {most}"
                )
        for name in ("lr", "epochs", "decay", "crop"):
            if not getattr(found, name) > 0:
                raise ValueError(f"finetune({name}={getattr(found, name)}): it must be above 0")
        for name, value in (
            ("samples", self.samples),
            ("mixup", found.mixup),
            ("cutmix", found.cutmix),
        ):
            if value < 0:
                raise ValueError(f"finetune({name}={value}): it must be 0 or more")
        if self.accumulate < 1 or found.batch < 1 or found.batch % (2 * self.accumulate):
            raise ValueError(
                f"finetune(batch={found.batch}, accumulate={self.accumulate}): mixup mixes pairs,"
                " so that the batch must be a multiple of 2 x accumulate"
            )
        if "/" in self.save:
            raise ValueError(
                f"finetune(save={self.save!r}): a name, not a path; it becomes"
                " RUN/finetuned/TAG/NAME"
            )

    def resolved(self, depth: int) -> Recipe:
        """The recipe for a tower of this depth, with what the options say otherwise."""
        row = RECIPES[self.recipe][(depth > BASE) + (depth > 2 * BASE)]
        return replace(
            row,
            **{
                f.name: given
                for f in fields(Recipe)
                if (given := getattr(self, f.name)) is not None
            },
        )


def trains_tower(options: Options) -> bool:
    return True


def check(images: Images, options: Options) -> None:
    train = images.other("train")
    classes = len(images.classes())
    for i in range(len(images)):  # those of train/ are looked at as they come
        label(images, i, classes)
    label(train, 0, classes)
    if len(train) < options.samples:
        raise ValueError(
            f"evals: finetune(samples={options.samples}): {images.folder}/train has {len(train)}"
            " images"
        )
    timm("mixup")
    if (augment := options.resolved(BASE).augment) != "none":
        rand_augment(augment, 224, (0.5, 0.5, 0.5))


def fits(model: Embedder, options: Options) -> None:
    batch = options.resolved(model.cfg.model.shape.depth).batch
    if batch < 2 * options.accumulate * world():
        raise ValueError(
            f"finetune(batch={batch}): less than a pair of images for each of {world()} ranks x"
            f" accumulate {options.accumulate}"
        )
    if options.save and once(kept(model, options).exists):
        raise ValueError(
            f"finetune(save={options.save}): {kept(model, options)} exists; give another name"
        )


def kept(model: Embedder, options: Options) -> Path:
    """Where the weights go."""
    return model.home / "finetuned" / model.tag / options.save


class Classifier(nn.Module):
    """A copy of a vision tower, and a linear layer on its pooled tokens: the class token, or the
    mean.

    A mean is normalised after it is taken, by a new norm in the place of the tower's, as in both
    codes (fc_norm); by the tower's own, where that already comes after the mean.
    """

    def __init__(self, vision: VisionTower, width: int, classes: int):
        super().__init__()
        self.vision, self.norm = copy.deepcopy(vision).requires_grad_(True), nn.Identity()
        if vision.cfg.pool in ("mean", "mean_with_cls"):
            self.vision.norm, self.norm = nn.Identity(), nn.LayerNorm(width, vision.cfg.eps)
        self.head = Linear(width, classes, 2e-5)

    def forward(self, patches: Tensor, positions: Tensor, paths: Tensor | None = None) -> Tensor:
        """(B, L, 3 P P) at (B, L), paths of drop_path -> (B, C) fp32."""
        tokens = self.vision(
            patches, positions, only_cls=self.vision.cfg.pool == "cls", paths=paths
        )
        return self.head(self.norm(self.vision.pool(tokens))).float()


def layer(name: str, depth: int) -> int:
    """The layer of a parameter: 0 the embedding, then each block, last what comes after them."""
    parts = name.split(".")
    if parts[:2] == ["vision", "blocks"]:
        return 1 + int(parts[2])
    return 0 if parts[0] == "vision" and parts[1] != "norm" else depth + 1


def groups(model: Classifier, recipe: Recipe) -> list[dict]:
    """Parameter groups by layer and weight decay; scale: by what the learning rate is multiplied,
    decay ** (layers above).
    """
    depth, found = len(model.vision.blocks), {}
    for where, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(
                (layer(f"{where}.{name}", depth), kind(module, name) in NO_DECAY), []
            ).append(parameter)
    return [
        dict(
            params=held,
            weight_decay=0.0 if free else recipe.weight_decay,
            scale=recipe.decay ** (depth + 1 - at),
        )
        for (at, free), held in sorted(found.items(), key=lambda item: item[0])
    ]


def rates(depth: int, recipe: Recipe) -> str:
    """A table of the peak learning rate of each layer."""
    peak = recipe.lr * recipe.batch / 256
    names = ["embedding", *[f"block {i + 1}" for i in range(depth)], "head"]
    scales = [recipe.decay ** (depth + 1 - at) for at in range(depth + 2)]
    return "\n".join(
        f"  {name:10} x {scale:.4f}  peak lr {peak * scale:.3e}"
        for name, scale in zip(names, scales)
    )


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """top1, top5 and mean_per_class on test/ after training on train/, and chance: what guessing
    would get at top1.
    """
    fits(model, options)  # again: another of this command may have taken the name
    classes, home = len(images.classes()), kept(model, options)
    trainer, _ = tuned(model, images, options)
    trainer.eval()
    shown = copy.copy(model)  # with the classifier as one more encoder
    shown.encoders = {"logits": trainer}
    indices, logits = shown.images(images, "logits")
    labels = torch.tensor(
        [images.label(i) for i in indices.tolist()], dtype=torch.int64, device=logits.device
    )
    counts = metrics.counted(logits, labels)
    results = dict(
        top1=metrics.top1(counts),
        top5=metrics.top5(counts),
        mean_per_class=metrics.mean_per_class(counts),
        chance=1 / classes,
    )
    if options.save:
        # its name; the weights are in the precision of training
        trainer.save_16bit_model(str(home), "classifier.pt")
        if not rank():
            (home / "finetuned.json").write_text(
                json.dumps(dict(set=str(images.folder), **asdict(options), **results), indent=1)
            )
        model.say(f"saved {home}")
    trainer.destroy()
    return results


def tuned(model: Embedder, images: Images, options: Options) -> tuple:
    """(the classifier, trained, under DeepSpeed; the loss of each backward pass)."""
    train, classes = images.other("train"), len(images.classes())
    depth = model.cfg.model.shape.depth
    recipe = options.resolved(depth)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        classifier = Classifier(model.towers.vision, model.cfg.model.shape.width, classes)
        chosen = torch.randperm(len(train))[: options.samples or None]
    trainer = wrapped(
        classifier, groups(classifier, recipe), model.cfg.deepspeed, accumulate=options.accumulate
    )
    trainer.train()
    count = steps(len(chosen), recipe.batch, recipe.epochs)
    model.say(
        f"finetune {images.name}: recipe {options.recipe}, {len(chosen):,} images of {classes}"
        f" classes, {count} steps of {recipe.batch}, a rate a layer:\n{rates(depth, recipe)}"
    )
    vision = model.cfg.model.vision
    data = Labelled(
        train,
        classes,
        size=model.pre.image_size,
        interpolation=model.pre.interpolation,
        mean=vision.mean,
        std=vision.std,
        crop=recipe.crop,
        augment=recipe.augment,
        erase=recipe.erase,
        noise=(depth, 2),
        seed=options.seed,
    )
    mix, patch = Mix(classes, recipe.mixup, recipe.cutmix, recipe.smoothing), model.pre.patch

    def loss_of(trainer, batch: tuple) -> Tensor:
        number, (pixels, labels, noise) = batch
        pixels, labels, noise = map(to_device, (pixels, labels, noise))
        pixels, targets = mix(pixels, labels, options.seed, number, 2)
        patches = patchify(pixels, patch)
        positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        losses = F.cross_entropy(
            trainer(patches, positions, drop_path(noise, recipe.drop_path)),
            targets,
            reduction="none",
        )
        return mean_loss(losses, recipe.batch // options.accumulate)

    loader = DataLoader(
        data, batch_size=None, sampler=shares(chosen, recipe, options), **ahead(model.cfg.data)
    )
    rate = cosine(recipe.lr * recipe.batch / 256, recipe.warmup, recipe.min_lr)
    passes = count * options.accumulate

    def of_step(progress: float) -> float:
        # alike in all passes of a step
        return rate(round(progress * passes) // options.accumulate / count)

    return trainer, fit(trainer, enumerate(loader), loss_of, of_step, passes, model.say)


def shares(chosen: Tensor, recipe: Recipe, options: Options) -> Iterator[list[Row]]:
    """This rank's samples of each backward pass; a sample that comes again does so in another
    epoch.
    """
    for step, samples in enumerate(order(len(chosen), recipe.batch, recipe.epochs, options.seed)):
        places = range(step * recipe.batch, (step + 1) * recipe.batch)
        rows = [
            (place // len(chosen), int(chosen[i])) for place, i in zip(places, samples.tolist())
        ]
        size = recipe.batch // options.accumulate
        for first in range(0, recipe.batch, size):
            yield paired(rows[first : first + size], rank(), world())
