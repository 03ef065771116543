"""megatron-core's distributed checkpoints (0.16.1: torch_dist) of both towers, split for any number
of tensor-parallel ranks.

    vision_model.       the parameters of CLIPViTModel, and beside them final_layernorm and head
    text_model.         those of GPTModel without an output layer (post_process=False), and beside
                        them final_layernorm and head
    logit_scale         0-dim

CLIPViTModel ends before the last norm and has no projection; final_layernorm and head are where
NVIDIA's NeMo puts them in CLIP (nemo/collections/vlm/clip/model/base.py). Both towers are stacks of
megatron-core's TransformerLayer: the same matrices as ours, the rows of qkv in another order, one
tensor for all layers. Settings that are no weights (pooling, the attention mask, the activation,
eps) are up to the code that builds the modules; our config.json holds them, with the arguments of
the modules.

A tower with pre_norm is CLIPViTModel's subtype clip, which has no bias of the patch embedding: if
ours has one, it is added to the positions (positions.py). A tower without pre_norm is its subtype
internvit, which has that bias: zeros if ours has none.

The names of norms depend on how megatron-core builds a layer: GPTModel's two specs give them the
same names, the vision tower's two do not; `spec` selects which are written. Either is read, in
either tower; so are layers that are not stacked, a prefix `module.`, a final norm inside the
decoder, and a training checkpoint, whose optimizer is ignored. A job with Transformer Engine's
norms may ask for their extra states, which hold no weight; it loads with strict="log_all".
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.model.convert import torch_dist
from glimpse.model.convert.positions import import_with_positions, position_rule, write_terms
from glimpse.model.convert.rules import (
    Rule,
    as_kernel,
    as_matrix,
    as_scalar,
    export_tensors,
    from_scalar,
    identity,
)
from glimpse.model.convert.torch_dist import DistCheckpoint, TensorPlace
from glimpse.model.layers import mlp_width
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import CONFIG_FILE, ModelInfo, PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size
from glimpse.model.vision import VisionConfig

VISION, TEXT = "vision_model.", "text_model."
LAYERS = "decoder.layers."
POSITIONS = f"{VISION}position_embeddings.weight"
KERNEL = f"{VISION}conv1."
WORDS = f"{TEXT}embedding.word_embeddings.weight"
NORMS = {
    "local": ("input_layernorm.", "pre_mlp_layernorm."),  # before attention, before the MLP
    "te": ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"),
}
# The linear layers that are split over ranks: the axis of the weight, and that of the bias.
SPLIT = {
    "self_attention.linear_qkv": (0, 0),
    "self_attention.linear_proj": (1, None),
    "mlp.linear_fc1": (0, 0),
    "mlp.linear_fc2": (1, None),
}
# Megatron-LM pads a vocabulary to a multiple of this, times the ranks
# (--make-vocab-size-divisible-by)
VOCAB_MULTIPLE = 128


def save(
    model: PortableModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tp: int = 1,
    spec: str = "local",
) -> list[str]:
    """Write the checkpoint as `tp` tensor-parallel ranks would; a job of any number of ranks can
    load it.

    spec: the vision tower's layers are built by get_vit_layer_with_local_spec (local) or
    ..._transformer_engine_spec (te).

    The vocabulary is padded with zeros, as Megatron-LM does it; a job may ask for another padding.
    The model is read tensor by tensor, once for each rank: H/14, 3.9 GB in fp32, takes 0.4 GB of
    memory and 20 to 30 s, written for 1 rank or 8.
    """
    cfg = model.cfg
    check_split(cfg, bool(model.vocab), tp, spec)

    # Weights under megatron-core's names, and the layers' extra states, which are empty.
    multiple = VOCAB_MULTIPLE * tp
    padded = -(-model.vocab // multiple) * multiple
    table = rules(cfg, model.vocab, padded, (spec, "te"))
    tensors = export_tensors(table, model.tensors)
    places = {name: find_place(cfg, name) for name in tensors}
    states = extra_states(cfg, model.vocab)
    common = {
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}
    }

    # Our config.json, what folding loses, and the checkpoint.
    tree = dict(
        format="megatron",
        model=asdict(cfg),
        vocab=model.vocab,
        context=model.context,
        about=asdict(model.about),
        megatron=dict(tp=tp, spec=spec, **module_arguments(cfg, padded, model.context)),
    )
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(tree, indent=1) + "\n")
    write_terms(folder, model, table)
    torch_dist.write(folder, tensors, places, states, common, tp, dtype)

    if tp == 1:
        return []
    return [f"in {tp} pieces, a tensor-parallel rank each; a job of any number loads them"]


def extra_states(cfg: ModelConfig, vocab: int) -> dict[str, list[None]]:
    """Return the extra states that megatron-core saves for each linear layer, all of them empty."""
    states = {}
    for tower, depth in count_layers(cfg, vocab).items():
        for layer in SPLIT:
            for i in range(depth):
                states[f"{tower}{LAYERS}{layer}._extra_state/shard_{i}_{depth}"] = [None]
    return states


def recognizes(path: Path) -> bool:
    return torch_dist.is_complete_folder(path)


@dataclass(frozen=True)
class LoadOptions:
    """Options for a checkpoint that lies apart from its config.json."""

    # the config.json that `save` wrote
    config: str = ""


def load(path: Path, config: str = "") -> PortableModel:
    """Load a checkpoint of any number of ranks, perhaps after training elsewhere.

    config: as in LoadOptions.
    """
    cfg, vocab, context, about = read_config(Path(config or path / CONFIG_FILE))
    tensors = unstack_layers(DistCheckpoint(path))

    # A bias of zeros stands for none, until it is trained.
    bias = f"{KERNEL}bias"
    patch_bias = bias in tensors and (cfg.vision.patch_bias or bool(tensors[bias].any()))
    cfg = replace(cfg, vision=replace(cfg.vision, positions="learned", patch_bias=patch_bias))

    specs = [detect_spec(tensors, tower) for tower in (VISION, TEXT)]
    padded = tensors.meta[WORDS].shape[0] if WORDS in tensors else 0

    def rules_of(cfg: ModelConfig) -> list[Rule]:
        return rules(cfg, vocab, padded, specs)

    cfg, tensors = import_with_positions(path, cfg, rules_of, POSITIONS, tensors, str(path))
    source = {**about.source, "path": str(path), "format": "megatron"}
    return PortableModel(cfg, vocab, context, tensors, replace(about, source=source))


def detect_spec(tensors: LazyTensors, tower: str) -> str:
    """Return the spec, a key of NORMS, that gave a tower's norms their names."""
    first_norm = f"{tower}{LAYERS}0.{NORMS['te'][0]}weight"
    return "te" if first_norm in tensors else "local"


def check_split(cfg: ModelConfig, text: bool, tp: int, spec: str) -> None:
    """Raise ValueError naming the first reason why the model cannot be written with these options.

    text: there is a text tower.
    """
    if spec not in NORMS:
        raise ValueError(f"spec {spec!r}: unknown; known: {', '.join(sorted(NORMS))}")
    s = cfg.shape
    counts = {"heads": s.heads, "mlp": mlp_width(s.width, s.mlp)}
    if text:
        counts |= {"text_heads": s.text_heads, "text_mlp": mlp_width(s.text_width, s.text_mlp)}
    for key, count in counts.items():
        if tp < 1 or count % tp:
            units = "hidden units" if "mlp" in key else "heads"
            raise ValueError(
                f"tp {tp}: the {count} {units} of model.size {cfg.size!r} ({key}) cannot be split"
                f" evenly over {tp} ranks; choose a divisor of {count}"
            )


def rules(cfg: ModelConfig, vocab: int, padded: int, specs: Sequence[str]) -> list[Rule]:
    """Return the rules of all tensors, megatron-core's layer by layer.

    padded: the rows of its vocabulary. specs: of the vision and of the text tower.
    """
    s = cfg.shape
    table = [
        Rule(("vision.cls",), (f"{VISION}class_token",), as_token, from_token),
        *tower_rules("vision", VISION, s.depth, s.heads, NORMS[specs[0]]),
        *patch_rules(cfg),
    ]
    if vocab:
        positions = f"{TEXT}embedding.position_embeddings.weight"
        pad, cut = partial(pad_rows, padded), partial(cut_rows, vocab)
        table += [
            Rule(("text.token.weight",), (WORDS,), pad, cut),
            Rule(("text.positions",), (positions,)),
            *tower_rules("text", TEXT, s.text_depth, s.text_heads, NORMS[specs[1]]),
            Rule(("image_projection.weight",), (f"{VISION}head.weight",)),
            Rule(("text_projection.weight",), (f"{TEXT}head.weight",)),
            Rule(
                ("temperature.logit_scale",),
                ("logit_scale",),
                to_foreign=as_scalar,
                from_foreign=from_scalar,
            ),
        ]
    return table


def patch_rules(cfg: ModelConfig) -> list[Rule]:
    """Return the rules of the patch embedding, the positions and the norm before the blocks."""
    weight, bias = (f"{KERNEL}weight",), (f"{KERNEL}bias",)
    patch = Rule(("vision.patch.weight",), weight, to_foreign=as_kernel, from_foreign=as_matrix)
    if cfg.vision.pre_norm:  # subtype clip: a bias is folded into the positions
        return [
            patch,
            position_rule(cfg, POSITIONS),
            *weight_and_bias("vision.pre_norm.", f"{VISION}ln_pre."),
        ]

    # Subtype internvit has a bias.
    unbiased = replace(cfg, vision=replace(cfg.vision, patch_bias=False))
    positions = position_rule(unbiased, POSITIONS)
    if cfg.vision.patch_bias:
        return [patch, positions, Rule(("vision.patch.bias",), bias)]
    patch = Rule(
        ("vision.patch.weight",),
        weight + bias,
        to_foreign=kernel_and_zeros,
        from_foreign=without_zeros,
    )
    return [patch, positions]


def as_token(cls: Tensor) -> Tensor:
    """Return the class token (D,) as (1, 1, D)."""
    return cls.reshape(1, 1, -1)


def from_token(token: Tensor) -> Tensor:
    return token.reshape(-1)


def kernel_and_zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patch embedding (D, 3 P P) as a convolution with a bias of zeros."""
    return as_kernel(weight), weight.new_zeros(len(weight))


def without_zeros(kernel: Tensor, zeros: Tensor) -> Tensor:
    """Invert `kernel_and_zeros`."""
    return as_matrix(kernel)


def pad_rows(rows: int, table: Tensor) -> Tensor:
    """Return a vocabulary (V, D) padded with zeros to (rows, D)."""
    return F.pad(table, (0, 0, 0, rows - len(table)))


def cut_rows(rows: int, table: Tensor) -> Tensor:
    return table[:rows]


def tower_rules(
    glimpse_tower: str, foreign_prefix: str, depth: int, heads: int, norms: tuple[str, str]
) -> list[Rule]:
    """Return the rules of a tower's blocks and of its last norm."""
    qkv_out, qkv_back = partial(group_by_head, heads), partial(group_by_kind, heads)
    table = weight_and_bias(f"{glimpse_tower}.norm.", f"{foreign_prefix}final_layernorm.")
    for i in range(depth):
        block, layer = f"{glimpse_tower}.blocks.{i}.", f"{foreign_prefix}{LAYERS}{i}."
        qkv = f"{layer}self_attention.linear_qkv."
        table += weight_and_bias(f"{block}norm1.", f"{layer}{norms[0]}")
        table += weight_and_bias(f"{block}norm2.", f"{layer}{norms[1]}")
        table += weight_and_bias(f"{block}attn.qkv.", qkv, qkv_out, qkv_back)
        table += weight_and_bias(f"{block}attn.out.", f"{layer}self_attention.linear_proj.")
        table += weight_and_bias(f"{block}mlp.up.", f"{layer}mlp.linear_fc1.")
        table += weight_and_bias(f"{block}mlp.down.", f"{layer}mlp.linear_fc2.")
    return table


def weight_and_bias(
    glimpse_prefix: str,
    foreign_prefix: str,
    to_foreign: Callable = identity,
    from_foreign: Callable = identity,
) -> list[Rule]:
    """Return the rules of a weight and a bias, given the prefixes of their names."""
    table = []
    for kind in ("weight", "bias"):
        names = (glimpse_prefix + kind,), (foreign_prefix + kind,)
        table.append(Rule(*names, to_foreign, from_foreign))
    return table


def group_by_head(heads: int, qkv: Tensor) -> Tensor:
    """Return the rows of a fused qkv (3 D, ...) in megatron-core's order.

    Ours has all of q first; megatron-core has q, k and v of the first head, then of the next.
    """
    return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def group_by_kind(heads: int, qkv: Tensor) -> Tensor:
    """Invert `by_head`."""
    return qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def count_layers(cfg: ModelConfig, vocab: int) -> dict[str, int]:
    """Return {tower: number of layers}."""
    counts = {VISION: cfg.shape.depth}
    if vocab:
        counts[TEXT] = cfg.shape.text_depth
    return counts


def find_place(cfg: ModelConfig, name: str) -> TensorPlace:
    """Return the place of a tensor of `rules` in the checkpoint.

    A layer's tensor is a row of the tensor of all layers, as in sharded_state_dict.
    """
    match = re.fullmatch(rf"(.*{re.escape(LAYERS)})(\d+)\.(.*)", name)
    if not match:
        return TensorPlace(name, axis=0 if name == WORDS else None)
    before, row, after = match.groups()
    layer, _, kind = after.rpartition(".")
    axis = None
    if layer in SPLIT and kind in ("weight", "bias"):
        weight_axis, bias_axis = SPLIT[layer]
        axis = bias_axis if kind == "bias" else weight_axis
    depth = count_layers(cfg, 1)[before.removesuffix(LAYERS)]
    return TensorPlace(before + after, int(row), depth, axis)


def unstack_layers(folder: DistCheckpoint) -> LazyTensors:
    """Return the folder's tensors under the names of `rules`, layers one by one."""
    meta: dict[str, Tensor] = {}
    where: dict[str, tuple[str, int | None]] = {}  # (key, row), as `Folder.read` takes them
    for key, tensor in folder.meta.items():
        if key.startswith("optimizer."):
            continue
        name = key.removeprefix("module.").replace("decoder.final_layernorm.", "final_layernorm.")
        stacked = re.fullmatch(rf"(.*{re.escape(LAYERS)})(\D.*)", name)
        if not stacked:
            meta[name], where[name] = tensor, (key, None)
            continue
        before, after = stacked.groups()
        for row in range(len(tensor)):
            layer_name = f"{before}{row}.{after}"
            meta[layer_name], where[layer_name] = tensor[row], (key, row)
    return LazyTensors(meta, lambda name: folder.read(*where[name]))


def module_arguments(cfg: ModelConfig, padded: int, context: int) -> dict[str, dict]:
    """Return the arguments that the modules are built with, under megatron-core's names.

    The value of activation_func is our name of it.
    """
    s = cfg.shape
    subtype = "clip" if cfg.vision.pre_norm else "internvit"
    text_mask = "causal" if cfg.text.causal else "no_mask"
    vision = dict(
        num_layers=s.depth,
        hidden_size=s.width,
        num_attention_heads=s.heads,
        ffn_hidden_size=mlp_width(s.width, s.mlp),
        layernorm_epsilon=cfg.vision.eps,
        activation_func=cfg.vision.activation,
        attn_mask_type="no_mask",
        model_subtype=subtype,
        patch_dim=cfg.patch_size,
        class_token_len=1,
        img_h=cfg.image_shape[0],
        img_w=cfg.image_shape[1],
    )
    if not padded:
        return {"vision": vision}
    vision["output_dim"] = s.embed
    text = dict(
        num_layers=s.text_depth,
        hidden_size=s.text_width,
        num_attention_heads=s.text_heads,
        ffn_hidden_size=mlp_width(s.text_width, s.text_mlp),
        layernorm_epsilon=cfg.text.eps,
        activation_func=cfg.text.activation,
        attn_mask_type=text_mask,
        vocab_size=padded,
        max_sequence_length=context,
        output_dim=s.embed,
    )
    return {"vision": vision, "text": text}


def read_config(path: Path) -> tuple[ModelConfig, int, int, ModelInfo]:
    """Return (architecture, vocab, context, about) from a config.json of `save`."""
    try:
        tree = json.loads(path.read_text())
        fields = lists_to_tuples(tree["model"])
        if fields["custom"]:
            fields["custom"] = Size(**fields["custom"])
        else:
            fields["custom"] = None
        fields["vision"] = VisionConfig(**fields["vision"])
        fields["text"] = TextConfig(**fields["text"])
        cfg = ModelConfig(**fields)
        return cfg, tree["vocab"], tree["context"], ModelInfo(**tree["about"])
    except FileNotFoundError:
        raise ValueError(
            f"{path}: missing; megatron-core keeps no architecture, so add --given config=PATH of"
            " the config.json that lies beside the checkpoint that training began from"
        ) from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not what a conversion to megatron wrote ({error!r}); put that file back"
        ) from None


def lists_to_tuples(tree: dict) -> dict:
    """Convert the lists of a JSON tree to tuples."""
    fields: dict = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            fields[key] = lists_to_tuples(value)
        elif isinstance(value, list):
            fields[key] = tuple(value)
        else:
            fields[key] = value
    return fields
