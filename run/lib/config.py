"""What a run is: YAML over dataclasses, resolved once, saved with the run. The one place that reads
the command line.

    load("run/configs/flip_b16.yaml", ["seed=1", "views.image.mask=random(0.75)"]) -> Run

A config may name a `base:`, whose keys it overrides one by one. The dataclasses stand beside the
code that they configure (ModelConfig in model/towers.py, ...); `Run` puts them together. A key that
no dataclass declares is refused with the near miss named, and every
declared key is read somewhere: tests/run/lib/test_config_keys.py holds both. Counts of samples may
be
written 12.8B, 400M or 51.2k.
"""

import argparse
import difflib
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

import yaml

from glimpse.data.loader import DataConfig, Reader, plan
from glimpse.data.transforms import CROPS, View
from glimpse.model.methods import METHODS
from glimpse.model.towers import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}


KINDS = ("bias", "norm", "positions", "cls", "tokens", "logit_scale", "weight")


@dataclass(frozen=True)
class OptimConfig:
    lr: str  # the peak: absolute ('5e-4'), or by FLIP's rule ('4e-6 per 256': times batch / 256)
    weight_decay: float  # decoupled; FLIP 0.2, CLIP and A-CLIP 0.5 at batch 4096, SLIP 0.1
    warmup: int  # samples over which the rate rises linearly from 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    min_lr: float = 0.0  # where the cosine ends
    clip: float = 0.0  # gradient norm; 0: no clipping (DeepSpeed's own default would be 1.0)
    # kinds of parameters that do not decay (FLIP's); all: see KINDS
    no_decay: tuple[str, ...] = ("bias", "norm", "positions")

    def __post_init__(self):
        self.peak(1)
        for kind in self.no_decay:
            if kind not in KINDS:
                raise ValueError(f"optim.no_decay: unknown {kind!r}; known: {', '.join(KINDS)}")

    def peak(self, batch: int) -> float:
        """The peak learning rate for a global batch."""
        match = re.fullmatch(r"([\d.e+-]+)(?: per (\d+))?", self.lr)
        try:
            return float(match[1]) * (batch / int(match[2]) if match[2] else 1)
        except (TypeError, ValueError):
            raise ValueError(f"optim.lr: {self.lr!r}; write 5e-4, or 4e-6 per 256") from None

    def rate(self, seen: int, batch: int, samples: int) -> float:
        """The learning rate of the step that starts with `seen` samples behind it: linear warm-up,
        then cosine to min_lr.
        """
        peak = self.peak(batch)
        if seen < self.warmup:
            return peak * min(1.0, (seen + batch) / self.warmup)
        turn = (seen - self.warmup) / max(1, samples - self.warmup)
        return self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * min(1.0, turn))) / 2


@dataclass(frozen=True)
class Run:
    run: str  # the run's folder, e.g. runs/flip_b16
    method: str  # a row of model.methods.METHODS
    samples: int  # how many image-text pairs to train on; 12.8B is FLIP's schedule
    batch: int  # pairs in a step, over all ranks: these are each other's negatives
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    views: dict[str, View]  # the method's docstring says which it reads
    # the method's own: `Options` in its file; built with the rest, so never None
    options: object = None
    # how memory, precision and communication are spent; from the repository root
    deepspeed: str = "ds_configs/zero3.json"
    # GradCache: so many forward-backward passes a step, with the negatives of the whole batch
    accumulate: int = 1
    seed: int = 0  # weights, order of the data, crops and masks
    # a run folder or checkpoint whose weights start this run; the optimizer starts anew
    init: str = ""
    log_every: int = 10  # steps
    eval_every: int = 0  # samples; 0: only at the end
    save_every: int = 0  # samples; 0: only at the end
    keep: int = 2  # checkpoints kept; older ones are deleted
    evals: tuple[str, ...] = ()  # e.g. zero_shot:FOLDER, retrieval:FOLDER, suite:aclip
    eval_data: str = ""  # where the sets of suite:NAME lie
    # evaluation images: resize_crop (short side, then centre), square (centre, then resize), squash
    eval_crop: str = "resize_crop"

    def __post_init__(self):
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
        method = METHODS[self.method]
        for name, counts in method.views.items():
            if name not in self.views:
                raise ValueError(
                    f"views: method {self.method!r} reads view {name!r}; give it under views:"
                )
            if (count := self.views[name].count) not in counts:
                raise ValueError(
                    f"views.{name}.count: {count}; method {self.method!r} takes"
                    f" {', '.join(map(str, counts))}"
                )
        for name in self.views:
            check_choice(f"views: method {self.method!r}", name, method.views)
        for name, view in self.views.items():
            around = name in method.enclosing
            if around != bool(view.encloses):
                raise ValueError(
                    f"views.{name}.encloses: {list(view.encloses)}; method {self.method!r} takes "
                    f"{'a view around others, e.g. [view]' if around else 'none here'}"
                )
            if view.size and not around:
                raise ValueError(
                    f"views.{name}.size: {view.size}; only a view around others has another size"
                    " than model.image_size"
                )
            if view.mask != "none" and name in (*method.noise, *method.enclosing):
                raise ValueError(
                    f"views.{name}.mask: {view.mask!r}; method {self.method!r} chooses itself what"
                    " is hidden; use none"
                )
        for name, view, mask, (rows, columns) in plan(
            self.views, self.model.image_size, self.model.patch
        ):
            if name in method.hidden and mask.visible(rows * columns) == rows * columns:
                raise ValueError(
                    f"views.{name}.mask: {view.mask!r} hides nothing; method {self.method!r} learns"
                    " from what is hidden, e.g. random(0.75)"
                )
        method.check(
            self.options, self.model, {name: view.count for name, view in self.views.items()}
        )

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def reader(cfg: Run) -> Reader:
    """What turns this run's samples into batches."""
    method = METHODS[cfg.method]
    return Reader(
        cfg.data,
        cfg.views,
        image_size=cfg.model.image_size,
        patch=cfg.model.patch,
        seed=cfg.seed,
        hidden=method.hidden,
        noise=method.noise,
        pool=cfg.model.text.pool,
    )


def check_choice(key: str, value: str, known: typing.Iterable[str]) -> None:
    """ValueError that names the value, what is allowed, and the near miss, unless value is one of
    `known`.
    """
    known = sorted(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}: unknown {value!r}; known: {', '.join(known) or 'none'}{hint}")


def load(path: str | Path, overrides: typing.Iterable[str] = ()) -> Run:
    """The config at `path`, its bases below it, `a.b=value` overrides on top."""
    tree = read_tree(Path(path))
    for item in overrides:
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
            if (value := yaml.safe_load(text)) is None:
                node.pop(last, None)
            else:
                node[last] = value
        except yaml.YAMLError:
            raise ValueError(
                f"--set {item}: {text!r} is not YAML; put quotes around a value with braces,"
                " brackets or a colon"
            ) from None
    return build(Run, tree)


def read_tree(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such config; the shipped ones are run/configs/*.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a config; a config is a mapping of keys")
    # what a saved config.yaml or a converted model's config.json says of its making
    made = tree.pop("provenance", None)
    if isinstance(made, dict) and made.get("format") == "glimpse" and tree.get("data"):
        tree["data"] = {**tree["data"], "tokenizer": beside(tree["data"]["tokenizer"], path.parent)}
    base = tree.pop("base", None)
    return merge(read_tree(path.parent / base), tree) if base else tree


def beside(tokenizer: str, folder: Path) -> str:
    """A tokenizer's name with the vocabulary that lies in a run's or converted model's folder,
    where one does: it may have been moved.
    """
    kind, bracket, file = tokenizer.removesuffix(")").partition("(")
    own = folder / Path(file).name
    return f"{kind}({own})" if bracket and own.is_file() else tokenizer


def merge(base: dict, over: dict) -> dict:
    """What `over` names replaces what `base` says, mappings key by key; null takes a key of the
    base away.
    """
    both = {
        k: merge(base[k], over[k])
        for k in base.keys() & over.keys()
        if isinstance(base[k], dict) and isinstance(over[k], dict)
    }
    return {k: v for k, v in {**base, **over, **both}.items() if v is not None}


def build(cls: type, tree: dict, where: str = ""):
    """A dataclass from a mapping: every key declared, every value of the declared type."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{where.rstrip('.')}: {tree!r}; it holds keys:"
            f" {', '.join(f.name for f in fields(cls))}"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            check_choice(f"{where}{key}", key, hints)
    for f in fields(cls):
        if f.name not in tree and f.default is f.default_factory:  # both MISSING
            raise ValueError(f"{where}{f.name}: missing; it has no default")
    if cls is Run:
        check_choice("method", tree["method"], METHODS)
        hints["options"], tree = METHODS[tree["method"]].Options, {"options": {}, **tree}
    return cls(**{key: convert(hints[key], value, f"{where}{key}") for key, value in tree.items()})


def convert(kind, value, where: str):
    """The value as `kind`, or ValueError."""
    if is_dataclass(kind):
        return build(kind, value, f"{where}.")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {value!r}; it must be a mapping")
        return {k: convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(kinds):
            raise ValueError(f"{where}: {value!r}; it takes {len(kinds)} values")
        return tuple(convert(k, v, f"{where}.{i}") for i, (k, v) in enumerate(zip(kinds, items)))
    if origin is types.UnionType:  # e.g. float | str: the first that fits
        options = [option for option in args if option is not types.NoneType]
        if value is None and types.NoneType in args:
            return None
        if len(options) == 1:
            return convert(options[0], value, where)
        for option in options:
            try:
                return convert(option, value, where)
            except ValueError:
                continue
        raise ValueError(f"{where}: {value!r}; it must be {kind}")
    try:
        return SCALARS[kind](value)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{where}: {value!r}; it must be of type {kind.__name__}") from None


def to_int(value) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and (match := re.fullmatch(r"([\d.]+)([kMB])", value)):
        value = float(match[1]) * UNITS[match[2]]
    if int(float(value)) != float(value):
        raise ValueError
    return int(float(value))


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


def save(cfg: Run, path: Path, provenance: dict) -> None:
    """The resolved whole; `load` reads it back."""
    tree = {"provenance": provenance, **plain(asdict(cfg))}
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=130))


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def parser(doc: str) -> argparse.ArgumentParser:
    """A script's command line; its help is the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def count(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def training_arguments(doc: str) -> tuple[Run, argparse.Namespace]:
    """(config, the rest) of a training script.

    The command line is --config, --set, --resume, --plan and the DeepSpeed launcher's.
    """
    args = parser(doc)
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
    cluster_arguments(args.add_argument_group("of the cluster, with --plan"))
    found = args.parse_args()
    cfg = load(found.config, found.set)
    if found.deepspeed_config:
        cfg = replace(cfg, deepspeed=str(Path(found.deepspeed_config).resolve()))
    return cfg, found


def cluster_arguments(cluster) -> None:
    """What a plan asks of the devices."""
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
