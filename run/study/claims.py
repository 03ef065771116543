"""Compare the papers' claims with trained runs.

run/claims.yaml lists the claims, and `judge_claims` returns a verdict for each. A claim says that
one cell of a grid is better than another, or (`no_gain: true`) that the addition in the other cell
does not help. It is judged by the difference of the means over at least three seeds, with a 95 %
bootstrap interval:

    reproduced      the interval lies on the claimed side of 0
    contradicted    it lies on the other side
    inconclusive    it contains 0; a `no_gain` claim is then reproduced
    absent          runs are missing

If both sides are evaluations of the same run, or one run was initialized from the other, they are
compared seed by seed.
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
MIN_SEEDS = 3
VERDICTS = ("reproduced", "contradicted", "inconclusive", "absent")
CHANCE_NOTE = (
    "Two cells that do not differ look better in about one of ten comparisons of three seeds, and"
    " worse in one of ten. If they are compared seed by seed, each happens in about one of eight"
    " comparisons."
)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, as in run/claims.yaml."""

    says: str
    source: str  # paper, table, row
    grid: str
    better: str  # a cell
    worse: str  # another cell, or the same cell with another evaluation
    paper: tuple[float, float]  # the paper's values of both, in its own metric
    no_gain: bool = False  # the paper finds `worse` no better than `better`, rather than worse
    # How each side is evaluated, as in the grid's `evaluate`; "" for the evaluation in training.
    better_as: str = ""
    worse_as: str = ""
    learned: str = ""  # known reasons for the verdict at glyphs scale

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(cell, evaluation) of both sides, the better one first."""
        return (self.better, self.better_as), (self.worse, self.worse_as)


@dataclass(frozen=True)
class ClaimResult:
    claim: Claim
    verdict: str  # one of VERDICTS
    difference: tuple[float, float, float] | None = None  # (mean, low, high)
    seeds: tuple[int, int] = (0, 0)  # number of seeds of each side
    reason: str = ""  # why it is absent


def read_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    trees = yaml.safe_load(path.read_text())
    return [config.build(Claim, tree, f"{path.name}: ") for tree in trees]


def claimed_runs(
    scale: str, seeds: int, out: Path, overrides: Sequence[str] = ()
) -> dict[str, list[grid.PlannedRun]]:
    """Return {"grid, cell": runs} for all cells in the claims, each run once.

    The arguments are those of Grid.runs.
    """
    cells: dict[str, list[grid.PlannedRun]] = {}
    for claim in read_claims():
        pair = [claim.better, claim.worse]
        runs_by_cell = grid.read_grid(claim.grid).runs(scale, pair, seeds, out, overrides)
        for cell, runs in runs_by_cell.items():
            cells[f"{claim.grid}, {cell}"] = runs

    # List a run that several cells share under the first of them only.
    unique_runs = grid.merge_runs(run for runs in cells.values() for run in runs)
    unlisted = {run.folder: run for run in unique_runs}
    result = {}
    for cell, runs in cells.items():
        if runs[0].folder in unlisted:
            result[cell] = [unlisted.pop(run.folder) for run in runs]
    return result


def judge_claims(scale: str, seeds: int, out: Path) -> list[ClaimResult]:
    return [judge_claim(claim, scale, seeds, out) for claim in read_claims()]


def judge_claim(claim: Claim, scale: str, seeds: int, out: Path) -> ClaimResult:
    """Compare the two sides of a claim over the runs in `out`."""
    claim_grid = grid.read_grid(claim.grid)
    metric = claim_grid.scale(scale).metric
    runs = claim_grid.runs(scale, [claim.better, claim.worse], seeds, out)

    # 1. The values of both sides by seed, and what is missing.
    sides: list[dict[int, float]] = []
    missing: list[str] = []
    for cell, evaluation in claim.sides:
        name = f"{metric} ({evaluation})" if evaluation else metric
        results = [read_state(run.folder) for run in runs[cell]]
        values = {}
        for run, result in zip(runs[cell], results):
            if result.state == "complete" and name in result.final:
                values[run.cfg.seed] = result.final[name]
        sides.append(values)
        if len(values) < MIN_SEEDS:
            reason = missing_reason(results, name) or f"--seeds is {seeds}"
            missing.append(f"{cell}: {len(values)} of {MIN_SEEDS} seeds ({reason})")
    better, worse = sides
    paired = are_paired(runs[claim.better][0], runs[claim.worse][0])
    shared_seeds = sorted(better.keys() & worse.keys())
    if not missing and paired and len(shared_seeds) < MIN_SEEDS:
        missing = [f"{len(shared_seeds)} of {MIN_SEEDS} seeds have both"]
    if missing:
        counts = (len(better), len(worse))
        return ClaimResult(claim, "absent", seeds=counts, reason="; ".join(missing))

    # 2. The difference of the means, with its interval.
    if paired:
        gains = [better[seed] - worse[seed] for seed in shared_seeds]
        mean, low, high = mean_interval(gains)
        counts = (len(shared_seeds), len(shared_seeds))
    else:
        mean, low, high = difference_interval(list(better.values()), list(worse.values()))
        counts = (len(better), len(worse))
    return ClaimResult(claim, choose_verdict(claim, low, high), (mean, low, high), counts)


def choose_verdict(claim: Claim, low: float, high: float) -> str:
    """Return the verdict for the interval of the difference."""
    if low > 0:
        return "reproduced"
    if high < 0:
        return "contradicted"
    return "reproduced" if claim.no_gain else "inconclusive"


def are_paired(a: grid.PlannedRun, b: grid.PlannedRun) -> bool:
    """Return True if they are the same run, or one is initialized from the other."""
    return a.folder == b.folder or a.folder in b.dependencies or b.folder in a.dependencies


def format_claims(results: list[ClaimResult], metric: str) -> str:
    """Return a Markdown table of the claims, followed by the known reasons for their verdicts."""
    lines = [
        f"| claim | paper | difference there | difference here: {metric} | grid: cells | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        claim = result.claim
        there = f"{claim.paper[0] - claim.paper[1]:+.1f}"
        here = result.reason
        if result.difference:
            mean, low, high = (100 * value for value in result.difference)
            better, worse = result.seeds
            here = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], n={better}+{worse}"
        sides = [
            f"{cell}, {evaluation}" if evaluation else cell for cell, evaluation in claim.sides
        ]
        lines.append(
            f"| {claim.says} | {claim.source} | {there} | {here} |"
            f" {claim.grid}: {' vs. '.join(sides)} | {result.verdict} |"
        )
    counts = Counter(result.verdict for result in results)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    lines += ["", f"{summary}. {CHANCE_NOTE}", ""]
    for result in results:
        if result.difference and result.claim.learned:
            lines.append(f"- {result.claim.says}: {result.verdict}. {result.claim.learned}")
    return "\n".join(lines)
