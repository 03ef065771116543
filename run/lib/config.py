"""The config of a run: YAML over dataclasses, resolved once, saved with the run.

This is the one place that reads the command line.

    load("run/configs/flip_b16.yaml", ["seed=1", "views.image.mask=random(0.75)"]) -> Run

A config may name a `base:`, whose keys it overrides one by one. The dataclasses stand beside the
code that they configure (ModelConfig in model/towers.py, ...); `Run` puts them together. A key that
no dataclass declares is refused with the near miss named, and every declared key is read somewhere:
tests/run/lib/test_config_keys.py holds both. Counts of samples may be written 12.8B, 400M or 51.2k.
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

from glimpse.data.loader import DataConfig, SampleReader, plan
from glimpse.data.transforms import CROPS, View
from glimpse.model.methods import METHODS
from glimpse.model.towers import ModelConfig

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
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
        """Return the peak learning rate for a global batch."""
        complaint = f"optim.lr: {self.lr!r}; write 5e-4, or 4e-6 per 256"
        match = re.fullmatch(r"([\d.e+-]+)(?: per (\d+))?", self.lr)
        if match is None:
            raise ValueError(complaint)
        try:
            rate = float(match[1])
        except ValueError:
            raise ValueError(complaint) from None
        reference_batch = match[2]
        if reference_batch is None:
            return rate
        return rate * (batch / int(reference_batch))

    def lr_at(self, seen: int, batch: int, samples: int) -> float:
        """Return the learning rate of the step that starts with `seen` samples behind it.

        Linear warm-up, then a cosine to min_lr.
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
        """Raise ValueError if the views are not those that the method reads."""
        method = METHODS[self.method]
        self.check_view_names()
        for name in self.views:
            self.check_view(name)

        # A method that learns from hidden patches needs a mask that hides some.
        for draw in plan(self.views, self.model.image_size, self.model.patch):
            rows, columns = draw.grid
            hides_nothing = draw.mask.visible(rows * columns) == rows * columns
            if draw.name in method.hidden and hides_nothing:
                raise ValueError(
                    f"views.{draw.name}.mask: {draw.view.mask!r} hides nothing; method"
                    f" {self.method!r} learns from what is hidden, e.g. random(0.75)"
                )

        counts = {name: view.count for name, view in self.views.items()}
        method.check(self.options, self.model, counts)

    def check_view_names(self) -> None:
        """Raise ValueError unless the views are the method's, each as often as it takes."""
        method = METHODS[self.method]
        for name, counts in method.views.items():
            if name not in self.views:
                raise ValueError(
                    f"views: method {self.method!r} reads view {name!r}; give it under views:"
                )
            count = self.views[name].count
            if count not in counts:
                takes = ", ".join(map(str, counts))
                raise ValueError(
                    f"views.{name}.count: {count}; method {self.method!r} takes {takes}"
                )
        for name in self.views:
            check_choice(f"views: method {self.method!r}", name, method.views)

    def check_view(self, name: str) -> None:
        """Raise ValueError if the view is configured as the method cannot use it."""
        method = METHODS[self.method]
        view = self.views[name]
        encloses_others = name in method.enclosing
        if encloses_others != bool(view.encloses):
            takes = "a view around others, e.g. [view]" if encloses_others else "none here"
            raise ValueError(
                f"views.{name}.encloses: {list(view.encloses)}; method {self.method!r} takes"
                f" {takes}"
            )
        if view.size and not encloses_others:
            raise ValueError(
                f"views.{name}.size: {view.size}; only a view around others has another size than"
                " model.image_size"
            )
        chosen_by_method = (*method.noise, *method.enclosing)
        if view.mask != "none" and name in chosen_by_method:
            raise ValueError(
                f"views.{name}.mask: {view.mask!r}; method {self.method!r} chooses itself what is"
                " hidden; use none"
            )

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def build_reader(cfg: RunConfig) -> SampleReader:
    """Build the reader that turns this run's samples into batches."""
    method = METHODS[cfg.method]
    return SampleReader(
        cfg.data,
        cfg.views,
        image_size=cfg.model.image_size,
        patch=cfg.model.patch,
        seed=cfg.seed,
        hidden=method.hidden,
        noise=method.noise,
        pool=cfg.model.text.pool,
    )


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError, naming the near miss, unless the value is one of `known`."""
    choices = sorted(known)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key}: unknown {value!r}; known: {', '.join(choices) or 'none'}{hint}")


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Build the config at `path`, its bases below it, `a.b=value` overrides on top."""
    tree = read_tree(Path(path))
    for item in overrides:
        apply_override(tree, item)
    return build(RunConfig, tree)


def apply_override(tree: dict, item: str) -> None:
    """Set the key of `a.b=value` in the tree; the value null removes it."""
    key, equals, text = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item}: write key=value, e.g. --set seed=1")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {item}: {name} is a value, it has no keys below it")
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
    """Return the keys of the YAML file at `path`, merged over those of its base."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config; the shipped ones are run/configs/*.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a config; a config is a mapping of keys")

    # A saved config.yaml and a converted model's config.json record how they were made.
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
    """Return a tokenizer's name with the copy of its vocabulary in a folder, if there is one.

    The folder of a run or converted model may have been moved.
    """
    kind, bracket, file = tokenizer.removesuffix(")").partition("(")
    copy = folder / Path(file).name
    return f"{kind}({copy})" if bracket and copy.is_file() else tokenizer


def merge(base: dict, over: dict) -> dict:
    """Return `base` with the values of `over` in place of its own, mappings key by key.

    null removes a key of the base.
    """
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = merge(base[key], over[key])
    return {key: value for key, value in merged.items() if value is not None}


def build(cls: type[T], tree: dict, where: str = "") -> T:
    """Build a dataclass from a mapping: every key declared, every value of the declared type.

    where: the keys above it, with a dot at the end, for error messages.
    """
    assert is_dataclass(cls)
    declared = fields(cls)
    if not isinstance(tree, dict):
        names = ", ".join(field.name for field in declared)
        raise ValueError(f"{where.rstrip('.')}: {tree!r}; it holds keys: {names}")

    # Every key is declared, and every declared key without a default is there.
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            check_choice(f"{where}{key}", key, hints)
    for field in declared:
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in tree:
            raise ValueError(f"{where}{field.name}: missing; it has no default")

    # The method decides the type of its options.
    if cls is RunConfig:
        check_choice("method", tree["method"], METHODS)
        hints["options"] = METHODS[tree["method"]].Options
        tree = {"options": {}, **tree}
    values = {key: convert_value(hints[key], value, f"{where}{key}") for key, value in tree.items()}
    return cls(**values)


# The kind is a type or a generic alias such as tuple[int, ...], which have no common type.
def convert_value(kind: Any, value, where: str):
    """Return the value as `kind`, or raise ValueError."""
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, f"{where}.")
    origin = typing.get_origin(kind)
    if origin is dict:
        return convert_mapping(kind, value, where)
    if origin is tuple:
        return convert_tuple(kind, value, where)
    if origin is types.UnionType:
        return convert_union(kind, value, where)
    try:
        return SCALARS[kind](value)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{where}: {value!r}; it must be of type {kind.__name__}") from None


def convert_mapping(kind: Any, value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r}; it must be a mapping")
    _, value_kind = typing.get_args(kind)
    return {key: convert_value(value_kind, item, f"{where}.{key}") for key, item in value.items()}


def convert_tuple(kind: Any, value, where: str) -> tuple:
    """Return the value as a tuple; a scalar is a tuple of one."""
    args = typing.get_args(kind)
    items = value if isinstance(value, (list, tuple)) else [value]
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
    if len(items) != len(kinds):
        raise ValueError(f"{where}: {value!r}; it takes {len(kinds)} values")
    return tuple(
        convert_value(item_kind, item, f"{where}.{i}")
        for i, (item_kind, item) in enumerate(zip(kinds, items))
    )


def convert_union(kind: Any, value, where: str):
    """Return the value as the first member of the union that fits, e.g. of float | str."""
    args = typing.get_args(kind)
    options = [option for option in args if option is not types.NoneType]
    if value is None and types.NoneType in args:
        return None
    if len(options) == 1:
        return convert_value(options[0], value, where)
    for option in options:
        try:
            return convert_value(option, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where}: {value!r}; it must be {kind}")


def to_int(value) -> int:
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
    return float(value)  # YAML reads 4e-6 as text


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
    """Write the resolved config; `load` reads it back."""
    tree = {"provenance": provenance, **tuples_to_lists(asdict(cfg))}
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=130))


def tuples_to_lists(value):
    """Return the value with lists instead of tuples, as YAML and JSON know them."""
    if isinstance(value, dict):
        return {key: tuples_to_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tuples_to_lists(item) for item in value]
    return value


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """Return a script's command line; its help is the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive_int(text: str) -> int:
    """Return the number that an argument gives; the type of arguments that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parse_training_arguments(doc: str) -> tuple[RunConfig, argparse.Namespace]:
    """Return (config, the other arguments) of a training script.

    The command line is --config, --set, --resume, --plan and the DeepSpeed launcher's.
    """
    # The options.
    args = argument_parser(doc)
    args.add_argument(
        "--config",
        required=True,
        help="a YAML file, e.g. run/configs/flip_b16.yaml, or a run's own config.yaml",
    )
    args.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys, e.g. seed=1 batch=8192",
    )
    args.add_argument(
        "--resume", action="store_true", help="go on from the run folder's newest whole checkpoint"
    )
    args.add_argument("--deepspeed_config", help="a DeepSpeed JSON instead of the config's")
    args.add_argument(
        "--deepspeed", action="store_true", help="accepted for DeepSpeed's habit; always on"
    )
    args.add_argument("--local_rank", type=int, help="from the launcher")
    args.add_argument(
        "--plan",
        action="store_true",
        help="print what the run would cost on a cluster; train nothing",
    )
    add_cluster_arguments(args.add_argument_group("of the cluster, with --plan"))

    # The config that they name; the launcher's JSON takes precedence.
    arguments = args.parse_args()
    cfg = load(arguments.config, arguments.set)
    if arguments.deepspeed_config:
        cfg = replace(cfg, deepspeed=str(Path(arguments.deepspeed_config).resolve()))
    return cfg, arguments


def add_cluster_arguments(cluster) -> None:
    """Add the arguments that describe the devices of a plan."""
    cluster.add_argument("--ranks", type=int, default=8, help="devices")
    cluster.add_argument(
        "--device",
        default="H100",
        help="their kind; known: A100-40, A100-80, H100, H200, B200, TPU-v3-core",
    )
    cluster.add_argument("--peak-tflops", type=float, help="... of another kind, in bf16")
    cluster.add_argument("--gpu-memory", type=float, metavar="GIB", help="... and its memory")
    cluster.add_argument(
        "--mfu",
        type=float,
        help="the model's FLOPs to the peak, as metrics.jsonl has it; default 0.35",
    )
    cluster.add_argument("--price", type=float, help="of a device-hour")
    cluster.add_argument(
        "--caption",
        type=float,
        metavar="TOKENS",
        help="tokens of a caption that the tower sees, on average; default 16",
    )
