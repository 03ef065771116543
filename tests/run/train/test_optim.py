"""The optimizer's groups by kind of parameter, and the learning rate, against values worked out by
hand. Under ZeRO-3: test_engine.py.

    bash run/test.sh tests/run/train/test_optim.py
"""

import math
from dataclasses import replace

import pytest
from torch import nn

from glimpse.model.methods import build_method
from glimpse.run.lib import config
from glimpse.run.lib.config import KINDS, OptimConfig
from glimpse.run.train.optim import groups, kind

FLAVOURS = {
    "flip": [],
    "clip": [
        "model.init=clip",
        "model.vision.positions=learned",
        "model.vision.pool=cls",
        "model.vision.pre_norm=true",
        "model.vision.patch_bias=false",
        "model.text.causal=true",
        "model.text.pool=eot",
        "optim.no_decay=[bias, norm, cls, logit_scale]",
    ],
}


def made(flavour, *more):
    cfg = config.load(
        "run/configs/quickstart.yaml",
        ["model.size=nano/8", "model.image_size=32", *FLAVOURS[flavour], *more],
    )
    return build_method(cfg, 320), cfg


def free_names(method, cfg):
    """The names of the group without decay; checks that the two groups hold every trainable
    parameter once.
    """
    names = {id(p): name for name, p in method.named_parameters()}
    found = groups(method, cfg.optim)
    assert [g["weight_decay"] for g in found] == [0.2, 0.0]
    every = [names[id(p)] for g in found for p in g["params"]]
    assert sorted(every) == sorted(name for name, p in method.named_parameters() if p.requires_grad)
    assert sum(p.numel() for g in found for p in g["params"]) == sum(
        p.numel() for p in method.parameters() if p.requires_grad
    )
    return {names[id(p)] for p in found[1]["params"]}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_groups(flavour):
    """What decays in each recipe: FLIP keeps class token and temperature decaying; open_clip its
    learned positions and embeddings.
    """
    method, cfg = made(flavour)
    free = free_names(method, cfg)
    named = dict(method.named_parameters())
    assert {n for n in named if n.endswith("bias") or "norm" in n} <= free
    assert all(p.ndim == 1 for p in (named[n] for n in free if "positions" not in n))
    special = {
        "towers.vision.cls",
        "towers.vision.positions",
        "towers.text.positions",
        "towers.text.token.weight",
        "towers.temperature.logit_scale",
    } & named.keys()
    wanted = {
        "flip": {"towers.text.positions"},
        "clip": {"towers.vision.cls", "towers.temperature.logit_scale"},
    }
    assert free & special == wanted[flavour]
    assert not {n for n in free - special if not n.endswith("bias") and "norm" not in n}
    assert (
        "towers.vision.positions" in named
        if flavour == "clip"
        else "towers.vision.positions" not in named
    )


def test_every_kind_can_be_switched_off_and_frozen_ones_are_left_out():
    method, cfg = made("clip", f"optim.no_decay=[{', '.join(KINDS)}]")
    (everything,) = groups(method, cfg.optim)
    assert everything["weight_decay"] == 0.0 and len(everything["params"]) == len(
        list(method.parameters())
    )
    (everything,) = groups(method, replace(cfg.optim, no_decay=()))
    assert everything["weight_decay"] == 0.2 and len(everything["params"]) == len(
        list(method.parameters())
    )
    frozen, cfg = made("flip", "model.vision.freeze_patch=true")
    assert "towers.vision.patch.bias" not in free_names(frozen, cfg)


def test_a_shared_parameter_is_refused():
    method, cfg = made("flip")
    method.again = nn.Linear(4, 4)
    method.again.weight = method.towers.image_projection.weight
    with pytest.raises(AssertionError, match="shared"):
        groups(method, cfg.optim)


def test_kind():
    assert kind(nn.LayerNorm(4), "bias") == kind(nn.LayerNorm(4), "weight") == "norm"
    assert kind(nn.Linear(4, 4), "bias") == "bias" and kind(nn.Linear(4, 4), "weight") == "weight"
    assert kind(nn.Embedding(4, 4), "weight") == "tokens" and kind(nn.Module(), "cls") == "cls"
    with pytest.raises(ValueError, match="optim.no_decay: unknown 'norms'; known: bias, norm"):
        OptimConfig(lr="1", weight_decay=0, warmup=0, no_decay=("norms",))


def test_flip_rates():
    """FLIP: 4e-6 per 256 at batch 65,536 is 1.024e-3; 51.2M samples of warm-up, then a cosine to 0
    at 12.8B.
    """
    optim = OptimConfig(lr="4e-6 per 256", weight_decay=0.2, warmup=51_200_000)
    assert optim.peak(65_536) == pytest.approx(1.024e-3, rel=1e-12) and optim.peak(256) == 4e-6
    batch, samples = 65_536, 12_800_000_000
    assert optim.rate(0, batch, samples) == pytest.approx(1.024e-3 * 65_536 / 51_200_000), (
        "the first step already learns"
    )
    assert optim.rate(25_600_000 - batch, batch, samples) == pytest.approx(0.512e-3)
    assert optim.rate(51_200_000 - 1, batch, samples) == pytest.approx(1.024e-3), (
        "never above the peak"
    )
    assert optim.rate(51_200_000, batch, samples) == pytest.approx(1.024e-3)
    middle = 51_200_000 + (samples - 51_200_000) // 2
    assert optim.rate(middle, batch, samples) == pytest.approx(0.512e-3)
    assert 0 < optim.rate(samples - batch, batch, samples) < 1e-9 and optim.rate(
        samples, batch, samples
    ) == pytest.approx(0, abs=1e-15)
    quarter = 51_200_000 + (samples - 51_200_000) // 4
    assert optim.rate(quarter, batch, samples) == pytest.approx(1.024e-3 * (1 + math.sqrt(0.5)) / 2)


def test_slip_rates():
    """SLIP's CLIP baseline: 5e-4 down to 1e-5."""
    optim = OptimConfig(lr="5e-4", weight_decay=0.5, warmup=14_700_000, min_lr=1e-5)
    rates = [optim.rate(seen, 4096, 367_000_000) for seen in range(0, 367_000_000, 1_000_000)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert max(rates) == pytest.approx(5e-4, rel=1e-4) and optim.rate(
        367_000_000, 4096, 367_000_000
    ) == pytest.approx(1e-5)
    assert optim.rate(14_700_000 + 176_150_000, 4096, 367_000_000) == pytest.approx(
        (5e-4 + 1e-5) / 2
    )
    assert optim.rate(400_000_000, 4096, 367_000_000) == pytest.approx(1e-5), (
        "beyond the end it stays"
    )


def test_without_warmup_and_shorter_than_it():
    flat = OptimConfig(lr="1e-3", weight_decay=0, warmup=0)
    assert flat.rate(0, 16, 320) == 1e-3 and flat.rate(320, 16, 320) == pytest.approx(0, abs=1e-18)
    short = OptimConfig(lr="1e-3", weight_decay=0, warmup=1000)
    assert short.rate(304, 16, 320) == pytest.approx(3.2e-4), "a run that ends within its warm-up"


@pytest.mark.parametrize("lr", ["fast", "1e-3 per", "4e-6 per batch", "1e", "", "1e-3 per 256 "])
def test_a_rate_that_cannot_be_read(lr):
    with pytest.raises(ValueError, match="optim.lr: .*write 5e-4, or 4e-6 per 256"):
        OptimConfig(lr=lr, weight_decay=0, warmup=0)
