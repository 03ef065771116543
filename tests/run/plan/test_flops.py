"""Test the FLOPs of a sample against closed forms and against formulas of each method."""

import pytest
import torch

from glimpse.model import collectives
from glimpse.model.losses import contrastive
from glimpse.run.lib import config
from glimpse.run.plan.flops import count_flops, count_model_flops, create_counter

VOCAB, TOKENS = 30523, 16


def load(name: str, *overrides: str) -> config.RunConfig:
    return config.load(config.ROOT / f"run/configs/{name}.yaml", overrides)


def block_macs(tokens: int, width: int, depth: int, queries: int) -> int:
    """Return the multiply-adds of a transformer whose last block has `queries` outputs only."""
    qkv = 3 * width**2
    rest = 2 * tokens * width + width**2 + 8 * width**2  # attention, projection, MLP
    return depth * tokens * (qkv + rest) - (tokens - queries) * rest


@pytest.mark.parametrize("mask, visible", [("none", 196), ("random(0.5)", 98)])
@pytest.mark.parametrize("pool, all_tokens", [("cls", False), ("mean", True)])
def test_the_closed_form_of_b16(mask, visible, pool, all_tokens):
    cfg = load("flip_b16", f"views.image.mask={mask}", f"model.vision.pool={pool}", "batch=4096")

    flops = count_flops(cfg, VOCAB, TOKENS)

    tokens = 1 + visible
    embedding = visible * 768 * 768
    vision = block_macs(tokens, 768, 12, tokens if all_tokens else 1) + 768 * 512
    # One product forward and two backward, but none for the gradient of the pixels.
    assert flops.images == 2 * (3 * vision + 2 * embedding)
    assert flops.captions == 2 * 3 * (block_macs(TOKENS, 512, 12, 1) + 512 * 512)
    assert flops.loss == 2 * 4 * 4096 * 512
    assert flops.teacher == 0
    assert flops.recomputed == 0
    assert flops.model == flops.images + flops.captions


# GFLOP of images, captions, teacher, loss, and recomputation without and with ZeRO-3. They were
# computed with formulas for each method, which the code had until commit 916dcfa.
EXPECTED = {
    "flip_b16": (51.884, 3.431, 0, 0.268, 12.344, 18.321),
    "flip_h14": (495.724, 28.221, 0, 0.537, 117.249, 174.451),
    "aclip_b16": (99.353, 3.431, 32.927, 0.067, 23.154, 34.042),
    "aclip_eff_b16": (99.353, 3.431, 8.116, 0.067, 23.154, 34.042),
    "maskclip_b16": (140.734, 3.431, 35.127, 0.017, 32.001, 47.736),
    "slip_b16": (296.347, 3.431, 0, 0.050, 67.533, 99.273),
    "mae_b16": (163.432, 3.431, 0, 0.017, 37.037, 55.251),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_formulas_by_hand(name):
    cfg = load(name, "model.checkpoint_activations=true")
    images, captions, teacher, loss, _, with_zero3 = EXPECTED[name]

    flops = count_flops(cfg, VOCAB, TOKENS, sharded=True)

    assert flops.images / 1e9 == pytest.approx(images, rel=0.003)
    assert flops.captions / 1e9 == pytest.approx(captions, rel=0.001)
    assert flops.teacher / 1e9 == pytest.approx(teacher, rel=0.002)
    assert flops.loss / 1e9 == pytest.approx(loss, rel=0.02)
    assert flops.recomputed / 1e9 == pytest.approx(with_zero3, rel=0.005)


@pytest.mark.parametrize("name", ["flip_b16", "maskclip_b16"])
def test_recomputation_without_zero3(name):
    cfg = load(name, "model.checkpoint_activations=true")
    recomputed = EXPECTED[name][4]

    flops = count_flops(cfg, VOCAB, TOKENS)

    assert flops.recomputed / 1e9 == pytest.approx(recomputed, rel=0.015)
    assert flops.model == count_model_flops(cfg, VOCAB, TOKENS)


def test_a_frozen_text_tower_is_not_counted():
    overrides = ("options.contrast=false", "options.teacher=runs/clip")

    flops = count_flops(load("maskclip_b16", *overrides), VOCAB, TOKENS)

    assert flops.captions == 0
    assert flops.loss == 0
    assert flops.teacher > 0


def test_products_that_are_added_in_place_count():
    rows, width = 64, 32
    image = torch.randn(rows, width).requires_grad_()
    text = torch.randn(rows, width).requires_grad_()

    with create_counter() as counter:
        contrastive(image, text, torch.ones(1, requires_grad=True))[0].backward()

    assert counter.get_total_flops() == 4 * 2 * rows * rows * width


def test_a_rank_counts_without_the_others(monkeypatch):
    """Counting starts no collective: A-CLIP's heads and losses would wait for the other ranks."""

    def refuse(*_, **__):
        raise AssertionError("a collective was started")

    monkeypatch.setattr(collectives.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(collectives.dist, name, refuse)
    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(collectives, name, refuse)

    assert count_flops(load("aclip_b16"), VOCAB, TOKENS).model > 0
    assert collectives.world_size() == 2
    with pytest.raises(AssertionError, match="a collective was started"):
        collectives.all_reduce(torch.ones(1))
