"""Hugging Face's CLIPModel: a folder with config.json, preprocessor_config.json and
model.safetensors.

Its architecture is fixed: class-token pooling, a norm before the blocks, a causal text tower that
is pooled at the first end-of-text token, square images. Its projections and temperature are the
pair's. Positions and patch bias: positions.py. The defaults of configs that leave keys out are
those of transformers 5.24's configuration_clip.py. Tokenizer files are
data/builders/tokenizer_files.py's.

Its image processor resizes, then crops. eval_crop square is written as that too, with an entry for
the way back that HF ignores.

HF multiplies by exp(logit_scale) where we stop at 100: logits of a model beyond that differ by as
much, embeddings do not.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model import tensor_files
from glimpse.model.convert.common import (
    MEAN,
    STD,
    crop_entry,
    crop_notes,
    describe_source,
    read_crop,
    require_version,
)
from glimpse.model.convert.positions import import_with_positions, position_rule, write_weights
from glimpse.model.convert.rules import (
    Rule,
    as_kernel,
    as_matrix,
    as_scalar,
    from_scalar,
    fuse_qkv,
    split_qkv,
)
from glimpse.model.convert.sizes import mlp_ratio, size_fields
from glimpse.model.layers import mlp_width
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
POSITIONS = "vision_model.embeddings.position_embedding.weight"
# Buffers of older files that hold the indices 0, 1, ...
INDEX_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

VISION = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
TEXT = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
)
# The eos_token_id of older configs. It means "pool at the largest id", OpenAI's end-of-text.
LARGEST_ID_EOS = 2
PREPROCESSING = dict(
    do_resize=True, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True
)
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers

# Glimpse's name: Hugging Face's name
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

NAMES = {  # Glimpse's name: Hugging Face's name
    "vision.cls": "vision_model.embeddings.class_embedding",
    "vision.pre_norm.weight": "vision_model.pre_layrnorm.weight",
    "vision.pre_norm.bias": "vision_model.pre_layrnorm.bias",
    "vision.norm.weight": "vision_model.post_layernorm.weight",
    "vision.norm.bias": "vision_model.post_layernorm.bias",
    "text.token.weight": "text_model.embeddings.token_embedding.weight",
    "text.positions": "text_model.embeddings.position_embedding.weight",
    "text.norm.weight": "text_model.final_layer_norm.weight",
    "text.norm.bias": "text_model.final_layer_norm.bias",
    "image_projection.weight": "visual_projection.weight",
    "text_projection.weight": "text_projection.weight",
}
BLOCK = {
    "norm1": "layer_norm1",
    "attn.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def rules(cfg: ModelConfig) -> list[Rule]:
    """Return the rules for all tensors of the model."""
    patch = "vision_model.embeddings.patch_embedding.weight"
    table = [Rule((glimpse_name,), (foreign_name,)) for glimpse_name, foreign_name in NAMES.items()]
    table.append(
        Rule(("vision.patch.weight",), (patch,), to_foreign=as_kernel, from_foreign=as_matrix)
    )
    table.append(position_rule(cfg, POSITIONS))
    table.append(
        Rule(
            ("temperature.logit_scale",),
            ("logit_scale",),
            to_foreign=as_scalar,
            from_foreign=from_scalar,
        )
    )
    table += block_rules("vision", cfg.shape.depth)
    table += block_rules("text", cfg.shape.text_depth)
    return table


def block_rules(tower: str, depth: int) -> Iterator[Rule]:
    """Yield the rules of a tower's blocks."""
    for i in range(depth):
        block, layer = f"{tower}.blocks.{i}", f"{tower}_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            qkv = tuple(f"{layer}.self_attn.{name}_proj.{kind}" for name in "qkv")
            yield Rule(
                (f"{block}.attn.qkv.{kind}",), qkv, to_foreign=split_qkv, from_foreign=fuse_qkv
            )
            for glimpse_name, foreign_name in BLOCK.items():
                yield Rule((f"{block}.{glimpse_name}.{kind}",), (f"{layer}.{foreign_name}.{kind}",))


def recognizes(path: Path) -> bool:
    try:
        return json.loads((path / CONFIG).read_text()).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False


def load(path: Path) -> PortableModel:
    """Load the model of a folder. ValueError if Glimpse cannot express its architecture."""
    try:
        return load_from_config(path, tensor_files.read_json(path / CONFIG))
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise error from None
        raise ValueError(f"{path / CONFIG}: {error}") from None


def load_from_config(path: Path, tree: dict) -> PortableModel:
    """Load the model of a folder; tree: the content of its config.json."""
    # 1. The architecture, from the config.
    vision = tower_section(tree, "vision_config", VISION)
    text = tower_section(tree, "text_config", TEXT)
    check_config(vision, text)
    size = size_fields(
        vision["patch_size"],
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp=mlp_ratio(vision["hidden_size"], vision["intermediate_size"]),
        text_width=text["hidden_size"],
        text_depth=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_mlp=mlp_ratio(text["hidden_size"], text["intermediate_size"]),
        embed=tree.get("projection_dim", 512),
    )
    mean, std, interpolation, crop = read_preprocessing(path, vision["image_size"])
    vision_cfg = VisionConfig(
        positions="learned",
        pool="cls",
        pre_norm=True,
        patch_bias=False,
        activation=read_activation(vision, "vision_config"),
        eps=vision["layer_norm_eps"],
        mean=mean,
        std=std,
    )
    text_cfg = TextConfig(
        causal=True,
        pool="eot",
        activation=read_activation(text, "text_config"),
        eps=text["layer_norm_eps"],
    )
    cfg = ModelConfig(
        **size, image_size=vision["image_size"], init="clip", vision=vision_cfg, text=text_cfg
    )

    # 2. The weights, which determine whether positions are sin-cos or learned.
    tensors = read_weights(path)
    eot, vocab = text["eos_token_id"], text["vocab_size"]
    if eot == LARGEST_ID_EOS:
        eot = vocab - 1
    about = ModelInfo(
        eot=eot,
        crop=crop,
        interpolation=interpolation,
        source=describe_source(path, "hf", left_out=tensors.unused_entries),
    )
    cfg, tensors = import_with_positions(path, cfg, rules, POSITIONS, tensors, str(path))
    return PortableModel(cfg, vocab, text["max_position_embeddings"], tensors, about)


def tower_section(tree: dict, key: str, default: dict) -> dict:
    """Return the config of a tower. An old `..._dict` replaces it, as in transformers."""
    return default | (tree.get(f"{key}_dict") or tree.get(key) or {})


def check_config(vision: dict, text: dict) -> None:
    """Raise ValueError naming a value of the towers' configs that is not supported."""
    for key in ("image_size", "patch_size"):
        if type(vision[key]) is not int:
            raise ValueError(
                f"vision_config.{key} {vision[key]}: a square's side, one number, is what CLIPModel"
                " can compute with"
            )
    if vision["num_channels"] != 3:
        raise ValueError(f"vision_config.num_channels {vision['num_channels']}: our towers see 3")
    eos = text["eos_token_id"]
    if type(eos) is not int:
        raise ValueError(
            f"text_config.eos_token_id {eos}: one number, the token at which captions are pooled"
        )


def read_activation(tower: dict, where: str) -> str:
    """Return Glimpse's name of a tower's activation; where: its config, for errors."""
    for name, foreign_name in ACTIVATIONS.items():
        if tower["hidden_act"] == foreign_name:
            return name
    known = ", ".join(sorted(ACTIVATIONS.values()))
    raise ValueError(f"{where}.hidden_act {tower['hidden_act']!r}: Glimpse supports {known}")


def read_preprocessing(
    path: Path, side: int
) -> tuple[tuple[float, ...], tuple[float, ...], str, str]:
    """Return (mean, std, interpolation, crop) of the folder's image processor.

    ValueError if it prepares images differently from our evaluations.
    """
    file, config = read_image_processor(path, side)
    for key in ("image_mean", "image_std"):
        if not is_rgb(config[key]):
            raise ValueError(
                f"{file}: {key} {config[key]}: it should be three numbers, of red, green and blue"
            )
    squash = check_preprocessing(config, side, file)
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    interpolation = read_interpolation(config, file)
    crop = read_crop(config, file, "squash" if squash else "resize_crop")
    return mean, std, interpolation, crop


def read_image_processor(path: Path, side: int) -> tuple[Path, dict]:
    """Return the file of the folder's image processor and its config, filled up with defaults.

    side: the image size of the model, which is the default size.
    """
    names = (PREPROCESSOR, "processor_config.json")
    files = [path / name for name in names if (path / name).exists()]
    file = files[0] if files else path / PREPROCESSOR
    tree = tensor_files.read_json(file) if files else {}
    config = tree.get("image_processor", tree)
    if not isinstance(config, dict):
        raise ValueError(
            f"{file}: image_processor holds a {type(config).__name__}, and should hold keys"
        )
    defaults = dict(size=side, crop_size=side, resample=3, image_mean=MEAN, image_std=STD)
    return file, PREPROCESSING | defaults | config


def is_rgb(values: object) -> bool:
    """Return True if the value is a list of three numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return False
    return all(type(value) in (int, float) for value in values)


def check_preprocessing(config: dict, side: int, file: Path) -> bool:
    """Raise ValueError naming the first key of an image processor that our evaluations contradict.

    Return True if it squashes images, False if it resizes and crops them.
    """
    square = {"height": side, "width": side}
    squash = config["size"] == square
    sides = {"size": square if squash else {"shortest_edge": side}, "crop_size": square}
    wanted = PREPROCESSING | sides
    if squash and not config["do_center_crop"]:  # the crop size is not used then
        del wanted["do_center_crop"], wanted["crop_size"]
    for key, value in wanted.items():
        as_number = key in sides and config[key] == side  # older processors have one number
        if config[key] != value and not as_number:
            raise ValueError(
                f"{file}: {key} {config[key]}: our evaluations resize the short side to the model's"
                f" {side} pixels, crop the middle and normalise; write {json.dumps(value)} to have"
                " it evaluated so"
            )
    return squash


def read_interpolation(config: dict, file: Path) -> str:
    """Return the name of an image processor's interpolation."""
    for name, number in RESAMPLE.items():
        if config["resample"] == number:
            return name
    known = ", ".join(f"{number} ({name})" for name, number in RESAMPLE.items())
    raise ValueError(f"{file}: resample {config['resample']}: we have {known}")


def read_weights(path: Path) -> LazyTensors:
    """Return the tensors of a folder, without buffers of position indices."""
    for name in WEIGHTS:
        if (path / name).exists():
            tensors = tensor_files.read_tensors(path / name)
            return tensors.rename({name: name for name in tensors if name not in INDEX_BUFFERS})
    raise ValueError(f"{path}: no weights; one of {', '.join(WEIGHTS)}")


def check_settings(model: PortableModel) -> None:
    """Raise ValueError naming the first setting that CLIPModel does not support."""
    vision, text, about = model.cfg.vision, model.cfg.text, model.about
    if not model.vocab:
        raise ValueError("a vision tower alone: HF's CLIPModel has a text tower too")
    for key, value, wanted in (
        ("model.vision.pool", vision.pool, "cls"),
        ("model.vision.pre_norm", vision.pre_norm, True),
        ("model.text.causal", text.causal, True),
        ("model.text.pool", text.pool, "eot"),
        ("data.pad_text", about.pad_text, False),
    ):
        if value != wanted:
            raise ValueError(
                f"{key} {json.dumps(value)}: HF's CLIPModel supports only {json.dumps(wanted)}"
            )
    height, width = model.cfg.image_shape
    if height != width:
        raise ValueError(
            f"model.image_size {[height, width]}: HF's CLIPModel supports only square images"
        )
    if about.eot is None:
        why = "this has none"
    elif about.eot == LARGEST_ID_EOS:
        why = f"this one's id, {about.eot}, it takes to mean a caption's largest id"
    else:
        return
    raise ValueError(
        f"data.tokenizer {about.tokenizer!r}: HF's CLIPModel pools a caption at its end-of-text"
        f" token; {why}"
    )


def save(model: PortableModel, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder without tokenizer files; return notes on differences in HF's libraries.

    ValueError: see `check_settings`.
    """
    check_settings(model)
    config, processor = make_config(model, dtype), make_processor_config(model)
    folder.mkdir(parents=True)
    write_weights(folder / WEIGHTS[0], model.tensors, model, rules(model.cfg), dtype)
    for name, content in ((CONFIG, config), (PREPROCESSOR, processor)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return crop_notes(model.about.crop, "HF's image processor")


def make_config(model: PortableModel, dtype: torch.dtype) -> dict:
    """Return the content of config.json."""
    cfg, s = model.cfg, model.cfg.shape
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=s.width,
        intermediate_size=mlp_width(s.width, s.mlp),
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        hidden_act=ACTIVATIONS[cfg.vision.activation],
        layer_norm_eps=cfg.vision.eps,
        projection_dim=s.embed,
        num_channels=3,
        image_size=cfg.image_shape[0],
        patch_size=cfg.patch_size,
    )
    text = dict(
        model_type="clip_text_model",
        hidden_size=s.text_width,
        intermediate_size=mlp_width(s.text_width, s.text_mlp),
        num_hidden_layers=s.text_depth,
        num_attention_heads=s.text_heads,
        hidden_act=ACTIVATIONS[cfg.text.activation],
        layer_norm_eps=cfg.text.eps,
        projection_dim=s.embed,
        vocab_size=model.vocab,
        max_position_embeddings=model.context,
        eos_token_id=model.about.eot,
        pad_token_id=model.about.eot,
        bos_token_id=None,
    )
    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=s.embed,
        torch_dtype=str(dtype).removeprefix("torch."),
        vision_config=vision,
        text_config=text,
    )


def make_processor_config(model: PortableModel) -> dict:
    """Return the content of preprocessor_config.json."""
    cfg, about = model.cfg, model.about
    side = cfg.image_shape[0]
    square = dict(height=side, width=side)
    size = square if about.crop == "squash" else {"shortest_edge": side}
    return dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="CLIPProcessor",
        **PREPROCESSING,
        do_convert_rgb=True,
        size=size,
        crop_size=square,
        resample=RESAMPLE[about.interpolation],
        image_mean=list(cfg.vision.mean),
        image_std=list(cfg.vision.std),
        **crop_entry(about.crop),
    )


def reference_model(path: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load the model in transformers; return a function from normalized images (B, 3, H, W) and
    padded ids (B, N) to unit embeddings (B, E) of images and texts.
    """
    require_version("transformers", "4.56")
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the progress bar of loading weights
    model = CLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    def embed(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model(pixel_values=images, input_ids=ids.long())
        return out.image_embeds, out.text_embeds

    return embed
