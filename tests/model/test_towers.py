"""Proves the towers against open_clip (embeddings, gradients, first draws, parameter counts) and
the counts of FLIP's released models,
and that what a tower returns depends on the visible patches alone, in any order, as uint8 or as
floats, in fp32 or bf16.

Run: pytest tests/model/test_towers.py
tests/golden/params.txt holds the parameters of every flavour and size; after adding a size: python
-m tests.test_towers
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from glimpse.model.layers import Packed
from glimpse.model.towers import (
    PATCHES,
    SIZES,
    ModelConfig,
    Temperature,
    TextConfig,
    Towers,
    VisionConfig,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "params.txt"
CLIP = ModelConfig(
    init="clip",
    vision=VisionConfig(
        positions="learned",
        pool="cls",
        pre_norm=True,
        patch_bias=False,
        activation="gelu",
        eps=1e-5,
    ),
    text=TextConfig(causal=True, pool="eot", activation="gelu", eps=1e-5),
)
# config, vocabulary, context
FLAVOURS = {"flip": (ModelConfig(), 30523, 32), "clip": (CLIP, 49408, 77)}
SMALL = {"size": "nano/8", "image_size": 32}


def small(flavour: str, vocab: int = 100, context: int = 12, **changes) -> Towers:
    torch.manual_seed(0)
    return Towers(dataclasses.replace(FLAVOURS[flavour][0], **SMALL, **changes), vocab, context)


def meta(flavour: str, size: str) -> Towers:
    cfg, vocab, context = FLAVOURS[flavour]
    with torch.device("meta"):
        return Towers(dataclasses.replace(cfg, size=size), vocab, context)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, L, 3 P P), each patch channel after channel."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def captions(vocab: int = 100, context: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed ids, each caption's largest at its end as open_clip's pooling wants it, and
    lengths.
    """
    lengths = torch.tensor([5, context, 2, 9], dtype=torch.int32)
    ids = torch.randint(
        1,
        vocab - 1,
        (int(lengths.sum()),),
        generator=torch.Generator().manual_seed(3),
        dtype=torch.int32,
    )
    ids[lengths.cumsum(0) - 1] = vocab - 1
    return ids, lengths


def everywhere(batch: int, grid: int = 4) -> torch.Tensor:
    return torch.arange(grid * grid).expand(batch, -1)


# ---- against open_clip


def peer(quick: bool = False, pool: str = "tok"):
    """A small random open_clip model of the shape of `small('clip')`."""
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(1)
    vision = CLIPVisionCfg(
        layers=4, width=128, head_width=32, patch_size=8, image_size=32, pool_type=pool
    )
    return Peer(
        128,
        vision,
        CLIPTextCfg(context_length=12, vocab_size=100, width=128, heads=4, layers=3),
        quick_gelu=quick,
    )


NAMES = {
    "visual.class_embedding": "vision.cls",
    "visual.positional_embedding": "vision.positions",
    "visual.ln_pre": "vision.pre_norm",
    "visual.conv1": "vision.patch",
    "visual.transformer.resblocks": "vision.blocks",
    "visual.ln_post": "vision.norm",
    "visual.proj": "image_projection.weight",
    "transformer.resblocks": "text.blocks",
    "token_embedding": "text.token",
    "positional_embedding": "text.positions",
    "ln_final": "text.norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "temperature.logit_scale",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.out",
    "c_fc": "up",
    "c_proj": "down",
}


def ours(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under open_clip's names -> under ours, in our shapes."""
    result = {}
    for name, tensor in tensors.items():
        for theirs, mine in NAMES.items():
            name = name.replace(theirs, mine)
        if name.endswith("projection.weight"):
            tensor = tensor.T
        result[name] = (
            tensor.reshape(1)
            if tensor.ndim == 0
            else tensor.flatten(1)
            if tensor.ndim == 4
            else tensor
        )
    return result


class Keep(torch.nn.Module):
    """In place of open_clip's PatchDropout: keeps given patches."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[:, 1:].gather(1, self.positions[:, :, None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, :1], kept], dim=1)


@pytest.mark.parametrize("visible", [16, 5])
@pytest.mark.parametrize("quick, pool", [(False, "tok"), (True, "tok"), (True, "avg")])
def test_embeddings_and_gradients_equal_open_clip(quick, pool, visible):
    reference = peer(quick, pool)
    activation = "quick_gelu" if quick else "gelu"
    towers = small(
        "clip",
        vision=dataclasses.replace(
            CLIP.vision, pool={"tok": "cls", "avg": "mean"}[pool], activation=activation
        ),
        text=dataclasses.replace(CLIP.text, activation=activation),
    )
    towers.load_state_dict(ours(reference.state_dict()))
    images = torch.randn(4, 3, 32, 32)
    positions = torch.rand(4, 16).argsort(1)[:, :visible].sort(1).values
    reference.visual.patch_dropout = Keep(positions)
    ids, lengths = captions()
    padded = torch.zeros(4, 12, dtype=torch.long)
    padded[torch.arange(12) < lengths[:, None]] = ids.long()

    patches = patches_of(images, 8).gather(1, positions[:, :, None].expand(-1, -1, 192))
    mine = (
        towers.encode_image(patches, positions.to(torch.int16)),
        towers.encode_text(ids, lengths),
        towers.temperature(),
    )
    theirs = reference(images, padded)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), atol=1e-5, rtol=1e-5)
    for image, text, scale in (mine, theirs):
        F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    gradients = ours({name: p.grad for name, p in reference.named_parameters()})
    assert gradients.keys() == dict(towers.named_parameters()).keys()
    for name, parameter in towers.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            gradients[name],
            atol=1e-5,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_clip_draws_as_open_clip_does():
    mine, theirs = dict(small("clip").named_parameters()), ours(dict(peer().named_parameters()))
    for name, parameter in mine.items():
        a, b = parameter.detach(), theirs[name].detach()
        assert a.mean().item() == pytest.approx(
            b.mean().item(), abs=4 * float(b.std(correction=0)) / b.numel() ** 0.5 + 1e-6
        ), name
        loose = 0.03 + 2 / a.numel() ** 0.5  # the spread of an estimated std
        assert a.std(correction=0).item() == pytest.approx(
            b.std(correction=0).item(), rel=loose, abs=1e-7
        ), name
        if a.numel() > 10_000:  # a normal's extremes stand near 4 std, a uniform's at 1.73
            assert (a.abs().max() / a.std()).item() == pytest.approx(
                (b.abs().max() / b.std()).item(), rel=0.3
            ), name


@pytest.mark.parametrize("size", ["S/16", "B/16", "B/32", "L/14", "H/14"])
def test_counts_and_heads_equal_open_clip(size):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        reference = open_clip.model.CLIP(
            **open_clip.get_model_config("ViT-" + size.replace("/", "-"))
        )
    assert count(meta("clip", size)) == count(reference)
    shape = ModelConfig(size=size).shape
    heads = [
        tower.resblocks[0].attn.num_heads
        for tower in (reference.visual.transformer, reference.transformer)
    ]
    assert [shape.heads, shape.text_heads] == heads  # which no count can tell


# ---- what a model costs


def golden_lines() -> list[str]:
    patches = {"nano": (8,)}
    sizes = [f"{name}/{patch}" for name in SIZES for patch in patches.get(name, PATCHES[1:])]
    return [
        f"{flavour} {size} {count(meta(flavour, size))}" for flavour in FLAVOURS for size in sizes
    ]


def test_parameter_counts_of_all_sizes():
    lines = golden_lines()
    print("\n".join(lines))
    assert lines == GOLDEN.read_text().splitlines()


PAPERS = {
    ("flip", "B/16"): 139.8,
    ("flip", "L/16"): 413.0,
    ("flip", "H/14"): 966.4,
    ("clip", "B/16"): 149.6,
}


@pytest.mark.parametrize("flavour, size", PAPERS)
def test_parameter_counts_of_the_papers(flavour, size):
    assert round(count(meta(flavour, size)) / 1e6, 1) == PAPERS[flavour, size]


# ---- behaviour


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_patches_in_any_order(flavour):
    towers, patches = small(flavour), torch.randn(2, 16, 192)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight = towers.vision(patches, everywhere(2))
    shuffled = towers.vision(patches[:, order], everywhere(2)[:, order])
    torch.testing.assert_close(shuffled[:, 1:], straight[:, 1:][:, order])
    torch.testing.assert_close(towers.vision.pool(shuffled), towers.vision.pool(straight))
    elsewhere = towers.vision(patches, everywhere(2)[:, order])
    assert not torch.allclose(
        towers.vision.pool(elsewhere), towers.vision.pool(straight), atol=1e-3
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_uint8_equals_normalised_floats(flavour):
    towers = small(flavour)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (towers.vision.cfg.mean, towers.vision.cfg.std)
    )
    floats = patches_of((pixels / 255 - mean) / std, 8)
    torch.testing.assert_close(
        towers.vision(patches_of(pixels.float(), 8).byte(), everywhere(2)),
        towers.vision(floats, everywhere(2)),
    )


def test_flip_class_token_has_no_position_and_joins_the_mean():
    vision, seen = small("flip").vision, []
    assert "positions" not in vision.state_dict() and vision.positions.shape == (16, 128)
    vision.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = vision(torch.zeros(1, 3, 192), torch.tensor([[0, 5, 9]]))
    torch.testing.assert_close(seen[0][0, 0], vision.cls)
    # zero patches, zero bias
    torch.testing.assert_close(seen[0][0, 1:], vision.positions[[0, 5, 9]])
    torch.testing.assert_close(vision.pool(tokens), tokens.mean(1))


def test_flip_text_pools_the_first_token():
    towers = small("flip")
    ids, lengths = captions()
    packed = Packed(lengths, len(ids), None, False)
    every = towers.text.blocks(
        towers.text.token(ids) + towers.text.positions[packed.positions], packed
    )
    torch.testing.assert_close(towers.text(ids, lengths), towers.text.norm(every[[0, 5, 17, 19]]))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(flavour):
    results = []
    for recompute in (False, True):
        towers = small(flavour, checkpoint_activations=recompute)
        image = towers.encode_image(
            torch.randn(4, 7, 192, generator=torch.Generator().manual_seed(0)), everywhere(4)[:, :7]
        )
        (towers.temperature() * image @ towers.encode_text(*captions()).T).logsumexp(
            1
        ).sum().backward()
        results.append({name: p.grad for name, p in towers.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, results[1][name]), name


def test_frozen_patch_embedding():
    towers = small("flip", vision=VisionConfig(freeze_patch=True))
    assert [name for name, p in towers.named_parameters() if not p.requires_grad] == [
        "vision.patch.weight",
        "vision.patch.bias",
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bf16_runs_and_stays_near(flavour):
    towers, pixels = small(flavour), torch.randint(0, 256, (4, 16, 192), dtype=torch.uint8)
    exact = towers.encode_image(pixels, everywhere(4)), towers.encode_text(*captions())
    towers.bfloat16()
    rounded = towers.encode_image(pixels, everywhere(4)), towers.encode_text(*captions())
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.norm(dim=1), torch.ones(4))
        assert (a * b).sum(1).min() > 0.999
    assert towers.temperature().dtype == torch.float32
    (rounded[0].sum() + rounded[1].sum()).backward()
    assert towers.vision.patch.weight.grad.isfinite().all()


def test_temperature():
    temperature = Temperature()
    assert temperature().tolist() == pytest.approx([1 / 0.07])
    temperature().sum().backward()
    assert temperature.logit_scale.grad.tolist() == pytest.approx([1 / 0.07])  # d exp(s) / d s
    torch.nn.init.constant_(temperature.logit_scale, 5.0)
    assert temperature().tolist() == pytest.approx([100.0])


def test_temperature_residual_restores_what_bf16_lost():
    master = torch.tensor([2.7123])
    temperature = Temperature().bfloat16()
    temperature.logit_scale.data.copy_(master)
    assert temperature().item() != pytest.approx(math.exp(2.7123), rel=1e-4)
    temperature.residual = master - temperature.logit_scale.detach().float()
    assert temperature().item() == pytest.approx(math.exp(2.7123), rel=1e-6)
    temperature().sum().backward()
    assert temperature.logit_scale.grad.item() == pytest.approx(math.exp(2.7123), rel=1e-2)
    assert not list(temperature.buffers()) and list(temperature.state_dict()) == ["logit_scale"]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ModelConfig(size="B16"), "model.size 'B16'.*nano, Ti, S, B, L, L512, H"),
        (lambda: ModelConfig(size="B/15"), "8, 14, 16, 32"),
        (lambda: ModelConfig(size="L/14", image_size=230), "model.image_size 230"),
        (lambda: ModelConfig(init="kaiming"), "model.init 'kaiming': unknown; known: clip, flip"),
        (
            lambda: VisionConfig(positions="rope"),
            "model.vision.positions 'rope': unknown; known: learned, sincos",
        ),
        (
            lambda: VisionConfig(activation="relu"),
            "model.vision.activation 'relu'.*gelu, gelu_tanh, quick_gelu",
        ),
        (lambda: VisionConfig(std=(1.0, 0.0, 1.0)), "std above 0"),
        (lambda: TextConfig(pool="argmax"), "model.text.pool 'argmax': unknown; known: eot, first"),
        (lambda: TextConfig(causal=True), "use pool: eot"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")
