"""Masks: every strategy fulfills the contract of data/masking.py.

The rates at which GLIP's masks keep patches are those of its released code, and invalid specs are
refused with a message about valid ones.
"""

import numpy as np
import pytest
import torch

from glimpse.data.masking import (
    STRATEGIES,
    GaussianMask,
    InverseGaussianMask,
    Mask,
    RandomMask,
    normal_density,
    parse_mask,
)

GRIDS = [(14, 14), (16, 16), (3, 11), (1, 8)]


def uniform(images, grid, seed=0):
    """Uniform noise (images, patches), like the loader's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, grid[0] * grid[1], generator=generator)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0, 0.5, 0.75, 0.8])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_contract(name, ratio, grid):
    patches = grid[0] * grid[1]
    mask = parse_mask(f"{name}({ratio})")
    noise = uniform(64, grid)
    before = noise.clone()

    keep = mask(noise, grid)

    assert keep.shape == (64, mask.visible_count(patches))
    assert keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all(), "ascending, so no patch twice"
    assert keep.min() >= 0
    assert keep.max() < patches
    assert torch.equal(noise, before), "the noise is not modified"
    assert torch.equal(keep, mask(noise, grid)), "the mask is a function of the noise"
    single = mask(noise[5:6], grid)
    assert torch.equal(keep[5:6], single), "an image's mask does not depend on its batch"
    if ratio:
        other = mask(uniform(64, grid, seed=1), grid)
        assert not torch.equal(keep, other)


@pytest.mark.parametrize(
    "patches, ratio, count",
    [
        (196, 0.5, 98),
        (196, 0.75, 49),
        (196, 0.9, 19),
        (256, 0.5, 128),
        (256, 0.75, 64),
        (256, 0.9, 25),
        (10, 0.9, 1),
        (49, 0.5, 24),
        (196, 0, 196),
        (1, 0, 1),
    ],
)
def test_kept_counts(patches, ratio, count):
    assert RandomMask(ratio).visible_count(patches) == count


def test_hiding_everything_is_an_error():
    mask = parse_mask("random(0.95)")

    with pytest.raises(ValueError, match="a ratio of 0.95 hides all 16 patches"):
        mask(uniform(1, (4, 4)), (4, 4))


def test_none_hides_nothing():
    keep = parse_mask("none")(uniform(2, (3, 5)), (3, 5))

    assert torch.equal(keep, torch.arange(15).expand(2, 15))


def test_a_tie_keeps_the_earlier_patch():
    noise = torch.full((2, 200), 0.5)

    keep = parse_mask("random(0.5)")(noise, (10, 20))

    assert torch.equal(keep, torch.arange(100).expand(2, 100))


def test_random_keeps_the_largest_noise():
    noise = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]])

    keep = parse_mask("random(0.5)")(noise, (2, 3))

    assert keep.tolist() == [[1, 3, 5]]


def keep_rates(spec, grid, draws=6000):
    """Return the share of draws in which each patch stays, (rows, columns)."""
    keep = parse_mask(spec)(uniform(draws, grid), grid)
    counts = torch.bincount(keep.flatten(), minlength=grid[0] * grid[1])
    return (counts / draws).view(grid)


@pytest.mark.parametrize(
    "spec, expected",
    [
        # Rates by ring, from the border to the central four patches. Simulated with the released
        # sampler, whose variance is 0.2.
        ("gaussian(0.5)", (0.33, 0.38, 0.46, 0.60, 0.78, 0.95, 1.00)),
        ("gaussian(0.75)", (0.08, 0.12, 0.21, 0.35, 0.53, 0.70, 0.82)),
        ("gaussian(0.9)", (0.00, 0.00, 0.02, 0.13, 0.31, 0.49, 0.60)),
        ("gaussian(0.5, literal=True)", (0.41, 0.41, 0.41, 0.45, 0.78, 1.00, 1.00)),
        ("gaussian(0.9, literal=True)", (0.00, 0.00, 0.00, 0.00, 0.18, 0.95, 1.00)),
        ("gaussian(0.5, gumbel=True)", (0.16, 0.33, 0.56, 0.78, 0.91, 0.96, 0.98)),
        ("inverse_gaussian(0.5)", (0.67, 0.63, 0.54, 0.40, 0.22, 0.05, 0.00)),
    ],
)
def test_keep_rate_per_ring(spec, expected):
    side = torch.arange(14)
    to_border = torch.minimum(side, 13 - side)
    ring = torch.minimum(to_border[:, None], to_border[None, :])

    rates = keep_rates(spec, (14, 14))

    ring_rates = [rates[ring == r].mean().item() for r in range(7)]
    np.testing.assert_allclose(ring_rates, expected, atol=0.02)


def density(grid, variance):
    """Return the bivariate normal density at each patch, computed one by one in numpy."""
    values = []
    for y in np.linspace(-1, 1, grid[0]):
        for x in np.linspace(-1, 1, grid[1]):
            exponent = -(y * y + x * x) / (2 * variance)
            values.append(np.exp(exponent) / (2 * np.pi * variance))
    return np.array(values)


@pytest.mark.parametrize(
    "spec, sign, variance",
    [
        ("gaussian(0.6, 0.3)", 1, 0.3),
        ("inverse_gaussian(0.6, 0.3)", -1, 0.3),
        ("gaussian(0.6, 0.3, literal=True)", 1, 0.09),
    ],
)
def test_rows_and_columns_are_not_swapped(spec, sign, variance):
    grid = (4, 9)
    noise = uniform(200, grid)

    keep = parse_mask(spec)(noise, grid)

    score = noise.double().numpy() + sign * density(grid, variance)
    best = np.argsort(-score, axis=1)[:, : int(36 * 0.4)]
    assert np.array_equal(keep.numpy(), np.sort(best, axis=1))


def test_a_grid_of_one_row_is_a_middle_row():
    middle = normal_density(0.2, (3, 9)).view(3, 9)[1]

    assert torch.equal(normal_density(0.2, (1, 9)), middle)


def test_gumbel_is_multinomial_without_replacement():
    grid = (3, 6)
    draws = 6000
    weights = torch.tensor(density(grid, 0.2)).expand(draws, -1)
    patches = torch.multinomial(weights, 9, generator=torch.Generator().manual_seed(0))
    expected = (torch.bincount(patches.flatten(), minlength=18) / draws).view(grid)

    rates = keep_rates("gaussian(0.5, gumbel=True)", grid, draws)

    torch.testing.assert_close(rates, expected, atol=0.02, rtol=0, check_dtype=False)


def test_parse_reads_what_a_config_writes():
    assert parse_mask("random(0.5)") == RandomMask(0.5)
    assert parse_mask("random(ratio=0.5)") == RandomMask(0.5)
    assert parse_mask("gaussian(0.75)") == GaussianMask(
        0.75, sigma=0.2, literal=False, gumbel=False
    )
    assert parse_mask("gaussian(0.75, 0.1, gumbel=True)") == GaussianMask(
        0.75, sigma=0.1, gumbel=True
    )
    assert parse_mask("inverse_gaussian(0.5, literal=True)") == InverseGaussianMask(
        0.5, literal=True
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        ("random(1.0)", r"ratio is 1.0; it must be in \[0, 1\)"),
        ("random(-0.1)", r"ratio is -0.1; it must be in \[0, 1\)"),
        ("random(True)", "ratio is True; it must be a number"),
        ("random('0.5')", "ratio is '0.5'; it must be a number"),
        ("random", "missing a required argument: 'ratio'; random takes"),
        ("random(0.5, sigma=1)", "unexpected keyword argument 'sigma'; random takes"),
        ("random(0.5, 0.5)", "too many positional"),
        ("random(0.5, ratio=0.5)", "multiple values for argument 'ratio'"),
        ("random(ratio=0.5, ratio=0.6)", "give each option once"),
        ("random(half)", "must be literals.*; random takes"),
        ("gausian(half)", "unknown strategy 'gausian'"),
        (" random(0.5)", "cannot be read; write it as"),
        ("gaussian(0.5, sigma=0)", "sigma is 0; it must be a finite number above 0"),
        ("gaussian(0.5, gumbel=1)", "gumbel is 1; it must be True or False"),
        ("gaussian(0.5, sigm=0.1)", r"'sigm'; gaussian takes \(ratio: float, sigma: float = 0.2"),
        (
            "gausian(0.5)",
            "unknown strategy 'gausian'; known: .*gaussian.*none.*; did you mean 'gaussian'",
        ),
        ("none(0.5)", "none takes no arguments"),
        ("", "cannot be read; write it as"),
        ("random(0.5", "cannot be read; write it as"),
        ("0.5", "cannot be read; write it as"),
        (None, "mask None cannot be read"),
    ],
)
def test_parse_refuses(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_mask(spec)
    assert repr(spec) in str(error.value)


def test_a_strategy_that_scores_nothing_cannot_be_made():
    class WithoutScore(Mask):
        pass

    with pytest.raises(TypeError, match="score"):
        WithoutScore(0.5)
