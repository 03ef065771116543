"""Grids of runs: cells that differ from a config in a few keys, at the papers' scale and at one
that a small machine can train.

    grid = read("flip_table8")                              run/grids/flip_table8.yaml
    runs = grid.runs("glyphs", ["baseline"], seeds=3, out=Path("runs/scaling"))

A cell is a list of changes: key=value, or a name that stands for some at each scale (`model` is
H/14 on a cluster, a wider nano here); config=NAME begins from another config than the scale's.
`{CELL}` in a value is the folder of that cell's run of the same seed, which is then trained first:
`init={mask 50}`. A run's folder is named by a digest of what it trains, so what two grids have in
common is trained once. To add a grid: a file beside the others.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import yaml

from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT, Run

FOLDER = ROOT / "run" / "grids"
# neither {a: b} nor a range of shards, {00000..00007}
HOLE = re.compile(r"\{((?:(?!\.\.)[^{}:])+)\}")
# what a run's results do not depend on
IDLE = ("run", "seed", "deepspeed", "log_every", "save_every", "keep")


@dataclass(frozen=True)
class Scale:
    """A size at which the cells may be trained."""

    config: str  # a file of run/configs, without .yaml
    metric: str  # what is compared: a result's name, e.g. zero_shot/imagenet/top1
    set: tuple[str, ...] = ()  # key=value, of every cell
    # what the names that cells use stand for
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """One run of a cell."""

    cfg: Run
    source: Path  # the config file
    changes: tuple[str, ...]  # key=value, with the run's folder and seed
    needs: tuple[Path, ...]  # run folders that must be complete before
    # options of run/evaluate.py, with which it is evaluated afterwards, too
    evaluate: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run)


def once(runs: Iterable[Planned]) -> list[Planned]:
    """Each run folder once, evaluated in every way that is asked of it."""
    found: dict[Path, Planned] = {}
    for run in runs:
        known = found.setdefault(run.folder, run)
        found[run.folder] = replace(
            known, evaluate=tuple(dict.fromkeys((*known.evaluate, *run.evaluate)))
        )
    return list(found.values())


@dataclass(frozen=True)
class Grid:
    title: str
    source: str  # paper, table
    scales: dict[str, Scale]
    cells: dict[str, tuple[str, ...]]  # the first is what the others are compared with
    # a cell's figure there, per cent; `CELL, mask random(0.5)`: evaluated so
    paper: dict[str, float] = field(default_factory=dict)
    # of a cell also so, as run/evaluate.py: [mask random(0.5)]
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
            for item in items:  # results are told apart by what was asked
                if item.partition(" ")[0] not in ("mask", "ensemble") or item in (
                    "mask none",
                    "ensemble 1",
                ):
                    raise ValueError(
                        f"evaluate: {cell}: {item!r}; it must be `mask STRATEGY` or `ensemble N`,"
                        " unlike training's own"
                    )
        for cell in self.paper:
            config.check_choice(
                "paper",
                cell,
                {
                    *self.cells,
                    *(f"{one}, {item}" for one, items in self.evaluate.items() for item in items),
                },
            )
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
    ) -> dict[str, list[Planned]]:
        """{cell: a run for each seed}, and of the cells that those need.

        more: key=value, on top of the scale's own for every cell.
        """
        for cell in cells:
            config.check_choice("CELL", cell, self.cells)
        for change in more:
            if change.startswith(("seed=", "run=")):
                raise ValueError(
                    f"--set {change}: a grid sets it; --seeds N takes 0 to N - 1, --out says where"
                    " runs go"
                )
        found: dict[str, list[Planned]] = {}
        found_at = self.scale(scale)
        for cell in cells or self.cells:
            self.add(cell, replace(found_at, set=(*found_at.set, *more)), seeds, out / scale, found)
        return found

    def add(
        self,
        cell: str,
        scale: Scale,
        seeds: int,
        out: Path,
        found: dict[str, list[Planned]],
        above: tuple[str, ...] = (),
    ) -> None:
        """above: the cells that need this one."""
        if cell in found:
            return
        if cell in above:
            raise ValueError(
                f"cells: {' needs '.join((*above, cell))}; none of them can be trained first"
            )
        changes = list(scale.set)
        for change in self.cells[cell]:
            changes += [change] if "=" in change else scale.changes[change]
        needed = list(dict.fromkeys(name for change in changes for name in HOLE.findall(change)))
        for name in needed:
            config.check_choice(f"cells: {cell}", name, self.cells)
            self.add(name, scale, seeds, out, found, (*above, cell))
        name = next(
            (change.removeprefix("config=") for change in changes if change.startswith("config=")),
            scale.config,
        )
        path, changes = (
            ROOT / "run" / "configs" / f"{name}.yaml",
            [change for change in changes if not change.startswith("config=")],
        )
        found[cell] = []
        for seed in range(seeds):
            folders = {name: str(found[name][seed].folder) for name in needed}
            own = [
                HOLE.sub(lambda match, folders=folders: folders[match[1]], change)
                for change in changes
            ]
            try:
                cfg = config.load(path, [*own, f"seed={seed}"])
            except ValueError as error:
                raise ValueError(f"cells: {cell}: {error}") from None
            run = out / f"{cfg.method}-{digest(cfg, folders.values())}-seed{seed}"
            changed = (*own, f"seed={seed}", f"run={run}")
            found[cell].append(
                Planned(
                    replace(cfg, run=str(run)),
                    path,
                    changed,
                    tuple(map(Path, folders.values())),
                    self.evaluate.get(cell, ()),
                )
            )


def digest(cfg: Run, needs: Iterable[str] = ()) -> str:
    """Of all that a run's results depend on, but its seed; keys that are as they are by default do
    not count, so new ones may come.

    needs: folders of other runs in it, of which their own digest counts, not where they lie or
    their seed.
    """
    tree = {key: value for key, value in stated(cfg).items() if key not in IDLE}
    tree["data"] = {
        key: value
        for key, value in tree["data"].items()
        if key not in ("workers", "prefetch", "trace")
    }
    text = json.dumps(tree, sort_keys=True)
    for folder in needs:
        text = text.replace(json.dumps(folder), json.dumps(unseeded(folder)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def unseeded(folder: str) -> str:
    """The name of a run's folder, as far as those of other seeds share it."""
    return re.sub(r"-seed\d+$", "", Path(folder).name)


def stated(value):
    """A config as plain containers, without what is as it is by default."""
    if isinstance(value, dict):
        return {key: stated(item) for key, item in value.items()}
    if not is_dataclass(value):
        return config.plain(value)
    usual = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(value)
    }
    return {
        name: stated(getattr(value, name)) for name in usual if getattr(value, name) != usual[name]
    }


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Grid:
    """A grid by its name, or by its own file."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        config.check_choice("--grid", name, names())
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--grid: {path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        return config.build(Grid, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
