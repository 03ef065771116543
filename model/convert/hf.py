"""Hugging Face's CLIPModel: a folder with config.json, preprocessor_config.json and
model.safetensors.

What it has is fixed: class-token pooling, a norm before the blocks, a causal text tower that is
pooled at the first end-of-text token, square images. Its projections and temperature are the
pair's. Positions and patch bias: positions.py. The defaults of configs that leave keys out are
those of transformers 5.24's configuration_clip.py. Tokenizer files are
data/builders/tokenizer_files.py's.
Its image processor resizes, then crops: eval_crop square is written as that too, with a word for
the way back that HF passes over.
HF multiplies by exp(logit_scale) where we stop at 100: logits of a model beyond that differ by as
much, embeddings do not.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model import tensor_files
from glimpse.model.convert.common import MEAN, STD, crop_in, kept_crop, newer, origin, told_crop
from glimpse.model.convert.positions import position_rule, taken, write
from glimpse.model.convert.rules import Rule, as_kernel, as_matrix, fused, one, scalar, thirds
from glimpse.model.convert.sizes import ratio, sized
from glimpse.model.layers import hidden
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About, Portable
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
POSITIONS = "vision_model.embeddings.position_embedding.weight"
# 0, 1, ...: buffers of older files
COUNTS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

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
# an eos_token_id that stands for "pool at the largest id", which OpenAI's end-of-text is: what
# older configs say
ARGMAX = 2
IMAGE = dict(
    do_resize=True, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True
)
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers

# ours: theirs
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

NAMES = {  # ours: theirs
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
    """Of each tensor."""
    return [
        *(Rule((ours,), (theirs,)) for ours, theirs in NAMES.items()),
        Rule(
            ("vision.patch.weight",),
            ("vision_model.embeddings.patch_embedding.weight",),
            out=as_kernel,
            back=as_matrix,
        ),
        position_rule(cfg, POSITIONS),
        Rule(("temperature.logit_scale",), ("logit_scale",), out=scalar, back=one),
        *blocks("vision", cfg.shape.depth),
        *blocks("text", cfg.shape.text_depth),
    ]


def blocks(tower: str, depth: int) -> Iterator[Rule]:
    for i in range(depth):
        ours, theirs = f"{tower}.blocks.{i}", f"{tower}_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            yield Rule(
                (f"{ours}.attn.qkv.{kind}",),
                tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"),
                out=thirds,
                back=fused,
            )
            for a, b in BLOCK.items():
                yield Rule((f"{ours}.{a}.{kind}",), (f"{theirs}.{b}.{kind}",))


def claims(path: Path) -> bool:
    try:
        return json.loads((path / CONFIG).read_text()).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False


def load(path: Path) -> Portable:
    """The folder's model.  ValueError: see the package's docstring."""
    try:
        return understood(path, tensor_files.read_json(path / CONFIG))
    except ValueError as error:
        raise (
            error if str(error).startswith(str(path)) else ValueError(f"{path / CONFIG}: {error}")
        ) from None


def understood(path: Path, tree: dict) -> Portable:
    vision, text = (
        section(tree, key, default)
        for key, default in (("vision_config", VISION), ("text_config", TEXT))
    )
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
    size = sized(
        vision["patch_size"],
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp=ratio(vision["hidden_size"], vision["intermediate_size"]),
        text_width=text["hidden_size"],
        text_depth=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_mlp=ratio(text["hidden_size"], text["intermediate_size"]),
        embed=tree.get("projection_dim", 512),
    )
    mean, std, interpolation, crop = images(path, vision["image_size"])
    cfg = ModelConfig(
        **size,
        image_size=vision["image_size"],
        init="clip",
        vision=VisionConfig(
            positions="learned",
            pool="cls",
            pre_norm=True,
            patch_bias=False,
            activation=activation(vision, "vision_config"),
            eps=vision["layer_norm_eps"],
            mean=mean,
            std=std,
        ),
        text=TextConfig(
            causal=True,
            pool="eot",
            activation=activation(text, "text_config"),
            eps=text["layer_norm_eps"],
        ),
    )
    theirs = weights(path)
    about = About(
        eot=text["vocab_size"] - 1 if eos == ARGMAX else eos,
        crop=crop,
        interpolation=interpolation,
        source=origin(path, "hf", left_out=theirs.left_out),
    )
    cfg, tensors = taken(path, cfg, rules, POSITIONS, theirs, str(path))
    return Portable(cfg, text["vocab_size"], text["max_position_embeddings"], tensors, about)


def section(tree: dict, key: str, default: dict) -> dict:
    """One tower's part; an old `..._dict` overrides it as a whole, as it does there."""
    return default | (tree.get(f"{key}_dict") or tree.get(key) or {})


def activation(part: dict, where: str) -> str:
    for ours, theirs in ACTIVATIONS.items():
        if part["hidden_act"] == theirs:
            return ours
    raise ValueError(
        f"{where}.hidden_act {part['hidden_act']!r}: our towers have"
        f" {', '.join(sorted(ACTIVATIONS.values()))}"
    )


def images(path: Path, side: int) -> tuple[tuple[float, ...], tuple[float, ...], str, str]:
    """(mean, std, interpolation, crop) of the folder's image processor; ValueError where it resizes
    and crops otherwise than we do.
    """
    found = next(
        (file for name in (IMAGES, "processor_config.json") if (file := path / name).exists()),
        path / IMAGES,
    )
    tree = tensor_files.read_json(found) if found.exists() else {}
    says = tree.get("image_processor", tree)
    if not isinstance(says, dict):
        raise ValueError(
            f"{found}: image_processor holds a {type(says).__name__}, and should hold keys"
        )
    tree = (
        IMAGE | dict(size=side, crop_size=side, resample=3, image_mean=MEAN, image_std=STD) | says
    )
    for key in ("image_mean", "image_std"):
        if (
            not isinstance(tree[key], (list, tuple))
            or [type(x) in (int, float) for x in tree[key]] != [True] * 3
        ):
            raise ValueError(
                f"{found}: {key} {tree[key]}: it should be three numbers, of red, green and blue"
            )
    square = {"height": side, "width": side}
    squash = tree["size"] == square
    sides = {"size": square if squash else {"shortest_edge": side}, "crop_size": square}
    unused = ("do_center_crop", "crop_size") if squash and not tree["do_center_crop"] else ()
    for key, wanted in (IMAGE | sides).items():
        if key in unused:
            continue
        if tree[key] != wanted and not (key in sides and tree[key] == side):
            raise ValueError(
                f"{found}: {key} {tree[key]}: our evaluations resize the short side to the model's"
                f" {side} pixels, crop the middle and normalise; write {json.dumps(wanted)} to have"
                " it evaluated so"
            )
    for name, number in RESAMPLE.items():
        if tree["resample"] == number:
            return (
                tuple(tree["image_mean"]),
                tuple(tree["image_std"]),
                name,
                crop_in(tree, found, "squash" if squash else "resize_crop"),
            )
    raise ValueError(
        f"{found}: resample {tree['resample']}: we have"
        f" {', '.join(f'{n} ({name})' for name, n in RESAMPLE.items())}"
    )


def weights(path: Path) -> Tensors:
    """The folder's tensors, without buffers that hold nothing."""
    for name in WEIGHTS:
        if (path / name).exists():
            tensors = tensor_files.read(path / name)
            return tensors.renamed({name: name for name in tensors if name not in COUNTS})
    raise ValueError(f"{path}: no weights; one of {', '.join(WEIGHTS)}")


def check(model: Portable) -> None:
    """ValueError naming what CLIPModel does not have."""
    vision, text, sides, eot = model.cfg.vision, model.cfg.text, model.cfg.sides, model.about.eot
    if not model.vocab:
        raise ValueError("a vision tower alone: HF's CLIPModel has a text tower too")
    for key, value, has in (
        ("model.vision.pool", vision.pool, "cls"),
        ("model.vision.pre_norm", vision.pre_norm, True),
        ("model.text.causal", text.causal, True),
        ("model.text.pool", text.pool, "eot"),
        ("data.pad_text", model.about.pad_text, False),
    ):
        if value != has:
            raise ValueError(
                f"{key} {json.dumps(value)}: HF's CLIPModel has {json.dumps(has)} alone"
            )
    if sides[0] != sides[1]:
        raise ValueError(f"model.image_size {list(sides)}: HF's CLIPModel has square images alone")
    if eot in (None, ARGMAX):
        why = (
            "this has none"
            if eot is None
            else f"this one's id, {eot}, it takes to mean a caption's largest id"
        )
        raise ValueError(
            f"data.tokenizer {model.about.tokenizer!r}: HF's CLIPModel pools a caption at its"
            f" end-of-text token; {why}"
        )


def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write the folder, without tokenizer files; returns what differs when HF's libraries run it.

    ValueError: see `check`.
    """
    check(model)
    cfg, s = model.cfg, model.cfg.shape
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=s.width,
        intermediate_size=hidden(s.width, s.mlp),
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        hidden_act=ACTIVATIONS[cfg.vision.activation],
        layer_norm_eps=cfg.vision.eps,
        projection_dim=s.embed,
        num_channels=3,
        image_size=cfg.sides[0],
        patch_size=cfg.patch,
    )
    text = dict(
        model_type="clip_text_model",
        hidden_size=s.text_width,
        intermediate_size=hidden(s.text_width, s.text_mlp),
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
    tree = dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=s.embed,
        torch_dtype=str(dtype).removeprefix("torch."),
        vision_config=vision,
        text_config=text,
    )
    square = dict.fromkeys(("height", "width"), vision["image_size"])
    pictures = dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="CLIPProcessor",
        **IMAGE,
        do_convert_rgb=True,
        size=square if model.about.crop == "squash" else {"shortest_edge": vision["image_size"]},
        crop_size=square,
        resample=RESAMPLE[model.about.interpolation],
        image_mean=list(cfg.vision.mean),
        image_std=list(cfg.vision.std),
        **kept_crop(model.about.crop),
    )
    folder.mkdir(parents=True)
    table = rules(cfg)
    write(folder / WEIGHTS[0], model.tensors, model, table, dtype)
    for name, content in ((CONFIG, tree), (IMAGES, pictures)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return told_crop(model.about.crop, "HF's image processor")


def peer(path: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """transformers' own model: (images (B, 3, H, W) normalised, ids (B, N) padded) -> unit vectors
    (B, E) of images and of texts.
    """
    newer("transformers", "4.56")
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights
    model = CLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    def embed(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = model(pixel_values=images, input_ids=ids.long())
        return out.image_embeds, out.text_embeds

    return embed
