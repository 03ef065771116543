"""The parts of run/pretrain.py that need no ranks: the FLOPs that MFU is computed from."""

import math
from types import SimpleNamespace

import pytest
import torch

from glimpse.model.methods import METHODS
from glimpse.model.methods.clip import Clip
from glimpse.run.lib import config
from glimpse.run.plan.flops import count_model_flops
from glimpse.run.pretrain import Training

VOCAB = 500


def training(*overrides: str) -> SimpleNamespace:
    """Return the attributes of Training that its method flops() uses; log_lines has its output."""
    cfg = config.load(config.ROOT / "run/configs/clip_nano.yaml", overrides)
    log_lines: list[str] = []
    return SimpleNamespace(
        cfg=cfg,
        tokenizer=SimpleNamespace(vocab_size=VOCAB),
        flops_per_sample=None,
        log=SimpleNamespace(info=log_lines.append),
        log_lines=log_lines,
    )


def captions(tokens: int, count: int) -> dict:
    """Return a micro-batch of `count` captions of `tokens` tokens each."""
    text = dict(ids=torch.ones(tokens * count), lengths=torch.full((count,), tokens))
    return dict(text=text)


@pytest.mark.parametrize("overrides", [(), ("data.pad_text=true", "model.text.pool=first")])
def test_flops_are_those_of_the_tokens_that_the_tower_sees(overrides):
    run = training("model.text.causal=false", "model.text.pool=first", *overrides)

    flops = Training.flops(run, captions(tokens=8, count=4))

    plain = training("model.text.causal=false", "model.text.pool=first").cfg
    assert flops == count_model_flops(plain, VOCAB, 8)
    assert flops < count_model_flops(plain, VOCAB, 9)


def test_flops_are_counted_once():
    run = training()

    first = Training.flops(run, captions(tokens=8, count=4))

    assert Training.flops(run, captions(tokens=12, count=4)) == first


def test_a_method_that_cannot_run_without_data_trains_without_mfu(monkeypatch):
    class Peeking(Clip):
        def forward(self, micro_batch):
            features = super().forward(micro_batch)
            if features["scale"].item() > 0:
                return features

    monkeypatch.setitem(METHODS, "clip", Peeking)
    run = training()

    assert math.isnan(Training.flops(run, captions(tokens=8, count=4)))

    (line,) = run.log_lines
    assert line.startswith("no MFU: the method's FLOPs cannot be counted")
