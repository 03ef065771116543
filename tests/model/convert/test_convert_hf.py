"""Hugging Face's CLIPModel both ways: our tensors come back bit for bit, and transformers' own
model computes what ours does.

Random models of both flavours, as far as HF has them, and random models that transformers made
itself.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glimpse.model import tensor_files
from glimpse.model.convert import hf
from glimpse.model.convert.positions import TERMS_FILE, sincos_table
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel, select_vision_weights
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.tests.model.test_towers import patches_of

VOCAB, EOT = 120, 119
CLIP = ModelConfig(
    "custom/32",
    Size(128, 2, 4, 96, 2, 3, 64),
    96,
    "clip",
    vision=VisionConfig(
        "learned",
        "cls",
        True,
        False,
        activation="quick_gelu",
        eps=1e-5,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    ),
    text=TextConfig(True, "eot", "quick_gelu", 1e-5),
)
GELU = replace(
    CLIP,
    size="custom/16",
    custom=Size(96, 3, 3, 128, 1, 2, 80, mlp=4.5, text_mlp=2.0),
    image_size=64,
    vision=replace(CLIP.vision, activation="gelu"),
    text=replace(CLIP.text, activation="gelu", eps=1e-6),
)
FLIP = replace(
    CLIP,
    size="nano/16",
    custom=None,
    image_size=64,
    init="flip",
    vision=VisionConfig(pool="cls", pre_norm=True),
    text=TextConfig(True, "eot"),
)
UNBIASED = replace(FLIP, vision=replace(FLIP.vision, patch_bias=False))


def made(cfg: ModelConfig, vocab: int = VOCAB, context: int = 32, **about) -> PortableModel:
    """A model whose every tensor matters."""
    torch.manual_seed(0)
    towers = Towers(cfg, vocab, context)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {name: parameter.detach() for name, parameter in towers.named_parameters()}
    about = ModelInfo(**{"eot": vocab - 1, **about})
    return PortableModel(cfg, vocab, context, LazyTensors.from_dict(tensors), about)


def inputs(model: PortableModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, ids padded with 0, and lengths: captions of every kind, the longest full."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([2, 5, model.context, 9])
    ids = torch.zeros(4, model.context, dtype=torch.int32)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(0, model.about.eot, (int(length),), generator=generator)
        row[length - 1] = model.about.eot
    return torch.randn(4, 3, *model.cfg.image_shape, generator=generator), ids, lengths


def embeddings(model: PortableModel) -> tuple[torch.Tensor, torch.Tensor]:
    towers, (images, ids, lengths) = model.towers(), inputs(model)
    patches = patches_of(images, model.cfg.patch_size)
    positions = torch.arange(patches.shape[1]).expand(4, -1)
    tokens = torch.cat([row[:length] for row, length in zip(ids, lengths)])
    with torch.no_grad():
        return towers.encode_image(patches, positions), towers.encode_text(tokens, lengths)


def assert_same(a: PortableModel, b: PortableModel) -> None:
    assert (a.cfg, a.vocab, a.context, a.about.eot) == (b.cfg, b.vocab, b.context, b.about.eot)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].dtype == b.tensors[name].dtype, name
        assert torch.equal(a.tensors[name], b.tensors[name]), name


def assert_theirs_agrees(model: PortableModel, folder: Path) -> None:
    images, ids, _ = inputs(model)
    peer = hf.reference_model(folder)
    pairs = zip(embeddings(model), peer(images, ids))
    for what, (ours, theirs) in zip(("images", "captions"), pairs):
        far = float((ours - theirs).abs().max())
        print(f"{model.cfg.size}: {far:.1e} ({what})")
        assert far < 1e-5
        assert ours.std(0).max() > 1e-2  # they are not all the same vector


@pytest.mark.parametrize(
    "cfg, context",
    [(CLIP, 77), (GELU, 32), (FLIP, 32), (UNBIASED, 77)],
    ids=["quick_gelu", "gelu", "flip", "sincos without bias"],
)
def test_there_and_back(tmp_path, cfg, context):
    model = made(cfg, context=context, interpolation="bilinear")

    hf.save(model, tmp_path / "hf")
    back = hf.load(tmp_path / "hf")

    assert hf.recognizes(tmp_path / "hf")
    assert back.about.interpolation == "bilinear"
    # `init` is stored only beside tensors that folding loses.
    wanted = replace(model, cfg=replace(cfg, init="clip")) if cfg == UNBIASED else model
    assert_same(back, wanted)
    assert (tmp_path / "hf" / TERMS_FILE).exists() == (cfg == FLIP)
    assert_theirs_agrees(model, tmp_path / "hf")


@pytest.mark.slow
def test_a_whole_b32(tmp_path):
    vision = VisionConfig("learned", "cls", True, False, activation="gelu", eps=1e-5)
    text = TextConfig(True, "eot", "gelu", 1e-5)
    model = made(ModelConfig("B/32", init="clip", vision=vision, text=text), 49408, 77)

    hf.save(model, tmp_path / "hf")
    assert_same(hf.load(tmp_path / "hf"), model)
    assert_theirs_agrees(model, tmp_path / "hf")


def theirs(folder: Path, **text):
    """Return a random model, written by transformers."""
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        hidden_act="gelu_pytorch_tanh",
    )
    usual = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=100,
        max_position_embeddings=20,
        bos_token_id=EOT - 1,
        eos_token_id=EOT,
        pad_token_id=1,
        layer_norm_eps=1e-6,
        **sizes,
    )
    vision = dict(hidden_size=128, intermediate_size=300, image_size=60, patch_size=20, **sizes)
    cfg = CLIPConfig(text_config=usual | text, projection_dim=48, vision_config=vision)
    torch.manual_seed(0)
    model = CLIPModel(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("eos", [EOT, 2])
def test_from_transformers(tmp_path, eos):
    """An eos_token_id of 2 means the largest id, as OpenAI's own folders have it."""
    theirs(tmp_path / "hf", eos_token_id=eos)

    model = hf.load(tmp_path / "hf")

    assert model.cfg.custom == Size(128, 2, 4, 64, 2, 4, 48, mlp=300 / 128, text_mlp=100 / 64)
    assert model.about.eot == EOT
    assert_theirs_agrees(model, tmp_path / "hf")

    hf.save(model, tmp_path / "again")
    assert not (tmp_path / "again" / TERMS_FILE).exists()
    source = tensor_files.read_tensors(tmp_path / "hf" / "model.safetensors")
    again = tensor_files.read_tensors(tmp_path / "again" / "model.safetensors")
    assert source.keys() == again.keys()
    for name in source:
        assert torch.equal(source[name], again[name])
        assert source[name].shape == again[name].shape


def test_older_folders(tmp_path):
    """Shards, pickles, buffers of positions, a config in two parts, of which the `_dict` counts."""
    folder = tmp_path / "hf"
    model = theirs(folder)
    wanted = hf.load(folder)

    # Two pickles in place of the file of weights.
    state = model.state_dict() | {name: torch.arange(9)[None] for name in hf.INDEX_BUFFERS}
    names = sorted(state)
    file_of = {}
    for n, part in enumerate((names[:30], names[30:])):
        tensors = {name: state[name] for name in part}
        torch.save({"state_dict": tensors, "ema": state[part[0]]}, folder / f"{n}.bin")
        file_of |= dict.fromkeys(part, f"{n}.bin")
    (folder / "model.safetensors").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))

    # The text tower's config under its older name.
    config = folder / "config.json"
    tree = json.loads(config.read_text())
    tree["text_config_dict"] = tree["text_config"]
    tree["text_config"] = {"hidden_size": 9}
    config.write_text(json.dumps(tree))

    again = hf.load(folder)

    assert_same(again, wanted)
    assert again.about.source["notes"] == "left out: ema of 0.bin, ema of 1.bin"


def test_a_config_that_says_little_is_openais(tmp_path):
    """The defaults are transformers' own."""
    from transformers import CLIPConfig

    cfg = CLIPConfig(vision_config={}, text_config={})
    for part, default in ((cfg.vision_config, hf.VISION), (cfg.text_config, hf.TEXT)):
        assert {key: getattr(part, key) for key in default} == default


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            dict(vision=dict(pool="mean")),
            'model.vision.pool "mean": HF\'s CLIPModel supports only "cls"',
        ),
        (
            dict(vision=dict(pre_norm=False)),
            "model.vision.pre_norm false: HF's CLIPModel supports only true",
        ),
        (
            dict(text=dict(causal=False)),
            "model.text.causal false: HF's CLIPModel supports only true",
        ),
        (dict(text=dict(causal=False, pool="first")), "model.text.causal false"),
        (
            dict(image_size=(64, 96)),
            r"model.image_size \[64, 96\]: HF's CLIPModel supports only square images",
        ),
        (dict(about=dict(pad_text=True)), "data.pad_text true: HF's CLIPModel supports only false"),
        (
            dict(about=dict(eot=None, tokenizer="wordpiece")),
            "data.tokenizer 'wordpiece': .* end-of-text token; this has none",
        ),
        (dict(about=dict(eot=2)), "this one's id, 2, it takes to mean a caption's largest id"),
    ],
)
def test_what_hf_cannot_express(tmp_path, change, complaint):
    cfg = replace(
        CLIP,
        vision=replace(CLIP.vision, **change.get("vision", {})),
        text=replace(CLIP.text, **change.get("text", {})),
        image_size=change.get("image_size", 96),
    )
    with pytest.raises(ValueError, match=complaint):
        hf.save(made(cfg, **change.get("about", {})), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_vision_tower_alone_is_refused(tmp_path):
    model = made(CLIP)
    alone = select_vision_weights(model.tensors)

    with pytest.raises(
        ValueError, match="a vision tower alone: HF's CLIPModel has a text tower too"
    ):
        hf.save(PortableModel(CLIP, 0, 0, alone), tmp_path / "hf")


@pytest.mark.parametrize(
    "where, change, complaint",
    [
        (
            "vision_config",
            dict(hidden_act="relu"),
            "vision_config.hidden_act 'relu': Glimpse supports gelu, gelu_pytorch_tanh, quick_gelu",
        ),
        ("vision_config", dict(image_size=[96, 64]), r"vision_config.image_size \[96, 64\]"),
        ("vision_config", dict(patch_size=31), "model.image_size: 96 is not a multiple"),
        ("vision_config", dict(num_channels=1), "vision_config.num_channels 1"),
        ("text_config", dict(eos_token_id=[3, 4]), r"text_config.eos_token_id \[3, 4\]"),
        (
            "text_config",
            dict(num_attention_heads=5),
            "model.custom.text_width: 96 is not a multiple",
        ),
        (
            "text_config",
            dict(max_position_embeddings=40),
            r"text.positions is \(32, 96\); its architecture makes it \(40, 96\)",
        ),
        (
            "text_config",
            dict(num_hidden_layers=3),
            r"text_model.encoder.layers.2.self_attn.q_proj.weight is missing \(and 15 more\)",
        ),
        (
            "text_config",
            dict(num_hidden_layers=1),
            (
                r"unexpected tensor text_model.encoder.layers.1.layer_norm1.bias \(96,\)"
                r" \(and 15 more\)"
            ),
        ),
    ],
)
def test_what_our_towers_cannot_express(tmp_path, where, change, complaint):
    hf.save(made(CLIP), tmp_path / "hf")
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    tree[where].update(change)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=complaint) as error:
        hf.load(tmp_path / "hf")
    assert str(error.value).startswith(str(tmp_path / "hf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            dict(size={"shortest_edge": 110}),
            "preprocessor_config.json: size {'shortest_edge': 110}: our evaluations",
        ),
        (dict(do_normalize=False), "do_normalize False: .*; write true"),
        (dict(resample=1), r"resample 1: we have 3 \(bicubic\), 2"),
        (None, "no weights; one of model.safetensors"),
    ],
)
def test_images_prepared_otherwise_and_no_weights(tmp_path, change, complaint):
    hf.save(made(CLIP), tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    tree = json.loads(file.read_text())
    if change is None:
        (tmp_path / "hf" / "model.safetensors").unlink()
    file.write_text(json.dumps(tree | (change or {})))
    with pytest.raises(ValueError, match=complaint):
        hf.load(tmp_path / "hf")


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{x", "preprocessor_config.json: no json"),
        ("[]", "preprocessor_config.json: holds a list, and should hold keys"),
        ('{"image_processor": []}', "preprocessor_config.json: image_processor holds a list"),
        (
            '{"image_mean": 0.5}',
            "preprocessor_config.json: image_mean 0.5: it should be three numbers",
        ),
        (
            '{"image_std": [1, 2]}',
            r"preprocessor_config.json: image_std \[1, 2\]: it should be three numbers",
        ),
    ],
)
def test_a_broken_image_processor_is_named(tmp_path, content, complaint):
    hf.save(made(CLIP), tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/hf/{complaint}"):
        hf.load(tmp_path / "hf")


def test_image_processors_of_other_ages(tmp_path):
    """One number a size, all within processor_config.json, or none: then it is OpenAI's."""
    hf.save(made(CLIP), tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    tree = json.loads(file.read_text())
    file.unlink()
    assert hf.load(tmp_path / "hf").cfg.vision.mean == hf.MEAN
    tree = {"image_processor": tree | dict(size=96, crop_size=96)}
    (file.parent / "processor_config.json").write_text(json.dumps(tree))
    assert hf.load(tmp_path / "hf").cfg == CLIP


def test_positions_that_were_tuned_elsewhere(tmp_path):
    hf.save(made(FLIP), tmp_path / "hf")
    tensors = dict(tensor_files.read_tensors(tmp_path / "hf" / "model.safetensors"))
    tensors[hf.POSITIONS] = tensors[hf.POSITIONS] + 1
    tensor_files.write_safetensors(
        tmp_path / "hf" / "model.safetensors", LazyTensors.from_dict(tensors)
    )
    model = hf.load(tmp_path / "hf")
    assert (model.cfg.vision.positions, model.cfg.vision.patch_bias) == ("learned", False)
    assert not torch.equal(model.tensors["vision.positions"], sincos_table(FLIP))
    assert_theirs_agrees(model, tmp_path / "hf")


def test_precisions(tmp_path):
    """In bf16 each tensor is what rounding makes of it; transformers reads it."""
    model = made(CLIP)
    hf.save(model, tmp_path / "hf", torch.bfloat16)
    back = hf.load(tmp_path / "hf")

    for name, tensor in model.tensors.items():
        assert torch.equal(back.tensors[name], tensor.bfloat16())
    assert_theirs_agrees(back, tmp_path / "hf")
