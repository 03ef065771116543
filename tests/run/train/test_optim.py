"""The optimizer's groups and the learning rate schedule, against values computed by hand.

test_engine.py compares the groups under ZeRO-3.

    bash run/test.sh tests/run/train/test_optim.py
"""

import math
from dataclasses import replace

import pytest
from torch import nn

from glimpse.model.methods import build_method
from glimpse.run.lib import config
from glimpse.run.lib.config import PARAMETER_KINDS, OptimConfig
from glimpse.run.train.optim import parameter_groups, parameter_kind

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


def method_and_config(flavour, *more):
    cfg = config.load(
        "run/configs/quickstart.yaml",
        ["model.size=nano/8", "model.image_size=32", *FLAVOURS[flavour], *more],
    )
    return build_method(cfg, 320), cfg


def names_without_decay(method, cfg):
    """Return the names of the parameters without weight decay.

    Checks that the two groups hold every trainable parameter once.
    """
    decayed, undecayed = parameter_groups(method, cfg.optim)
    assert decayed["weight_decay"] == 0.2
    assert undecayed["weight_decay"] == 0.0

    names = {id(p): name for name, p in method.named_parameters()}
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    members = [*decayed["params"], *undecayed["params"]]
    assert sorted(names[id(p)] for p in members) == sorted(trainable)
    assert sum(p.numel() for p in members) == sum(p.numel() for p in trainable.values())
    return {names[id(p)] for p in undecayed["params"]}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_groups(flavour):
    """FLIP decays class token and temperature, open_clip its learned positions and embeddings."""
    method, cfg = method_and_config(flavour)
    parameters = dict(method.named_parameters())
    biases_and_norms = {n for n in parameters if n.endswith("bias") or "norm" in n}
    special = {
        "towers.vision.cls",
        "towers.vision.positions",
        "towers.text.positions",
        "towers.text.token.weight",
        "towers.temperature.logit_scale",
    }
    expected = {
        "flip": {"towers.text.positions"},
        "clip": {"towers.vision.cls", "towers.temperature.logit_scale"},
    }

    undecayed = names_without_decay(method, cfg)

    assert biases_and_norms <= undecayed
    assert all(parameters[n].ndim == 1 for n in undecayed if "positions" not in n)
    assert undecayed & special & parameters.keys() == expected[flavour]
    assert undecayed - special <= biases_and_norms
    assert ("towers.vision.positions" in parameters) == (flavour == "clip")


def test_every_kind_can_be_switched_off_and_frozen_ones_are_left_out():
    method, cfg = method_and_config("clip", f"optim.no_decay=[{', '.join(PARAMETER_KINDS)}]")
    count = len(list(method.parameters()))

    (group,) = parameter_groups(method, cfg.optim)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == count

    (group,) = parameter_groups(method, replace(cfg.optim, no_decay=()))
    assert group["weight_decay"] == 0.2
    assert len(group["params"]) == count

    frozen, cfg = method_and_config("flip", "model.vision.freeze_patch=true")
    assert "towers.vision.patch.bias" not in names_without_decay(frozen, cfg)


def test_a_shared_parameter_is_refused():
    method, cfg = method_and_config("flip")
    method.again = nn.Linear(4, 4)
    method.again.weight = method.towers.image_projection.weight

    with pytest.raises(AssertionError, match="shared"):
        parameter_groups(method, cfg.optim)


def test_kind():
    assert parameter_kind(nn.LayerNorm(4), "bias") == "norm"
    assert parameter_kind(nn.LayerNorm(4), "weight") == "norm"
    assert parameter_kind(nn.Linear(4, 4), "bias") == "bias"
    assert parameter_kind(nn.Linear(4, 4), "weight") == "weight"
    assert parameter_kind(nn.Embedding(4, 4), "weight") == "tokens"
    assert parameter_kind(nn.Module(), "cls") == "cls"
    with pytest.raises(ValueError, match="optim.no_decay: unknown 'norms'; known: bias, norm"):
        OptimConfig(lr="1", weight_decay=0, warmup=0, no_decay=("norms",))


def test_flip_rates():
    """FLIP's schedule: 51.2M samples of warm-up to 1.024e-3, then a cosine to 0 at 12.8B.

    The peak is 4e-6 per 256 at batch 65,536.
    """
    warmup = 51_200_000
    samples = 12_800_000_000
    batch = 65_536
    optim = OptimConfig(lr="4e-6 per 256", weight_decay=0.2, warmup=warmup)

    def rate(seen):
        return optim.lr_at(seen, batch, samples)

    # the peak
    assert optim.peak_lr(batch) == pytest.approx(1.024e-3, rel=1e-12)
    assert optim.peak_lr(256) == 4e-6

    # the warm-up
    first = 1.024e-3 * batch / warmup
    assert rate(0) == pytest.approx(first), "the first step already learns"
    assert rate(25_600_000 - batch) == pytest.approx(0.512e-3)
    assert rate(warmup - 1) == pytest.approx(1.024e-3), "never above the peak"
    assert rate(warmup) == pytest.approx(1.024e-3)

    # the cosine
    quarter = warmup + (samples - warmup) // 4
    middle = warmup + (samples - warmup) // 2
    assert rate(quarter) == pytest.approx(1.024e-3 * (1 + math.sqrt(0.5)) / 2)
    assert rate(middle) == pytest.approx(0.512e-3)
    assert 0 < rate(samples - batch) < 1e-9
    assert rate(samples) == pytest.approx(0, abs=1e-15)


def test_slip_rates():
    """SLIP's CLIP baseline: 5e-4 down to 1e-5."""
    samples = 367_000_000
    optim = OptimConfig(lr="5e-4", weight_decay=0.5, warmup=14_700_000, min_lr=1e-5)

    def rate(seen):
        return optim.lr_at(seen, 4096, samples)

    rates = [rate(seen) for seen in range(0, samples, 1_000_000)]
    peak = rates.index(max(rates))
    rising, falling = rates[: peak + 1], rates[peak:]
    middle = (5e-4 + 1e-5) / 2

    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(rates) == pytest.approx(5e-4, rel=1e-4)
    assert rate(14_700_000 + 176_150_000) == pytest.approx(middle)
    assert rate(samples) == pytest.approx(1e-5)
    assert rate(400_000_000) == pytest.approx(1e-5), "constant after the end"


def test_without_warmup_and_shorter_than_it():
    flat = OptimConfig(lr="1e-3", weight_decay=0, warmup=0)
    assert flat.lr_at(0, 16, 320) == 1e-3
    assert flat.lr_at(320, 16, 320) == pytest.approx(0, abs=1e-18)

    short = OptimConfig(lr="1e-3", weight_decay=0, warmup=1000)
    assert short.lr_at(304, 16, 320) == pytest.approx(3.2e-4), "a run that ends within its warm-up"


@pytest.mark.parametrize("lr", ["fast", "1e-3 per", "4e-6 per batch", "1e", "", "1e-3 per 256 "])
def test_a_rate_that_cannot_be_read(lr):
    with pytest.raises(ValueError, match="optim.lr: .*write 5e-4, or 4e-6 per 256"):
        OptimConfig(lr=lr, weight_decay=0, warmup=0)
