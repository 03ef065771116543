"""The papers' directional claims, held against runs: run/claims.yaml says each, `judged` tells what
of it holds.

A claim says that one cell of a grid is better than another, or that it is no worse (`no_gain`: what
the other adds does not help). It is tested by the difference of their means over seeds, with a
bootstrap interval: reproduced where the interval lies on the claimed side of 0, opposite where it
lies on the other, not distinguishable where it holds 0 (which is what a `no_gain` says, and so
reproduces it), absent where runs are missing. Where both sides are of the same run, or one began
from the other, the differences are taken seed by seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT
from glimpse.run.study import grid
from glimpse.run.study.jobs import state, why
from glimpse.run.study.results import difference, interval

FILE = ROOT / "run" / "claims.yaml"
LEAST = 3  # seeds
VERDICTS = ("reproduced", "not distinguishable", "opposite", "absent")
CHANCE = (
    "Of cells that do not differ, three seeds make about one pair in ten look better and one in ten"
    " worse; one in eight where they are compared seed by seed."
)


@dataclass(frozen=True)
class Claim:
    says: str
    source: str  # paper, table, row
    grid: str
    better: str  # a cell
    worse: str  # another
    paper: tuple[float, float]  # their figures there, in the paper's metric
    no_gain: bool = False  # the paper finds the worse one no better, not worse
    # how the first is evaluated, as in the grid's `evaluate`; as in training where nothing is said
    better_as: str = ""
    worse_as: str = ""
    learned: str = ""  # what is known of why it holds or does not, at glyphs scale


@dataclass(frozen=True)
class Judged:
    claim: Claim
    verdict: str  # of VERDICTS
    found: tuple[float, float, float] | None = None  # difference, low, high
    seeds: tuple[int, int] = (0, 0)
    reason: str = ""  # why absent


def read(path: Path = FILE) -> list[Claim]:
    return [
        config.build(Claim, tree, f"{path.name}: ") for tree in yaml.safe_load(path.read_text())
    ]


def tested(
    scale: str, seeds: int, out: Path, more: Sequence[str] = ()
) -> dict[str, list[grid.Planned]]:
    """{grid, cell: its runs} of all that the claims are of, each run once; as Grid.runs."""
    cells = {
        f"{claim.grid}, {cell}": runs
        for claim in read()
        for cell, runs in (
            grid.read(claim.grid).runs(scale, [claim.better, claim.worse], seeds, out, more).items()
        )
    }
    left = {run.folder: run for run in grid.once(run for runs in cells.values() for run in runs)}
    return {
        cell: [left.pop(run.folder) for run in runs]
        for cell, runs in cells.items()
        if runs[0].folder in left
    }


def judged(scale: str, seeds: int, out: Path) -> list[Judged]:
    return [judge(claim, scale, seeds, out) for claim in read()]


def judge(claim: Claim, scale: str, seeds: int, out: Path) -> Judged:
    one = grid.read(claim.grid)
    metric, runs = one.scale(scale).metric, one.runs(scale, [claim.better, claim.worse], seeds, out)
    together, sides, missing = akin(runs[claim.better][0], runs[claim.worse][0]), [], []
    for cell, how in ((claim.better, claim.better_as), (claim.worse, claim.worse_as)):
        name, results = metric + f" ({how})" * bool(how), [state(run.folder) for run in runs[cell]]
        found = {
            run.cfg.seed: result.final[name]
            for run, result in zip(runs[cell], results)
            if result.state == "complete" and name in result.final
        }
        sides.append(found)
        if len(found) < LEAST:
            missing.append(
                f"{cell}: {len(found)} of {LEAST} seeds"
                f" ({why(results, name) or f'{seeds} asked for'})"
            )
    better, worse = sides
    both = better.keys() & worse.keys()
    if not missing and together and len(both) < LEAST:
        missing = [f"{len(both)} of {LEAST} seeds have both"]
    if missing:
        return Judged(claim, "absent", seeds=(len(better), len(worse)), reason="; ".join(missing))
    if together:
        better, worse = ({seed: side[seed] for seed in sorted(both)} for side in sides)
        far, low, high = interval([better[seed] - worse[seed] for seed in better])
    else:
        far, low, high = difference(list(better.values()), list(worse.values()))
    verdict = "reproduced" if low > 0 else "opposite" if high < 0 else "not distinguishable"
    if claim.no_gain and verdict == "not distinguishable":
        verdict = "reproduced"
    return Judged(claim, verdict, (far, low, high), (len(better), len(worse)))


def akin(one: grid.Planned, other: grid.Planned) -> bool:
    """Are they the same run, or did one begin from the other?"""
    return one.folder == other.folder or one.folder in other.needs or other.folder in one.needs


def markdown(rows: list[Judged], metric: str) -> str:
    """A table of the claims, and below it what was learned of those that were tested."""
    lines = [
        f"| claim | paper | there | here: {metric} | grid: cells | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        claim, there = row.claim, f"{row.claim.paper[0] - row.claim.paper[1]:+.1f}"
        here = (
            "{:+.2f} [{:+.2f}, {:+.2f}], n={}+{}".format(*(100 * x for x in row.found), *row.seeds)
            if row.found
            else row.reason
        )
        cells = " against ".join(
            f"{cell}, {how}" if how else cell
            for cell, how in ((claim.better, claim.better_as), (claim.worse, claim.worse_as))
        )
        lines.append(
            f"| {claim.says} | {claim.source} | {there} | {here} | {claim.grid}: {cells} |"
            f" {row.verdict} |"
        )
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    lines += [
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in count.items()) + f". {CHANCE}",
        "",
    ]
    lines += [
        f"- {row.claim.says}: {row.verdict}. {row.claim.learned}"
        for row in rows
        if row.found and row.claim.learned
    ]
    return "\n".join(lines)
