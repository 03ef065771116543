"""Find the model at a path, and load its weights.

    path = find_model(Path("runs/quickstart"))
        the newest checkpoint of a run, a checkpoint, or a converted model (run/convert.py)
    cfg, tokenizer, method = open_model(path)
        build the method and load its weights, for evaluation
    load_weights(method, path, names)
        load weights into a method that may be sharded, for training

The functions below take a `path` that find_model() returned. Weights are loaded one tensor at a
time: a rank never holds more than one full tensor besides its own shards.
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from glimpse.data.tokenizer import Tokenizer, build_tokenizer
from glimpse.model import ema, tensor_files
from glimpse.model.lazy_tensors import LazyTensors, and_more
from glimpse.model.methods import Method, build_method
from glimpse.model.portable import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ModelInfo,
    PortableModel,
    is_glimpse_folder,
)
from glimpse.model.towers import ModelConfig
from glimpse.run.lib.config import RunConfig, build, merge, relocate_tokenizer, tuples_to_lists
from glimpse.run.lib.config import load as load_config
from glimpse.run.lib.distributed import broadcast_from_rank0, device, rank
from glimpse.run.train import zero_reader
from glimpse.run.train.checkpoint import check_identity, identity, newest_checkpoint, read_manifest
from glimpse.run.train.engine import full_parameter, move_to_device

TOWERS = "towers."  # prefix of the method's parameters that a converted model contains
# Values for the required keys that a converted model's config.json lacks; only training reads them.
TRAINING_PLACEHOLDERS = dict(
    method="clip",
    samples=1,
    batch=1,
    data={"train": "none"},
    optim=dict(lr="0", weight_decay=0.0, warmup=0),
)


def find_model(path: Path) -> Path:
    """Return the path of the model at `path`: a checkpoint or a converted model's folder.

    path: a run folder (for its newest checkpoint), a checkpoint, or a converted model's folder or
    weight file. Raises ValueError if there is no model, it is damaged, or it has another format.
    """
    from glimpse.model.convert import detect_format

    if path.name == WEIGHTS_FILE and is_glimpse_folder(path.parent):
        path = path.parent
    if is_glimpse_folder(path):
        return path

    foreign_format = detect_format(path) if path.exists() else None
    if foreign_format:
        raise ValueError(
            f"{path}: a model in {foreign_format} format; convert it first, with `python"
            f" run/convert.py glimpse {path} OUT`"
        )
    if (path / CONFIG_FILE).is_file():
        tensor_files.read_json(path / CONFIG_FILE)  # raises ValueError if it is damaged
    return newest_checkpoint(path)


def results_folder(path: Path) -> Path:
    """Return the folder for a model's results: its run folder, or the converted model's folder."""
    return path if is_glimpse_folder(path) else path.parents[1]


def read_run_config(path: Path) -> RunConfig:
    """Return the config of a model.

    A converted model's config gets placeholders for the keys that only training reads.
    """
    if not is_glimpse_folder(path):
        run = path.parents[1]
        cfg = load_config(run / "config.yaml")
        data = replace(cfg.data, tokenizer=relocate_tokenizer(cfg.data.tokenizer, run))
        return replace(cfg, data=data)
    tree = read_portable_config(path)
    del tree["provenance"]
    if not tree.get("data"):
        raise ValueError(
            f"{path}: it has a vision tower but no text tower; it can only be the start of a run,"
            f" with init: {path}"
        )
    return build(RunConfig, merge({**TRAINING_PLACEHOLDERS, "run": str(path)}, tree))


def read_portable_config(path: Path) -> dict:
    """Return a converted model's config.json, with the current path of its vocabulary file.

    Raises ValueError if a key is missing.
    """
    tree = tensor_files.read_json(path / CONFIG_FILE)
    check_keys(path, tree, "", ("model", "views", "eval_crop"))
    check_keys(path, tree, "provenance", ("vocab", "fingerprint", "eot", "source"))
    if tree["provenance"].get("vocab") or tree.get("data"):
        check_keys(path, tree, "data", ("context", "tokenizer", "pad_text"))
        tree["data"]["tokenizer"] = relocate_tokenizer(str(tree["data"]["tokenizer"]), path)
    return tree


def check_keys(path: Path, tree: dict, key: str, names: tuple[str, ...]) -> None:
    """Raise ValueError unless the mapping tree[key], or tree for key "", has all the names."""
    mapping = tree.get(key, {}) if key else tree
    if not isinstance(mapping, dict):
        mapping = {}
    missing = [f"{key}.{name}".lstrip(".") for name in names if name not in mapping]
    if missing:
        raise ValueError(
            f"{path / CONFIG_FILE}: {', '.join(missing)} missing; convert the model again"
        )


def read_provenance(path: Path) -> dict:
    """Return the provenance in a converted model's config.json: source, vocabulary, tokenizer."""
    return read_portable_config(path)["provenance"]


def training_progress(path: Path) -> dict:
    """Return the step and samples that a model was trained for, if they are known."""
    source = read_provenance(path)["source"] if is_glimpse_folder(path) else read_manifest(path)
    return {key: source[key] for key in ("step", "samples") if key in source}


def open_converted(path: Path) -> PortableModel:
    """Open a converted model."""
    tree = read_portable_config(path)
    record = tree["provenance"]
    data = tree.get("data", {})
    about = ModelInfo(
        tokenizer=data.get("tokenizer", ""),
        fingerprint=record["fingerprint"],
        eot=record["eot"],
        pad_text=data.get("pad_text", False),
        crop=tree["eval_crop"],
        interpolation=tree["views"]["image"]["interpolation"],
        source={**record["source"], "path": str(path)},
    )
    model = build(ModelConfig, merge({}, tree["model"]), "model.")
    tensors = tensor_files.read_tensors(path / WEIGHTS_FILE)
    return PortableModel(model, record["vocab"], data.get("context", 0), tensors, about)


def open_portable(path: Path, weights: str = "student") -> PortableModel:
    """Open the towers of a model, in fp32, as the common form of all conversions.

    weights: "student", or "teacher" for a run's moving averages.
    """
    if is_glimpse_folder(path):
        if weights != "student":
            raise ValueError(
                f"--weights {weights}: {path} is a converted model, which has one set of weights;"
                f" convert the run again with --weights {weights}"
            )
        return open_converted(path)

    # 1. The towers' weights.
    cfg = read_run_config(path)
    manifest = read_manifest(path)
    tensors = zero_reader.read_weights(path)
    names = {name.removeprefix(TOWERS): name for name in tensors if name.startswith(TOWERS)}
    vocab = tensors.meta[f"{TOWERS}text.token.weight"].shape[0]
    towers = tensors.rename(names)
    if weights == "teacher":
        towers = replace_by_averages(path, cfg, vocab, towers)

    # 2. Their provenance, and what else a conversion needs to know.
    source = dict(
        path=str(path),
        format="run",
        method=cfg.method,
        weights=weights,
        step=manifest["step"],
        samples=manifest["samples"],
    )
    about = ModelInfo(
        tokenizer=cfg.data.tokenizer,
        fingerprint=manifest["identity"]["tokenizer"],
        pad_text=cfg.data.pad_text,
        crop=cfg.eval_crop,
        interpolation=eval_interpolation(cfg),
        source=source,
    )
    return PortableModel(cfg.model, vocab, cfg.data.context, towers, about)


def eval_interpolation(cfg: RunConfig) -> str:
    """Return the interpolation of a run's first view; evaluations resize images with it."""
    return next(iter(cfg.views.values())).interpolation


def replace_by_averages(path: Path, cfg: RunConfig, vocab: int, towers: LazyTensors) -> LazyTensors:
    """Return the towers' tensors, with moving averages in place of the parameters that have one."""
    with torch.device("meta"):
        method = build_method(cfg, vocab)

    # Find out which tower parameters have an average: eval_towers("teacher") returns towers that
    # contain the teacher's own Parameter objects. {parameter: (name, shape) of its average}
    pairs = ema.pair_parameters(method.ema_pairs()).items()
    teachers = {id(teacher): (key, teacher.shape) for key, (teacher, _) in pairs}
    average_of = {}
    for name, parameter in method.eval_towers("teacher").named_parameters():
        if id(parameter) in teachers:
            average_of[name] = teachers[id(parameter)]

    keys = {name: key for name, (key, _) in average_of.items()}
    averages = zero_reader.read_averages(path, dict(average_of.values())).rename(keys)

    def read(name: str) -> torch.Tensor:
        return averages[name] if name in average_of else towers[name]

    return LazyTensors({**towers.meta, **averages.meta}, read)


def read_weights(path: Path) -> LazyTensors:
    """Return the weights of a checkpoint or converted model, by the method's parameter names."""
    if not is_glimpse_folder(path):
        return zero_reader.read_weights(path)
    tensors = tensor_files.read_tensors(path / WEIGHTS_FILE)
    return tensors.rename({TOWERS + name: name for name in tensors})


def load_weights(
    method: torch.nn.Module,
    path: Path,
    names: dict[str, str] | None = None,
    required_prefix: str | None = None,
) -> None:
    """Load weights into a method, sharded or not. All ranks must call; only rank 0 reads.

    names: {parameter of the method: its name at `path`}, in the same order on all ranks; None loads
    all parameters by their own names. Raises ValueError if a name is missing at `path` or has
    another shape, or if a name there with the required prefix is not among `names`.
    """
    parameters = dict(method.named_parameters())
    if names is None:
        names = {name: name for name in parameters}
        required_prefix = ""
    shapes = {}
    for name, stored_name in names.items():
        parameter = parameters[name]
        # the .shape of a ZeRO-3 parameter is that of an empty tensor
        shapes[stored_name] = getattr(parameter, "ds_shape", parameter.shape)

    # Check names and shapes on rank 0 before any rank waits for weights in a broadcast.
    source = read_weights(path) if rank() == 0 else LazyTensors.from_dict({})
    broadcast_from_rank0(partial(check_names_and_shapes, path, source, shapes, required_prefix))

    for name, stored_name in names.items():
        with full_parameter(parameters[name]) as tensor:
            if rank() == 0:
                tensor.copy_(source[stored_name])


def check_names_and_shapes(
    path: Path, source: LazyTensors, shapes: dict[str, torch.Size], required_prefix: str | None
) -> str:
    """Raise ValueError if the weights at a path do not match the expected names and shapes.

    Returns "", because broadcast_from_rank0 sends a string.
    """
    missing = sorted(shapes.keys() - source.meta.keys())
    if missing:
        raise ValueError(
            f"{path}: has no weights for {missing[0]}{and_more(missing)}; it holds another"
            " architecture than this config's"
        )
    if required_prefix is not None:
        stored = {name for name in source if name.startswith(required_prefix)}
        extra = sorted(stored - shapes.keys())
        if extra:
            raise ValueError(
                f"{path}: this config's model has no parameter {extra[0]}{and_more(extra)}; the"
                " weights are of another architecture"
            )
    for name, shape in shapes.items():
        stored_shape = source.meta[name].shape
        if stored_shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(stored_shape)}, in this config it has"
                f" {tuple(shape)}; the weights are of another architecture"
            )
    return ""


def open_model(path: Path) -> tuple[RunConfig, Tokenizer, Method]:
    """Return (config, tokenizer, method on this rank's device) of a model, for evaluation.

    Raises ValueError if the vocabulary is not the one that the model was trained with.
    """
    cfg = read_run_config(path)
    tokenizer = build_tokenizer(cfg.data.tokenizer, cfg.data.context)
    if is_glimpse_folder(path):
        source = read_provenance(path)
        if source["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{path}: trained with tokenizer {source['fingerprint']}, but"
                f" {cfg.data.tokenizer} has {tokenizer.fingerprint}; restore the original"
                " vocabulary file"
            )
        vocab = source["vocab"]
        tensors = tensor_files.read_tensors(path / WEIGHTS_FILE).meta.values()
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
    """Return a hash of everything that embeddings depend on.

    That is the preprocessing of images and texts, the architecture, and the weights. The weights
    enter as the sum of their bit patterns, which is the same on every device.
    """
    integers = {2: torch.int16, 4: torch.int32}  # {bytes per element: dtype}
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
    """Return the vision tower of a model as a backbone of feature maps (docs/transfer.md).

    It is unsharded, in fp32, with all parameters trainable. All ranks must call, after
    run.lib.distributed.start().

    run: a run folder, checkpoint or converted model. weights: "student", or "teacher" (the moving
    average). options: arguments of Backbone.
    """
    from glimpse.model.downstream.backbone import Backbone

    _, _, method = open_model(find_model(Path(run)))
    tower = method.eval_towers(weights).vision.float().requires_grad_(True)
    return Backbone(tower, **options).to(device())
