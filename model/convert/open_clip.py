"""open_clip's CLIP, both ways: a folder that `open_clip.create_model_and_transforms('local-dir:FOLDER')` takes; and OpenAI's state dicts.

    FOLDER/open_clip_config.json        {model_cfg, preprocess_cfg}
    FOLDER/open_clip_model.safetensors  (in: open_clip_pytorch_model.bin, too)

A file of weights alone tells no architecture but OpenAI's, whose own entries do; for another, `given` names the config: a json file, or a
name of open_clip's (ViT-B-32), looked up in the installed package.
"""
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from model.convert import files, positions
from model.convert.portable import MEAN, STD, About, Portable, crop_in, kept_crop, newer, origin, told_crop
from model.convert.rules import Rule, Tensors, as_kernel, as_matrix, one, scalar, transposed
from model.convert.sizes import sized
from model.text import TextConfig
from model.towers import ModelConfig
from model.vision import VisionConfig

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI = ("input_resolution", "context_length", "vocab_size")  # entries of OpenAI's state dicts that are no weights
RESNET = "a ResNet; Glimpse's towers are vision transformers"
POOLS = {"cls": ("tok", False), "mean": ("avg", False), "mean_then_norm": ("avg", True)}
# The keys of a model_cfg and of its towers: those that are read here, those that change nothing, and what others must say to be ours.
READ = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "layers", "width", "head_width", "heads", "mlp_ratio", "patch_size",
        "image_size", "context_length", "vocab_size", "no_ln_pre", "pool_type", "final_ln_after_pool", "no_causal_mask", "eos_id",
        "act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
HARMLESS = {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype", "output_dict", "patch_dropout", "output_tokens",
            "attn_pooler_queries", "attn_pooler_heads", "pad_id", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
            "timm_drop", "timm_drop_path", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
ONLY = {"ls_init_value": (None,), "attentional_pool": (False,), "timm_model_name": (None,), "hf_model_name": (None,), "embed_cls": (False,),
        "proj_bias": (False,), "proj_type": ("linear",), "block_type": (None, "default"), "qk_norm": (False,),
        "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,), "scale_fc": (False,),
        "init_logit_bias": (None,), "multimodal_cfg": (None,), "pos_embed_type": ("learnable", "sin_cos_2d"),  # both are tables
        "input_patchnorm": (False,), "global_average_pool": (False,)}  # of older versions
RESAMPLE = {"random": "bicubic"}  # drawn in training alone
RESIZE = {"shortest": "resize_crop", "squash": "squash"}  # a resize_mode as we call it
WHY = {"init_logit_bias": "a sigmoid loss's model (SigLIP); Glimpse's have no bias of the logits",
       "global_average_pool": "it averaged the class token too, before the last norm, which is none of Glimpse's pools"}


@dataclass(frozen=True)
class Given:
    """What a file of weights may be told; a folder tells it itself."""
    config: str = ""  # see the head of this file
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def claims(path: Path) -> bool:
    return (path / CONFIG).is_file() or path.is_file() and "visual.conv1.weight" in files.metas(path)


# --- in

def load(path: Path, config: str = "", **statistics: tuple[float, ...]) -> Portable:
    """A folder as above, or a file of weights; the rest as in Given."""
    if path.is_dir():
        if config or statistics:
            raise ValueError(f"--given: {path / CONFIG} tells everything; leave it out, or name the file of weights")
        tree, weights = files.read_json(path / CONFIG), next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if weights is None:
            raise ValueError(f"{path}: has {CONFIG}, but none of {', '.join(WEIGHTS)}")
    else:
        tree, weights = {}, path
    theirs = files.read(weights)
    if path.is_file():
        tree = config_of(theirs, path, config)
    model, preprocess = tree.get("model_cfg", tree), tree.get("preprocess_cfg", {}) | statistics
    cfg = config_in(model, preprocess, path)
    cfg, tensors = positions.taken(weights.parent, cfg, rules, "visual.positional_embedding", plain_names(theirs), str(weights))
    text = model["text_cfg"]
    if (mode := preprocess.get("resize_mode") or "shortest") not in RESIZE:
        raise ValueError(f"{path}: preprocess_cfg.resize_mode {mode!r}: ours are {' or '.join(RESIZE)}; write one of them")
    other = any(text.get(key) for key in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"))  # than CLIP's tokenizer
    about = About(tokenizer="" if other else "clip_bpe",
                  eot=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None, pad_text=not cfg.text.causal,
                  crop=crop_in(tree, path / CONFIG if path.is_dir() else Path(config), RESIZE[mode]),
                  interpolation=RESAMPLE.get(resample := preprocess.get("interpolation") or "bicubic", resample),
                  source=origin(path, "open_clip", assumed(config, preprocess), theirs.left_out))
    return Portable(cfg, text.get("vocab_size", 49408), text.get("context_length", 77), tensors, about)


def plain_names(theirs: Tensors) -> Tensors:
    """The weights by the names of open_clip's CLIP; CustomTextCLIP has `text.` before those of the text tower."""
    return theirs.renamed({name.removeprefix("text."): name for name in theirs if name not in (*OPENAI, "attn_mask")})


def assumed(config: str, preprocess: dict) -> list[str]:
    """What nobody says of a file of weights whose config is named: OpenAI's have their own numbers, LAION's not always."""
    lacking = [f"{key} {list(usual)}" for key, usual in (("mean", MEAN), ("std", STD)) if not preprocess.get(key)]
    return [f"assumed, as config={config} does not say it: {', '.join(lacking)}; --given mean=... std=..."] if config and lacking else []


def config_of(theirs: Tensors, path: Path, config: str) -> dict:
    """The config of a file of weights."""
    own = set(OPENAI) <= theirs.meta.keys()
    if own and config:
        raise ValueError(f"--given config={config}: {path} is OpenAI's, which tells everything itself; leave it out")
    return openai(theirs, path) if own or not config else named(config)


def named(config: str) -> dict:
    """A config by its file, or by its name in the installed package."""
    if Path(config).is_file():
        return files.read_json(Path(config))
    found = find_spec("open_clip")
    folder = Path(found.submodule_search_locations[0]) / "model_configs" if found else None
    if not folder or not (folder / f"{config}.json").is_file():
        known = f"; its names: ls {folder}" if folder else ", which is not installed (pip install open-clip-torch)"
        raise ValueError(f"--given config={config}: neither a json file nor a model of open_clip's{known}")
    return files.read_json(folder / f"{config}.json")


def openai(theirs: Tensors, path: Path) -> dict:
    """The config of OpenAI's state dicts, read off the shapes."""
    if not set(OPENAI) <= theirs.meta.keys():
        raise ValueError(f"{path}: weights alone, which do not tell the activation; add --given config=NAME, e.g. ViT-B-32, or a json file")

    if not any(name.startswith("visual.transformer.") for name in theirs):
        raise ValueError(f"{path}: {RESNET}")

    def depth(prefix: str) -> int:
        return 1 + max(int(name.split(".")[prefix.count(".")]) for name in theirs if name.startswith(prefix))

    kernel, text = theirs.meta["visual.conv1.weight"].shape, theirs.meta["token_embedding.weight"].shape
    return dict(embed_dim=theirs.meta["text_projection"].shape[1], quick_gelu=True,
                vision_cfg=dict(image_size=int(theirs["input_resolution"]), layers=depth("visual.transformer.resblocks."),
                                width=kernel[0], patch_size=kernel[2]),
                text_cfg=dict(context_length=int(theirs["context_length"]), vocab_size=text[0], width=text[1], heads=text[1] // 64,
                              layers=depth("transformer.resblocks.")))


def config_in(model: dict, preprocess: dict, path: Path) -> ModelConfig:
    """Our architecture for a model_cfg; positions learned, no patch bias, which is what a config can tell."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    check_keys(model, path)
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"{path}: model_cfg.vision_cfg.layers {vision['layers']}: {RESNET}")
    pool = {theirs: ours for ours, theirs in POOLS.items()} | {("tok", True): "cls"}
    kind = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool"))
    text_pool, causal = text.get("pool_type", "argmax"), not text.get("no_causal_mask")
    if kind not in pool or text_pool not in ("argmax", "eos", "first") or text.get("final_ln_after_pool"):
        raise ValueError(f"{path}: model_cfg: vision_cfg.pool_type {kind[0]!r}, text_cfg.pool_type {text_pool!r}: "
                         "Glimpse has tok and avg; argmax, eos and first")
    patch, sides = vision.get("patch_size", 16), vision.get("image_size", 224)
    width, text_width = vision.get("width", 768), text.get("width", 512)
    shape = sized(patch, width=width, depth=vision.get("layers", 12), heads=width // vision.get("head_width", 64),
                  mlp=vision.get("mlp_ratio", 4.0), text_width=text_width, text_depth=text.get("layers", 12),
                  text_heads=text.get("heads", 8), text_mlp=text.get("mlp_ratio", 4.0),
                  embed=model["embed_dim"])
    act = [activation(model, tree, f"{path}: model_cfg.{where}") for where, tree in (("vision_cfg", vision), ("text_cfg", text))]
    eps = [(tree.get("norm_kwargs") or {}).get("eps", 1e-5) for tree in (vision, text)]
    return ModelConfig(**shape, image_size=tuple(sides) if isinstance(sides, list) else sides, init="clip",
                       vision=VisionConfig(positions="learned", pool=pool[kind], pre_norm=not vision.get("no_ln_pre"), patch_bias=False,
                                           activation=act[0], eps=eps[0], mean=tuple(preprocess.get("mean") or MEAN),
                                           std=tuple(preprocess.get("std") or STD)),
                       text=TextConfig(causal=causal, pool="first" if text_pool == "first" else "eot", activation=act[1], eps=eps[1]))


def check_keys(model: dict, path: Path) -> None:
    """ValueError naming the first key of a model_cfg that says what is not ours; else the first that nothing here knows."""
    places = {f"{path}: model_cfg": model, **{f"{path}: model_cfg.{tower}": model[tower] for tower in ("vision_cfg", "text_cfg")}}
    for where, tree in places.items():
        for key, value in tree.items():
            if key in ONLY and value not in ONLY[key]:
                why = WHY.get(key, "Glimpse's towers have no such thing")
                raise ValueError(f"{where}.{key} {value!r}: {why} (only {' or '.join(map(repr, ONLY[key]))})")
    parts = {f"{where}.{key}": (tree.get(key) or {}, known) for where, tree in places.items()
             for key, known in (("norm_kwargs", {"eps"}), ("act_kwargs", {"approximate"}))}
    for where, (tree, known) in ({where: (tree, READ | HARMLESS | ONLY.keys()) for where, tree in places.items()} | parts).items():
        for key, value in tree.items():
            if key not in known:
                raise ValueError(f"{where}.{key} {value!r}: unknown here, so the model may be another than Glimpse would make of it; "
                                 "remove the key if it changes nothing")


def activation(model: dict, tower: dict, where: str) -> str:
    if model.get("quick_gelu"):
        return "quick_gelu"
    known = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = (tower.get("act_kwargs") or {}).get("approximate", "none")
    if approximate not in known:
        raise ValueError(f"{where}.act_kwargs {tower['act_kwargs']}: unknown; known: approximate none, tanh")
    return known[approximate]


# --- out

def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """A folder as above; returns what differs when open_clip runs it.  ValueError naming what open_clip's CLIP cannot be."""
    prepared = dict(mean=model.cfg.vision.mean, std=model.cfg.vision.std, interpolation=model.about.interpolation,
                    resize_mode="squash" if model.about.crop == "squash" else "shortest")
    tree = dict(model_cfg=config_out(model), preprocess_cfg=prepared, **kept_crop(model.about.crop))
    table = rules(model.cfg)
    folder.mkdir(parents=True)
    positions.write(folder / WEIGHTS[0], model.tensors, model, table, dtype)
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
    return told_crop(model.about.crop, "open_clip")


def config_out(model: Portable) -> dict:
    cfg, shape, vision, text = model.cfg, model.cfg.shape, model.cfg.vision, model.cfg.text
    if not model.vocab:
        raise ValueError("open_clip: a vision tower alone; open_clip's models have a text tower. timm takes a vision tower")
    if vision.pool not in POOLS:
        raise ValueError(f"open_clip: model.vision.pool {vision.pool!r}: open_clip has {', '.join(POOLS)}")
    if (vision.activation == "quick_gelu") != (text.activation == "quick_gelu"):
        raise ValueError(f"open_clip: model.vision.activation {vision.activation!r}, model.text.activation {text.activation!r}: "
                         "open_clip has quick_gelu in both towers or in none")
    if not text.causal and not model.about.pad_text:
        raise ValueError("open_clip: model.text.causal false with data.pad_text false: where open_clip's text tower is not causal, "
                         "it attends to the padding")
    if shape.width % shape.heads:
        raise ValueError(f"open_clip: {shape.heads} heads do not divide a width of {shape.width}")
    pool, last = POOLS[vision.pool]
    towers = dict(
        vision_cfg=dict(image_size=cfg.image_size, patch_size=cfg.patch, width=shape.width, layers=shape.depth,
                        head_width=shape.width // shape.heads, mlp_ratio=shape.mlp, no_ln_pre=not vision.pre_norm, pool_type=pool,
                        final_ln_after_pool=last),
        text_cfg=dict(context_length=model.context, vocab_size=model.vocab, width=shape.text_width, heads=shape.text_heads,
                      layers=shape.text_depth, mlp_ratio=shape.text_mlp, no_causal_mask=not text.causal, **pooled(model)))
    for tree, tower in ((towers["vision_cfg"], vision), (towers["text_cfg"], text)):
        tree["norm_kwargs"] = dict(eps=tower.eps)
        if tower.activation == "gelu_tanh":
            tree["act_kwargs"] = dict(approximate="tanh")
    return dict(embed_dim=shape.embed, quick_gelu=vision.activation == "quick_gelu", **towers)


def pooled(model: Portable) -> dict:
    """How the text is pooled, and the tokenizer: CLIP's is open_clip's own, another lies in the folder as Hugging Face's files."""
    tokenizer = {} if model.about.tokenizer.startswith("clip_bpe") else dict(hf_tokenizer_name="tokenizer")
    if model.cfg.text.pool == "first":
        return dict(pool_type="first", **tokenizer)
    if model.about.eot in (None, model.vocab - 1):  # CLIP's is the largest id
        return dict(pool_type="argmax", **tokenizer)
    return dict(pool_type="eos", eos_id=model.about.eot, **tokenizer)


# --- both

def rules(cfg: ModelConfig) -> list[Rule]:
    """What of our tensors is what of open_clip's."""
    return [Rule(("vision.patch.weight",), ("visual.conv1.weight",), as_kernel, as_matrix),
            Rule(("vision.cls",), ("visual.class_embedding",)),
            positions.position_rule(cfg, "visual.positional_embedding"),
            *(norm("vision.pre_norm", "visual.ln_pre") if cfg.vision.pre_norm else ()),
            *blocks("vision.", "visual.", cfg.shape.depth), *norm("vision.norm", "visual.ln_post"),
            Rule(("image_projection.weight",), ("visual.proj",), transposed, transposed),
            Rule(("text.token.weight",), ("token_embedding.weight",)), Rule(("text.positions",), ("positional_embedding",)),
            *blocks("text.", "", cfg.shape.text_depth), *norm("text.norm", "ln_final"),
            Rule(("text_projection.weight",), ("text_projection",), transposed, transposed),
            Rule(("temperature.logit_scale",), ("logit_scale",), scalar, one)]


def norm(ours: str, theirs: str) -> Iterator[Rule]:
    return (Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in ("weight", "bias"))


def blocks(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
    pairs = {"norm1.": "ln_1.", "attn.qkv.": "attn.in_proj_", "attn.out.": "attn.out_proj.", "norm2.": "ln_2.", "mlp.up.": "mlp.c_fc.",
             "mlp.down.": "mlp.c_proj."}
    return (Rule((f"{ours}blocks.{i}.{a}{kind}",), (f"{theirs}transformer.resblocks.{i}.{b}{kind}",))
            for i in range(depth) for a, b in pairs.items() for kind in ("weight", "bias"))


def peer(path: Path, config: str = "", **_) -> Callable:
    """open_clip's own model: (images (B, 3, H, W) normalised, ids (B, context)) -> unit embeddings of both."""
    newer("open-clip-torch", "3.0")
    import open_clip
    if path.is_dir():
        model = open_clip.create_model(f"local-dir:{path}")
    else:
        theirs = files.read(path)
        tree = config_of(theirs, path, config)
        model = open_clip.CLIP(**{key: value for key, value in tree.get("model_cfg", tree).items() if key != "custom_text"})
        model.load_state_dict(dict(plain_names(theirs)))
    model.eval()
    return lambda images, ids: (model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True))
