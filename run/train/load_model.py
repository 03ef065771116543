"""Find the model at a path, a run's checkpoint or a converted model, and load its weights.

    path = find(Path("runs/quickstart"))
        the newest checkpoint of a run, a checkpoint, or a folder that run/convert.py wrote
    cfg, tokenizer, method = opened(path)
        for evaluation

No rank ever holds more than one whole tensor beside its shard.
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from glimpse.data.tokenizer import Tokenizer
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.model import ema, tensor_files
from glimpse.model.lazy_tensors import Tensors, more
from glimpse.model.methods import Method, build_method
from glimpse.model.portable import CONFIG, WEIGHTS, About, Portable, is_one
from glimpse.model.towers import ModelConfig
from glimpse.run.lib.config import RunConfig, build, merge, relocate_tokenizer, tuples_to_lists
from glimpse.run.lib.config import load as read_config
from glimpse.run.lib.distributed import broadcast_from_rank0, device, rank
from glimpse.run.train import zero_reader
from glimpse.run.train.checkpoint import check_identity, identity, newest_checkpoint, read_manifest
from glimpse.run.train.engine import full_parameter, move_to_device

TOWERS = "towers."  # prefix of a method's parameters that a converted model holds
# The keys that a converted model's config.json lacks, since only training reads them.
TRAINING_PLACEHOLDERS = dict(
    method="clip",
    samples=1,
    batch=1,
    data={"train": "none"},
    optim=dict(lr="0", weight_decay=0.0, warmup=0),
)


def find_model(path: Path) -> Path:
    """Return the model that a path names.

    The newest checkpoint of a run folder, a checkpoint itself, or the folder of a converted model
    (also by the weights in it).
    """
    from glimpse.model.convert import claimed

    if path.name == WEIGHTS and is_one(path.parent):
        path = path.parent
    if is_one(path):
        return path

    foreign_format = claimed(path) if path.exists() else None
    if foreign_format:
        raise ValueError(
            f"{path}: a model of {foreign_format}; `python run/convert.py glimpse {path} OUT` makes"
            " one that can be used here"
        )
    if (path / CONFIG).is_file():
        tensor_files.read_json(path / CONFIG)  # raises ValueError if it is damaged
    return newest_checkpoint(path)


def results_folder(path: Path) -> Path:
    """Return the folder for results of a model that `find` returned.

    The run's, or the converted model's own.
    """
    return path if is_one(path) else path.parents[1]


def read_run_config(path: Path) -> RunConfig:
    """Return the config of a model that `find` returned.

    Training's keys of a converted model are filled in.
    """
    if not is_one(path):
        run = path.parents[1]
        cfg = read_config(run / "config.yaml")
        data = replace(cfg.data, tokenizer=relocate_tokenizer(cfg.data.tokenizer, run))
        return replace(cfg, data=data)
    tree = read_portable_config(path)
    del tree["provenance"]
    if not tree.get("data"):
        raise ValueError(
            f"{path}: a vision tower alone, without text; start a run from it with init: {path}"
        )
    return build(RunConfig, merge({**TRAINING_PLACEHOLDERS, "run": str(path)}, tree))


def read_portable_config(path: Path) -> dict:
    """Return a converted model's config.json, with the path of its vocabulary as it is now.

    Raises ValueError if a key is missing.
    """
    tree = tensor_files.read_json(path / CONFIG)
    check_keys(path, tree, "", ("model", "views", "eval_crop"))
    check_keys(path, tree, "provenance", ("vocab", "fingerprint", "eot", "source"))
    if tree["provenance"].get("vocab") or tree.get("data"):
        check_keys(path, tree, "data", ("context", "tokenizer", "pad_text"))
        tree["data"]["tokenizer"] = relocate_tokenizer(str(tree["data"]["tokenizer"]), path)
    return tree


def check_keys(path: Path, tree: dict, key: str, names: tuple[str, ...]) -> None:
    """Raise ValueError unless the mapping at `key`, "" for the tree itself, has all these keys."""
    mapping = tree.get(key, {}) if key else tree
    if not isinstance(mapping, dict):
        mapping = {}
    missing = [f"{key}.{name}".lstrip(".") for name in names if name not in mapping]
    if missing:
        raise ValueError(f"{path / CONFIG}: {', '.join(missing)} missing; convert the model again")


def read_provenance(path: Path) -> dict:
    """Return the record in a converted model's config.json of how it was made."""
    return read_portable_config(path)["provenance"]


def training_progress(path: Path) -> dict:
    """Return how far a model was trained: its step and samples, if they are known."""
    source = read_provenance(path)["source"] if is_one(path) else read_manifest(path)
    return {key: source[key] for key in ("step", "samples") if key in source}


def open_converted(path: Path) -> Portable:
    """Open a converted model's folder."""
    tree = read_portable_config(path)
    record = tree["provenance"]
    data = tree.get("data", {})
    about = About(
        tokenizer=data.get("tokenizer", ""),
        fingerprint=record["fingerprint"],
        eot=record["eot"],
        pad_text=data.get("pad_text", False),
        crop=tree["eval_crop"],
        interpolation=tree["views"]["image"]["interpolation"],
        source={**record["source"], "path": str(path)},
    )
    model = build(ModelConfig, merge({}, tree["model"]), "model.")
    tensors = tensor_files.read(path / WEIGHTS)
    return Portable(model, record["vocab"], data.get("context", 0), tensors, about)


def open_portable(path: Path, weights: str = "student") -> Portable:
    """Open the towers of a model that `find` returned, in fp32.

    weights: student, or teacher: the moving averages in place of the weights that they average.
    """
    if is_one(path):
        if weights != "student":
            raise ValueError(
                f"--weights {weights}: {path} holds one model; convert the run again with --weights"
                f" {weights}"
            )
        return open_converted(path)

    # The towers' weights.
    cfg = read_run_config(path)
    manifest = read_manifest(path)
    tensors = zero_reader.read_weights(path)
    names = {name.removeprefix(TOWERS): name for name in tensors if name.startswith(TOWERS)}
    vocab = tensors.meta[f"{TOWERS}text.token.weight"].shape[0]
    towers = tensors.renamed(names)
    if weights == "teacher":
        towers = replace_by_averages(path, cfg, vocab, towers)

    # The record of where they come from.
    source = dict(
        path=str(path),
        format="run",
        method=cfg.method,
        weights=weights,
        step=manifest["step"],
        samples=manifest["samples"],
    )
    about = About(
        tokenizer=cfg.data.tokenizer,
        fingerprint=manifest["identity"]["tokenizer"],
        pad_text=cfg.data.pad_text,
        crop=cfg.eval_crop,
        interpolation=eval_interpolation(cfg),
        source=source,
    )
    return Portable(cfg.model, vocab, cfg.data.context, towers, about)


def eval_interpolation(cfg: RunConfig) -> str:
    """Return the interpolation of a run's first view, with which evaluations resize images."""
    return next(iter(cfg.views.values())).interpolation


def replace_by_averages(path: Path, cfg: RunConfig, vocab: int, towers: Tensors) -> Tensors:
    """Return the towers' tensors, with the moving averages in place of what they average."""
    with torch.device("meta"):
        method = build_method(cfg, vocab)

    # {tower's tensor: name and shape of its average}. The towers with the averages in them hold
    # the teacher's parameters themselves.
    pairs = ema.parameters(method.ema_pairs()).items()
    teachers = {id(teacher): (key, teacher.shape) for key, (teacher, _) in pairs}
    average_of = {}
    for name, parameter in method.eval_towers("teacher").named_parameters():
        if id(parameter) in teachers:
            average_of[name] = teachers[id(parameter)]

    keys = {name: key for name, (key, _) in average_of.items()}
    averages = zero_reader.read_averages(path, dict(average_of.values())).renamed(keys)

    def get(name: str) -> torch.Tensor:
        return averages[name] if name in average_of else towers[name]

    return Tensors({**towers.meta, **averages.meta}, get)


def read_weights(path: Path) -> Tensors:
    """Return the weights of a checkpoint or converted model, under the names of a method."""
    if not is_one(path):
        return zero_reader.read_weights(path)
    tensors = tensor_files.read(path / WEIGHTS)
    return tensors.renamed({TOWERS + name: name for name in tensors})


def load_weights(
    method: torch.nn.Module,
    path: Path,
    names: dict[str, str] | None = None,
    under: str | None = None,
) -> None:
    """Copy weights into a method, sharded or not; rank 0 alone reads them.

    names: {parameter of the method: its name at the path}, in one order on all ranks; None: all
    parameters, by their own names. Raises ValueError unless each is there in its shape, and no
    other name there begins with `under`. All ranks must call.
    """
    parameters = dict(method.named_parameters())
    if names is None:
        names = {name: name for name in parameters}
        under = ""
    shapes = {}
    for name, stored in names.items():
        parameter = parameters[name]
        # of a sharded parameter: its own shape is empty
        shapes[stored] = getattr(parameter, "ds_shape", parameter.shape)

    # Rank 0 alone reads; it compares names and shapes before any rank waits for weights.
    source = read_weights(path) if rank() == 0 else Tensors.held({})
    broadcast_from_rank0(partial(check_names_and_shapes, path, source, shapes, under))

    for name, stored in names.items():
        with full_parameter(parameters[name]) as tensor:
            if rank() == 0:
                tensor.copy_(source[stored])


def check_names_and_shapes(
    path: Path, source: Tensors, shapes: dict[str, torch.Size], under: str | None
) -> str:
    """Return "", or raise ValueError if the weights at a path are not those that `load` needs."""
    missing = sorted(shapes.keys() - source.meta.keys())
    if missing:
        raise ValueError(
            f"{path}: has no weights for {missing[0]}{more(missing)}; it holds another architecture"
        )
    if under is not None:
        stored = {name for name in source if name.startswith(under)}
        extra = sorted(stored - shapes.keys())
        if extra:
            raise ValueError(
                f"{path}: this config has no place for {extra[0]}{more(extra)}; it holds another"
                " architecture"
            )
    for name, shape in shapes.items():
        stored_shape = source.meta[name].shape
        if stored_shape != shape:
            raise ValueError(
                f"{path}: {name} is {tuple(stored_shape)}, this config makes {tuple(shape)}"
            )
    return ""


def open_model(path: Path) -> tuple[RunConfig, Tokenizer, Method]:
    """Return (config, tokenizer, method on this rank's device) of a model, for evaluation.

    path: as `find` returned it.
    """
    cfg = read_run_config(path)
    tokenizer = build_tokenizer(cfg.data.tokenizer, cfg.data.context)
    if is_one(path):
        source = read_provenance(path)
        if source["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{path}: trained with tokenizer {source['fingerprint']}; {cfg.data.tokenizer} is"
                f" {tokenizer.fingerprint}"
            )
        vocab = source["vocab"]
        tensors = tensor_files.read(path / WEIGHTS).meta.values()
        bf16 = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    else:
        check_identity(path, identity(cfg, tokenizer.fingerprint))
        vocab = tokenizer.vocab_size
        bf16 = read_manifest(path)["bf16"]
    method = build_method(cfg, vocab)
    load_weights(method, path)
    move_to_device(method, bf16)
    return cfg, tokenizer, method


def checksum(module: torch.nn.Module, cfg: RunConfig, tokenizer: Tokenizer) -> str:
    """Hash everything that embeddings depend on.

    The preparation of images and texts, the architecture, and the sum of the weights' bits, which
    is the same on every device.
    """
    integers = {2: torch.int16, 4: torch.int32}  # by bytes
    total = 0
    for parameter in module.parameters():
        bits = parameter.detach().view(integers[parameter.element_size()])
        total += int(bits.sum(dtype=torch.int64))
    settings = [
        total,
        tuples_to_lists(asdict(cfg.model)),
        cfg.eval_crop,
        eval_interpolation(cfg),
        cfg.data.context,
        cfg.data.pad_text,
        tokenizer.fingerprint,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def backbone(run: Path | str, weights: str = "student", **options) -> torch.nn.Module:
    """Return the vision tower of a model as feature maps (docs/transfer.md).

    It is unsharded, in fp32, all of it trainable. run: a run folder, checkpoint or converted model.

    weights: student, or teacher (the moving average). options: of the Backbone. All ranks must
    call, after run.lib.distributed.start().
    """
    from glimpse.model.downstream.backbone import Backbone

    _, _, method = open_model(find_model(Path(run)))
    tower = method.eval_towers(weights).vision.float().requires_grad_(True)
    return Backbone(tower, **options).to(device())
