"""Masks of images: a strategy scores every patch, and the patches with the highest scores stay.

    mask = parse_mask("gaussian(0.75, sigma=0.2)")   as written in a config
    keep = mask(noise, grid)                         (B, K) int64, ascending; K is equal for all

A mask is a pure function of uniform noise. The caller owns the random generator: the loader seeds
it with (seed, epoch, sample, view), so masks do not depend on ranks, workers or resuming.

Shapes: B images, grid = (rows, columns), L = rows * columns patches, K visible patches.

To add a strategy, write a class here, decorate it with @strategy("name"), and use that name in a
config (`mask: name(0.5)`). tests/data/test_masking.py then tests it, too.
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
    """Register a mask under the name that configs use, and make it a frozen dataclass."""

    def register(cls: type["Mask"]) -> type["Mask"]:
        STRATEGIES[name] = dataclass(frozen=True)(cls)
        return STRATEGIES[name]

    return register


@dataclass(frozen=True)
class Mask(ABC):
    """Base class of the strategies; the fields are the arguments in a config."""

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
        """Return K for L patches, rounded down as in FLIP (19 of 196 at 90 %).

        Raise ValueError if that is 0.
        """
        # round() first: 10 * (1 - 0.9) is 0.9999999999999998 in floating point, not 1.
        count = int(round(patches * (1 - self.ratio), 6))
        if count == 0:
            raise ValueError(
                f"mask: a ratio of {self.ratio} hides all {patches} patches; lower it, or use more"
                " patches"
            )
        return count

    @abstractmethod
    def score(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return scores (B, L); the patches with the highest scores stay visible."""

    def __call__(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the indices of the visible patches (B, K), ascending.

        noise: (B, L), uniform in [0, 1).
        """
        assert noise.shape[1] == grid[0] * grid[1], (
            f"noise has {noise.shape[1]} patches, but the grid is {grid[0]} x {grid[1]}"
        )
        # A stable sort breaks ties in favor of the earlier patch, on any device.
        order = self.score(noise, grid).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.visible_count(noise.shape[1])].sort(dim=1).values


@strategy("random")
class RandomMask(Mask):
    """Keep every patch with equal probability (FLIP, arXiv 2212.00794, section 3)."""

    def score(self, noise, grid):
        return noise


@dataclass(frozen=True)
class CenteredMask(Mask):
    """Base of GLIP's masks: a normal density around the image center, coordinates from -1 to 1.

    The paper calls `sigma` a standard deviation. Its released code, which produced the published
    results, uses the number as the VARIANCE, and so do we. `literal=True` follows the paper's text.
    """

    sigma: float = 0.2  # the variance of the density, not its standard deviation; > 0
    literal: bool = False  # True: sigma is the standard deviation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}; it must be a finite number above 0")

    def density(self, grid: tuple[int, int], noise: Tensor) -> Tensor:
        """Return the density at each patch (L,), on the device of the noise."""
        variance = self.sigma**2 if self.literal else self.sigma
        return normal_density(variance, tuple(grid)).to(noise)


@cache
def normal_density(variance: float, grid: tuple[int, int]) -> Tensor:
    """Return the normal density at each patch (L,).

    The outermost patches have coordinates -1 and 1, as in GLIP's released code.
    """
    # A single row or column is at the center.
    y, x = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in grid)
    squared_distance = y[:, None] ** 2 + x[None, :] ** 2
    return torch.exp(-squared_distance / (2 * variance)).flatten() / (2 * math.pi * variance)


@strategy("gaussian")
class GaussianMask(CenteredMask):
    """Prefer patches near the center (GLIP, arXiv 2403.15837, equation 2).

    The score is noise plus density, as in the released code.
    """

    # True: sample without replacement, with probabilities proportional to the density.
    gumbel: bool = False

    def score(self, noise, grid):
        density = self.density(grid, noise)
        if self.gumbel:
            # Gumbel top-k: -log(u) / w is exponentially distributed with rate w. The K smallest
            # of these times are K draws without replacement, with weights w.
            return noise.log() / density
        return noise + density


@strategy("inverse_gaussian")
class InverseGaussianMask(CenteredMask):
    """Prefer patches near the border, the control experiment of GLIP's table 7."""

    def score(self, noise, grid):
        return noise - self.density(grid, noise)


def complementary_masks(noise: Tensor, views: int) -> list[Tensor]:
    """Divide the patches of each image at random into `views` disjoint sets of visible patches.

    noise: (B, L), uniform in [0, 1). Each set is (B, K), ascending; if L does not divide by
    `views`, the K differ by one. Raise ValueError if there are fewer patches than views.
    """
    patches = noise.shape[1]
    if not 1 <= views <= patches:
        raise ValueError(f"--ensemble {views}: {patches} patches make 1 to {patches} views")
    order = noise.argsort(dim=1, stable=True)
    return [patch_set.sort(dim=1).values for patch_set in order.tensor_split(views, dim=1)]


def parse_mask(spec: str) -> Mask:
    """Parse a mask as written in a config: 'gaussian(0.5, sigma=0.1)'.

    'none' is a mask that hides nothing. Raise ValueError if the text is not a mask.
    """
    if spec == "none":
        return RandomMask(0.0)
    return build_strategy(spec, STRATEGIES, "mask", "random(0.5) or gaussian(0.5, sigma=0.2)")
