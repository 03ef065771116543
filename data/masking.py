"""Masks: a strategy scores every patch, and the best-scoring patches stay visible.

    mask = parse("gaussian(0.75, sigma=0.2)")    as a config writes it
    keep = mask(noise, grid)                     (B, K) int64, ascending; K is the same for all

A mask is a pure function of uniform noise: the caller has the random generator, so that a mask can
be a function of (seed, epoch, sample, view) and of nothing else.

Letters: B images, grid = (rows, columns), L = rows * columns patches, K visible patches.

To add a strategy, write a class here, decorated with @strategy, and name it in a config (`mask:
mine(0.5)`); tests/data/test_masking.py then holds it to the contract above.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from glimpse.data.spec import build_strategy

STRATEGIES: dict[str, type["Mask"]] = {}


def strategy(name: str) -> Callable[[type["Mask"]], type["Mask"]]:
    def register(cls: type["Mask"]) -> type["Mask"]:
        STRATEGIES[name] = dataclass(frozen=True)(cls)
        return STRATEGIES[name]

    return register


@dataclass(frozen=True)
class Mask(ABC):
    ratio: float  # the share of patches to hide, in [0, 1)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} is {value!r}; it must be True or False")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field.name} is {value!r}; it must be a number")
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio is {self.ratio}; it must be in [0, 1): the share of patches to hide"
            )

    def visible_count(self, patches: int) -> int:
        """K for L patches, rounded down as FLIP does (19 of 196 at 90 %)."""
        # 10 * (1 - 0.9) is 0.9999999999999998, and means 1
        count = int(round(patches * (1 - self.ratio), 6))
        if count == 0:
            raise ValueError(
                f"mask: a ratio of {self.ratio} hides all {patches} patches; lower it, or use more"
                " patches"
            )
        return count

    @abstractmethod
    def score(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L), the larger the likelier to stay."""

    def __call__(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """noise (B, L), uniform in [0, 1) -> keep (B, K)."""
        assert noise.shape[1] == grid[0] * grid[1], (
            f"noise for {noise.shape[1]} patches, but a grid of {grid[0]} x {grid[1]}"
        )
        # stable: a tie keeps the earlier patch, on any device
        order = self.score(noise, grid).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.visible_count(noise.shape[1])].sort(dim=1).values


@strategy("random")
class RandomMask(Mask):
    """FLIP (arXiv 2212.00794, section 3, image masking): every patch is as likely to stay as any
    other.
    """

    def score(self, noise, grid):
        return noise


@dataclass(frozen=True)
class CenteredMask(Mask):
    """A normal density around the image's center, on coordinates from -1 to 1 both ways (GLIP).

    The paper calls `sigma` a standard deviation; its released code, which gave the published
    results, uses the number as the VARIANCE, and so do we. `literal=True` follows the paper's
    wording.
    """

    sigma: float = 0.2  # the variance of the density, not its standard deviation; > 0
    literal: bool = False  # True: sigma is the standard deviation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}; it must be a finite number above 0")

    def density(self, grid: tuple[int, int], noise: Tensor) -> Tensor:
        """(L,), on the device of the noise."""
        variance = self.sigma**2 if self.literal else self.sigma
        return normal_density(variance, tuple(grid)).to(noise)


@cache
def normal_density(variance: float, grid: tuple[int, int]) -> Tensor:
    """The density (L,) at the patches; the outermost lie on the border itself, at -1 and 1, as in
    the released code.
    """
    y, x = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in grid)
    squared_distance = y[:, None] ** 2 + x[None, :] ** 2
    return torch.exp(-squared_distance / (2 * variance)).flatten() / (2 * math.pi * variance)


@strategy("gaussian")
class GaussianMask(CenteredMask):
    """GLIP (arXiv 2403.15837, equation 2): patches near the centre are likelier to stay.

    As released: noise plus density.
    """

    # True: draw one by one, with probability proportional to the density (Gumbel top-k)
    gumbel: bool = False

    def score(self, noise, grid):
        density = self.density(grid, noise)
        # -log(u) / w is an arrival time of rate w; the first K arrivals are K draws without
        # replacement, of weights w
        return noise.log() / density if self.gumbel else noise + density


@strategy("inverse_gaussian")
class InverseGaussianMask(CenteredMask):
    """GLIP's control experiment (its table 7): patches near the border are likelier to stay."""

    def score(self, noise, grid):
        return noise - self.density(grid, noise)


def complementary_masks(noise: Tensor, views: int) -> list[Tensor]:
    """noise (B, L) -> `views` keeps (B, K), ascending, that together hold every patch once; where L
    does not divide, K differ by one.
    """
    patches = noise.shape[1]
    if not 1 <= views <= patches:
        raise ValueError(f"--ensemble {views}: {patches} patches make 1 to {patches} views")
    order = noise.argsort(dim=1, stable=True)
    return [part.sort(dim=1).values for part in order.tensor_split(views, dim=1)]


def parse_mask(spec: str) -> Mask:
    """'gaussian(0.5, sigma=0.1)' -> Gaussian(ratio=0.5, sigma=0.1); 'none' -> a mask that hides
    nothing.
    """
    if spec == "none":
        return RandomMask(0.0)
    return build_strategy(spec, STRATEGIES, "mask", "random(0.5) or gaussian(0.5, sigma=0.2)")
