"""Which patches the vision tower sees: a strategy scores every patch, and the best-scoring patches
stay visible.

    mask = parse("gaussian(0.75, sigma=0.2)")
        # as a config writes it
    keep = mask(noise, grid)
        # (B, K) int64, ascending; K is the same for all images

A mask is a pure function of uniform noise: whoever calls owns the random generator, so that a mask
can be a function of
(seed, epoch, sample, view) and of nothing else.
Letters: B images, grid = (rows, columns), L = rows * columns patches, K visible patches.
To add a strategy, write one class here, decorated with @strategy, and name it in a config (`mask:
mine(0.5)`);
tests/data/test_masking.py then holds it to the contract above.
"""

import ast
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache

import torch
from torch import Tensor

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
            fits = (
                isinstance(value, bool)
                if field.type is bool
                else isinstance(value, int | float) and not isinstance(value, bool)
            )
            if not fits:
                raise ValueError(
                    f"{field.name} is {value!r}; it must be"
                    f" {'True or False' if field.type is bool else 'a number'}"
                )
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio is {self.ratio}; it must be in [0, 1): the share of patches to hide"
            )

    def visible(self, patches: int) -> int:
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
        return order[:, : self.visible(noise.shape[1])].sort(dim=1).values


@strategy("random")
class Random(Mask):
    """FLIP (arXiv 2212.00794, section 3, image masking): every patch is as likely to stay as any
    other.
    """

    def score(self, noise, grid):
        return noise


@dataclass(frozen=True)
class Centred(Mask):
    """What GLIP's strategies share: a normal density around the image's centre, on coordinates from
    -1 to 1 both ways.

    The paper calls `sigma` a standard deviation; its released code, which gave the published
    results, uses the number as
    the VARIANCE, and so do we. `literal=True` follows the paper's wording.
    """

    sigma: float = 0.2  # the variance of the density, not its standard deviation; > 0
    literal: bool = False  # True: sigma is the standard deviation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}; it must be a finite number above 0")

    def density(self, grid: tuple[int, int], noise: Tensor) -> Tensor:
        """(L,), on the device of the noise."""
        return normal_density(self.sigma**2 if self.literal else self.sigma, tuple(grid)).to(noise)


@cache
def normal_density(variance: float, grid: tuple[int, int]) -> Tensor:
    """(L,) at the patches; the outermost lie on the border itself, at -1 and 1, as in the released
    code.
    """
    y, x = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in grid)
    return torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * variance)).flatten() / (
        2 * math.pi * variance
    )


@strategy("gaussian")
class Gaussian(Centred):
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
class InverseGaussian(Centred):
    """GLIP's control experiment (its table 7): patches near the border are likelier to stay."""

    def score(self, noise, grid):
        return noise - self.density(grid, noise)


def complementary(noise: Tensor, views: int) -> list[Tensor]:
    """noise (B, L) -> `views` keeps (B, K), ascending, that together hold every patch once; where L
    does not divide, K differ by one.
    """
    if not 1 <= views <= noise.shape[1]:
        raise ValueError(
            f"--ensemble {views}: {noise.shape[1]} patches make 1 to {noise.shape[1]} views"
        )
    return [
        part.sort(dim=1).values
        for part in noise.argsort(dim=1, stable=True).tensor_split(views, dim=1)
    ]


def parse(spec: str) -> Mask:
    """'gaussian(0.5, sigma=0.1)' -> Gaussian(ratio=0.5, sigma=0.1); 'none' -> a mask that hides
    nothing.
    """
    return (
        Random(0.0)
        if spec == "none"
        else named(spec, STRATEGIES, "mask", "random(0.5) or gaussian(0.5, sigma=0.2)")
    )


def named(spec: str, strategies: dict[str, type], key: str, form: str):
    """The strategy that a spec names, made of the arguments in it; `key` and `form` are for
    messages.
    """
    try:
        call = ast.parse(spec, mode="eval").body
        name = (call.func if isinstance(call, ast.Call) else call).id
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise ValueError(f"{key} {spec!r} cannot be read; write it as none, {form}") from None
    if name not in strategies:
        raise ValueError(f"{key} {spec!r}: {unknown(name, strategies)}")
    signature = inspect.signature(strategies[name]).replace(
        return_annotation=inspect.Signature.empty
    )
    try:
        args, options = arguments(call)
        signature.bind(*args, **options)
        return strategies[name](*args, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} {spec!r}: {error}; {name} takes {signature}") from None


def unknown(name: str, strategies: dict[str, type]) -> str:
    if name == "none":
        return "none takes no arguments"
    near = get_close_matches(name, [*strategies, "none"], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown strategy {name!r}; known: {', '.join(sorted([*strategies, 'none']))}{hint}"


def arguments(call: ast.expr) -> tuple[list, dict]:
    args, keywords = (call.args, call.keywords) if isinstance(call, ast.Call) else ([], [])
    names = [keyword.arg for keyword in keywords]
    if None in names or len(set(names)) < len(names):
        raise ValueError("name each option once")
    try:
        return [ast.literal_eval(arg) for arg in args], {
            keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords
        }
    except ValueError:
        raise ValueError("arguments must be plain values, such as 0.5 or True") from None
