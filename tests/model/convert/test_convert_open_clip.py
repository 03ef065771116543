"""open_clip's models in and out: bit-exact round trips, and embeddings equal to open_clip's own,
really run.

    bash run/test.sh tests/model/convert/test_convert_open_clip.py -s         prints the differences
"""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glimpse.data.tokenizer import build_tokenizer
from glimpse.model.convert import open_clip, positions
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.run.verify import proofs

SMALL = Size(width=128, depth=2, heads=2, text_width=64, text_depth=2, text_heads=1, embed=48)
CLIP_VISION = VisionConfig(
    positions="learned",
    pool="cls",
    pre_norm=True,
    patch_bias=False,
    activation="gelu",
    eps=1e-5,
    mean=open_clip.MEAN,
    std=open_clip.STD,
)
FLIP_VISION = VisionConfig(pool="mean")
CLIP_TEXT = TextConfig(causal=True, pool="eot", activation="gelu", eps=1e-5)
QUICK = dict(activation="quick_gelu")
TINY = replace(SMALL, width=192, depth=12, heads=3)  # a row of timm's
SLIP = ModelConfig(
    "custom/16",
    TINY,
    vision=VisionConfig("learned", "cls", activation="gelu"),
    text=replace(CLIP_TEXT, **QUICK),
)
FLAVOURS = {  # model config, context, captions padded
    "CLIP": (ModelConfig("custom/16", SMALL, 64, vision=CLIP_VISION, text=CLIP_TEXT), 77, False),
    "OpenAI": (
        ModelConfig(
            "custom/16",
            SMALL,
            64,
            vision=replace(CLIP_VISION, **QUICK),
            text=replace(CLIP_TEXT, **QUICK),
        ),
        77,
        False,
    ),
    "not square, 32 tokens": (
        ModelConfig("custom/16", SMALL, (48, 96), vision=CLIP_VISION, text=CLIP_TEXT),
        32,
        False,
    ),
    "odd MLP": (
        ModelConfig(
            "custom/14",
            replace(SMALL, mlp=4.3637, text_mlp=3.0),
            56,
            vision=CLIP_VISION,
            text=CLIP_TEXT,
        ),
        77,
        False,
    ),
    "FLIP, pooled mean": (
        ModelConfig("custom/16", SMALL, 64, vision=FLIP_VISION, text=TextConfig()),
        32,
        True,
    ),
    "FLIP, not square": (
        ModelConfig("custom/16", SMALL, (64, 32), vision=FLIP_VISION, text=TextConfig()),
        32,
        True,
    ),
    "FLIP, learned": (
        ModelConfig(
            "custom/16",
            SMALL,
            64,
            vision=replace(FLIP_VISION, positions="learned"),
            text=TextConfig(),
        ),
        32,
        True,
    ),
    "SLIP, A-CLIP": (SLIP, 77, False),
    "MaskCLIP": (replace(SLIP, vision=replace(SLIP.vision, pool="mean")), 77, False),
    "MaskCLIP, fixed positions": (
        replace(SLIP, vision=replace(SLIP.vision, pool="mean", positions="sincos")),
        77,
        False,
    ),
}


def made(cfg: ModelConfig, context: int, pad_text: bool, seed: int = 0) -> PortableModel:
    """A random model whose every tensor differs from its start, biases and norms too."""
    torch.manual_seed(seed)
    towers = Towers(cfg, 49408, context)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tensors = {name: p.detach() for name, p in towers.named_parameters()}
    about = ModelInfo(tokenizer="clip_bpe", eot=49407, pad_text=pad_text)
    return PortableModel(cfg, 49408, context, LazyTensors.from_dict(tensors), about)


def assert_theirs_agrees(model: PortableModel, path: Path, *config: str) -> None:
    """Assert that open_clip's own model of the path gives our embeddings."""
    peer = open_clip.reference_model(path, *config)
    far = proofs.embedding_differences(model, peer, build_tokenizer("clip_bpe", model.context))
    print(f"{path.name}: {far}")
    assert max(far.values()) < 1e-5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_there_and_back_and_beside_open_clip(flavour, tmp_path):
    model = made(*FLAVOURS[flavour])
    folder = tmp_path / flavour

    open_clip.save(model, folder)
    again = open_clip.load(folder)

    assert proofs.find_difference(model.tensors, again.tensors, torch.float32) is None
    assert replace(again.cfg, init=model.cfg.init) == model.cfg
    assert again.context == model.context
    assert_theirs_agrees(again, folder)


def test_after_tuning_elsewhere_what_was_folded_is_taken_as_it_is(tmp_path):
    model = made(*FLAVOURS["FLIP, pooled mean"])
    open_clip.save(model, tmp_path / "out")
    weights = tmp_path / "out" / open_clip.WEIGHTS[0]
    tuned = {
        name: tensor.clone()
        for name, tensor in open_clip.tensor_files.read_tensors(weights).items()
    }
    tuned["visual.positional_embedding"] += 0.01
    save_file(tuned, weights)
    assert (tmp_path / "out" / positions.TERMS_FILE).exists()

    again = open_clip.load(tmp_path / "out")

    assert again.cfg.vision.positions == "learned"
    assert not again.cfg.vision.patch_bias
    assert_theirs_agrees(again, tmp_path / "out")


def test_a_tower_of_timms_in_another_model(tmp_path):
    """Of open_clip's own making, text with gelu; it may leave as one of open_clip's own towers."""
    theirs = pytest.importorskip("open_clip")
    open_clip.save(made(*FLAVOURS["SLIP, A-CLIP"]), tmp_path / "out")
    tree = json.loads((tmp_path / "out" / open_clip.CONFIG).read_text())["model_cfg"]
    tree["quick_gelu"] = False
    sizes, path = tmp_path / "sizes.json", tmp_path / "epoch_1.pt"
    sizes.write_text(json.dumps(tree))
    torch.manual_seed(0)
    torch.save(theirs.CLIP(**tree).state_dict(), path)

    model = open_clip.load(path, config=str(sizes))

    assert model.cfg.text.activation == "gelu"
    assert model.cfg.vision.activation == "gelu"
    assert model.cfg.vision.patch_bias
    assert_theirs_agrees(model, path, str(sizes))

    open_clip.save(model, tmp_path / "own")
    again = open_clip.load(tmp_path / "own")
    assert proofs.find_difference(model.tensors, again.tensors, torch.float32) is None
    assert "timm" not in (tmp_path / "own" / open_clip.CONFIG).read_text()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            dict(timm_model_name="vit_base_patch16_siglip_224"),
            "timm_model_name 'vit_base_patch16_siglip_224': of timm's",
        ),
        (dict(timm_proj="mlp"), "vision_cfg.timm_proj 'mlp': ours are linear"),
        (dict(timm_pool="map"), "timm_pool 'map': ours are token or avg"),
        (dict(image_size=256), "vision_cfg.image_size 256: ours are 224"),
    ],
)
def test_what_towers_of_timms_are_not_ours(change, complaint, tmp_path):
    open_clip.save(made(*FLAVOURS["MaskCLIP"]), tmp_path / "out")
    file = tmp_path / "out" / open_clip.CONFIG
    tree = json.loads(file.read_text())
    tree["model_cfg"]["vision_cfg"] |= change
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=complaint):
        open_clip.load(tmp_path / "out")


@pytest.mark.parametrize(
    "name, tower, change, complaint",
    [
        (
            "pool",
            "vision",
            dict(pool="mean_with_cls"),
            "model.vision.pool 'mean_with_cls': open_clip has cls, mean",
        ),
        (
            "activation",
            "vision",
            dict(activation="quick_gelu"),
            "quick_gelu in both or neither, or a tower of timm's, and",
        ),
        (
            "norm",
            "text",
            dict(activation="quick_gelu"),
            "a tower of timm's, and none there has model.vision.eps 1e-05, only 1e-06",
        ),
    ],
)
def test_what_open_clip_cannot_be(name, tower, change, complaint, tmp_path):
    cfg, context, pad_text = FLAVOURS["CLIP"]
    changed = replace(cfg, **{tower: replace(getattr(cfg, tower), **change)})
    model = made(changed, context, pad_text)

    with pytest.raises(ValueError, match=complaint):
        open_clip.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_skips_its_padding_is_not_open_clips(tmp_path):
    cfg, context, _ = FLAVOURS["FLIP, pooled mean"]
    with pytest.raises(ValueError, match="data.pad_text false: .* it attends to the padding"):
        open_clip.save(made(cfg, context, False), tmp_path / "out")


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        (("vision_cfg", "layers"), [3, 4, 6, 3], "a ResNet"),
        (("vision_cfg", "attentional_pool"), True, "vision_cfg.attentional_pool True"),
        (("text_cfg", "hf_model_name"), "xlm-roberta-base", "text_cfg.hf_model_name"),
        (("text_cfg", "pool_type"), "last", "text_cfg.pool_type 'last'"),
        (("init_logit_bias",), -10, "model_cfg.init_logit_bias -10: .*SigLIP"),
        (
            ("vision_cfg", "global_average_pool"),
            True,
            "vision_cfg.global_average_pool True: it averaged the class token too",
        ),
        (
            ("vision_cfg", "block_type"),
            "custom",
            "vision_cfg.block_type 'custom': .*only None or 'default'",
        ),
        (("vision_cfg", "rope"), True, "model_cfg.vision_cfg.rope True: unknown here"),
        (
            ("text_cfg", "norm_kwargs"),
            {"elementwise_affine": False},
            "text_cfg.norm_kwargs.elementwise_affine False: unknown here",
        ),
        (("fusion",), "late", "model_cfg.fusion 'late': unknown here, .*; remove the key"),
    ],
)
def test_what_is_not_ours(key, value, complaint, tmp_path):
    open_clip.save(made(*FLAVOURS["CLIP"]), tmp_path / "out")
    file = tmp_path / "out" / open_clip.CONFIG
    tree = json.loads(file.read_text())
    node = tree["model_cfg"]
    for name in key[:-1]:
        node = node[name]
    node[key[-1]] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=complaint):
        open_clip.load(tmp_path / "out")


def test_keys_that_change_nothing(tmp_path):
    """As older and newer versions write them."""
    model = made(*FLAVOURS["CLIP"])
    open_clip.save(model, tmp_path / "out")
    file = tmp_path / "out" / open_clip.CONFIG
    tree = json.loads(file.read_text())
    tree["model_cfg"] |= dict(custom_text=True, init_logit_bias=None)
    tree["model_cfg"]["vision_cfg"] |= dict(
        global_average_pool=False,
        ls_init_value=None,
        patch_dropout=0.5,
        timm_pool="avg",
        pos_embed_type="learnable",
        act_kwargs=None,
    )
    # for training; open_clip evaluates with bicubic then
    tree["preprocess_cfg"]["interpolation"] = "random"
    file.write_text(json.dumps(tree))
    assert open_clip.load(tmp_path / "out").cfg == replace(model.cfg, init="clip")
    assert open_clip.load(tmp_path / "out").about.interpolation == "bicubic"
    with pytest.raises(ValueError, match=f"--given: {file} tells everything; leave it out"):
        open_clip.load(tmp_path / "out", config="ViT-B-32")


def test_every_config_of_open_clips_is_taken_or_refused_for_what_it_is():
    package = find_spec("open_clip")
    if not package:
        pytest.skip("open-clip-torch is not installed")
    taken = set()
    for file in Path(package.submodule_search_locations[0], "model_configs").glob("*.json"):
        try:
            open_clip.read_config(json.loads(file.read_text()), {}, file)
            taken.add(file.stem)
        except ValueError as error:
            assert "unknown here" not in str(error)
    assert taken >= {
        "ViT-B-32",
        "ViT-B-32-quickgelu",
        "ViT-B-16-plus-240",
        "ViT-L-14",
        "ViT-L-14-336",
        "ViT-H-14",
        "ViT-g-14",
        "ViT-bigG-14",
        "ViT-H-14-worldwide",
    }


def state(tmp_path, model: PortableModel) -> dict[str, torch.Tensor]:
    """Return the state dict that open_clip would save."""
    open_clip.save(model, tmp_path / "state")
    weights = tmp_path / "state" / open_clip.WEIGHTS[0]
    return {
        name: tensor.clone()
        for name, tensor in open_clip.tensor_files.read_tensors(weights).items()
    }


def test_openais_state_dict_tells_its_architecture(tmp_path):
    model = made(*FLAVOURS["OpenAI"])
    tensors = {name: tensor.half() for name, tensor in state(tmp_path, model).items()}
    scalars = dict(
        input_resolution=torch.tensor(64),
        context_length=torch.tensor(77),
        vocab_size=torch.tensor(49408),
    )
    torch.save({**tensors, **scalars}, tmp_path / "openai.pt")
    assert open_clip.recognizes(tmp_path / "openai.pt")
    again = open_clip.load(tmp_path / "openai.pt")
    assert replace(again.cfg, init=model.cfg.init) == model.cfg
    assert proofs.find_difference(model.tensors, again.tensors, torch.float16) is None


def test_weights_alone_ask_for_their_architecture(tmp_path):
    """A checkpoint of open_clip's own training: names under DDP's prefix, the text tower's under
    `text.`.
    """
    model = made(*FLAVOURS["CLIP"])
    ours = {}
    for name, tensor in state(tmp_path, model).items():
        prefix = "" if name.startswith(("visual", "logit")) else "text."
        ours[f"module.{prefix}{name}"] = tensor
    content = {"epoch": 3, "state_dict": ours, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "epoch_3.pt")

    with pytest.raises(ValueError, match="--given config=NAME"):
        open_clip.load(tmp_path / "epoch_3.pt")
    with pytest.raises(ValueError, match="config=ViT-B-33: neither"):
        open_clip.load(tmp_path / "epoch_3.pt", config="ViT-B-33")
    again = open_clip.load(
        tmp_path / "epoch_3.pt", config=str(tmp_path / "state" / open_clip.CONFIG)
    )
    assert proofs.find_difference(model.tensors, again.tensors, torch.float32) is None
    with pytest.raises(ValueError, match="wrong shape|unexpected tensor|is missing"):
        open_clip.load(tmp_path / "epoch_3.pt", config="ViT-B-32").towers()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_open_clips_own_b32(name, tmp_path):
    """As open_clip builds and stores it: in, beside it, out again, bit for bit."""
    import open_clip as theirs

    torch.manual_seed(0)
    reference = theirs.create_model(name, pretrained=None).eval()
    weights = {key: value.contiguous() for key, value in reference.state_dict().items()}
    tree = dict(model_cfg=theirs.get_model_config(name), preprocess_cfg={})
    folder = tmp_path / "own"
    folder.mkdir()
    save_file(weights, folder / open_clip.WEIGHTS[0])
    (folder / open_clip.CONFIG).write_text(json.dumps(tree))

    model = open_clip.load(folder)
    assert model.cfg.size == "B/32"
    assert_theirs_agrees(model, folder)

    open_clip.save(model, tmp_path / "out")
    written = open_clip.tensor_files.read_tensors(tmp_path / "out" / open_clip.WEIGHTS[0])
    assert proofs.find_difference(LazyTensors.from_dict(weights), written, torch.float32) is None
