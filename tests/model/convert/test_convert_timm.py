"""Towers as timm's models and back, bit for bit, with the features of timm's own; timm's and MAE's
as towers; what is refused.

Run: pytest tests/model/convert/test_convert_timm.py
"""

import json
import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from glimpse.model.convert import open_clip
from glimpse.model.convert import timm as timm_format
from glimpse.model.convert.positions import TERMS_FILE, sincos_table
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.run import convert
from glimpse.tests.model.test_towers import patches_of

timm = pytest.importorskip("timm")

CLIP = VisionConfig(
    positions="learned",
    pool="cls",
    pre_norm=True,
    patch_bias=False,
    activation="quick_gelu",
    eps=1e-5,
)
FLAVOURS = {
    "flip": ModelConfig("nano/8", image_size=32),
    "clip": ModelConfig("nano/8", image_size=(32, 48), vision=CLIP),
    "its own size": ModelConfig(
        "custom/4",
        Size(96, 2, 3, 64, 1, 2, 32, mlp=3.5),
        image_size=(20, 12),
        vision=VisionConfig(
            positions="learned", pool="mean", activation="gelu", mean=(0.5, 0.4, 0.3)
        ),
    ),
    "clipa": ModelConfig(
        "nano/8", image_size=32, vision=VisionConfig(pool="mean_then_norm", activation="gelu")
    ),
    # timm has no such: the bias is folded
    "a norm and a bias": ModelConfig("nano/8", image_size=32, vision=VisionConfig(pre_norm=True)),
    # nor such: a bias of zeros
    "no norm, no bias": ModelConfig("nano/8", image_size=32, vision=VisionConfig(patch_bias=False)),
}


def pair(cfg: ModelConfig) -> PortableModel:
    torch.manual_seed(0)
    tensors = {}
    for name, parameter in Towers(cfg, 5, 3).named_parameters():
        tensors[name] = parameter.detach() + 0.05 * torch.randn_like(parameter)
    return PortableModel(cfg, 5, 3, LazyTensors.from_dict(tensors))


def tokens(model: PortableModel, images: torch.Tensor) -> torch.Tensor:
    patches = patches_of(images, model.cfg.patch_size)
    positions = torch.arange(patches.shape[1]).expand(len(images), -1)
    with torch.no_grad():
        return model.towers().vision(patches, positions)


def features(model: PortableModel, images: torch.Tensor) -> torch.Tensor:
    return model.skeleton().vision.pool(tokens(model, images))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_out_and_back(tmp_path, flavour):
    ours, folder = pair(FLAVOURS[flavour]), tmp_path / "out"

    # Out.
    assert "text tower" in timm_format.save(ours, folder)[0]
    assert timm_format.recognizes(folder)
    assert (folder / TERMS_FILE).exists() == (flavour == "a norm and a bias")

    # timm's own model and its preparation of images.
    images = torch.randn(3, 3, *ours.cfg.image_shape)
    reference, none = timm_format.reference_model(folder)(images, None)
    far = float((features(ours, images) - reference).abs().max())
    print(f"{flavour}: {far:.1e} (features, of {float(reference.abs().max()):.1f} at most)")
    assert none is None
    assert far < 1e-5
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    assert tuple(data["mean"]) == ours.cfg.vision.mean
    assert tuple(data["std"]) == ours.cfg.vision.std
    assert tuple(data["input_size"]) == (3, *ours.cfg.image_shape)

    # Back.
    back = timm_format.load(folder)
    assert back.vocab == 0
    assert back.cfg.vision == ours.cfg.vision
    assert back.cfg.image_shape == ours.cfg.image_shape
    assert back.cfg.size == ours.cfg.size
    assert back.cfg.shape.heads == ours.cfg.shape.heads
    assert back.cfg.shape.mlp == ours.cfg.shape.mlp
    assert back.tensors.keys() == {name for name in ours.tensors if name.startswith("vision.")}
    assert all(torch.equal(tensor, ours.tensors[name]) for name, tensor in back.tensors.items())
    assert "text tower" not in timm_format.save(back, tmp_path / "alone")


def test_a_pair_of_another_format_converted(tmp_path, monkeypatch, capsys):
    """run/convert.py tells what timm does not take, and runs both libraries' models."""
    cfg = replace(
        FLAVOURS["clip"],
        size="custom/8",
        custom=Size(96, 2, 3, 64, 1, 2, 32),
        text=TextConfig(causal=True, pool="eot", activation="quick_gelu", eps=1e-5),
    )
    towers = Towers(cfg, 49408, 77)
    tensors = LazyTensors.from_dict({name: p.detach() for name, p in towers.named_parameters()})
    model = PortableModel(cfg, 49408, 77, tensors, ModelInfo(tokenizer="clip_bpe", eot=49407))
    open_clip.save(model, tmp_path / "pair")
    line = ["convert.py", "timm", str(tmp_path / "pair"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", line)

    convert.main()

    out = capsys.readouterr().out
    assert "the text tower" in out
    assert re.search("pair compared with its reference library: .*images.*captions", out)
    assert re.search("out compared with its reference library: .*images", out)
    assert not (tmp_path / "out" / "tokenizer.txt").exists()


def test_tuned_elsewhere_a_bias_of_zeros_is_one(tmp_path):
    ours = pair(FLAVOURS["no norm, no bias"])
    timm_format.save(ours, tmp_path / "out")
    reference = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    reference.patch_embed.proj.bias.data += 1
    torch.save(reference.state_dict(), tmp_path / "out" / "pytorch_model.bin")
    (tmp_path / "out" / "model.safetensors").unlink()

    back = timm_format.load(tmp_path / "out")

    assert back.cfg.vision.patch_bias
    assert back.tensors["vision.patch.bias"].eq(1).all()


def test_half_precision(tmp_path):
    ours = pair(FLAVOURS["flip"])
    timm_format.save(ours, tmp_path / "out", torch.bfloat16)

    back = timm_format.load(tmp_path / "out")

    assert back.cfg == ours.cfg
    for name, tensor in back.tensors.items():
        assert torch.equal(tensor, ours.tensors[name].bfloat16())


SMALL = dict(embed_dim=96, depth=2, num_heads=6, img_size=32, patch_size=8)


@pytest.mark.parametrize(
    "name, args, vision",
    [
        (
            "vit_tiny_patch16_224",
            {"num_classes": 7},
            VisionConfig(positions="learned", pool="cls", activation="gelu"),
        ),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg"},
            VisionConfig(positions="learned", pool="mean_then_norm", activation="gelu"),
        ),
        ("vit_base_patch32_clip_quickgelu_224", {}, CLIP),
        (
            "vit_base_patch16_clip_224",
            {"global_pool": "avg", "fc_norm": False},
            replace(CLIP, activation="gelu", pool="mean"),
        ),
    ],
)
def test_models_that_timm_wrote(tmp_path, name, args, vision):
    torch.manual_seed(1)
    reference = timm.create_model(name, **SMALL, **args)
    timm.models.save_for_hf(reference, tmp_path / "hub", safe_serialization=True)
    prepared = reference.pretrained_cfg

    model = timm_format.load(tmp_path / "hub")

    mean, std = tuple(prepared["mean"]), tuple(prepared["std"])
    assert model.cfg.vision == replace(vision, mean=mean, std=std)
    assert model.cfg.shape.heads == 6
    notes = model.about.source["notes"]
    assert notes.startswith(f"crop_pct {prepared['crop_pct']}: ")
    assert notes.endswith("; left out: head")
    assert "assumed" not in notes
    images = torch.randn(2, 3, 32, 32)
    wanted, _ = timm_format.reference_model(tmp_path / "hub")(images)
    assert (features(model, images) - wanted).abs().max() < 1e-5


def bare(folder, change=lambda tensors: tensors, **args):
    """Write the state of a small model of timm's into a file; return its path and the model."""
    torch.manual_seed(1)
    model = timm.create_model("vit_base_patch16_224", **SMALL | {"num_classes": 3} | args).eval()
    content = {"model": change(model.state_dict()), "args": Namespace(lr=1e-3)}
    if args.get("global_pool") == "avg":
        content["model_ema"] = model.state_dict()
    torch.save(content, folder / "model.pth")
    return folder / "model.pth", model


def test_a_bare_file(tmp_path):
    path, reference = bare(tmp_path)
    assert timm_format.recognizes(path)
    model = timm_format.load(path, heads=6, pool="mean", mean=[0.5] * 3)
    vision = VisionConfig(positions="learned", pool="mean", activation="gelu", mean=(0.5, 0.5, 0.5))
    size = Size(96, 2, 6, 96, 2, 1, 96)
    assert model.cfg == ModelConfig("custom/8", size, image_size=32, vision=vision)

    images = torch.randn(2, 3, 32, 32)
    pooled, _ = timm_format.reference_model(path, heads=6, pool="mean")(images)
    assert (tokens(model, images) - reference.forward_features(images)).abs().max() < 1e-5
    assert (features(model, images) - pooled).abs().max() < 1e-5

    assert timm_format.load(path).cfg.shape.heads == 1  # 64 wide, unless given

    wide, _ = bare(tmp_path, img_size=(16, 64))
    assert timm_format.load(wide, image_size=(16, 64)).cfg.grid == (2, 8)
    with pytest.raises(
        ValueError,
        match=r"pos_embed \(1, 17, 96\): not the places of .* 16 x 48; say its height and width",
    ):
        timm_format.load(wide, image_size=[16, 48])


@pytest.mark.parametrize(
    "args, complaint",
    [
        ({"reg_tokens": 2}, "reg_token: register tokens"),
        ({"init_values": 0.1}, r"blocks.0.ls1.gamma: layer scale"),
        ({"qk_norm": True}, r"blocks.0.attn.q_norm.weight: norms of queries and keys"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token is missing"),
        ({"global_pool": "map"}, "attn_pool.latent: attention pooling"),
        ({"mlp_layer": timm.layers.SwiGLU}, r"blocks.0.mlp.fc1_g.weight: gated MLPs"),
        ({"mlp_layer": timm.layers.GluMlp}, r"blocks.0.mlp.fc2.weight: gated MLPs"),
        ({"qkv_bias": False}, r"blocks.0.attn.qkv.bias is missing"),
        ({"in_chans": 1}, r"patch_embed.proj.weight \(96, 1, 8, 8\): ours is"),
        ({"no_embed_class": True}, r"pos_embed \(1, 16, 96\): not the places"),
        ({"final_norm": False}, "norm.weight is missing"),
        ({"scale_mlp_norm": True}, "unexpected tensor blocks.0.mlp.norm.bias"),
    ],
)
def test_other_architectures_are_refused(tmp_path, args, complaint):
    path, _ = bare(tmp_path, **args)
    with pytest.raises(ValueError, match=complaint):
        timm_format.load(path)


def test_distilled_missing_extra_and_misshapen_tensors(tmp_path):
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    torch.save(distilled.state_dict(), tmp_path / "deit.pth")
    with pytest.raises(ValueError, match=r"deit.pth: dist_token: a distillation token"):
        timm_format.load(tmp_path / "deit.pth")

    def without_bias(tensors):
        return {name: t for name, t in tensors.items() if name != "blocks.1.norm2.bias"}

    def with_more(tensors):
        return tensors | {"more": torch.ones(2)}

    def with_short_norm(tensors):
        return tensors | {"norm.weight": torch.ones(5)}

    for change, complaint in (
        (without_bias, "blocks.1.norm2.bias is missing"),
        (with_more, r"unexpected tensor more \(2,\)"),
        (with_short_norm, r"vision.norm.weight is \(5,\); its architecture makes it \(96,\)"),
    ):
        path, _ = bare(tmp_path, change)
        with pytest.raises(ValueError, match=complaint):
            timm_format.load(path)


def test_what_a_folder_lacks_or_cannot_say(tmp_path):
    cfg = ModelConfig("nano/8", image_size=32, vision=VisionConfig(eps=2e-6))
    with pytest.raises(
        ValueError, match="model.vision.eps 2e-06: a config of timm's can say 1e-06 and 1e-05 alone"
    ):
        timm_format.save(pair(cfg), tmp_path / "no")
    folder = tmp_path / "out"
    assert not timm_format.recognizes(folder)
    assert not (tmp_path / "no").exists()

    timm_format.save(pair(FLAVOURS["flip"]), folder)
    tree = json.loads((folder / "config.json").read_text())
    for args, complaint in (
        ({"global_pool": "map"}, "config.json: model.vision.pool: unknown 'map'"),
        ({"act_layer": "relu"}, "config.json: model.vision.activation: unknown 'relu'"),
        ({"img_size": [32, 40]}, "pos_embed .* 32 x 40"),
    ):
        changed = tree | {"model_args": tree["model_args"] | args}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=complaint):
            timm_format.load(folder)
    assert timm_format.load(folder, image_size=32).cfg.image_shape == (32, 32)

    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: no config of timm's .*architecture"):
        timm_format.load(folder)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="out: no weights in it"):
        timm_format.load(folder)


# ---- MAE


def sincos_of_mae(width: int, side: int) -> torch.Tensor:
    """Return MAE's positions by its formula: a class token's zeros, then for each patch sines and
    cosines of its column, and of its row.
    """
    rows = [[0.0] * width]
    for y in range(side):
        for x in range(side):
            row = []
            for at in (x, y):
                angles = [at / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                angles = torch.tensor(angles, dtype=torch.float64)
                row += torch.sin(angles).tolist() + torch.cos(angles).tolist()
            rows.append(row)
    return torch.tensor(rows)


def test_positions_are_those_of_mae():
    cfg = ModelConfig("custom/8", Size(64, 1, 1, 64, 1, 1, 64), image_size=40)

    assert torch.equal(sincos_of_mae(64, 5), sincos_table(cfg))


DECODER = (
    "mask_token",
    "decoder_embed.weight",
    "decoder_pos_embed",
    "decoder_blocks.0.norm1.weight",
    "decoder_pred.bias",
)


def of_mae(tensors: dict) -> dict:
    """Return a pre-trained checkpoint: fixed positions, a decoder, no classifier."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head")}
    tensors["pos_embed"] = sincos_of_mae(96, 4)[None]
    return tensors | {name: torch.ones(8) for name in DECODER}


def test_mae_pretrained(tmp_path):
    path, reference = bare(tmp_path, of_mae)
    assert timm_format.recognizes(path)
    model = timm_format.load(path, heads=6, pool="mean_with_cls")
    assert model.cfg.vision == VisionConfig(activation="gelu")
    notes, left_out = model.about.source["notes"].split("; left out: ")
    assumptions = "assumed, as nothing says it: activation gelu, eps 1e-06, mean [0.485,"
    assert notes.startswith(assumptions)
    assert notes.endswith("says otherwise")
    assert left_out == "decoder_blocks, decoder_embed, decoder_pos_embed, decoder_pred, mask_token"

    reference.pos_embed.data = sincos_of_mae(96, 4)[None]
    images = torch.randn(2, 3, 32, 32)
    pooled, _ = timm_format.reference_model(path, heads=6, pool="mean_with_cls")(images)
    assert (tokens(model, images) - reference.forward_features(images)).abs().max() < 1e-5
    assert (features(model, images) - pooled).abs().max() < 1e-5


def test_mae_finetuned(tmp_path):
    path, reference = bare(tmp_path, global_pool="avg")
    model = timm_format.load(path, heads=6)
    assert model.cfg.vision.pool == "mean_then_norm"
    assert model.about.source["notes"].endswith("; left out: head, model_ema")

    images = torch.randn(2, 3, 32, 32)
    wanted = reference.forward_head(reference.forward_features(images), pre_logits=True)
    pooled, _ = timm_format.reference_model(path, heads=6)(images)
    assert (features(model, images) - wanted).abs().max() < 1e-5
    assert (pooled - wanted).abs().max() < 1e-5
