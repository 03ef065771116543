"""Interface between a training run and a method, that is, the model and losses of a paper.

A method is an nn.Module with two functions:

    forward(micro_batch) -> features    {name: tensor}. All uses of parameters happen here, in the
                                        forward of towers and heads; loss() may use none, because
                                        ZeRO-3 gathers a parameter only in its module's forward
    loss(features) -> (loss, metrics)   a function of the features of this rank's whole batch and of
                                        the features of other ranks

The split between the two allows gradient accumulation with the negatives of the whole batch
(GradCache): first the features of all micro-batches without a graph, then the loss and its gradient
with respect to the features, then each micro-batch again with a graph. A row of a feature belongs
to one sample, except for features named in `shared_features`, which are the same for every
micro-batch (the temperature).

Letters: B samples, L patches of the grid, K visible patches, T tokens.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from glimpse.model.towers import ModelConfig, Towers


class ViewBatch(TypedDict):
    """One view of the samples of a micro-batch; data/loader.py creates it."""

    patches: Tensor  # (B, K, 3 P P) uint8, the visible patches
    positions: Tensor  # (B, K) int16, their indices in the grid
    box: NotRequired[Tensor]  # (B, 4), if a view encloses others
    hidden: NotRequired[Tensor]  # (B, L - K, 3 P P), the masked patches; see hidden_patch_views
    hidden_positions: NotRequired[Tensor]  # (B, L - K)
    noise: NotRequired[Tensor]  # (B, L), uniform; see noise_views


class TextBatch(TypedDict):
    """Captions of a micro-batch, end to end."""

    ids: Tensor  # (T,) int32
    lengths: Tensor  # (B,) int32
    longest: int
    positions: NotRequired[Tensor]  # (T,)


class MicroBatch(TypedDict):
    """The part of a micro-batch that methods read: views and captions."""

    views: dict[str, ViewBatch]
    text: TextBatch


@dataclass(frozen=True)
class NoOptions:
    """Options of a method without options."""


class Method(nn.Module, ABC):
    """Base class of methods: the towers, and what a run must know about the method.

    The config check and the loader read the class attributes.
    """

    # Dataclass of the config's section `options:`.
    Options: type = NoOptions
    # {view name: allowed values of its `count`}, for all views that the method reads.
    allowed_view_counts: dict[str, tuple[int, ...]] = {"image": (1,)}
    # Views whose masked patches are loaded too, as targets.
    hidden_patch_views: tuple[str, ...] = ()
    # Views without a mask, loaded with uniform noise: the method selects their patches.
    noise_views: tuple[str, ...] = ()
    # Views that enclose other views; all boxes are loaded.
    enclosing_views: tuple[str, ...] = ()
    # Features that do not have one row per sample.
    shared_features: tuple[str, ...] = ("scale",)

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__()
        self.cfg, self.options = cfg, options
        self.towers = Towers(cfg, vocab, context)

    @staticmethod
    def check_options(options, cfg: ModelConfig, counts: Mapping[str, int]) -> None:
        """Raise ValueError if the options do not fit the model or the views.

        counts: {view name: its `count`}.
        """

    def teacher_checkpoint(self) -> dict[str, str]:
        """Return {parameter prefix: run folder} for parameters that start from another run.

        For example {"teacher.": "runs/clip"}.
        """
        return {}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (teacher, student) modules with the same parameters.

        The teacher's are a moving average of the student's (class EmaMethod).
        """
        return []

    def eval_towers(self, weights: str = "student") -> Towers:
        """Return the towers for evaluation.

        weights: 'student', or another value for the moving averages, in modules that have one.
        """
        if weights == "student":
            return self.towers
        if not self.ema_pairs():
            raise ValueError(
                f"--weights: {weights} is not available, because this run was trained without a"
                " moving average; use student"
            )
        teacher_of = {student: teacher for teacher, student in self.ema_pairs()}
        towers = replace_submodules(self.towers, teacher_of)
        assert isinstance(towers, Towers)
        return towers

    def pool_views(self, views: Sequence[ViewBatch]) -> list[Tensor]:
        """Return the pooled features (B, D) of each view.

        Views with the same number of patches go through the tower in one batch.
        """
        patches = [view["patches"] for view in views]
        positions = [view["positions"] for view in views]
        if len({x.shape[1:] for x in patches}) == 1:
            features = self.towers.image_features(torch.cat(patches), torch.cat(positions))
            return list(features.chunk(len(views)))
        return [self.towers.image_features(x, at) for x, at in zip(patches, positions)]

    def pair_features(self, pooled: Tensor, text: TextBatch) -> dict[str, Tensor]:
        """Return the features of the contrastive loss: image and text (B, E), scale (1,).

        pooled: pooled tokens of the images, (B, D).
        """
        return dict(
            image=self.towers.embed_image(pooled),
            text=self.towers.encode_text(**text),
            scale=self.towers.temperature(),
        )

    def momentum(self, progress: float) -> float:
        """Return the momentum of the moving average; see EmaMethod."""
        raise TypeError(f"{type(self).__name__} has no moving average")

    @abstractmethod
    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Return the features of a micro-batch."""

    @abstractmethod
    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss (), metrics to log) for the features of this rank's whole batch."""


class EmaMethod(Method):
    """Method with a teacher that is a moving average of the student."""

    @abstractmethod
    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the pairs as in Method; none if the options select another kind of teacher."""

    @abstractmethod
    def momentum(self, progress: float) -> float:
        """Return the momentum of a step: average = momentum * average + (1 - momentum) * student.

        progress: the fraction of the run that is done.
        """


def replace_submodules(module: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of the module in which some submodules are replaced; others: {old: new}.

    The copy shares all other submodules with the original, which does not change.
    """
    if module in others:
        return others[module]
    children = {
        name: child and replace_submodules(child, others) for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    clone = copy.copy(module)
    clone._modules = children
    return clone


def require_at_least(minimum: float, **options: float) -> None:
    """Raise ValueError for the first option below the minimum."""
    for name, value in options.items():
        if not value >= minimum:
            raise ValueError(f"options.{name}: {value}; it must be at least {minimum}")


def require_above(bound: float, **options: float) -> None:
    """Raise ValueError for the first option that is not greater than the bound."""
    for name, value in options.items():
        if not value > bound:
            raise ValueError(f"options.{name}: {value}; it must be above {bound}")


def all_patches(view: ViewBatch) -> tuple[Tensor, Tensor]:
    """Return all patches (B, L, 3 P P) of a masked view and their positions (B, L).

    The visible patches come first, then the masked ones.
    """
    patches = torch.cat([view["patches"], view["hidden"]], dim=1)
    positions = torch.cat([view["positions"], view["hidden_positions"]], dim=1)
    return patches, positions
