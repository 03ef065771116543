"""What every method is: the contract between a training run and the losses of a paper. Letters: B
samples, K visible patches.

A method is an nn.Module that turns a batch into features and features into a loss:

    forward(part) -> features           {name: tensor}: everything that depends on parameters, made
                                        inside the towers' own forwards
    loss(features) -> (loss, metrics)   a function of the features of the whole batch on this rank,
                                        and of the other ranks'

The cut between the two is what lets accumulation keep the negatives of the whole batch (GradCache):
features without a graph for all
parts, the loss and its gradient in the features once, then part after part again with a graph. Each
row of a feature belongs to one sample, except those named in `shared`, which every part computes
alike (the temperature).
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glimpse.model.towers import ModelConfig, Towers


@dataclass(frozen=True)
class Nothing:
    """The options of a method that has none."""


class Method(nn.Module, ABC):
    """The towers and what a method tells the rest: its options, the views that it reads, its
    teacher.
    """

    Options: type = Nothing  # what the config's `options:` may hold
    # the views that it reads, and how many of each it can use
    views: dict[str, tuple[int, ...]] = {"image": (1,)}
    hidden: tuple[str, ...] = ()  # views whose hidden patches it reads, as targets
    # views whose visible patches it chooses itself, with uniform noise of the data path
    noise: tuple[str, ...] = ()
    enclosing: tuple[str, ...] = ()  # views around others, of which it reads the boxes
    shared: tuple[str, ...] = ("scale",)

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__()
        self.cfg, self.options = cfg, options
        self.towers = Towers(cfg, vocab, context)

    @staticmethod
    def check(options, cfg: ModelConfig, counts: dict[str, int]) -> None:
        """ValueError where the options do not go with the model, or with so many draws of each
        view.
        """

    def borrowed(self) -> dict[str, str]:
        """{prefix of parameters: the run whose towers they are taken from, at the start}, e.g.

        {"teacher.": "runs/clip"}.
        """
        return {}

    def averaged(self) -> list[tuple[nn.Module, nn.Module]]:
        """(teacher, student): modules built alike, of which the first follows the second as a
        moving average (class Averaging).
        """
        return []

    def shown(self, weights: str = "student") -> Towers:
        """The towers as evaluations see them: the student's, or with the moving averages in the
        place of what they average.
        """
        if weights == "student":
            return self.towers
        if not self.averaged():
            raise ValueError(f"--weights {weights}: this run was trained without a moving average")
        return swapped(self.towers, {student: teacher for teacher, student in self.averaged()})

    def pooled(self, views: list[dict]) -> list[Tensor]:
        """Pooled features (B, D) of each view; in one pass through the tower where all show as many
        patches.
        """
        columns = [[view[key] for view in views] for key in ("patches", "positions")]
        if len({patches.shape[1:] for patches in columns[0]}) > 1:
            return [
                self.towers.image_features(view["patches"], view["positions"]) for view in views
            ]
        return list(self.towers.image_features(*map(torch.cat, columns)).chunk(len(views)))

    @abstractmethod
    def forward(self, part: dict) -> dict[str, Tensor]:
        """A part of a batch (data/loader.py) -> features."""

    @abstractmethod
    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of the whole batch on this rank -> (loss (), what to log)."""


class Averaging(Method):
    """A method with a teacher that is a moving average."""

    @abstractmethod
    def averaged(self) -> list[tuple[nn.Module, nn.Module]]:
        """See Method.averaged; none, where the options ask for another teacher."""

    @abstractmethod
    def momentum(self, progress: float) -> float:
        """The share of itself that the teacher keeps in a step, at `progress` (0 to 1) of the
        run.
        """


def swapped(module: nn.Module, others: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with others in the place of some below it; it shares everything else with the
    original, which stays as it is.
    """
    if module in others:
        return others[module]
    below = {name: child and swapped(child, others) for name, child in module._modules.items()}
    if all(below[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin._modules = below
    return twin


def at_least(least: float, **options: float) -> None:
    """ValueError naming the first option that is less."""
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"options.{name} {value}: it must be at least {least}")


def above(bound: float, **options: float) -> None:
    """ValueError naming the first option that is not more."""
    for name, value in options.items():
        if not value > bound:
            raise ValueError(f"options.{name} {value}: it must be above {bound}")


def whole(view: dict) -> tuple[Tensor, Tensor]:
    """All patches (B, L, 3 P P) of a masked view and their positions (B, L): the visible ones, then
    the hidden.
    """
    return torch.cat([view["patches"], view["hidden"]], dim=1), torch.cat(
        [view["positions"], view["hidden_positions"]], dim=1
    )
