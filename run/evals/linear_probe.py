"""Linear probe: a linear classifier on frozen features, trained on train/ and tested on test/.

There are four recipes, one for each optimizer:

    lbfgs   CLIP (arXiv 2103.00020, section 3.2 and appendix A.3): at most 1,000 iterations, and the
            best of many weight decays
    lars    MaskCLIP (arXiv 2208.12262, appendix) and MAE: batch norm without affine parameters
            before the linear layer, large batches
    sgd     SLIP's and A-CLIP's main_linear.py: no norm, and the best of several learning rates; the
            lowest, 0.00625, is what their code uses on 8 GPUs
    adamw   CLIP_benchmark, whose probe GLIP reports: normalized embeddings

Features are computed once, without augmentation; the papers that use LARS and SGD train on random
crops and flips. The setting that a recipe leaves open is chosen on a held-out tenth of train/. Then
the classifier is trained again on all of train/.

Shapes: N images, n images of this rank, D width, C classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.features import (
    FEATURE_KINDS,
    Features,
    check_train_and_test,
    check_visible_patches,
    train_test_features,
)
from glimpse.run.evals.lars import LARS
from glimpse.run.evals.metrics import accuracies
from glimpse.run.evals.supervised import (
    ReplicatedTrainer,
    cosine_rate,
    count_steps,
    fit,
    global_batches,
    mean_loss,
    rank_share,
)
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import all_reduce_sum, device, rank, to_device, world_size

ITERATIONS = 1000  # of L-BFGS
CHUNK = 4096  # images classified at once
# Steps of an epoch. A set with fewer images than the recipe's gets smaller batches, so that its
# epochs have about this number of steps.
MIN_STEPS = 64
HELD_OUT_INTERVAL = 10  # one image in ten
SWEEP_STEPS = 96  # the sweep's weight decays are 1e-6 * 10^(i / 8), i = 0 ... SWEEP_STEPS


@dataclass(frozen=True)
class Recipe:
    """The settings of an optimizer. An option of the same name overrides each of them."""

    features: str = "pooled"  # one of features.FEATURE_KINDS
    standardize: bool = False  # batch norm without affine parameters before the linear layer
    lr: tuple[float, ...] = ()  # peaks; if there are several, held-out images decide
    epochs: float = 0
    warmup: float = 0  # epochs
    batch: int = 0  # global batch
    # None: chosen by a sweep. L-BFGS minimizes sum of losses + weight_decay / 2 * |W|^2, so it is
    # scikit-learn's 1 / C.
    weight_decay: float | None = 0.0


RECIPES = {
    "lbfgs": Recipe(weight_decay=None),
    "lars": Recipe(standardize=True, lr=(6.4,), epochs=90, warmup=10, batch=16384),
    "sgd": Recipe(lr=(0.00625, 0.05, 0.4, 3.2), epochs=90, batch=1024),
    "adamw": Recipe("embedded", lr=(0.1,), epochs=10, batch=64),
}
OPTIMIZERS = {
    "lars": LARS,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Options:
    """Options of linear_probe; None leaves a setting to the recipe."""

    optimizer: str = "lbfgs"
    seed: int = 0  # of the order of images, and of the held-out images
    features: str | None = None
    standardize: bool | None = None
    lr: tuple[float, ...] | None = None
    epochs: float | None = None
    batch: int | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        check_choice("linear_probe(optimizer=...)", self.optimizer, RECIPES)
        check_choice("linear_probe(features=...)", self.recipe.features, FEATURE_KINDS)
        for name in ("lr", "epochs", "batch"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.optimizer == "lbfgs":
                raise ValueError(
                    f"linear_probe({name}={value}): lbfgs has no such setting; remove it, or use"
                    f" optimizer={', '.join(OPTIMIZERS)}"
                )
            smallest = min(value, default=0) if name == "lr" else value
            if not smallest > 0:
                raise ValueError(f"linear_probe({name}={value}): it must be above 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"linear_probe(weight_decay={self.weight_decay}): it must be 0 or more"
            )

    @property
    def recipe(self) -> Recipe:
        """The optimizer's recipe, overridden by these options."""
        overrides = {}
        for field in fields(Recipe):
            value = getattr(self, field.name, None)
            if value is not None:
                overrides[field.name] = value
        return replace(RECIPES[self.optimizer], **overrides)


check_set = check_train_and_test
check_model = check_visible_patches


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, mean_per_class and chance, as fractions."""
    recipe = options.recipe
    train, test = train_test_features(model, images, recipe.features)
    task = ProbeTask(train, len(images.class_names()), options)

    # 1. Choose the setting that the recipe leaves open on a held-out tenth of train/.
    generator = torch.Generator().manual_seed(options.seed)
    is_held_out = torch.randperm(len(train), generator=generator) % HELD_OUT_INTERVAL == 0
    fit_indices = torch.nonzero(~is_held_out).flatten()
    held_out_indices = torch.nonzero(is_held_out).flatten()

    def held_out_accuracy(value: float) -> float:
        probe, description = task.fit_probe(fit_indices, value)
        top1 = probe_accuracies(probe, train, held_out_indices)["top1"]
        model.log(f"  {description}: {top1:.2%} of {len(held_out_indices)} held-out images")
        return top1

    model.log(f"{images.name}: a linear probe on {recipe.features} features of {len(train)} images")
    if options.optimizer != "lbfgs":
        rates = recipe.lr
        value = max(rates, key=held_out_accuracy) if len(rates) > 1 else rates[0]
    elif recipe.weight_decay is None:
        value = sweep_weight_decay(held_out_accuracy)
    else:
        value = recipe.weight_decay

    # 2. Train on all of train/, and test.
    probe, description = task.fit_probe(torch.arange(len(train)), value)
    model.log(f"  {description}, on all images")
    return probe_accuracies(probe, test, torch.arange(len(test)))


def sweep_weight_decay(accuracy: Callable[[float], float]) -> float:
    """Return the best of the SWEEP_STEPS + 1 weight decays, the largest if several are best.

    CLIP's search: seven values over the range, then steps around the best that are halved each
    time. accuracy(weight_decay): called at most once for each value.
    """
    step = SWEEP_STEPS // 6
    scores: dict[int, float] = {}
    candidates: Iterable[int] = range(SWEEP_STEPS, -1, -step)
    while step:
        for i in candidates:
            if 0 <= i <= SWEEP_STEPS and i not in scores:
                scores[i] = accuracy(sweep_value(i))
        step //= 2
        best = max(scores, key=lambda i: (scores[i], i))
        candidates = (best + step, best - step)
    return sweep_value(best)


def sweep_value(i: int) -> float:
    """Return weight decay i of the sweep."""
    return 10 ** (i / 8 - 6)


def probe_accuracies(probe: nn.Module, features: Features, indices: Tensor) -> dict[str, float]:
    """Return the probe's accuracies on these images; each rank classifies a share of them."""
    probe.eval()
    share = indices[rank() :: world_size()]
    dtype = next(probe.parameters()).dtype
    with torch.no_grad():
        chunks = [probe(feature_rows(features, chunk).to(dtype)) for chunk in share.split(CHUNK)]
        scores = torch.cat(chunks)
    return accuracies(scores, features.labels()[share])


def feature_rows(features: Features, indices: Tensor) -> Tensor:
    """Return the features of these images, (n, D) float32, on the device."""
    return to_device(features.rows(indices).flatten(1))


class ProbeTask:
    """The features and labels of a train split, on which classifiers of C classes are trained."""

    def __init__(self, train: Features, classes: int, options: Options):
        self.train = train
        self.classes = classes
        self.options = options
        self.recipe = options.recipe
        self.labels = to_device(train.labels())

    def fit_probe(self, indices: Tensor, value: float) -> tuple[nn.Module, str]:
        """Return a classifier trained on the images `indices`, and a description of the training.

        value: the weight decay of L-BFGS, or the learning rate of another optimizer.
        """
        width = feature_rows(self.train, indices[:1]).shape[1]
        linear = nn.utils.skip_init(nn.Linear, width, self.classes, device=device())
        # A generator of its own, so that an evaluation during training does not change the
        # training's random numbers.
        generator = torch.Generator().manual_seed(self.options.seed)
        with torch.no_grad():
            weight = torch.empty(linear.weight.shape).normal_(std=0.01, generator=generator)
            linear.weight.copy_(weight)
            linear.bias.zero_()
        norm = nn.Identity()
        if self.recipe.standardize:
            norm = NonAffineBatchNorm(width).to(device())
        probe = nn.Sequential(norm, linear)
        if self.options.optimizer == "lbfgs":
            return self.fit_lbfgs(probe, indices, value)
        return self.fit_minibatches(probe, indices, value)

    def fit_lbfgs(
        self, probe: nn.Sequential, indices: Tensor, weight_decay: float
    ) -> tuple[nn.Module, str]:
        """Train on all images at once with L-BFGS."""
        share = rank_share(indices)
        probe = probe.double()
        # Start from zeros: a component that the weights of all classes share does not affect the
        # loss, and would only decay slowly.
        nn.init.zeros_(probe[1].weight)
        x = feature_rows(self.train, share).double()
        if self.recipe.standardize:
            probe[0].momentum = 1.0  # the only batch is the whole training set
            x = probe[0](x)
        labels = self.labels[share]
        iterations = fit_regression(probe[1], x, labels, len(indices), weight_decay)
        return probe, f"weight decay {weight_decay:.3g}, {iterations} iterations"

    def fit_minibatches(
        self, probe: nn.Sequential, indices: Tensor, lr: float
    ) -> tuple[nn.Module, str]:
        """Train on mini-batches with LARS, SGD or AdamW."""
        recipe = self.recipe
        batch = self.options.batch or min(recipe.batch, max(len(indices) // MIN_STEPS, MIN_STEPS))
        batch = min(batch, len(indices))
        build_optimizer = OPTIMIZERS[self.options.optimizer]
        optimizer = build_optimizer(probe.parameters(), lr=lr, weight_decay=recipe.weight_decay)
        trainer = ReplicatedTrainer(probe, optimizer)

        def compute_loss(trainer: ReplicatedTrainer, samples: Tensor) -> Tensor:
            share = indices[rank_share(samples)]
            logits = trainer(feature_rows(self.train, share))
            losses = F.cross_entropy(logits, self.labels[share], reduction="none")
            return mean_loss(losses, batch)

        step_count = count_steps(len(indices), batch, recipe.epochs)
        batches = global_batches(len(indices), batch, recipe.epochs, self.options.seed)
        learning_rate = cosine_rate(lr, recipe.warmup / recipe.epochs)
        losses = fit(trainer, batches, compute_loss, learning_rate, step_count)
        return probe, f"lr {lr:.4g}, {step_count} steps of {batch}, loss {losses[-1]:.4f}"


class NonAffineBatchNorm(nn.Module):
    """Batch norm without affine parameters over the rows of all ranks, (b, D) -> (b, D).

    Ranks may have different numbers of rows. Evaluation uses running statistics. There is no
    gradient for the input, because the model that computes it is frozen; model/heads.py has a batch
    norm with a gradient.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6):
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        var = self.var
        if self.training:
            # One all-reduce for the sums and the number of rows.
            count = torch.full((1,), len(x), dtype=x.dtype, device=x.device)
            sums = torch.cat([x.sum(0), x.square().sum(0), count])
            sums = all_reduce_sum(sums.double())
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            var = (square - mean**2).clamp(min=0)
            self.mean.lerp_(mean.to(x.dtype), self.momentum)
            self.var.lerp_(var.to(x.dtype), self.momentum)
        return (x - mean.to(x.dtype)) * (var + self.eps).rsqrt().to(x.dtype)


def fit_regression(
    linear: nn.Linear, x: Tensor, labels: Tensor, count: int, weight_decay: float
) -> int:
    """Fit a logistic regression with L-BFGS and return the number of iterations.

    Minimizes the sum of cross-entropies + weight_decay / 2 * |W|^2 without decay of the bias, like
    scikit-learn's LogisticRegression(C=1/weight_decay). Every rank takes the same steps, because
    all of them compute with the same sums.

    x: (n, D) float64 and labels: (n,), this rank's share of `count` images.
    """
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(1, dtype=x.dtype, device=x.device)
        for x_chunk, labels_chunk in zip(x.split(CHUNK), labels.split(CHUNK)):
            chunk_loss = F.cross_entropy(linear(x_chunk), labels_chunk, reduction="sum")
            chunk_loss.backward()
            loss += chunk_loss.detach()
        # The mean loss over all ranks and its gradients, then the weight decay.
        W = linear.weight
        b = linear.bias
        sums = all_reduce_sum(torch.cat([loss, W.grad.flatten(), b.grad])) / count
        W.grad.copy_(sums[1 : 1 + W.numel()].view_as(W))
        W.grad.add_(W.detach(), alpha=weight_decay / count)
        b.grad.copy_(sums[1 + W.numel() :])
        return sums[0] + weight_decay / count / 2 * W.detach().square().sum()

    optimizer.step(closure)
    return optimizer.state[linear.weight]["n_iter"]
