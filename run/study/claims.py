"""The papers' directional claims, compared with runs.

run/claims.yaml lists the claims, and `judged` returns a verdict for each. A claim is that one cell
of a grid is better than another, or that it is no worse (`no_gain`: the addition in the other cell
does not help). It is tested by the difference of their means over seeds, with a bootstrap interval:

    reproduced              the interval lies on the claimed side of 0
    opposite                it lies on the other side
    not distinguishable     it contains 0; this reproduces a `no_gain` claim
    absent                  runs are missing

If both sides are evaluations of the same run, or one began from the other, the differences are
taken seed by seed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT
from glimpse.run.study import grid
from glimpse.run.study.jobs import missing_reason, read_state
from glimpse.run.study.results import difference_interval, mean_interval

CLAIMS_FILE = ROOT / "run" / "claims.yaml"
MIN_SEEDS = 3  # seeds
VERDICTS = ("reproduced", "not distinguishable", "opposite", "absent")
CHANCE_NOTE = (
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
    # how each is evaluated, as in the grid's `evaluate`; "": as in training
    better_as: str = ""
    worse_as: str = ""
    learned: str = ""  # the known reasons why it holds or does not, at glyphs scale

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """The cell and the evaluation of each side, the better one first."""
        return (self.better, self.better_as), (self.worse, self.worse_as)


@dataclass(frozen=True)
class ClaimResult:
    claim: Claim
    verdict: str  # of VERDICTS
    difference: tuple[float, float, float] | None = None  # difference, low, high
    seeds: tuple[int, int] = (0, 0)
    reason: str = ""  # why absent


def read_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    trees = yaml.safe_load(path.read_text())
    return [config.build(Claim, tree, f"{path.name}: ") for tree in trees]


def claimed_runs(
    scale: str, seeds: int, out: Path, more: Sequence[str] = ()
) -> dict[str, list[grid.PlannedRun]]:
    """Return {"grid, cell": its runs} of all cells in the claims, each run once; as Grid.runs."""
    cells: dict[str, list[grid.PlannedRun]] = {}
    for claim in read_claims():
        pair = [claim.better, claim.worse]
        for cell, runs in grid.read_grid(claim.grid).runs(scale, pair, seeds, out, more).items():
            cells[f"{claim.grid}, {cell}"] = runs

    # A run of several cells belongs to the first of them.
    merged = grid.merge_runs(run for runs in cells.values() for run in runs)
    left = {run.folder: run for run in merged}
    result = {}
    for cell, runs in cells.items():
        if runs[0].folder in left:
            result[cell] = [left.pop(run.folder) for run in runs]
    return result


def judge_claims(scale: str, seeds: int, out: Path) -> list[ClaimResult]:
    return [judge_claim(claim, scale, seeds, out) for claim in read_claims()]


def judge_claim(claim: Claim, scale: str, seeds: int, out: Path) -> ClaimResult:
    claimed_in = grid.read_grid(claim.grid)
    metric = claimed_in.scale(scale).metric
    runs = claimed_in.runs(scale, [claim.better, claim.worse], seeds, out)

    # The values of both sides by seed, and what is missing.
    sides: list[dict[int, float]] = []
    missing: list[str] = []
    for cell, how in claim.sides:
        name = f"{metric} ({how})" if how else metric
        results = [read_state(run.folder) for run in runs[cell]]
        values = {}
        for run, result in zip(runs[cell], results):
            if result.state == "complete" and name in result.final:
                values[run.cfg.seed] = result.final[name]
        sides.append(values)
        if len(values) < MIN_SEEDS:
            reason = missing_reason(results, name) or f"{seeds} asked for"
            missing.append(f"{cell}: {len(values)} of {MIN_SEEDS} seeds ({reason})")
    better, worse = sides
    paired = are_paired(runs[claim.better][0], runs[claim.worse][0])
    both = sorted(better.keys() & worse.keys())
    if not missing and paired and len(both) < MIN_SEEDS:
        missing = [f"{len(both)} of {MIN_SEEDS} seeds have both"]
    if missing:
        return ClaimResult(
            claim, "absent", seeds=(len(better), len(worse)), reason="; ".join(missing)
        )

    # The difference, with its interval.
    if paired:
        far, low, high = mean_interval([better[seed] - worse[seed] for seed in both])
        counts = (len(both), len(both))
    else:
        far, low, high = difference_interval(list(better.values()), list(worse.values()))
        counts = (len(better), len(worse))
    return ClaimResult(claim, choose_verdict(claim, low, high), (far, low, high), counts)


def choose_verdict(claim: Claim, low: float, high: float) -> str:
    """Return the verdict, given the interval of the difference."""
    if low > 0:
        return "reproduced"
    if high < 0:
        return "opposite"
    return "reproduced" if claim.no_gain else "not distinguishable"


def are_paired(one: grid.PlannedRun, other: grid.PlannedRun) -> bool:
    """Return True if they are the same run, or one began from the other."""
    return (
        one.folder == other.folder
        or one.folder in other.dependencies
        or other.folder in one.dependencies
    )


def format_claims(rows: list[ClaimResult], metric: str) -> str:
    """Return a table of the claims, and below it the reasons known for those that were tested."""
    lines = [
        f"| claim | paper | there | here: {metric} | grid: cells | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        claim = row.claim
        there = f"{claim.paper[0] - claim.paper[1]:+.1f}"
        here = row.reason
        if row.difference:
            far, low, high = (100 * value for value in row.difference)
            better, worse = row.seeds
            here = f"{far:+.2f} [{low:+.2f}, {high:+.2f}], n={better}+{worse}"
        cells = " against ".join(f"{cell}, {how}" if how else cell for cell, how in claim.sides)
        lines.append(
            f"| {claim.says} | {claim.source} | {there} | {here} | {claim.grid}: {cells} |"
            f" {row.verdict} |"
        )
    counts = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    lines += ["", f"{summary}. {CHANCE_NOTE}", ""]
    for row in rows:
        if row.difference and row.claim.learned:
            lines.append(f"- {row.claim.says}: {row.verdict}. {row.claim.learned}")
    return "\n".join(lines)
