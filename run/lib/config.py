"""Load the config of a run from YAML into dataclasses, and parse the command line of training.

    cfg = load("run/configs/flip_b16.yaml", ["seed=1", "views.image.mask=random(0.75)"])

RunConfig is the whole config. The dataclasses of its sections are defined next to the code that
they configure, e.g. ModelConfig in model/towers.py. A YAML file may have a `base:`, another YAML
file whose keys it overrides one by one.

A key that no dataclass declares is an error that suggests the closest key. Integers may be written
as 12.8B, 400M or 51.2k. The resolved config is saved in the run folder.
"""

import argparse
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from glimpse.data.loader import DataConfig, SampleReader, plan_views
from glimpse.data.transforms import CROPS, View
from glimpse.model.methods import METHODS
from glimpse.model.towers import ModelConfig

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the installed package
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}
PARAMETER_KINDS = ("bias", "norm", "positions", "cls", "tokens", "logit_scale", "weight")


@dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate: absolute, e.g. 5e-4, or scaled with the batch by FLIP's rule, e.g.
    # 4e-6 per 256 (times batch / 256).
    lr: str
    # Decoupled weight decay of AdamW; FLIP uses 0.2, CLIP and A-CLIP 0.5 at batch 4096, SLIP
    # 0.1.
    weight_decay: float
    # Samples over which the learning rate rises linearly from 0 to its peak.
    warmup: int
    # AdamW's two decay rates of the moments.
    betas: tuple[float, float] = (0.9, 0.95)
    # AdamW's epsilon.
    eps: float = 1e-8
    # Learning rate at the end of the cosine schedule.
    min_lr: float = 0.0
    # Maximum gradient norm; 0 turns clipping off.
    clip: float = 0.0
    # Kinds of parameters without weight decay: bias, norm, positions, cls, tokens,
    # logit_scale, weight.
    no_decay: tuple[str, ...] = ("bias", "norm", "positions")

    def __post_init__(self) -> None:
        self.peak_lr(1)
        for kind in self.no_decay:
            if kind not in PARAMETER_KINDS:
                raise ValueError(
                    f"optim.no_decay: unknown {kind!r}; known: {', '.join(PARAMETER_KINDS)}"
                )

    def peak_lr(self, batch: int) -> float:
        """Return the peak learning rate for a global batch size.

        Raises ValueError if `lr` is neither a rate nor a rate per batch size.
        """
        problem = f"optim.lr: {self.lr!r} is not a learning rate; write 5e-4, or 4e-6 per 256"
        match = re.fullmatch(r"([\d.e+-]+)(?: per (\d+))?", self.lr)
        if match is None:
            raise ValueError(problem)
        try:
            rate = float(match[1])
        except ValueError:
            raise ValueError(problem) from None
        if not 0 <= rate < math.inf:
            raise ValueError(
                f"optim.lr: {self.lr!r} is negative or infinite; use a positive number"
            )
        if match[2] is None:
            return rate

        reference_batch = int(match[2])
        if reference_batch < 1:
            raise ValueError(
                f"optim.lr: {self.lr!r} is per batch of {reference_batch}; use a batch size of at"
                " least 1, e.g. 4e-6 per 256"
            )
        return rate * (batch / reference_batch)

    def lr_at(self, seen: int, batch: int, samples: int) -> float:
        """Return the learning rate of the step that starts after `seen` samples.

        The schedule is a linear warm-up, then a cosine to min_lr at `samples` samples. batch: the
        global batch size.
        """
        peak = self.peak_lr(batch)
        if seen < self.warmup:
            return peak * min(1.0, (seen + batch) / self.warmup)
        progress = (seen - self.warmup) / max(1, samples - self.warmup)
        cosine = 1 + math.cos(math.pi * min(1.0, progress))
        return self.min_lr + (peak - self.min_lr) * cosine / 2


@dataclass(frozen=True)
class RunConfig:
    # Run folder, e.g. runs/flip_b16; an existing folder is only accepted with --resume.
    run: str
    # Training method: clip (also FLIP and GLIP), slip, mae, aclip or maskclip.
    method: str
    # Image-text pairs to train on; the number of steps is samples // batch.
    samples: int
    # Pairs in one step over all ranks; they are each other's negatives.
    batch: int
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    views: dict[str, View]  # the method's docstring says which it reads
    # Options of the method; their keys are listed for each method below.
    options: Any = None
    # DeepSpeed JSON with ZeRO stage and precision; a relative path starts at the repository
    # root.
    deepspeed: str = "ds_configs/zero3.json"
    # Micro-batches that GradCache splits each rank's share of a batch into; the negatives
    # stay those of the whole batch.
    accumulate: int = 1
    # Seed of the initial weights, the data order, the crops and the masks.
    seed: int = 0
    # Run folder or checkpoint that provides the initial weights; the optimizer and the
    # schedule start anew.
    init: str = ""
    # Steps between two records in metrics.jsonl; the first and the last step are always
    # recorded.
    log_every: int = 10
    # Samples between two evaluations; 0 evaluates only at the end.
    eval_every: int = 0
    # Samples between two checkpoints; 0 saves only at the end.
    save_every: int = 0
    # Newest checkpoints to keep; older ones are deleted.
    keep: int = 2
    # Evaluations during and after training, as KIND:FOLDER or suite:NAME, e.g.
    # zero_shot:datasets/glyphs/eval/seen_concepts_seen_style.
    evals: tuple[str, ...] = ()
    # Folder that holds the evaluation sets of suite:NAME.
    eval_data: str = ""
    # How an evaluation image becomes square: resize_crop (resize the short side, then center
    # crop; CLIP), square (center crop, then resize; FLIP) or squash (resize the whole image,
    # ignoring its aspect ratio).
    eval_crop: str = "resize_crop"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("eval_crop", self.eval_crop, CROPS)
        if self.data.pad_text and self.model.text.pool == "eot":
            raise ValueError(
                "data.pad_text: with model.text.pool 'eot' the pooled token would be padding; use"
                " pool: first, or no padding"
            )
        self.check_views()
        for name in ("samples", "batch", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; it must be at least 1")
        if self.samples < self.batch:
            raise ValueError(f"samples: {self.samples} is less than one batch of {self.batch}")

    def check_views(self) -> None:
        """Raise ValueError if the method cannot train with these views."""
        method = METHODS[self.method]
        self.check_view_names()
        for name in self.views:
            self.check_view(name)

        # A method that learns from masked patches needs a mask that hides some.
        for spec in plan_views(self.views, self.model.image_size, self.model.patch_size):
            rows, columns = spec.grid
            hides_nothing = spec.mask.visible_count(rows * columns) == rows * columns
            if spec.name in method.hidden_patch_views and hides_nothing:
                raise ValueError(
                    f"views.{spec.name}.mask: {spec.view.mask!r} hides nothing; method"
                    f" {self.method!r} learns from masked patches: use e.g. random(0.75)"
                )

        counts = {name: view.count for name, view in self.views.items()}
        method.check_options(self.options, self.model, counts)

    def check_view_names(self) -> None:
        """Raise ValueError unless the views have the names and counts that the method requires."""
        method = METHODS[self.method]
        for name, counts in method.allowed_view_counts.items():
            if name not in self.views:
                raise ValueError(
                    f"views: method {self.method!r} reads view {name!r}; add it under views:"
                )
            count = self.views[name].count
            if count not in counts:
                allowed = ", ".join(map(str, counts))
                raise ValueError(
                    f"views.{name}.count: {count}; method {self.method!r} takes {allowed}"
                )
        for name in self.views:
            check_choice(f"views: method {self.method!r}", name, method.allowed_view_counts)

    def check_view(self, name: str) -> None:
        """Raise ValueError if the method cannot use the settings of a view."""
        method = METHODS[self.method]
        view = self.views[name]

        # A view that encloses others is cropped around their boxes, and may have its own size.
        encloses_others = name in method.enclosing_views
        if encloses_others != bool(view.encloses):
            allowed = "the names of other views, e.g. [view]" if encloses_others else "only []"
            raise ValueError(
                f"views.{name}.encloses: {list(view.encloses)}; method {self.method!r} takes"
                f" {allowed} here"
            )
        if view.size and not encloses_others:
            raise ValueError(
                f"views.{name}.size: {view.size}; only a view that encloses others may differ from"
                " model.image_size; remove it"
            )

        chosen_by_method = (*method.noise_views, *method.enclosing_views)
        if view.mask != "none" and name in chosen_by_method:
            raise ValueError(
                f"views.{name}.mask: {view.mask!r}; method {self.method!r} chooses the visible"
                " patches itself; use none"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.samples // self.batch


def build_reader(cfg: RunConfig) -> SampleReader:
    """Build the reader that decodes a run's samples and collates them into batches."""
    method = METHODS[cfg.method]
    return SampleReader(
        cfg.data,
        cfg.views,
        image_size=cfg.model.image_size,
        patch=cfg.model.patch_size,
        seed=cfg.seed,
        hidden=method.hidden_patch_views,
        noise=method.noise_views,
        pool=cfg.model.text.pool,
    )


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the closest match, unless the value is one of `known`."""
    choices = sorted(known)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key}: unknown {value!r}; known: {', '.join(choices) or 'none'}{hint}")


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a config file, merged over its bases, with overrides of the form `a.b=value`."""
    tree = read_tree(Path(path))
    for item in overrides:
        apply_override(tree, item)
    return build(RunConfig, tree)


def apply_override(tree: dict, item: str) -> None:
    """Apply an override `a.b=value` to nested keys; the value null removes the key."""
    key, equals, text = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item}: write key=value, e.g. --set seed=1")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {item}: {name} is a value and has no keys")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(
            f"--set {item}: {text!r} is not YAML; put quotes around a value with braces,"
            " brackets or a colon"
        ) from None
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value


def read_tree(path: Path) -> dict:
    """Read a YAML file as nested keys, merged over those of its base."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config; the shipped ones are run/configs/*.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a config; a config consists of `key: value` lines")

    # A run's config.yaml and a converted model's config.json also have a "provenance", which is no
    # config key. The vocabulary file of a converted model is next to its config.json.
    provenance = tree.pop("provenance", None)
    is_converted = isinstance(provenance, dict) and provenance.get("format") == "glimpse"
    if is_converted and tree.get("data"):
        tokenizer = relocate_tokenizer(tree["data"]["tokenizer"], path.parent)
        tree["data"] = {**tree["data"], "tokenizer": tokenizer}

    base = tree.pop("base", None)
    if not base:
        return tree
    return merge(read_tree(path.parent / base), tree)


def relocate_tokenizer(tokenizer: str, folder: Path) -> str:
    """Point a tokenizer, KIND(PATH), to the copy of its vocabulary file in a folder, if any.

    The folder of a run or a converted model may have been moved since the path was written.
    """
    kind, bracket, file = tokenizer.removesuffix(")").partition("(")
    copy = folder / Path(file).name
    return f"{kind}({copy})" if bracket and copy.is_file() else tokenizer


def merge(base: dict, over: dict) -> dict:
    """Merge `over` into a copy of `base`, nested mappings key by key; null removes a key."""
    result = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            result[key] = merge(base[key], over[key])
    return {key: value for key, value in result.items() if value is not None}


def build(cls: type[T], tree: dict, prefix: str = "") -> T:
    """Build a config dataclass from nested mappings.

    Raises ValueError for unknown or missing keys and for values of a wrong type. prefix: the keys
    above, with a dot at the end, for error messages.
    """
    assert is_dataclass(cls)
    declared = fields(cls)
    if not isinstance(tree, dict):
        names = ", ".join(field.name for field in declared)
        raise ValueError(f"{prefix.rstrip('.')}: {tree!r} is not a mapping; its keys are {names}")

    # 1. All keys must be declared, and those without a default must be present.
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            check_choice(f"{prefix}{key}", key, hints)
    for field in declared:
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in tree:
            raise ValueError(f"{prefix}{field.name}: missing; it has no default")

    # 2. The dataclass of `options` depends on the method.
    if cls is RunConfig:
        check_choice("method", tree["method"], METHODS)
        hints["options"] = METHODS[tree["method"]].Options
        tree = {"options": {}, **tree}

    # 3. Convert the values; sections become dataclasses.
    values = {}
    for name, value in tree.items():
        values[name] = convert_value(hints[name], value, f"{prefix}{name}")
    return cls(**values)


# A hint is a type or a generic alias such as tuple[int, ...]; these have no common type.
def convert_value(hint: Any, value, key: str):
    """Convert a value from YAML to the type of a field; raise ValueError if it does not fit.

    key: the full key, for error messages.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value, f"{key}.")
    origin = typing.get_origin(hint)
    if origin is dict:
        return convert_mapping(hint, value, key)
    if origin is tuple:
        return convert_tuple(hint, value, key)
    if origin is types.UnionType:
        return convert_union(hint, value, key)
    try:
        return SCALARS[hint](value)
    except (ValueError, TypeError, KeyError, OverflowError):  # int(inf) raises OverflowError
        raise ValueError(f"{key}: {value!r}; it must be of type {hint.__name__}") from None


def convert_mapping(hint: Any, value, key: str) -> dict:
    """Convert the values of a mapping with free keys, such as `views`."""
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {value!r}; it must be a mapping")
    _, item_hint = typing.get_args(hint)
    return {name: convert_value(item_hint, item, f"{key}.{name}") for name, item in value.items()}


def convert_tuple(hint: Any, value, key: str) -> tuple:
    """Convert a list to a tuple; a scalar becomes a tuple with one element."""
    args = typing.get_args(hint)
    items = value if isinstance(value, (list, tuple)) else [value]
    item_hints = [args[0]] * len(items) if args[-1] is Ellipsis else args
    if len(items) != len(item_hints):
        raise ValueError(f"{key}: {value!r}; it takes {len(item_hints)} values")
    return tuple(
        convert_value(item_hint, item, f"{key}.{i}")
        for i, (item_hint, item) in enumerate(zip(item_hints, items))
    )


def convert_union(hint: Any, value, key: str):
    """Convert a value to the first member of a union that fits, e.g. of float | str."""
    args = typing.get_args(hint)
    options = [option for option in args if option is not types.NoneType]
    if value is None and types.NoneType in args:
        return None
    if len(options) == 1:
        return convert_value(options[0], value, key)
    for option in options:
        try:
            return convert_value(option, value, key)
        except ValueError:
            continue
    raise ValueError(f"{key}: {value!r}; it must be of type {hint}")


def to_int(value) -> int:
    """Convert 3, 3.0, "3", "1e6" or "12.8B" to an int."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and (match := re.fullmatch(r"([\d.]+)([kMB])", value)):
        value = float(match[1]) * UNITS[match[2]]
    number = float(value)
    if int(number) != number:
        raise ValueError
    return int(number)


def to_float(value) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # YAML reads 4e-6 as a string


def to_bool(value) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def to_str(value) -> str:
    if value is None or isinstance(value, (dict, list)):
        raise ValueError
    return str(value)


SCALARS = {int: to_int, float: to_float, bool: to_bool, str: to_str}


def save(cfg: RunConfig, path: Path, provenance: dict) -> None:
    """Write the resolved config and its provenance as YAML, which load() can read."""
    tree = {"provenance": provenance, **tuples_to_lists(asdict(cfg))}
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=130))


def tuples_to_lists(value):
    """Replace tuples by lists in a nested value, for YAML and JSON."""
    if isinstance(value, dict):
        return {key: tuples_to_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tuples_to_lists(item) for item in value]
    return value


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """Return an argument parser whose description is the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive_int(text: str) -> int:
    """Convert a command line argument to an int of at least 1; used as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse_training_arguments(doc: str) -> tuple[RunConfig, argparse.Namespace]:
    """Parse the command line of a training script; return (config, all arguments)."""
    # 1. The arguments of the script, and those that DeepSpeed's launcher adds.
    parser = argument_parser(doc)
    parser.add_argument(
        "--config",
        required=True,
        help="a YAML file, e.g. run/configs/flip_b16.yaml, or the config.yaml of a run",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys, e.g. seed=1 batch=8192",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest complete checkpoint in the run folder",
    )
    parser.add_argument(
        "--deepspeed_config", help="a DeepSpeed JSON to use instead of the config's `deepspeed`"
    )
    parser.add_argument(
        "--deepspeed", action="store_true", help="has no effect: DeepSpeed is always used"
    )
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="estimate memory, time and cost of the run on a cluster, without training",
    )
    add_cluster_arguments(parser.add_argument_group("cluster, with --plan"))

    # 2. The config, in which --deepspeed_config replaces a key.
    args = parser.parse_args()
    cfg = load(args.config, args.set)
    if args.deepspeed_config:
        cfg = replace(cfg, deepspeed=str(Path(args.deepspeed_config).resolve()))
    return cfg, args


def add_cluster_arguments(parser) -> None:
    """Add the arguments that describe the cluster of a plan."""
    parser.add_argument("--ranks", type=int, default=8, help="number of devices; default 8")
    parser.add_argument(
        "--device",
        default="H100",
        help="type of the devices: A100-40, A100-80, H100 (default), H200, B200 or TPU-v3-core",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="peak bf16 TFLOP/s of another type of device"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of another type of device, in GiB"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        help="model FLOPs utilization, as in metrics.jsonl; default 0.35",
    )
    parser.add_argument("--price", type=float, help="price of a device-hour")
    parser.add_argument(
        "--caption",
        type=float,
        metavar="TOKENS",
        help="mean number of tokens per caption that the text tower sees; default 16",
    )
