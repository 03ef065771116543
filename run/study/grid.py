"""Grids of runs: cells that differ from a config in a few keys.

Each grid has the papers' scale, and one that a small machine can train.

    grid = read("flip_table8")                              run/grids/flip_table8.yaml
    runs = grid.runs("glyphs", ["baseline"], seeds=3, out=Path("runs/scaling"))

A cell is a list of changes: key=value, or a name that stands for some at each scale (`model` is
H/14 on a cluster, a wider nano here); config=NAME begins from another config than the scale's.
`{CELL}` in a value is the folder of that cell's run of the same seed, which is then trained first:
`init={mask 50}`. A run's folder name has a digest of its settings, so a run that two grids have in
common is trained once. To add a grid, add a file beside the others.
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
# neither {a: b} nor a range of shards, {00000..00007}
CELL_REFERENCE = re.compile(r"\{((?:(?!\.\.)[^{}:])+)\}")
# keys that a run's results do not depend on
IGNORED_KEYS = ("run", "seed", "deepspeed", "log_every", "save_every", "keep")


@dataclass(frozen=True)
class Scale:
    """A size at which the cells may be trained."""

    config: str  # a file of run/configs, without .yaml
    metric: str  # the result that is compared, e.g. zero_shot/imagenet/top1
    set: tuple[str, ...] = ()  # key=value, of every cell
    # {a name that cells use: its changes}
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a cell."""

    cfg: RunConfig
    config_file: Path
    changes: tuple[str, ...]  # key=value, with the run's folder and seed
    dependencies: tuple[Path, ...]  # run folders that must be complete before
    # options of run/evaluate.py, with which it is evaluated afterwards, too
    evaluate: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run)


def merge_runs(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Return each run folder once, with the evaluations of all its runs."""
    merged: dict[Path, PlannedRun] = {}
    for run in runs:
        known = merged.setdefault(run.folder, run)
        evaluate = tuple(dict.fromkeys((*known.evaluate, *run.evaluate)))
        merged[run.folder] = replace(known, evaluate=evaluate)
    return list(merged.values())


@dataclass(frozen=True)
class Grid:
    title: str
    source: str  # paper, table
    scales: dict[str, Scale]
    cells: dict[str, tuple[str, ...]]  # the first is what the others are compared with
    # a cell's figure there, per cent; `CELL, mask random(0.5)`: evaluated so
    paper: dict[str, float] = field(default_factory=dict)
    # further evaluations of a cell, as options of run/evaluate.py: [mask random(0.5)]
    evaluate: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        for cell in self.cells:
            if not isinstance(cell, str):
                raise ValueError(
                    f"cells: {cell!r}: YAML reads this name as no text; put it in quotes"
                )
        for cell in self.evaluate:
            config.check_choice("cells", cell, self.cells)
        for cell, items in self.evaluate.items():
            for item in items:  # a result's name has the options that differ from training's
                option = item.partition(" ")[0]
                as_in_training = item in ("mask none", "ensemble 1")
                if option not in ("mask", "ensemble") or as_in_training:
                    raise ValueError(
                        f"evaluate: {cell}: {item!r}; it must be `mask STRATEGY` or `ensemble N`,"
                        " unlike training's own"
                    )
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
        self, scale: str, cells: list[str], seeds: int, out: Path, more: Sequence[str] = ()
    ) -> dict[str, list[PlannedRun]]:
        """Return {cell: a run for each seed}, with the cells that those need.

        more: key=value, on top of the scale's, for every cell.
        """
        for cell in cells:
            config.check_choice("CELL", cell, self.cells)
        for change in more:
            if change.startswith(("seed=", "run=")):
                raise ValueError(
                    f"--set {change}: a grid sets it; --seeds N takes 0 to N - 1, --out says where"
                    " runs go"
                )
        planned: dict[str, list[PlannedRun]] = {}
        base = self.scale(scale)
        base = replace(base, set=(*base.set, *more))
        for cell in cells or self.cells:
            self.plan_cell(cell, base, seeds, out / scale, planned)
        return planned

    def plan_cell(
        self,
        cell: str,
        scale: Scale,
        seeds: int,
        out: Path,
        planned: dict[str, list[PlannedRun]],
        above: tuple[str, ...] = (),
    ) -> None:
        """Add the runs of a cell to `planned`, after those of the cells that it needs.

        above: the cells that need this one.
        """
        if cell in planned:
            return
        if cell in above:
            raise ValueError(
                f"cells: {' needs '.join((*above, cell))}; none of them can be trained first"
            )

        # The changes: of every cell, then of this one, names replaced by what they stand for.
        changes = list(scale.set)
        for change in self.cells[cell]:
            changes += [change] if "=" in change else scale.changes[change]

        # The cells whose runs this one needs come first.
        needed = list(
            dict.fromkeys(name for change in changes for name in CELL_REFERENCE.findall(change))
        )
        for name in needed:
            config.check_choice(f"cells: {cell}", name, self.cells)
            self.plan_cell(name, scale, seeds, out, planned, (*above, cell))

        # The first config= names the file; it is no change of a key.
        configs = [
            change.removeprefix("config=") for change in changes if change.startswith("config=")
        ]
        changes = [change for change in changes if not change.startswith("config=")]
        name = configs[0] if configs else scale.config
        path = ROOT / "run" / "configs" / f"{name}.yaml"

        planned[cell] = []
        for seed in range(seeds):
            folders = {name: str(planned[name][seed].folder) for name in needed}
            settings = [fill_references(change, folders) for change in changes]
            settings.append(f"seed={seed}")
            try:
                cfg = config.load(path, settings)
            except ValueError as error:
                raise ValueError(f"cells: {cell}: {error}") from None
            folder = str(out / f"{cfg.method}-{digest(cfg, folders.values())}-seed{seed}")
            settings.append(f"run={folder}")
            needs = tuple(map(Path, folders.values()))
            evaluate = self.evaluate.get(cell, ())
            run = PlannedRun(replace(cfg, run=folder), path, tuple(settings), needs, evaluate)
            planned[cell].append(run)


def fill_references(change: str, folders: dict[str, str]) -> str:
    """Replace each {CELL} of a change by that cell's folder."""
    return CELL_REFERENCE.sub(lambda match: folders[match[1]], change)


def digest(cfg: RunConfig, needs: Iterable[str] = ()) -> str:
    """Hash everything that affects a run's results except the seed.

    Default values are left out, so adding a config key does not change existing hashes.

    needs: folders of other runs in it; their digests count, their location and seed do not.
    """
    tree = {key: value for key, value in without_defaults(cfg).items() if key not in IGNORED_KEYS}
    for key in ("workers", "prefetch", "trace"):
        tree["data"].pop(key, None)
    text = json.dumps(tree, sort_keys=True)
    for folder in needs:
        text = text.replace(json.dumps(folder), json.dumps(strip_seed(folder)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def strip_seed(folder: str) -> str:
    """Return the name of a run's folder without its seed."""
    return re.sub(r"-seed\d+$", "", Path(folder).name)


def without_defaults(value: Any) -> Any:
    """Return a config as plain containers, without its default values."""
    if isinstance(value, dict):
        return {key: without_defaults(item) for key, item in value.items()}
    if not is_dataclass(value):
        return config.plain(value)
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
    """Return a grid by its name, or by its file."""
    path = Path(name) if name.endswith(".yaml") else GRIDS_FOLDER / f"{name}.yaml"
    if not path.is_file():
        config.check_choice("--grid", name, grid_names())
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--grid: {path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        return config.build(Grid, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
