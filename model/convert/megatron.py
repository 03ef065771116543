"""megatron-core's distributed checkpoints (0.16.1: torch_dist) of both towers, split for any number
of tensor-parallel ranks.

    vision_model.       what CLIPViTModel holds, and beside it final_layernorm and head
    text_model.         what GPTModel holds without an output layer (post_process=False), and beside
                        it final_layernorm and head
    logit_scale         0-dim

CLIPViTModel ends before the last norm and has no projection; final_layernorm and head are where
NVIDIA's NeMo puts them in CLIP (nemo/collections/vlm/clip/model/base.py). Both towers are stacks of
megatron-core's TransformerLayer: the same matrices as ours, the
rows of qkv in another order, one tensor of all layers for each of a layer's. What is no weight
(pooling, the mask of attention, the activation, eps) is for whoever builds the modules;
config.json, ours, says it, with the arguments that the modules take.

A tower with pre_norm is CLIPViTModel's subtype clip, which has no bias of the patch embedding: if
ours has one, it is added to the positions (positions.py). One without is its subtype internvit,
which has one: zeros, where ours has none.

The names of norms depend on how megatron-core builds a layer: GPTModel's two specs give them the
same names, the vision tower's two do
not; `spec` says which are written. Either is read, in either tower; so are layers that are not
stacked, a prefix `module.`, a final
norm inside the decoder, and a checkpoint of training, of which the optimizer is left alone. A job
with Transformer Engine's norms may
ask for states of theirs that hold no weight; it loads with strict="log_all".
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.model.convert import torch_dist
from glimpse.model.convert.positions import keep, position_rule, taken
from glimpse.model.convert.rules import Rule, as_kernel, as_matrix, exported, one, scalar
from glimpse.model.convert.torch_dist import Folder, Place
from glimpse.model.layers import hidden
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import CONFIG, About, Portable
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size
from glimpse.model.vision import VisionConfig

VISION, TEXT, LAYERS = "vision_model.", "text_model.", "decoder.layers."
POSITIONS, KERNEL, WORDS = (
    f"{VISION}position_embeddings.weight",
    f"{VISION}conv1.",
    f"{TEXT}embedding.word_embeddings.weight",
)
NORMS = {
    "local": ("input_layernorm.", "pre_mlp_layernorm."),  # before attention, before the MLP
    "te": ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"),
}
# The linear layers that ranks share: along which axis they split the weight, and the bias.
SPLIT = {
    "self_attention.linear_qkv": (0, 0),
    "self_attention.linear_proj": (1, None),
    "mlp.linear_fc1": (0, 0),
    "mlp.linear_fc2": (1, None),
}
# Megatron-LM pads a vocabulary to a multiple of this, times the ranks
# (--make-vocab-size-divisible-by)
MULTIPLE = 128


def save(
    model: Portable,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tp: int = 1,
    spec: str = "local",
) -> list[str]:
    """Write the checkpoint as `tp` tensor-parallel ranks would; a job of another number of ranks
    may load it, too.

    spec: the vision tower's layers are built by get_vit_layer_with_local_spec (local) or
    ..._transformer_engine_spec (te). The
    vocabulary is padded with zeros, as Megatron-LM does it; another padding may be asked for. The
    model is read tensor by tensor, once a rank: H/14, 3.9 GB in fp32, takes 0.4 GB of memory and 20
    to 30 s, written for 1 rank or 8.
    """
    cfg = model.cfg
    check(cfg, bool(model.vocab), tp, spec)
    padded = -(-model.vocab // (MULTIPLE * tp)) * MULTIPLE * tp
    table = rules(cfg, model.vocab, padded, (spec, "te"))
    tensors = exported(table, model.tensors)
    places = {name: place(cfg, name) for name in tensors}
    states = {
        f"{tower}{LAYERS}{layer}._extra_state/shard_{i}_{depth}": [None]
        for tower, depth in depths(cfg, model.vocab).items()
        for layer in SPLIT
        for i in range(depth)
    }
    content = {
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}
    }
    folder.mkdir(parents=True)
    tree = dict(
        format="megatron",
        model=asdict(cfg),
        vocab=model.vocab,
        context=model.context,
        about=asdict(model.about),
        megatron=dict(tp=tp, spec=spec, **arguments(cfg, padded, model.context)),
    )
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
    keep(folder, model, table)
    torch_dist.write(folder, tensors, places, states, content, tp, dtype)
    return (
        [f"in {tp} pieces, a tensor-parallel rank each; a job of any number loads them"]
        if tp > 1
        else []
    )


def claims(path: Path) -> bool:
    return torch_dist.is_one(path)


@dataclass(frozen=True)
class Given:
    """What a checkpoint may be told that lies alone."""

    # the config.json that `save` wrote, where it does not lie beside the checkpoint
    config: str = ""


def load(path: Path, config: str = "") -> Portable:
    """A checkpoint of any number of ranks, perhaps after training elsewhere; config: as in
    Given.
    """
    cfg, vocab, context, about = described(Path(config or path / CONFIG))
    theirs = named(Folder(path))
    bias = f"{KERNEL}bias"
    # zeros stand for none, until they are trained
    patch_bias = bias in theirs and (cfg.vision.patch_bias or bool(theirs[bias].any()))
    cfg = replace(cfg, vision=replace(cfg.vision, positions="learned", patch_bias=patch_bias))
    specs = [
        "te" if f"{tower}{LAYERS}0.{NORMS['te'][0]}weight" in theirs else "local"
        for tower in (VISION, TEXT)
    ]
    padded = theirs.meta[WORDS].shape[0] if WORDS in theirs else 0
    cfg, tensors = taken(
        path, cfg, lambda c: rules(c, vocab, padded, specs), POSITIONS, theirs, str(path)
    )
    return Portable(
        cfg,
        vocab,
        context,
        tensors,
        replace(about, source={**about.source, "path": str(path), "format": "megatron"}),
    )


def check(cfg: ModelConfig, text: bool, tp: int, spec: str) -> None:
    """ValueError naming the first thing in which it cannot be written so."""
    if spec not in NORMS:
        raise ValueError(f"spec {spec!r}: unknown; known: {', '.join(sorted(NORMS))}")
    s = cfg.shape
    parts = {
        "heads": s.heads,
        "mlp": hidden(s.width, s.mlp),
        "text_heads": s.text_heads,
        "text_mlp": hidden(s.text_width, s.text_mlp),
    }
    for key, count in parts.items():
        if (text or not key.startswith("text")) and (tp < 1 or count % tp):
            raise ValueError(
                f"tp {tp}: the {count} {'hidden units' if 'mlp' in key else 'heads'} of model.size"
                f" {cfg.size!r} ({key}) cannot be split evenly over so many ranks"
            )


def rules(cfg: ModelConfig, vocab: int, padded: int, specs: tuple[str, str]) -> list[Rule]:
    """Theirs layer by layer.  specs: of the vision and of the text tower."""
    s, bare = cfg.shape, replace(cfg, vision=replace(cfg.vision, patch_bias=False))
    table = [
        Rule(
            ("vision.cls",),
            (f"{VISION}class_token",),
            out=lambda x: x.reshape(1, 1, -1),
            back=lambda x: x.reshape(-1),
        ),
        *tower("vision", VISION, s.depth, s.heads, NORMS[specs[0]]),
    ]
    if cfg.vision.pre_norm:
        table += [
            Rule(("vision.patch.weight",), (f"{KERNEL}weight",), out=as_kernel, back=as_matrix),
            position_rule(cfg, POSITIONS),
            *both("vision.pre_norm.", f"{VISION}ln_pre."),
        ]
    elif cfg.vision.patch_bias:
        table += [
            Rule(("vision.patch.weight",), (f"{KERNEL}weight",), out=as_kernel, back=as_matrix),
            position_rule(bare, POSITIONS),
            Rule(("vision.patch.bias",), (f"{KERNEL}bias",)),
        ]
    else:
        table += [
            Rule(
                ("vision.patch.weight",),
                (f"{KERNEL}weight", f"{KERNEL}bias"),
                back=lambda kernel, zeros: as_matrix(kernel),
                out=lambda weight: (as_kernel(weight), weight.new_zeros(len(weight))),
            ),
            position_rule(bare, POSITIONS),
        ]
    if vocab:
        table += [
            Rule(
                ("text.token.weight",),
                (WORDS,),
                out=lambda x: F.pad(x, (0, 0, 0, padded - len(x))),
                back=lambda x: x[:vocab],
            ),
            Rule(("text.positions",), (f"{TEXT}embedding.position_embeddings.weight",)),
            *tower("text", TEXT, s.text_depth, s.text_heads, NORMS[specs[1]]),
            Rule(("image_projection.weight",), (f"{VISION}head.weight",)),
            Rule(("text_projection.weight",), (f"{TEXT}head.weight",)),
            Rule(("temperature.logit_scale",), ("logit_scale",), out=scalar, back=one),
        ]
    return table


def tower(ours: str, theirs: str, depth: int, heads: int, norms: tuple[str, str]) -> list[Rule]:
    """A tower's blocks and its last norm."""
    table = both(f"{ours}.norm.", f"{theirs}final_layernorm.")
    for i in range(depth):
        a, b = f"{ours}.blocks.{i}.", f"{theirs}{LAYERS}{i}."
        table += [
            *both(f"{a}norm1.", f"{b}{norms[0]}"),
            *both(f"{a}norm2.", f"{b}{norms[1]}"),
            *both(
                f"{a}attn.qkv.",
                f"{b}self_attention.linear_qkv.",
                partial(by_head, heads),
                partial(by_kind, heads),
            ),
            *both(f"{a}attn.out.", f"{b}self_attention.linear_proj."),
            *both(f"{a}mlp.up.", f"{b}mlp.linear_fc1."),
            *both(f"{a}mlp.down.", f"{b}mlp.linear_fc2."),
        ]
    return table


def both(ours: str, theirs: str, *how: Callable) -> list[Rule]:
    """A weight and a bias."""
    return [Rule((ours + kind,), (theirs + kind,), *how) for kind in ("weight", "bias")]


def by_head(heads: int, qkv: Tensor) -> Tensor:
    """Rows of a fused qkv (3 D, ...), all of q first, as megatron-core has them: q, k and v of the
    first head, then of the next.
    """
    return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def by_kind(heads: int, qkv: Tensor) -> Tensor:
    """Its inverse."""
    return qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def depths(cfg: ModelConfig, vocab: int) -> dict[str, int]:
    return (
        {VISION: cfg.shape.depth, TEXT: cfg.shape.text_depth}
        if vocab
        else {VISION: cfg.shape.depth}
    )


def place(cfg: ModelConfig, name: str) -> Place:
    """Where a tensor of `rules` lies: a layer's as a row of that of all layers, as
    sharded_state_dict has it.
    """
    if not (match := re.fullmatch(rf"(.*{re.escape(LAYERS)})(\d+)\.(.*)", name)):
        return Place(name, axis=0 if name == WORDS else None)
    before, row, after = match.groups()
    layer, _, kind = after.rpartition(".")
    axis = SPLIT[layer][kind == "bias"] if layer in SPLIT and kind in ("weight", "bias") else None
    return Place(before + after, int(row), depths(cfg, 1)[before.removesuffix(LAYERS)], axis)


def named(folder: Folder) -> Tensors:
    """Its tensors under the names of `rules`, layers one by one."""
    meta, where = {}, {}
    for key, tensor in folder.meta.items():
        if key.startswith("optimizer."):
            continue
        name = key.removeprefix("module.").replace("decoder.final_layernorm.", "final_layernorm.")
        match = re.fullmatch(rf"(.*{re.escape(LAYERS)})(\D.*)", name)
        for row in range(len(tensor)) if match else [None]:
            own = name if row is None else f"{match[1]}{row}.{match[2]}"
            meta[own], where[own] = tensor if row is None else tensor[row], (key, row)
    return Tensors(meta, lambda name: folder.read(*where[name]))


def arguments(cfg: ModelConfig, padded: int, context: int) -> dict[str, dict]:
    """What the modules are built with, in megatron-core's words; activation_func in ours."""
    s, v, t = cfg.shape, cfg.vision, cfg.text
    built = {
        "vision": dict(
            num_layers=s.depth,
            hidden_size=s.width,
            num_attention_heads=s.heads,
            ffn_hidden_size=hidden(s.width, s.mlp),
            layernorm_epsilon=v.eps,
            activation_func=v.activation,
            attn_mask_type="no_mask",
            model_subtype="clip" if v.pre_norm else "internvit",
            patch_dim=cfg.patch,
            class_token_len=1,
            img_h=cfg.sides[0],
            img_w=cfg.sides[1],
        )
    }
    if padded:
        built["vision"]["output_dim"] = s.embed
        built["text"] = dict(
            num_layers=s.text_depth,
            hidden_size=s.text_width,
            num_attention_heads=s.text_heads,
            ffn_hidden_size=hidden(s.text_width, s.text_mlp),
            layernorm_epsilon=t.eps,
            activation_func=t.activation,
            attn_mask_type="causal" if t.causal else "no_mask",
            vocab_size=padded,
            max_sequence_length=context,
            output_dim=s.embed,
        )
    return built


def described(path: Path) -> tuple[ModelConfig, int, int, About]:
    """What a config.json of `save` says: architecture, vocab, context, about."""
    try:
        tree = json.loads(path.read_text())
        given = tupled(tree["model"])
        parts = dict(
            custom=Size(**given["custom"]) if given["custom"] else None,
            vision=VisionConfig(**given["vision"]),
            text=TextConfig(**given["text"]),
        )
        return (
            ModelConfig(**{**given, **parts}),
            tree["vocab"],
            tree["context"],
            About(**tree["about"]),
        )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: missing; megatron-core keeps no architecture, so add --given config=PATH of"
            " the config.json that lies beside the checkpoint that training began from"
        ) from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not what a conversion to megatron wrote ({error!r}); put that file back"
        ) from None


def tupled(tree: dict) -> dict:
    """With json's lists as the tuples that they were."""
    return {
        key: tupled(x) if isinstance(x, dict) else tuple(x) if isinstance(x, list) else x
        for key, x in tree.items()
    }
