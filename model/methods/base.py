"""Contract between a training run and a method, the losses of a paper.

A method is an nn.Module that turns a micro-batch into features and features into a loss:

    forward(part) -> features           {name: tensor}: everything that depends on parameters, made
                                        inside the towers' own forwards
    loss(features) -> (loss, metrics)   a function of the features of the whole batch on this rank,
                                        and of the other ranks'

A new method needs these two. The cut between them is what lets accumulation keep the negatives of
the whole batch (GradCache): features without a graph for all micro-batches, the loss and its
gradient in the features once, then one micro-batch after another again with a graph. Each row of a
feature belongs to one sample, except those named in `shared`, which every micro-batch computes
alike (the temperature).

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
    """One view of the samples of a micro-batch, as data/loader.py makes it."""

    patches: Tensor  # (B, K, 3 P P) uint8
    positions: Tensor  # (B, K) int16
    box: NotRequired[Tensor]  # (B, 4): where one view encloses others
    hidden: NotRequired[Tensor]  # (B, L - K, 3 P P): for methods that name the view in `hidden`
    hidden_positions: NotRequired[Tensor]  # (B, L - K)
    noise: NotRequired[Tensor]  # (B, L): for methods that name the view in `noise`


class TextBatch(TypedDict):
    """Captions of a micro-batch, end to end."""

    ids: Tensor  # (T,) int32
    lengths: Tensor  # (B,) int32
    longest: int
    positions: NotRequired[Tensor]  # (T,)


class MicroBatch(TypedDict):
    """Views and captions, the part of a batch that a method reads."""

    views: dict[str, ViewBatch]
    text: TextBatch


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


class Method(nn.Module, ABC):
    """Towers, and the facts on a method that a run needs: its options, views and teacher."""

    Options: type = NoOptions  # what the config's `options:` may hold
    # the views that it reads, and how many of each it can use
    allowed_view_counts: dict[str, tuple[int, ...]] = {"image": (1,)}
    hidden_patch_views: tuple[str, ...] = ()  # views whose hidden patches it reads, as targets
    # views whose visible patches it chooses itself, with uniform noise of the data path
    noise_views: tuple[str, ...] = ()
    enclosing_views: tuple[str, ...] = ()  # views around others, of which it reads the boxes
    shared_features: tuple[str, ...] = ("scale",)

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__()
        self.cfg, self.options = cfg, options
        self.towers = Towers(cfg, vocab, context)

    @staticmethod
    def check_options(options, cfg: ModelConfig, counts: Mapping[str, int]) -> None:
        """Raise ValueError if the options do not go with the model or the number of draws.

        counts: draws of each view.
        """

    def teacher_checkpoint(self) -> dict[str, str]:
        """Return {prefix of parameters: the run whose towers they start from}.

        For example {"teacher.": "runs/clip"}.
        """
        return {}

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (teacher, student) pairs of modules that are built alike.

        The teacher follows the student as a moving average (class Averaging).
        """
        return []

    def eval_towers(self, weights: str = "student") -> Towers:
        """Return the towers that evaluations see.

        They are the student's; for other weights, moving averages replace the modules that they
        average.
        """
        if weights == "student":
            return self.towers
        if not self.ema_pairs():
            raise ValueError(f"--weights {weights}: this run was trained without a moving average")
        towers = replace_submodules(
            self.towers, {student: teacher for teacher, student in self.ema_pairs()}
        )
        assert isinstance(towers, Towers)
        return towers

    def pool_views(self, views: Sequence[ViewBatch]) -> list[Tensor]:
        """Return the pooled features (B, D) of each view.

        If all views have the same number of patches, they pass through the tower together.
        """
        patches = [view["patches"] for view in views]
        positions = [view["positions"] for view in views]
        if len({x.shape[1:] for x in patches}) == 1:
            features = self.towers.image_features(torch.cat(patches), torch.cat(positions))
            return list(features.chunk(len(views)))
        return [self.towers.image_features(x, at) for x, at in zip(patches, positions)]

    def pair_features(self, pooled: Tensor, text: TextBatch) -> dict[str, Tensor]:
        """Return the unit embeddings image and text (B, E), and scale (1,).

        pooled: images (B, D).
        """
        return dict(
            image=self.towers.embed_image(pooled),
            text=self.towers.encode_text(**text),
            scale=self.towers.temperature(),
        )

    def momentum(self, progress: float) -> float:
        """Return the share of itself that a teacher keeps in a step; see Averaging.

        progress: of the run, 0 to 1.
        """
        raise TypeError(f"{type(self).__name__} has no moving average")

    @abstractmethod
    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Return the features of a micro-batch."""

    @abstractmethod
    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss (), metrics to log) for the features of the whole batch on this rank."""


class EmaMethod(Method):
    """Method with a teacher that is a moving average."""

    @abstractmethod
    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the pairs of Method.averaged; none if the options ask for another teacher."""

    @abstractmethod
    def momentum(self, progress: float) -> float:
        """Return the share of itself that the teacher keeps in a step.

        progress: of the run, 0 to 1.
        """


def replace_submodules(module: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return the module with `others` in the place of some below it.

    It shares everything else with the original, which stays as it is.
    """
    if module in others:
        return others[module]
    below = {
        name: child and replace_submodules(child, others) for name, child in module._modules.items()
    }
    if all(below[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin._modules = below
    return twin


def require_at_least(least: float, **options: float) -> None:
    """Raise ValueError naming the first option that is less."""
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"options.{name} {value}: it must be at least {least}")


def require_above(bound: float, **options: float) -> None:
    """Raise ValueError naming the first option that is not more."""
    for name, value in options.items():
        if not value > bound:
            raise ValueError(f"options.{name} {value}: it must be above {bound}")


def all_patches(view: ViewBatch) -> tuple[Tensor, Tensor]:
    """Return all patches (B, L, 3 P P) of a masked view and their positions (B, L).

    The visible ones come first, then the hidden ones.
    """
    patches = torch.cat([view["patches"], view["hidden"]], dim=1)
    positions = torch.cat([view["positions"], view["hidden_positions"]], dim=1)
    return patches, positions
