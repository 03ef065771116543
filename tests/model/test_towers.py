"""Compare the towers with open_clip (embeddings, gradients, initialization, parameter counts) and
their parameter counts with FLIP's released models.

The output of a tower depends on the visible patches alone: in any order, as uint8 or as floats, in
fp32 or bf16.

Run: pytest tests/model/test_towers.py
tests/golden/params.txt holds the parameters of every flavor and size; after adding a size:
python -m tests.model.test_towers
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from glimpse.model.layers import PackedSequences
from glimpse.model.towers import (
    PATCH_SIZES,
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
    cfg, _, _ = FLAVOURS[flavour]
    torch.manual_seed(0)
    return Towers(dataclasses.replace(cfg, **SMALL, **changes), vocab, context)


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
    """Return packed ids and lengths.

    The last id of a caption is its largest, as open_clip's pooling requires.
    """
    lengths = torch.tensor([5, context, 2, 9], dtype=torch.int32)
    total = int(lengths.sum())
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocab - 1, (total,), generator=rng, dtype=torch.int32)
    ids[lengths.cumsum(0) - 1] = vocab - 1
    return ids, lengths


def assert_close_gradients(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    def message(text: str) -> str:
        return f"{name}: {text}"

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=message)


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
    text = CLIPTextCfg(context_length=12, vocab_size=100, width=128, heads=4, layers=3)
    return Peer(128, vision, text, quick_gelu=quick)


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
    """Convert tensors with open_clip's names and shapes to our names and shapes."""
    result = {}
    for source_name, source in tensors.items():
        name = source_name
        for open_clip_part, our_part in NAMES.items():
            name = name.replace(open_clip_part, our_part)
        tensor = source.T if name.endswith("projection.weight") else source
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
        elif tensor.ndim == 4:
            tensor = tensor.flatten(1)
        result[name] = tensor
    return result


class Keep(torch.nn.Module):
    """A replacement for open_clip's PatchDropout that keeps chosen patches."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = self.positions[:, :, None].expand(-1, -1, x.shape[2])
        patches = x[:, 1:].gather(1, index)
        return torch.cat([x[:, :1], patches], dim=1)


@pytest.mark.parametrize("visible", [16, 5])
@pytest.mark.parametrize("quick, pool", [(False, "tok"), (True, "tok"), (True, "avg")])
def test_embeddings_and_gradients_equal_open_clip(quick, pool, visible):
    reference = peer(quick, pool)
    activation = "quick_gelu" if quick else "gelu"
    our_pool = {"tok": "cls", "avg": "mean"}[pool]
    towers = small(
        "clip",
        vision=dataclasses.replace(CLIP.vision, pool=our_pool, activation=activation),
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

    outputs = (
        towers.encode_image(patches, positions.to(torch.int16)),
        towers.encode_text(ids, lengths),
        towers.temperature(),
    )
    expected = reference(images, padded)
    for image, text, scale in (outputs, expected):
        F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()

    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), atol=1e-5, rtol=1e-5)
    gradients = ours({name: p.grad for name, p in reference.named_parameters()})
    assert gradients.keys() == dict(towers.named_parameters()).keys()
    for name, parameter in towers.named_parameters():
        assert_close_gradients(name, parameter.grad, gradients[name])


def test_clip_draws_as_open_clip_does():
    towers = small("clip")

    references = ours(dict(peer().named_parameters()))

    for name, parameter in towers.named_parameters():
        a = parameter.detach()
        b = references[name].detach()
        a_std = a.std(correction=0).item()
        b_std = b.std(correction=0).item()
        mean_error = 4 * b_std / b.numel() ** 0.5 + 1e-6
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=mean_error), name
        std_error = 0.03 + 2 / a.numel() ** 0.5  # the spread of an estimated std
        assert a_std == pytest.approx(b_std, rel=std_error, abs=1e-7), name
        if a.numel() > 10_000:  # the extremes of a normal lie near 4 std, of a uniform at 1.73
            a_extreme = a.abs().max() / a.std()
            b_extreme = b.abs().max() / b.std()
            assert a_extreme.item() == pytest.approx(b_extreme.item(), rel=0.3), name


@pytest.mark.parametrize("size", ["S/16", "B/16", "B/32", "L/14", "H/14"])
def test_counts_and_heads_equal_open_clip(size):
    open_clip = pytest.importorskip("open_clip")
    name = "ViT-" + size.replace("/", "-")
    with torch.device("meta"):
        reference = open_clip.model.CLIP(**open_clip.get_model_config(name))

    shape = ModelConfig(size=size).shape

    assert count(meta("clip", size)) == count(reference)
    # The number of heads does not change the count.
    assert shape.heads == reference.visual.transformer.resblocks[0].attn.num_heads
    assert shape.text_heads == reference.transformer.resblocks[0].attn.num_heads


# ---- what a model costs


def golden_lines() -> list[str]:
    sizes = []
    for name in SIZES:
        patches = (8,) if name == "nano" else PATCH_SIZES[1:]
        sizes += [f"{name}/{patch}" for patch in patches]
    lines = []
    for flavour in FLAVOURS:
        lines += [f"{flavour} {size} {count(meta(flavour, size))}" for size in sizes]
    return lines


@pytest.mark.parametrize("line", GOLDEN.read_text().splitlines())
def test_parameter_counts(line):
    """A size that has no line yet is not compared."""
    flavour, size, parameters = line.split()
    assert count(meta(flavour, size)) == int(parameters)


PAPERS = {
    ("flip", "B/16"): 139.8,
    ("flip", "L/16"): 413.0,
    ("flip", "H/14"): 966.4,
    ("clip", "B/16"): 149.6,
}


@pytest.mark.parametrize("flavour, size", PAPERS)
def test_parameter_counts_of_the_papers(flavour, size):
    assert round(count(meta(flavour, size)) / 1e6, 1) == PAPERS[flavour, size]


# ---- behavior


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_patches_in_any_order(flavour):
    vision = small(flavour).vision
    patches = torch.randn(2, 16, 192)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    straight = vision(patches, everywhere(2))
    shuffled = vision(patches[:, order], everywhere(2)[:, order])
    elsewhere = vision(patches, everywhere(2)[:, order])

    torch.testing.assert_close(shuffled[:, 1:], straight[:, 1:][:, order])
    torch.testing.assert_close(vision.pool(shuffled), vision.pool(straight))
    assert not torch.allclose(vision.pool(elsewhere), vision.pool(straight), atol=1e-3)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_uint8_equals_normalised_floats(flavour):
    vision = small(flavour).vision
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(vision.cfg.mean).view(3, 1, 1)
    std = torch.tensor(vision.cfg.std).view(3, 1, 1)
    integers = patches_of(pixels.float(), 8).byte()
    floats = patches_of((pixels / 255 - mean) / std, 8)

    from_integers = vision(integers, everywhere(2))
    from_floats = vision(floats, everywhere(2))

    torch.testing.assert_close(from_integers, from_floats)


def test_flip_class_token_has_no_position_and_joins_the_mean():
    vision = small("flip").vision
    inputs = []
    vision.blocks.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    # Zero patches: without a bias, their tokens are the positions.
    tokens = vision(torch.zeros(1, 3, 192), torch.tensor([[0, 5, 9]]))

    assert "positions" not in vision.state_dict()
    assert vision.positions.shape == (16, 128)
    torch.testing.assert_close(inputs[0][0, 0], vision.cls)
    torch.testing.assert_close(inputs[0][0, 1:], vision.positions[[0, 5, 9]])
    torch.testing.assert_close(vision.pool(tokens), tokens.mean(1))


def test_flip_text_pools_the_first_token():
    towers = small("flip")
    ids, lengths = captions()
    packed = PackedSequences(lengths, len(ids), None, False)
    text = towers.text
    firsts = [0, 5, 17, 19]

    inputs = text.token(ids) + text.positions[packed.positions]
    outputs = text.blocks(inputs, packed)

    torch.testing.assert_close(text(ids, lengths), text.norm(outputs[firsts]))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(flavour):
    patches = torch.randn(4, 7, 192, generator=torch.Generator().manual_seed(0))
    results = []

    for recompute in (False, True):
        towers = small(flavour, checkpoint_activations=recompute)
        image = towers.encode_image(patches, everywhere(4)[:, :7])
        text = towers.encode_text(*captions())
        logits = towers.temperature() * image @ text.T
        logits.logsumexp(1).sum().backward()
        results.append({name: p.grad for name, p in towers.named_parameters()})

    stored, recomputed = results
    for name, gradient in stored.items():
        assert gradient is not None, name
        assert torch.equal(gradient, recomputed[name]), name


def test_frozen_patch_embedding():
    towers = small("flip", vision=VisionConfig(freeze_patch=True))

    frozen = [name for name, p in towers.named_parameters() if not p.requires_grad]

    assert frozen == ["vision.patch.weight", "vision.patch.bias"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bf16_runs_and_stays_near(flavour):
    towers = small(flavour)
    pixels = torch.randint(0, 256, (4, 16, 192), dtype=torch.uint8)

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
    assert not list(temperature.buffers())
    assert list(temperature.state_dict()) == ["logit_scale"]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ModelConfig(size="B16"), "model.size: unknown 'B16'.*nano, .*B, .*H"),
        (lambda: ModelConfig(size="B/15"), "8, 14, 16, 32"),
        (lambda: ModelConfig(size="L/14", image_size=230), "model.image_size: 230"),
        (lambda: ModelConfig(init="kaiming"), "model.init: unknown 'kaiming'; known: clip, flip"),
        (
            lambda: VisionConfig(positions="rope"),
            "model.vision.positions: unknown 'rope'; known: learned, sincos",
        ),
        (
            lambda: VisionConfig(activation="relu"),
            "model.vision.activation: unknown 'relu'.*gelu, gelu_tanh, quick_gelu",
        ),
        (lambda: VisionConfig(std=(1.0, 0.0, 1.0)), "std must be above 0"),
        (lambda: TextConfig(pool="argmax"), "model.text.pool: unknown 'argmax'; known: eot, first"),
        (lambda: TextConfig(causal=True), "use pool: eot"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")
