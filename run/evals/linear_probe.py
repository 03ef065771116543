"""Linear probe: a linear classifier on frozen features of a set's train/, tested on its test/.

There are four recipes, one per optimizer. Features are computed once, without augmentation, where
LARS and SGD of the papers see random crops and flips. A setting that a recipe leaves open is chosen
on a held-out tenth of train/, and the classifier is then fitted again to all of train/.

    lbfgs   CLIP (arXiv 2103.00020, section 3.2 and appendix A.3): at most 1,000 iterations; the
            weight decay is swept
    lars    MaskCLIP's (arXiv 2208.12262, appendix) and MAE's: batch norm without affine below the
            linear layer, wide batches
    sgd     SLIP's and A-CLIP's main_linear.py: no norm; the learning rate is swept, from the
            0.00625 that their code comes to on 8 GPUs
    adamw   CLIP_benchmark's, which GLIP reports: unit embeddings

Names: N images, n of them on this rank, D width, C classes.
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
CHUNK = 4096  # rows that go through the classifier at once
# steps of an epoch that a set should have: sets smaller than those of the recipes get smaller
# batches
MIN_STEPS = 64
HELD_OUT_INTERVAL = 10  # one image in ten
SWEEP_STEPS = 96  # weight decays of the sweep: 1e-6 x 10^(i / 8), i = 0 ... 96


@dataclass(frozen=True)
class Recipe:
    """The settings that the optimizer determines; an option of the same name overrides each."""

    features: str = "pooled"  # of features.KINDS
    standardize: bool = False  # batch norm without affine below the linear layer
    lr: tuple[float, ...] = ()  # the peak; of several, the best on held-out images
    epochs: float = 0
    warmup: float = 0  # epochs
    batch: int = 0  # of all ranks
    # None: swept.  Of L-BFGS: lambda of sum of losses + lambda / 2 |W|^2, scikit-learn's 1 / C
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
    optimizer: str = "lbfgs"
    seed: int = 0  # of the order of batches, and of what is held out
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
                    f"linear_probe({name}={value}): lbfgs has none; choose"
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
        overrides = {}
        for field in fields(Recipe):
            value = getattr(self, field.name, None)
            if value is not None:
                overrides[field.name] = value
        return replace(RECIPES[self.optimizer], **overrides)


check_set = check_train_and_test
check_model = check_visible_patches


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return top1, mean_per_class and chance, as shares."""
    recipe = options.recipe
    train, test = train_test_features(model, images, recipe.features)
    task = ProbeTask(train, len(images.class_names()), options)

    # Hold out a tenth of train/ to choose the setting that the recipe leaves open.
    generator = torch.Generator().manual_seed(options.seed)
    is_held_out = torch.randperm(len(train), generator=generator) % HELD_OUT_INTERVAL == 0
    fitting = torch.nonzero(~is_held_out).flatten()
    held_out = torch.nonzero(is_held_out).flatten()

    def tried(value: float) -> float:
        probe, how = task.fitted(fitting, value)
        top1 = test_accuracies(probe, train, held_out)["top1"]
        model.log(f"  {how}: {top1:.2%} of {len(held_out)} held-out images")
        return top1

    model.log(f"{images.name}: a linear probe on {recipe.features} features of {len(train)} images")
    if options.optimizer == "lbfgs":
        value = sweep_weight_decay(tried) if recipe.weight_decay is None else recipe.weight_decay
    else:
        value = max(recipe.lr, key=tried) if len(recipe.lr) > 1 else recipe.lr[0]

    # Fit again, to all training images.
    probe, how = task.fitted(torch.arange(len(train)), value)
    model.log(f"  {how}, on all images")
    return test_accuracies(probe, test, torch.arange(len(test)))


def sweep_weight_decay(tried: Callable[[float], float]) -> float:
    """Return the best of the MOST + 1 weight decays, of equal ones the largest.

    CLIP's search: seven values over the range, then halving the steps around the best.
    """
    step = SWEEP_STEPS // 6
    scores: dict[int, float] = {}
    around: Iterable[int] = range(SWEEP_STEPS, -1, -step)
    while step:
        for i in around:
            if 0 <= i <= SWEEP_STEPS and i not in scores:
                scores[i] = tried(sweep_value(i))
        step //= 2
        best = max(scores, key=lambda i: (scores[i], i))
        around = (best + step, best - step)
    return sweep_value(best)


def sweep_value(i: int) -> float:
    return 10 ** (i / 8 - 6)


def test_accuracies(probe: nn.Module, features: Features, indices: Tensor) -> dict[str, float]:
    """Return the probe's accuracies on these images; each rank computes a share of them."""
    probe.eval()
    share = indices[rank() :: world_size()]
    dtype = next(probe.parameters()).dtype
    with torch.no_grad():
        chunks = [probe(feature_rows(features, part).to(dtype)) for part in share.split(CHUNK)]
        scores = torch.cat(chunks)
    return accuracies(scores, features.labels()[share])


def feature_rows(features: Features, indices: Tensor) -> Tensor:
    """Return the features at indices, (n, D) float32, on the device."""
    return to_device(features.rows(indices).flatten(1))


class ProbeTask:
    """The features of a train split, to some of which a classifier of C classes is fitted."""

    def __init__(self, train: Features, classes: int, options: Options):
        self.train = train
        self.classes = classes
        self.options = options
        self.recipe = options.recipe
        self.labels = to_device(train.labels())

    def fitted(self, indices: Tensor, value: float) -> tuple[nn.Module, str]:
        """Return a classifier fitted to the images `indices`, and a description of the fit.

        value: the weight decay of L-BFGS, the learning rate of the others.
        """
        width = feature_rows(self.train, indices[:1]).shape[1]
        linear = nn.utils.skip_init(nn.Linear, width, self.classes, device=device())
        # its own generator, so that an evaluation during training does not change the training
        generator = torch.Generator().manual_seed(self.options.seed)
        with torch.no_grad():
            weight = torch.empty(linear.weight.shape).normal_(std=0.01, generator=generator)
            linear.weight.copy_(weight)
            linear.bias.zero_()
        norm = NonAffineBatchNorm(width).to(device()) if self.recipe.standardize else nn.Identity()
        fit_to = self.by_lbfgs if self.options.optimizer == "lbfgs" else self.by_steps
        return fit_to(nn.Sequential(norm, linear), indices, value)

    def by_lbfgs(
        self, probe: nn.Sequential, indices: Tensor, weight_decay: float
    ) -> tuple[nn.Module, str]:
        share = rank_share(indices)
        probe = probe.double()
        # a component that all classes' weights share has no effect on the loss, and decays slowly
        nn.init.zeros_(probe[1].weight)
        x = feature_rows(self.train, share).double()
        if self.recipe.standardize:
            probe[0].momentum = 1.0  # the batch is the whole training set
            x = probe[0](x)
        iterations = fit_regression(probe[1], x, self.labels[share], len(indices), weight_decay)
        return probe, f"weight decay {weight_decay:.3g}, {iterations} iterations"

    def by_steps(self, probe: nn.Sequential, indices: Tensor, lr: float) -> tuple[nn.Module, str]:
        recipe = self.recipe
        batch = self.options.batch or min(recipe.batch, max(len(indices) // MIN_STEPS, MIN_STEPS))
        batch = min(batch, len(indices))
        build = OPTIMIZERS[self.options.optimizer]
        optimizer = build(probe.parameters(), lr=lr, weight_decay=recipe.weight_decay)
        trainer = ReplicatedTrainer(probe, optimizer)

        def loss_of(trainer: ReplicatedTrainer, samples: Tensor) -> Tensor:
            share = indices[rank_share(samples)]
            logits = trainer(feature_rows(self.train, share))
            losses = F.cross_entropy(logits, self.labels[share], reduction="none")
            return mean_loss(losses, batch)

        count = count_steps(len(indices), batch, recipe.epochs)
        batches = global_batches(len(indices), batch, recipe.epochs, self.options.seed)
        rate = cosine_rate(lr, recipe.warmup / recipe.epochs)
        losses = fit(trainer, batches, loss_of, rate, count)
        return probe, f"lr {lr:.4g}, {count} steps of {batch}, loss {losses[-1]:.4f}"


class NonAffineBatchNorm(nn.Module):
    """Batch norm (b, D) -> (b, D) without affine, over all ranks' rows, however many each has.

    Evaluation uses running statistics. The input needs no gradient, since the model below is frozen
    (model/heads.py has a batch norm with one).
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
            # one all-reduce for the sums and the number of rows
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
    """Fit a logistic regression and return the number of iterations.

    This rank has the share x (n, D), labels (n,) of `count` images, all float64. The minimum is of
    the sum of cross-entropies + weight_decay / 2 |W|^2, the bias free, as scikit-learn's
    LogisticRegression(C=1/weight_decay). Every rank takes the same steps, since all have the same
    sums.
    """
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(1, dtype=x.dtype, device=x.device)
        for part, numbers in zip(x.split(CHUNK), labels.split(CHUNK)):
            part_loss = F.cross_entropy(linear(part), numbers, reduction="sum")
            part_loss.backward()
            loss += part_loss.detach()
        # the mean loss and its gradients over all ranks, then the weight decay
        W = linear.weight
        b = linear.bias
        sums = all_reduce_sum(torch.cat([loss, W.grad.flatten(), b.grad])) / count
        W.grad.copy_(sums[1 : 1 + W.numel()].view_as(W))
        W.grad.add_(W.detach(), alpha=weight_decay / count)
        b.grad.copy_(sums[1 + W.numel() :])
        return sums[0] + weight_decay / count / 2 * W.detach().square().sum()

    optimizer.step(closure)
    return optimizer.state[linear.weight]["n_iter"]
