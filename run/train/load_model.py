"""What lies at a path, a run's checkpoint or a converted model, and its weights put into methods.

    path = find(Path("runs/quickstart"))
        the newest checkpoint of a run, a checkpoint, or a folder that run/convert.py wrote
    cfg, tokenizer, method = opened(path)
        to be looked at

No rank ever holds more than one whole tensor beside its shard.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from glimpse.data.tokenizer import Tokenizer
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.model import ema, tensor_files
from glimpse.model.lazy_tensors import Tensors, more
from glimpse.model.methods import build_method
from glimpse.model.portable import CONFIG, WEIGHTS, About, Portable, is_one
from glimpse.model.towers import ModelConfig
from glimpse.run.lib.config import Run, beside, build, merge, plain
from glimpse.run.lib.config import load as read_config
from glimpse.run.lib.distributed import device, rank, told
from glimpse.run.train import zero_reader
from glimpse.run.train.checkpoint import check_identity, identity, manifest, newest
from glimpse.run.train.engine import place, whole_parameter

TOWERS = "towers."  # where a method keeps what a converted model holds
# What a converted model's config.json does not say, since only training reads it.
UNTRAINED = dict(
    method="clip",
    samples=1,
    batch=1,
    data={"train": "none"},
    optim=dict(lr="0", weight_decay=0.0, warmup=0),
)


def find(path: Path) -> Path:
    """The newest checkpoint of a run folder, or what is given: a checkpoint, a converted model's
    folder, or the weights in it.
    """
    from glimpse.model.convert import claimed

    if path.name == WEIGHTS and is_one(path.parent):
        path = path.parent
    if is_one(path):
        return path

    if path.exists() and (format := claimed(path)):
        raise ValueError(
            f"{path}: a model of {format}; `python run/convert.py glimpse {path} OUT` makes one"
            " that can be used here"
        )
    if (path / CONFIG).is_file():
        tensor_files.read_json(path / CONFIG)  # tells how it is damaged
    return newest(path)


def home(path: Path) -> Path:
    """Where results of the model at a found path go: the run's folder, or the converted model's
    own.
    """
    return path if is_one(path) else path.parents[1]


def config_of(path: Path) -> Run:
    """The config of what was found; of a converted model what it knows, the rest filled in."""
    if not is_one(path):
        cfg = read_config(path.parents[1] / "config.yaml")
        return replace(
            cfg, data=replace(cfg.data, tokenizer=beside(cfg.data.tokenizer, path.parents[1]))
        )
    tree = {key: value for key, value in said(path).items() if key != "provenance"}
    if not tree.get("data"):
        raise ValueError(
            f"{path}: a vision tower alone, without text; start a run from it with init: {path}"
        )
    return build(Run, merge({**UNTRAINED, "run": str(path)}, tree))


def said(path: Path) -> dict:
    """What a converted model's config.json says, its vocabulary where it lies now; ValueError where
    it lacks something.
    """
    tree = tensor_files.read_json(path / CONFIG)
    needed = {
        "": ("model", "views", "eval_crop"),
        "provenance": ("vocab", "fingerprint", "eot", "source"),
    }
    if tree["provenance"].get("vocab") or tree.get("data"):
        needed["data"] = ("context", "tokenizer", "pad_text")
    for key, names in needed.items():
        part = tree.get(key, {}) if key else tree
        if lacking := [
            f"{key}.{name}".lstrip(".")
            for name in names
            if not isinstance(part, dict) or name not in part
        ]:
            raise ValueError(
                f"{path / CONFIG}: {', '.join(lacking)} missing; convert the model again"
            )
    if "data" in needed:
        tree["data"]["tokenizer"] = beside(str(tree["data"]["tokenizer"]), path)
    return tree


def provenance(path: Path) -> dict:
    """What a converted model's config.json says of its making."""
    return said(path)["provenance"]


def origin(path: Path) -> dict:
    """What training a found model has behind it: step and samples, where they are known."""
    known = provenance(path)["source"] if is_one(path) else manifest(path)
    return {key: known[key] for key in ("step", "samples") if key in known}


def converted(path: Path) -> Portable:
    """A converted model's folder."""
    tree = said(path)
    known, data = tree["provenance"], tree.get("data", {})
    about = About(
        tokenizer=data.get("tokenizer", ""),
        fingerprint=known["fingerprint"],
        eot=known["eot"],
        pad_text=data.get("pad_text", False),
        crop=tree["eval_crop"],
        interpolation=tree["views"]["image"]["interpolation"],
        source={**known["source"], "path": str(path)},
    )
    model = build(ModelConfig, merge({}, tree["model"]), "model.")
    return Portable(
        model, known["vocab"], data.get("context", 0), tensor_files.read(path / WEIGHTS), about
    )


def portable(path: Path, weights: str = "student") -> Portable:
    """The towers of what was found: a run's student, or with the moving averages, in fp32, in the
    place of what they average.
    """
    if is_one(path):
        if weights != "student":
            raise ValueError(
                f"--weights {weights}: {path} holds one model; convert the run again with --weights"
                f" {weights}"
            )
        return converted(path)
    cfg, found, tensors = config_of(path), manifest(path), zero_reader.weights(path)
    names = {name.removeprefix(TOWERS): name for name in tensors if name.startswith(TOWERS)}
    vocab = tensors.meta[f"{TOWERS}text.token.weight"].shape[0]
    towers = tensors.renamed(names)
    if weights == "teacher":
        towers = averaged(path, cfg, vocab, towers)
    source = dict(
        path=str(path),
        format="run",
        method=cfg.method,
        weights=weights,
        step=found["step"],
        samples=found["samples"],
    )
    about = About(
        tokenizer=cfg.data.tokenizer,
        fingerprint=found["identity"]["tokenizer"],
        pad_text=cfg.data.pad_text,
        crop=cfg.eval_crop,
        interpolation=next(iter(cfg.views.values())).interpolation,
        source=source,
    )
    return Portable(cfg.model, vocab, cfg.data.context, towers, about)


def averaged(path: Path, cfg: Run, vocab: int, towers: Tensors) -> Tensors:
    """The towers' tensors, with the averages instead where there are some."""
    with torch.device("meta"):
        method = build_method(cfg, vocab)
    pairs = {
        id(teacher): (name, teacher.shape)
        for name, (teacher, _) in ema.parameters(method.averaged()).items()
    }
    kept = {
        name: pairs[id(p)]
        for name, p in method.shown("teacher").named_parameters()
        if id(p) in pairs
    }
    averages = zero_reader.averages(path, dict(kept.values())).renamed(
        {name: key for name, (key, _) in kept.items()}
    )
    return Tensors(
        {**towers.meta, **averages.meta}, lambda name: (averages if name in kept else towers)[name]
    )


def contents(path: Path) -> Tensors:
    """The weights of a checkpoint or converted model, under the names that a method gives them."""
    if not is_one(path):
        return zero_reader.weights(path)
    tensors = tensor_files.read(path / WEIGHTS)
    return tensors.renamed({TOWERS + name: name for name in tensors})


def load(
    method: torch.nn.Module,
    path: Path,
    names: dict[str, str] | None = None,
    under: str | None = None,
) -> None:
    """Copy weights into a method, sharded or not; rank 0 alone reads them.

    names: {parameter of the method: its name at the path}; all, by their own names, where none are
    given. Each must be found in its
    own shape, and there may be nothing else whose name begins with `under`. All ranks must call,
    with names in one order.
    """
    parameters = dict(method.named_parameters())
    if names is None:
        names, under = {name: name for name in parameters}, ""
    source = contents(path) if rank() == 0 else None
    shapes = {
        stored: getattr(parameters[name], "ds_shape", parameters[name].shape)
        for name, stored in names.items()
    }
    told(lambda: check_places(path, source, shapes, under))  # before any rank waits for weights
    for name, stored in names.items():
        with whole_parameter(parameters[name]) as whole:
            if rank() == 0:
                whole.copy_(source[stored])


def check_places(
    path: Path, source: Tensors, shapes: dict[str, torch.Size], under: str | None
) -> str:
    """ValueError where what lies at a path is not what `load` is to find there."""
    if missing := sorted(shapes.keys() - source.meta.keys()):
        raise ValueError(
            f"{path}: has no weights for {missing[0]}{more(missing)}; it holds another architecture"
        )
    if under is not None and (
        extra := sorted({name for name in source if name.startswith(under)} - shapes.keys())
    ):
        raise ValueError(
            f"{path}: this config has no place for {extra[0]}{more(extra)}; it holds another"
            " architecture"
        )
    for name, shape in shapes.items():
        if source.meta[name].shape != shape:
            raise ValueError(
                f"{path}: {name} is {tuple(source.meta[name].shape)}, this config makes"
                f" {tuple(shape)}"
            )
    return ""


def opened(path: Path) -> tuple[Run, Tokenizer, torch.nn.Module]:
    """(config, tokenizer, method on this rank's device) of what was found, to be looked at."""
    cfg = config_of(path)
    tokenizer = build_tokenizer(cfg.data.tokenizer, cfg.data.context)
    if is_one(path):
        known = provenance(path)
        if known["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{path}: trained with tokenizer {known['fingerprint']}; {cfg.data.tokenizer} is"
                f" {tokenizer.fingerprint}"
            )
        vocab, bf16 = (
            known["vocab"],
            torch.bfloat16
            in {meta.dtype for meta in tensor_files.read(path / WEIGHTS).meta.values()},
        )
    else:
        check_identity(path, identity(cfg, tokenizer.fingerprint))
        vocab, bf16 = tokenizer.vocab_size, manifest(path)["bf16"]
    method = build_method(cfg, vocab)
    load(method, path)
    return cfg, tokenizer, place(method, bf16)


def checksum(module: torch.nn.Module, cfg: Run, tokenizer: Tokenizer) -> str:
    """Of all that embeddings depend on: what prepares images and texts, the architecture, and the
    sum of the weights' bits, which is the same on every device.
    """
    bits = {2: torch.int16, 4: torch.int32}
    total = sum(
        int(p.detach().view(bits[p.element_size()]).sum(dtype=torch.int64))
        for p in module.parameters()
    )
    interpolation = next(iter(cfg.views.values())).interpolation
    about = (
        plain(asdict(cfg.model)),
        cfg.eval_crop,
        interpolation,
        cfg.data.context,
        cfg.data.pad_text,
        tokenizer.fingerprint,
    )
    return hashlib.sha256(json.dumps([total, *about]).encode()).hexdigest()[:16]


def backbone(run: Path | str, weights: str = "student", **how) -> torch.nn.Module:
    """The vision tower of a run, checkpoint or converted model as feature maps (docs/transfer.md):
    whole, in fp32, all of it trainable.

    weights: student, or teacher (the moving average). how: Backbone's own. To be called after
    run.lib.ranks.start(), by all ranks.
    """
    from glimpse.model.downstream.backbone import Backbone

    method = opened(find(Path(run)))[2]
    return Backbone(method.shown(weights).vision.float().requires_grad_(True), **how).to(device())
