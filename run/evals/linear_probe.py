"""Linear probe: a linear classifier on frozen features of a set's train/, tested on its test/.

Four recipes, an optimizer each; features are those of the images as evaluation shows them, where
LARS and SGD of the papers see random crops and flips. What a recipe leaves open is chosen on a
held-out tenth of train/, and fitted again to the whole.

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
from glimpse.run.evals.features import KINDS, Features, check_splits, check_view, splits
from glimpse.run.evals.lars import LARS
from glimpse.run.evals.metrics import accuracies
from glimpse.run.evals.supervised import Replicated, cosine, fit, mean_loss, mine, order, steps
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import device, rank, to_device, total, world

ITERATIONS = 1000  # of L-BFGS
CHUNK = 4096  # rows that go through the classifier at once
# of an epoch, where a set allows them: smaller sets than the recipes were made for get smaller
# batches
STEPS = 64
HELD_OUT = 10  # one image in so many
MOST = 96  # weight decays of the sweep: 1e-6 x 10^(i / 8), i = 0 ... 96


@dataclass(frozen=True)
class Recipe:
    """What follows from the optimizer; an option of the same name overrides each."""

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
        check_choice("linear_probe(features=...)", self.recipe.features, KINDS)
        for name in ("lr", "epochs", "batch"):
            value = getattr(self, name)
            if value is not None and self.optimizer == "lbfgs":
                raise ValueError(
                    f"linear_probe({name}={value}): lbfgs has none; choose"
                    f" optimizer={', '.join(OPTIMIZERS)}"
                )
            if value is not None and not min(value if name == "lr" else [value], default=0) > 0:
                raise ValueError(f"linear_probe({name}={value}): it must be above 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"linear_probe(weight_decay={self.weight_decay}): it must be 0 or more"
            )

    @property
    def recipe(self) -> Recipe:
        given = {
            f.name: value
            for f in fields(Recipe)
            if (value := getattr(self, f.name, None)) is not None
        }
        return replace(RECIPES[self.optimizer], **given)


check, fits = check_splits, check_view


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """top1, mean_per_class and chance, as shares."""
    recipe = options.recipe
    train, test = splits(model, images, recipe.features)
    task = Task(train, len(images.classes()), options)
    held = (
        torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed)) % HELD_OUT
        == 0
    )
    most, few = torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()

    def tried(value: float) -> float:
        probe, how = task.fitted(most, value)
        found = scored(probe, train, few)["top1"]
        model.say(f"  {how}: {found:.2%} of {len(few)} held-out images")
        return found

    model.say(f"{images.name}: a linear probe on {recipe.features} features of {len(train)} images")
    if options.optimizer == "lbfgs":
        value = swept(tried) if recipe.weight_decay is None else recipe.weight_decay
    else:
        value = max(recipe.lr, key=tried) if len(recipe.lr) > 1 else recipe.lr[0]
    probe, how = task.fitted(torch.arange(len(train)), value)
    model.say(f"  {how}, on all images")
    return scored(probe, test, torch.arange(len(test)))


def swept(tried: Callable[[float], float]) -> float:
    """The best of the MOST + 1 weight decays, of equal ones the largest, by CLIP's search: seven
    over the range, then halving the steps.
    """
    step, found = MOST // 6, {}
    around: Iterable[int] = range(MOST, -1, -step)
    while step:
        for i in around:
            if 0 <= i <= MOST and i not in found:
                found[i] = tried(decay(i))
        step //= 2
        best = max(found, key=lambda i: (found[i], i))
        around = (best + step, best - step)
    return decay(best)


def decay(i: int) -> float:
    return 10 ** (i / 8 - 6)


def scored(probe: nn.Module, features: Features, indices: Tensor) -> dict[str, float]:
    """How many of these images the probe is right about; each rank asks it about a share of
    them.
    """
    probe.eval()
    share = indices[rank() :: world()]
    kind = next(probe.parameters()).dtype
    with torch.no_grad():
        scores = torch.cat([probe(rows(features, part).to(kind)) for part in share.split(CHUNK)])
    return accuracies(scores, features.labels()[share])


def rows(features: Features, indices: Tensor) -> Tensor:
    """(n, D) float32, on the device."""
    return to_device(features.rows(indices).flatten(1))


class Task:
    """The features of a train split, and how a classifier of C classes is fitted to some of
    them.
    """

    def __init__(self, train: Features, classes: int, options: Options):
        self.train, self.classes, self.options, self.recipe = (
            train,
            classes,
            options,
            options.recipe,
        )
        self.labels = to_device(train.labels())

    def fitted(self, indices: Tensor, value: float) -> tuple[nn.Module, str]:
        """A classifier of the images `indices`, with this weight decay or learning rate, and how it
        was made.
        """
        linear = nn.utils.skip_init(
            nn.Linear, rows(self.train, indices[:1]).shape[1], self.classes, device=device()
        )
        with torch.no_grad():  # drawn apart, so that an evaluation changes no draw of a training
            drawn = torch.empty(linear.weight.shape).normal_(
                std=0.01, generator=torch.Generator().manual_seed(self.options.seed)
            )
            linear.weight.copy_(drawn), linear.bias.zero_()
        norm = (
            BatchNorm(linear.in_features).to(device()) if self.recipe.standardize else nn.Identity()
        )
        fit_to = self.by_lbfgs if self.options.optimizer == "lbfgs" else self.by_steps
        return fit_to(nn.Sequential(norm, linear), indices, value)

    def by_lbfgs(
        self, probe: nn.Sequential, indices: Tensor, weight_decay: float
    ) -> tuple[nn.Module, str]:
        share, probe = mine(indices), probe.double()
        # what all classes' weights have in common makes no difference, and would go away slowly
        nn.init.zeros_(probe[1].weight)
        x = rows(self.train, share).double()
        if self.recipe.standardize:
            probe[0].momentum = 1.0  # the batch is the whole
            x = probe[0](x)
        iterations = regression(probe[1], x, self.labels[share], len(indices), weight_decay)
        return probe, f"weight decay {weight_decay:.3g}, {iterations} iterations"

    def by_steps(self, probe: nn.Sequential, indices: Tensor, lr: float) -> tuple[nn.Module, str]:
        recipe, seed = self.recipe, self.options.seed
        batch = self.options.batch or min(recipe.batch, max(len(indices) // STEPS, STEPS))
        batch = min(batch, len(indices))
        trainer = Replicated(
            probe,
            OPTIMIZERS[self.options.optimizer](
                probe.parameters(), lr=lr, weight_decay=recipe.weight_decay
            ),
        )

        def loss_of(trainer: Replicated, samples: Tensor) -> Tensor:
            share = indices[mine(samples)]
            return mean_loss(
                F.cross_entropy(
                    trainer(rows(self.train, share)), self.labels[share], reduction="none"
                ),
                batch,
            )

        count = steps(len(indices), batch, recipe.epochs)
        batches, rate = (
            order(len(indices), batch, recipe.epochs, seed),
            cosine(lr, recipe.warmup / recipe.epochs),
        )
        losses = fit(trainer, batches, loss_of, rate, count)
        return probe, f"lr {lr:.4g}, {count} steps of {batch}, loss {losses[-1]:.4f}"


class BatchNorm(nn.Module):
    """(b, D) -> (b, D): batch norm without affine over all ranks' rows, however many each has;
    running statistics for evaluation.

    Its input asks for no gradient, since what lies below is frozen (model/heads.py has one for what
    is not).
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            sums = total(
                torch.cat(
                    [
                        x.sum(0),
                        x.square().sum(0),
                        torch.full((1,), len(x), dtype=x.dtype, device=x.device),
                    ]
                ).double()
            )
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            var = (square - mean**2).clamp(min=0)
            (
                self.mean.lerp_(mean.to(x.dtype), self.momentum),
                self.var.lerp_(var.to(x.dtype), self.momentum),
            )
        return (x - mean.to(x.dtype)) * (var + self.eps).rsqrt().to(x.dtype)


def regression(
    linear: nn.Linear, x: Tensor, labels: Tensor, count: int, weight_decay: float
) -> int:
    """Fit to this rank's share x (n, D), labels (n,) of `count` images, all float64; how many
    iterations it took.

    The minimum of sum of cross entropies + weight_decay / 2 |W|^2, the bias free, as scikit-learn's
    LogisticRegression(C=1/weight_decay). Every rank takes the same steps, since all see the same
    sums.
    """
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(1, dtype=x.dtype, device=x.device)
        for part, numbers in zip(x.split(CHUNK), labels.split(CHUNK)):
            some = F.cross_entropy(linear(part), numbers, reduction="sum")
            some.backward()
            loss += some.detach()
        W, b = linear.weight, linear.bias
        sums = total(torch.cat([loss, W.grad.flatten(), b.grad])) / count
        W.grad.copy_(sums[1 : 1 + W.numel()].view_as(W)).add_(
            W.detach(), alpha=weight_decay / count
        )
        b.grad.copy_(sums[1 + W.numel() :])
        return sums[0] + weight_decay / count / 2 * W.detach().square().sum()

    optimizer.step(closure)
    return optimizer.state[linear.weight]["n_iter"]
