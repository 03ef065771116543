"""What an open_clip_config.json says of a CLIP's architecture, in its `model_cfg`, as ours and the
other way round.
"""

from pathlib import Path

from glimpse.model.convert import open_clip_trunk as trunk
from glimpse.model.convert.common import MEAN, STD
from glimpse.model.convert.sizes import sized
from glimpse.model.portable import Portable
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig
from glimpse.model.vision import VisionConfig

RESNET = "a ResNet; Glimpse's towers are vision transformers"
POOLS = {"cls": ("tok", False), "mean": ("avg", False), "mean_then_norm": ("avg", True)}
# The keys of a model_cfg and of its towers: those that are read here, those that change nothing,
# and what others must say to be ours.
READ = {
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
HARMLESS = {
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
ONLY = {
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
    # both are tables
    "init_logit_bias": (None,),
    "multimodal_cfg": (None,),
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "input_patchnorm": (False,),
    "global_average_pool": (False,),
}  # of older versions
WHY = {
    "init_logit_bias": "a sigmoid loss's model (SigLIP); Glimpse's have no bias of the logits",
    "global_average_pool": (
        "it averaged the class token too, before the last norm, which is none of Glimpse's pools"
    ),
}


def config_in(model: dict, preprocess: dict, path: Path) -> ModelConfig:
    """Our architecture for a model_cfg; positions learned, no patch bias, which is what a config
    can tell.
    """
    vision, text = model["vision_cfg"], model["text_cfg"]
    check_keys(model, path)
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"{path}: model_cfg.vision_cfg.layers {vision['layers']}: {RESNET}")
    pool = {theirs: ours for ours, theirs in POOLS.items()} | {("tok", True): "cls"}
    kind = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool"))
    text_pool, causal = text.get("pool_type", "argmax"), not text.get("no_causal_mask")
    if (
        kind not in pool
        or text_pool not in ("argmax", "eos", "first")
        or text.get("final_ln_after_pool")
    ):
        raise ValueError(
            f"{path}: model_cfg: vision_cfg.pool_type {kind[0]!r}, text_cfg.pool_type"
            f" {text_pool!r}: Glimpse has tok and avg; argmax, eos and first"
        )
    sides, width = vision.get("image_size", 224), vision.get("width", 768)
    act = [
        activation(model, tree, f"{path}: model_cfg.{where}")
        for where, tree in (("vision_cfg", vision), ("text_cfg", text))
    ]
    eps = [(tree.get("norm_kwargs") or {}).get("eps", 1e-5) for tree in (vision, text)]
    if vision.get("timm_model_name"):
        tower, says = trunk.tower_in(vision, f"{path}: model_cfg.vision_cfg")
    else:
        tower = dict(
            patch=vision.get("patch_size", 16),
            width=width,
            depth=vision.get("layers", 12),
            heads=width // vision.get("head_width", 64),
            mlp=vision.get("mlp_ratio", 4.0),
        )
        says = dict(
            pool=pool[kind],
            pre_norm=not vision.get("no_ln_pre"),
            patch_bias=False,
            activation=act[0],
            eps=eps[0],
        )
    shape = sized(
        **tower,
        text_width=text.get("width", 512),
        text_depth=text.get("layers", 12),
        text_heads=text.get("heads", 8),
        text_mlp=text.get("mlp_ratio", 4.0),
        embed=model["embed_dim"],
    )
    return ModelConfig(
        **shape,
        image_size=tuple(sides) if isinstance(sides, list) else sides,
        init="clip",
        vision=VisionConfig(
            positions="learned",
            **says,
            mean=tuple(preprocess.get("mean") or MEAN),
            std=tuple(preprocess.get("std") or STD),
        ),
        text=TextConfig(
            causal=causal,
            pool="first" if text_pool == "first" else "eot",
            activation=act[1],
            eps=eps[1],
        ),
    )


def check_keys(model: dict, path: Path) -> None:
    """ValueError naming the first key of a model_cfg that says what is not ours; else the first
    that nothing here knows.
    """
    places = {
        f"{path}: model_cfg": model,
        **{f"{path}: model_cfg.{tower}": model[tower] for tower in ("vision_cfg", "text_cfg")},
    }
    for where, tree in places.items():
        for key, value in tree.items():
            if key in ONLY and value not in ONLY[key]:
                why = WHY.get(key, "Glimpse's towers have no such thing")
                raise ValueError(
                    f"{where}.{key} {value!r}: {why} (only {' or '.join(map(repr, ONLY[key]))})"
                )
    parts = {
        f"{where}.{key}": (tree.get(key) or {}, known)
        for where, tree in places.items()
        for key, known in (("norm_kwargs", {"eps"}), ("act_kwargs", {"approximate"}))
    }
    for where, (tree, known) in (
        {where: (tree, READ | HARMLESS | ONLY.keys()) for where, tree in places.items()} | parts
    ).items():
        for key, value in tree.items():
            if key not in known:
                raise ValueError(
                    f"{where}.{key} {value!r}: unknown here, so the model may be another than"
                    " Glimpse would make of it; remove the key if it changes nothing"
                )


def activation(model: dict, tower: dict, where: str) -> str:
    if model.get("quick_gelu"):
        return "quick_gelu"
    known = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = (tower.get("act_kwargs") or {}).get("approximate", "none")
    if approximate not in known:
        raise ValueError(
            f"{where}.act_kwargs {tower['act_kwargs']}: unknown; known: approximate none, tanh"
        )
    return known[approximate]


def config_out(model: Portable) -> dict:
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
    words = dict(
        context_length=model.context,
        vocab_size=model.vocab,
        width=shape.text_width,
        heads=shape.text_heads,
        layers=shape.text_depth,
        mlp_ratio=shape.text_mlp,
        no_causal_mask=not text.causal,
        **pooled(model),
        **inside(text),
    )
    return dict(
        embed_dim=shape.embed,
        quick_gelu=text.activation == "quick_gelu",
        vision_cfg=tower_out(cfg),
        text_cfg=words,
    )


def tower_out(cfg: ModelConfig) -> dict:
    """The vision_cfg: open_clip's own tower, or one of timm's."""
    if is_timms(cfg):
        try:
            return trunk.tower_out(cfg)
        except ValueError as error:
            kinds = (
                f"model.vision.activation {cfg.vision.activation!r}, model.text.activation"
                f" {cfg.text.activation!r}"
            )
            raise ValueError(
                f"open_clip: {kinds}: it has quick_gelu in both or neither, or a tower of timm's,"
                f" and {error}"
            ) from None
    shape, (pool, last) = cfg.shape, POOLS[cfg.vision.pool]
    return dict(
        image_size=cfg.image_size,
        patch_size=cfg.patch,
        width=shape.width,
        layers=shape.depth,
        head_width=shape.width // shape.heads,
        mlp_ratio=shape.mlp,
        no_ln_pre=not cfg.vision.pre_norm,
        pool_type=pool,
        final_ln_after_pool=last,
        **inside(cfg.vision),
    )


def is_timms(cfg: ModelConfig) -> bool:
    """Is its vision tower one of timm's there? open_clip's own cannot have another activation than
    the text tower.
    """
    return (cfg.vision.activation == "quick_gelu") != (cfg.text.activation == "quick_gelu")


def inside(tower: VisionConfig | TextConfig) -> dict[str, dict]:
    """What a tower's norms and MLPs are told."""
    return dict(
        norm_kwargs=dict(eps=tower.eps),
        **({"act_kwargs": {"approximate": "tanh"}} if tower.activation == "gelu_tanh" else {}),
    )


def pooled(model: Portable) -> dict:
    """How the text is pooled, and the tokenizer: CLIP's is open_clip's own, another lies in the
    folder as Hugging Face's files.
    """
    tokenizer = (
        {} if model.about.tokenizer.startswith("clip_bpe") else dict(hf_tokenizer_name="tokenizer")
    )
    if model.cfg.text.pool == "first":
        return dict(pool_type="first", **tokenizer)
    if model.about.eot in (None, model.vocab - 1):  # CLIP's is the largest id
        return dict(pool_type="argmax", **tokenizer)
    return dict(pool_type="eos", eos_id=model.about.eot, **tokenizer)
