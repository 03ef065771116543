"""Compare CLIPs of custom shapes with open_clip: sizes that are not in the table, MLPs of any
ratio, CLIPA's pooling.

Run: pytest tests/model/test_shapes.py
"""

import dataclasses
import json

import pytest
import torch

from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.run.lib import config
from glimpse.run.train import checkpoint, initial_weights
from glimpse.tests.model.test_towers import (
    CLIP,
    Keep,
    assert_close_gradients,
    captions,
    count,
    everywhere,
    ours,
    patches_of,
)

QUICKSTART = config.ROOT / "run/configs/quickstart.yaml"
ODD = Size(
    width=48,
    depth=2,
    heads=3,
    text_width=40,
    text_depth=1,
    text_heads=2,
    embed=24,
    mlp=4.9231,
    text_mlp=2.5,
)
NUMBERS = (
    "{width: 48, depth: 2, heads: 3, text_width: 40, text_depth: 1, text_heads: 2, embed: 24, mlp:"
    " 4.9231, text_mlp: 2.5}"
)
CUSTOM = ["model.size=custom/14", "model.image_size=42", f"model.custom={NUMBERS}"]


def odd() -> ModelConfig:
    return dataclasses.replace(CLIP, size="custom/14", custom=ODD, image_size=42)


def peer(**vision_options):
    """A small random open_clip model of the shape of `odd()`."""
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        layers=2,
        width=48,
        head_width=16,
        mlp_ratio=4.9231,
        patch_size=14,
        image_size=42,
        **vision_options,
    )
    text = CLIPTextCfg(
        context_length=12, vocab_size=100, width=40, heads=2, layers=1, mlp_ratio=2.5
    )
    return Peer(24, vision, text)


# ---- sizes


def test_a_custom_size_equals_open_clip():
    reference = peer()
    towers = Towers(odd(), 100, 12)
    towers.load_state_dict(ours(reference.state_dict()))
    images = torch.randn(4, 3, 42, 42)
    ids, lengths = captions()
    padded = torch.zeros(4, 12, dtype=torch.long)
    padded[torch.arange(12) < lengths[:, None]] = ids.long()

    image = towers.encode_image(patches_of(images, 14), everywhere(4, 3))
    text = towers.encode_text(ids, lengths)
    expected_image, expected_text = reference(images, padded)[:2]

    torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, expected_text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, size, sides",
    [
        ("ViT-g-14", "custom/14", Size(1408, 40, 16, 1024, 24, 16, 1024, mlp=4.3637)),
        ("ViT-bigG-14", "custom/14", Size(1664, 48, 16, 1280, 32, 20, 1280, mlp=4.9231)),
    ],
)
def test_counts_of_large_sizes_equal_open_clip(name, size, sides):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        reference = open_clip.model.CLIP(**open_clip.get_model_config(name))
        towers = Towers(dataclasses.replace(CLIP, size=size, custom=sides), 49408, 77)

    assert count(towers) == count(reference)
    assert sides.heads == reference.visual.transformer.resblocks[0].attn.num_heads


@pytest.mark.parametrize("visible", [9, 4])
def test_a_mean_before_the_norm_equals_open_clip(visible):
    """CLIPA's pooling: embeddings, gradients, and patch tokens that are those of a plain mean."""
    # The same model in open_clip and here, on visible patches.
    reference = peer(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True)
    torch.nn.init.uniform_(reference.visual.ln_post.weight, 0.5, 2)
    vision = dataclasses.replace(CLIP.vision, pool="mean_then_norm", pre_norm=False)
    cfg = dataclasses.replace(odd(), vision=vision)
    towers = Towers(cfg, 100, 12)
    towers.load_state_dict(ours(reference.state_dict()))
    images = torch.randn(4, 3, 42, 42)
    places = torch.rand(4, 9).argsort(1)[:, :visible].sort(1).values
    reference.visual.patch_dropout = Keep(places)
    patches = patches_of(images, 14).gather(1, places[:, :, None].expand(-1, -1, 588))

    # Embeddings.
    embeddings = towers.encode_image(patches, places)
    expected = reference.encode_image(images, normalize=True)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)

    # Gradients.
    weights = torch.randn(4, 24)
    (embeddings * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = ours({f"visual.{name}": p.grad for name, p in reference.visual.named_parameters()})
    for name, parameter in towers.vision.named_parameters():
        assert_close_gradients(name, parameter.grad, gradients[f"vision.{name}"])

    # The norm after the mean changes the embedding alone.
    plain = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, pool="mean"))
    other = Towers(plain, 100, 12)
    other.load_state_dict(towers.state_dict())
    patch_tokens = towers.vision(patches, places)[:, 1:]
    other_patch_tokens = other.vision(patches, places)[:, 1:]
    torch.testing.assert_close(patch_tokens, other_patch_tokens)
    assert not torch.allclose(embeddings, other.encode_image(patches, places), atol=1e-2)


def test_the_recipes_draw_any_ratio():
    cfg = ModelConfig(size="custom/8", image_size=32, custom=Size(64, 2, 4, 64, 1, 4, 32, mlp=1.5))

    towers = Towers(cfg, 100, 12)

    assert towers.vision.blocks[1].mlp.up.weight.shape == (96, 64)
    assert towers.text.blocks[0].mlp.up.weight.shape == (256, 64)


def test_a_custom_size_is_saved_and_loads_back(tmp_path):
    for more in ([], CUSTOM):
        cfg = config.load(QUICKSTART, more)
        config.save(cfg, tmp_path / "config.yaml", {})
        assert "custom:" in (tmp_path / "config.yaml").read_text()
        assert config.load(tmp_path / "config.yaml") == cfg
    assert cfg.model.custom == ODD
    assert cfg.model.shape == ODD
    assert cfg.model.grid == (3, 3)


def test_checkpoints_from_before_the_key_are_still_the_same_model(tmp_path):
    cfg = config.load(QUICKSTART)
    identity = checkpoint.identity(cfg, "t")
    old_model = {key: value for key, value in identity["model"].items() if key != "custom"}
    old = {**identity, "model": old_model}
    other = checkpoint.identity(config.load(QUICKSTART, CUSTOM), "t")

    differing = [key for key, *_ in checkpoint.differences(old, other)]

    assert not list(checkpoint.differences(old, identity))
    assert "model.custom" in differing


def test_a_borrowed_tower_of_another_custom_size_is_refused(tmp_path):
    identity = {"model": config.tuples_to_lists(dataclasses.asdict(odd()))}
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": identity, "files": {}}))
    deeper = dataclasses.replace(odd(), custom=dataclasses.replace(ODD, depth=3))

    initial_weights.check_vision_tower(tmp_path, odd())

    with pytest.raises(ValueError, match="model.shape.depth: 2, but this config has 3"):
        initial_weights.check_vision_tower(tmp_path, deeper)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model.size=custom/14", "model.image_size=42"],
            "model.custom: missing; model.size 'custom/14'",
        ),
        (
            ["model.size=B/16", f"model.custom={NUMBERS}"],
            "model.custom: not used by model.size 'B/16'",
        ),
        ([*CUSTOM, "model.size=custom/0"], "model.size: unknown 'custom/0'"),
        ([*CUSTOM, "model.size=custom"], "model.size: unknown 'custom'"),
        (
            [*CUSTOM, "model.custom.heads=5"],
            "model.custom.width: 48 is not a multiple of model.custom.heads \(5\)",
        ),
        (
            [*CUSTOM, "model.custom.text_heads=3"],
            "model.custom.text_width: 40 is not a multiple of model.custom.text_heads \(3\)",
        ),
        ([*CUSTOM, "model.custom.depth=0"], "model.custom.depth: 0"),
        ([*CUSTOM, "model.custom.mlp=0.01"], "model.custom.mlp: 0.01"),
        ([*CUSTOM, "model.custom.mpl=4"], "model.custom.mpl: unknown .* did you mean 'mlp'"),
        ([*CUSTOM, "model.custom.embed=null"], "model.custom.embed: missing"),
        ([*CUSTOM, "model.custom=7"], "model.custom: 7 is not a mapping; its keys are width"),
        (
            [*CUSTOM, "model.custom.width=50", "model.custom.heads=5"],
            "is not a multiple of 4, which model.vision.positions sincos needs",
        ),
    ],
)
def test_a_wrong_custom_size_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        config.load(QUICKSTART, overrides)
    assert "\n" not in str(caught.value)
