"""Grids of runs: cells that differ from a base config in a few keys.

    grid = read_grid("flip_table8")                         run/grids/flip_table8.yaml
    runs = grid.runs("glyphs", ["baseline"], seeds=3, out=Path("runs/scaling"))

A grid reproduces a table of a paper at several scales: the paper's own, and one that a small
machine can train. Each cell is a list of changes:

- `key=value` overrides a key of the config.
- A name stands for the changes that the scale lists under that name. `model` may be H/14 at the
  paper's scale and a wider nano model on a small machine.
- `config=NAME` starts from another config than that of the scale.
- `{CELL}` in a value is the run folder of that cell with the same seed, which is trained first, as
  in `init={mask 50}`.

A run's folder name contains a digest of its settings, so a run that two grids share is trained
once. To add a grid, add a YAML file to run/grids/.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT, RunConfig

GRIDS_FOLDER = ROOT / "run" / "grids"
# {CELL}, but neither a mapping {a: b} nor a range of shards {00000..00007}.
CELL_REFERENCE = re.compile(r"\{((?:(?!\.\.)[^{}:])+)\}")
# Keys that do not affect the results of a run.
IGNORED_KEYS = ("run", "seed", "deepspeed", "log_every", "save_every", "keep")
IGNORED_DATA_KEYS = ("workers", "prefetch", "trace")


@dataclass(frozen=True)
class Scale:
    """A scale at which the cells of a grid can be trained."""

    config: str  # a file of run/configs, without .yaml
    metric: str  # the metric that is compared, e.g. zero_shot/imagenet/top1
    set: tuple[str, ...] = ()  # key=value, for every cell
    # {name used by cells: its changes}
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a cell: one seed."""

    cfg: RunConfig
    config_file: Path
    changes: tuple[str, ...]  # key=value, including the run's folder and seed
    dependencies: tuple[Path, ...]  # run folders that must be complete first
    # Options of run/evaluate.py for further evaluations after training.
    evaluate: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run)


def merge_runs(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Return one run for each folder, with the evaluations of all runs that share it."""
    by_folder: dict[Path, PlannedRun] = {}
    for run in runs:
        first = by_folder.setdefault(run.folder, run)
        evaluate = tuple(dict.fromkeys((*first.evaluate, *run.evaluate)))
        by_folder[run.folder] = replace(first, evaluate=evaluate)
    return list(by_folder.values())


@dataclass(frozen=True)
class Grid:
    title: str
    source: str  # paper and table
    scales: dict[str, Scale]
    cells: dict[str, tuple[str, ...]]  # the first cell is the baseline
    # The paper's value of a cell, in per cent. The key `CELL, mask random(0.5)` is a cell with a
    # further evaluation.
    paper: dict[str, float] = field(default_factory=dict)
    # Further evaluations of a cell, as options of run/evaluate.py: [mask random(0.5)]
    evaluate: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        # YAML may read the name of a cell as a number or a boolean.
        for cell in self.cells:
            if not isinstance(cell, str):
                kind = type(cell).__name__
                raise ValueError(
                    f"cells: YAML reads the name {cell!r} as {kind}, not text; put it in quotes"
                )

        # Results are named by the options that differ from those of the evaluation in training.
        for cell in self.evaluate:
            config.check_choice("cells", cell, self.cells)
        for cell, items in self.evaluate.items():
            for item in items:
                option = item.partition(" ")[0]
                is_default = item in ("mask none", "ensemble 1")
                if option not in ("mask", "ensemble") or is_default:
                    raise ValueError(
                        f"evaluate: {cell}: {item!r} is not a further evaluation; use"
                        " `mask STRATEGY` or `ensemble N` with other values than `mask none` and"
                        " `ensemble 1`, which training evaluates with"
                    )

        # Every value of the paper belongs to a cell, and every name of a change is defined.
        evaluated = [f"{cell}, {item}" for cell, items in self.evaluate.items() for item in items]
        for cell in self.paper:
            config.check_choice("paper", cell, {*self.cells, *evaluated})
        for cell, changes in self.cells.items():
            for scale in self.scales.values():
                for change in changes:
                    if "=" not in change:
                        config.check_choice(f"cells: {cell}", change, scale.changes)

    def scale(self, name: str) -> Scale:
        config.check_choice("--scale", name, self.scales)
        return self.scales[name]

    def runs(
        self, scale: str, cells: list[str], seeds: int, out: Path, overrides: Sequence[str] = ()
    ) -> dict[str, list[PlannedRun]]:
        """Return {cell: one run per seed}, including the cells that the given ones depend on.

        cells: names of cells; [] for all.
        out: parent of the folders of all scales.
        overrides: key=value for every cell, after those of the scale.
        """
        for cell in cells:
            config.check_choice("CELL", cell, self.cells)
        for change in overrides:
            if change.startswith(("seed=", "run=")):
                raise ValueError(
                    f"--set: {change} is set by the grid; use --seeds N for the seeds 0 to N - 1,"
                    " and --out for the folder of the runs"
                )
        runs_by_cell: dict[str, list[PlannedRun]] = {}
        base = self.scale(scale)
        base = replace(base, set=(*base.set, *overrides))
        for cell in cells or self.cells:
            self.plan_cell(cell, base, seeds, out / scale, runs_by_cell)
        return runs_by_cell

    def plan_cell(
        self,
        cell: str,
        scale: Scale,
        seeds: int,
        out: Path,
        runs_by_cell: dict[str, list[PlannedRun]],
        dependents: tuple[str, ...] = (),
    ) -> None:
        """Add the runs of a cell to `runs_by_cell`, after those of the cells that it depends on.

        dependents: the chain of cells that depend on this one, to detect a cycle.
        """
        if cell in runs_by_cell:
            return
        if cell in dependents:
            raise ValueError(
                f"cells: {' needs '.join((*dependents, cell))}; remove one of these {{CELL}}"
                " references, so that one of the cells can be trained first"
            )

        # 1. The changes: those of every cell, then those of this cell, with names resolved.
        changes = list(scale.set)
        for change in self.cells[cell]:
            changes += [change] if "=" in change else scale.changes[change]

        # 2. The cells that this one refers to come first.
        references = [name for change in changes for name in CELL_REFERENCE.findall(change)]
        dependencies = list(dict.fromkeys(references))
        for name in dependencies:
            config.check_choice(f"cells: {cell}", name, self.cells)
            self.plan_cell(name, scale, seeds, out, runs_by_cell, (*dependents, cell))

        # 3. The config file: that of the first config=NAME, which is not a change of a key.
        configs = [
            change.removeprefix("config=") for change in changes if change.startswith("config=")
        ]
        changes = [change for change in changes if not change.startswith("config=")]
        name = configs[0] if configs else scale.config
        path = ROOT / "run" / "configs" / f"{name}.yaml"

        # 4. One run per seed.
        runs_by_cell[cell] = []
        for seed in range(seeds):
            folders = {name: str(runs_by_cell[name][seed].folder) for name in dependencies}
            settings = [fill_references(change, folders) for change in changes]
            settings.append(f"seed={seed}")
            try:
                cfg = config.load(path, settings)
            except ValueError as error:
                raise ValueError(f"cells: {cell}: {error}") from None
            folder = str(out / f"{cfg.method}-{digest(cfg, folders.values())}-seed{seed}")
            settings.append(f"run={folder}")
            run = PlannedRun(
                cfg=replace(cfg, run=folder),
                config_file=path,
                changes=tuple(settings),
                dependencies=tuple(map(Path, folders.values())),
                evaluate=self.evaluate.get(cell, ()),
            )
            runs_by_cell[cell].append(run)


def fill_references(change: str, folders: dict[str, str]) -> str:
    """Replace each {CELL} in a change by the run folder of that cell."""
    return CELL_REFERENCE.sub(lambda match: folders[match[1]], change)


def digest(cfg: RunConfig, dependencies: Iterable[str] = ()) -> str:
    """Hash everything that affects a run's results except the seed.

    Default values are left out, so adding a config key does not change existing hashes.

    dependencies: run folders in the config's values. Their digests are hashed, but not their
        parent folders and seeds.
    """
    tree = {key: value for key, value in without_defaults(cfg).items() if key not in IGNORED_KEYS}
    for key in IGNORED_DATA_KEYS:
        tree["data"].pop(key, None)
    text = json.dumps(tree, sort_keys=True)
    for folder in dependencies:
        text = text.replace(json.dumps(folder), json.dumps(strip_seed(folder)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def strip_seed(folder: str) -> str:
    """Return the name of a run folder without its parent folders and `-seedN`."""
    return re.sub(r"-seed\d+$", "", Path(folder).name)


def without_defaults(value: Any) -> Any:
    """Convert a config to plain containers, leaving out fields with default values."""
    if isinstance(value, dict):
        return {key: without_defaults(item) for key, item in value.items()}
    if not is_dataclass(value):
        return config.tuples_to_lists(value)
    tree = {}
    for f in fields(value):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        actual = getattr(value, f.name)
        if actual != default:
            tree[f.name] = without_defaults(actual)
    return tree


def grid_names() -> list[str]:
    return sorted(path.stem for path in GRIDS_FOLDER.glob("*.yaml"))


def read_grid(name: str) -> Grid:
    """Read a grid: a name in run/grids, or the path of a .yaml file."""
    path = Path(name) if name.endswith(".yaml") else GRIDS_FOLDER / f"{name}.yaml"
    if not path.is_file():
        config.check_choice("--grid", name, grid_names())
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--grid: {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return config.build(Grid, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
