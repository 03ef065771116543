"""The `model_cfg` of an open_clip_config.json as our architecture, and the other way round."""

from collections.abc import Collection
from pathlib import Path

from glimpse.model.convert import open_clip_trunk as trunk
from glimpse.model.convert.common import MEAN, STD
from glimpse.model.convert.sizes import size_fields
from glimpse.model.portable import PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

RESNET = "a ResNet; Glimpse's towers are vision transformers"
POOLS = {"cls": ("tok", False), "mean": ("avg", False), "mean_then_norm": ("avg", True)}
# The keys of a model_cfg and of its towers. READ: those that are read here. HARMLESS: those that
# change nothing. ONLY: those that must have one of these values.
READ_KEYS = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "layers",
    "width",
    "head_width",
    "heads",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "context_length",
    "vocab_size",
    "no_ln_pre",
    "pool_type",
    "final_ln_after_pool",
    "no_causal_mask",
    "eos_id",
    "act_kwargs",
    "norm_kwargs",
    "timm_model_name",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
}
HARMLESS_KEYS = {
    "custom_text",
    "init_logit_scale",
    "nonscalar_logit_scale",
    "cast_dtype",
    "output_dict",
    "patch_dropout",
    "output_tokens",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "pad_id",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
}
ALLOWED_VALUES = {
    "ls_init_value": (None,),
    "attentional_pool": (False,),
    "hf_model_name": (None,),
    "embed_cls": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "init_logit_bias": (None,),
    "multimodal_cfg": (None,),
    "pos_embed_type": ("learnable", "sin_cos_2d"),  # both are tables
    # of older versions
    "input_patchnorm": (False,),
    "global_average_pool": (False,),
}
REASONS = {
    "init_logit_bias": "a sigmoid loss's model (SigLIP); Glimpse's have no bias of the logits",
    "global_average_pool": (
        "it averaged the class token too, before the last norm, which is none of Glimpse's pools"
    ),
}


def read_config(model: dict, preprocess: dict, path: Path) -> ModelConfig:
    """Return our architecture for a model_cfg; path: where it lies, for errors.

    Positions are learned and there is no patch bias, as far as a config can tell.
    """
    vision, text = model["vision_cfg"], model["text_cfg"]
    check_keys(model, path)
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"{path}: model_cfg.vision_cfg.layers {vision['layers']}: {RESNET}")

    # 1. Settings of both towers.
    pool, text_pool = read_pools(vision, text, path)
    vision_activation = read_activation(model, vision, f"{path}: model_cfg.vision_cfg")
    text_activation = read_activation(model, text, f"{path}: model_cfg.text_cfg")
    vision_eps, text_eps = read_eps(vision), read_eps(text)

    # 2. The vision tower: open_clip's own, or one of timm's.
    width = vision.get("width", 768)
    if vision.get("timm_model_name"):
        tower, settings = trunk.read_vision_config(vision, f"{path}: model_cfg.vision_cfg")
    else:
        heads = width // vision.get("head_width", 64)
        tower = trunk.TowerSize(
            patch=vision.get("patch_size", 16),
            width=width,
            depth=vision.get("layers", 12),
            heads=heads,
            mlp=vision.get("mlp_ratio", 4.0),
        )
        settings = trunk.TowerSettings(
            pool=pool,
            pre_norm=not vision.get("no_ln_pre"),
            patch_bias=False,
            activation=vision_activation,
            eps=vision_eps,
        )

    # 3. Both together.
    size = size_fields(
        **tower,
        text_width=text.get("width", 512),
        text_depth=text.get("layers", 12),
        text_heads=text.get("heads", 8),
        text_mlp=text.get("mlp_ratio", 4.0),
        embed=model["embed_dim"],
    )
    image_size = vision.get("image_size", 224)
    if isinstance(image_size, list):
        image_size = tuple(image_size)
    mean = tuple(preprocess.get("mean") or MEAN)
    std = tuple(preprocess.get("std") or STD)
    vision_cfg = VisionConfig(positions="learned", **settings, mean=mean, std=std)
    causal = not text.get("no_causal_mask")
    text_cfg = TextConfig(causal=causal, pool=text_pool, activation=text_activation, eps=text_eps)
    return ModelConfig(**size, image_size=image_size, init="clip", vision=vision_cfg, text=text_cfg)


def read_pools(vision: dict, text: dict, path: Path) -> tuple[str, str]:
    """Return our names of the pools of a vision_cfg and a text_cfg."""
    pools = {foreign_pool: pool for pool, foreign_pool in POOLS.items()}
    pools["tok", True] = "cls"
    pool = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool"))
    text_pool = text.get("pool_type", "argmax")
    text_known = text_pool in ("argmax", "eos", "first") and not text.get("final_ln_after_pool")
    if pool not in pools or not text_known:
        raise ValueError(
            f"{path}: model_cfg: vision_cfg.pool_type {pool[0]!r}, text_cfg.pool_type"
            f" {text_pool!r}: Glimpse has tok and avg; argmax, eos and first"
        )
    return pools[pool], "first" if text_pool == "first" else "eot"


def read_eps(tower: dict) -> float:
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def check_keys(model: dict, path: Path) -> None:
    """Raise ValueError naming the first key of a model_cfg with a value that is not ours; if there
    is none, the first unknown key.
    """
    places = {f"{path}: model_cfg": model}
    for tower in ("vision_cfg", "text_cfg"):
        places[f"{path}: model_cfg.{tower}"] = model[tower]
    for where, tree in places.items():
        check_values(tree, where)
    for where, tree in places.items():
        check_known_keys(tree, READ_KEYS | HARMLESS_KEYS | ALLOWED_VALUES.keys(), where)
    for where, tree in places.items():
        for key, known in (("norm_kwargs", {"eps"}), ("act_kwargs", {"approximate"})):
            check_known_keys(tree.get(key) or {}, known, f"{where}.{key}")


def check_values(tree: dict, where: str) -> None:
    """Raise ValueError naming the first key of a tree with a value that is not ours."""
    for key, value in tree.items():
        if key in ALLOWED_VALUES and value not in ALLOWED_VALUES[key]:
            why = REASONS.get(key, "Glimpse's towers have no such thing")
            allowed = " or ".join(map(repr, ALLOWED_VALUES[key]))
            raise ValueError(f"{where}.{key} {value!r}: {why} (only {allowed})")


def check_known_keys(tree: dict, known: Collection[str], where: str) -> None:
    """Raise ValueError naming the first key of a tree that is not known."""
    for key, value in tree.items():
        if key not in known:
            raise ValueError(
                f"{where}.{key} {value!r}: unknown here, so the model may be another than"
                " Glimpse would make of it; remove the key if it changes nothing"
            )


def read_activation(model: dict, tower: dict, where: str) -> str:
    """Return our name of a tower's activation; `where` names its config in errors."""
    if model.get("quick_gelu"):
        return "quick_gelu"
    known = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = (tower.get("act_kwargs") or {}).get("approximate", "none")
    if approximate not in known:
        raise ValueError(
            f"{where}.act_kwargs {tower['act_kwargs']}: unknown; known: approximate none, tanh"
        )
    return known[approximate]


def make_config(model: PortableModel) -> dict:
    """Return the model_cfg.  ValueError naming the first setting that open_clip does not have."""
    cfg, shape, vision, text = model.cfg, model.cfg.shape, model.cfg.vision, model.cfg.text
    if not model.vocab:
        raise ValueError(
            "open_clip: a vision tower alone; open_clip's models have a text tower. timm takes a"
            " vision tower"
        )
    if vision.pool not in POOLS:
        raise ValueError(
            f"open_clip: model.vision.pool {vision.pool!r}: open_clip has {', '.join(POOLS)}"
        )
    if not text.causal and not model.about.pad_text:
        raise ValueError(
            "open_clip: model.text.causal false with data.pad_text false: where open_clip's text"
            " tower is not causal, it attends to the padding"
        )
    if shape.width % shape.heads:
        raise ValueError(f"open_clip: {shape.heads} heads do not divide a width of {shape.width}")
    text_cfg = dict(
        context_length=model.context,
        vocab_size=model.vocab,
        width=shape.text_width,
        heads=shape.text_heads,
        layers=shape.text_depth,
        mlp_ratio=shape.text_mlp,
        no_causal_mask=not text.causal,
        **text_settings(model),
        **layer_settings(text),
    )
    return dict(
        embed_dim=shape.embed,
        quick_gelu=text.activation == "quick_gelu",
        vision_cfg=make_vision_config(cfg),
        text_cfg=text_cfg,
    )


def make_vision_config(cfg: ModelConfig) -> dict:
    """Return the vision_cfg: open_clip's own tower, or one of timm's."""
    if needs_timm_tower(cfg):
        return make_timm_vision_config(cfg)
    shape = cfg.shape
    pool, norm_after_pool = POOLS[cfg.vision.pool]
    return dict(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        width=shape.width,
        layers=shape.depth,
        head_width=shape.width // shape.heads,
        mlp_ratio=shape.mlp,
        no_ln_pre=not cfg.vision.pre_norm,
        pool_type=pool,
        final_ln_after_pool=norm_after_pool,
        **layer_settings(cfg.vision),
    )


def make_timm_vision_config(cfg: ModelConfig) -> dict:
    """Return the vision_cfg of a tower of timm's."""
    try:
        return trunk.make_vision_config(cfg)
    except ValueError as error:
        activations = (
            f"model.vision.activation {cfg.vision.activation!r}, model.text.activation"
            f" {cfg.text.activation!r}"
        )
        raise ValueError(
            f"open_clip: {activations}: it has quick_gelu in both or neither, or a tower of timm's,"
            f" and {error}"
        ) from None


def needs_timm_tower(cfg: ModelConfig) -> bool:
    """Return True if the vision tower becomes one of timm's.

    open_clip's own cannot have quick_gelu in one tower alone.
    """
    return (cfg.vision.activation == "quick_gelu") != (cfg.text.activation == "quick_gelu")


def layer_settings(tower: VisionConfig | TextConfig) -> dict[str, dict]:
    """Return the settings of a tower's norms and MLPs."""
    settings: dict[str, dict] = {"norm_kwargs": {"eps": tower.eps}}
    if tower.activation == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    return settings


def text_settings(model: PortableModel) -> dict:
    """Return the settings of the text's pooling, and of the tokenizer.

    CLIP's tokenizer is open_clip's own; another lies in the folder as Hugging Face's files.
    """
    settings: dict[str, object]
    if model.cfg.text.pool == "first":
        settings = dict(pool_type="first")
    elif model.about.eot in (None, model.vocab - 1):  # CLIP's is the largest id
        settings = dict(pool_type="argmax")
    else:
        settings = dict(pool_type="eos", eos_id=model.about.eot)
    if not model.about.tokenizer.startswith("clip_bpe"):
        settings["hf_tokenizer_name"] = "tokenizer"
    return settings
