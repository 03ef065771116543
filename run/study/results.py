"""The results of run folders: curves, final metrics, cost, progress; intervals over seeds.

result = read(Path("runs/flip-seed0"))
    never raises: a missing run has the state `absent`, with the reason
result.final["zero_shot/shapes/top1"]
    after the whole schedule; a metric that was not measured is missing, and never 0
by_seed([result, ...])
    {"flip": [result of seed 0, result of seed 1]}
mean, low, high = interval([0.31, 0.33, 0.30])
"""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import yaml

from glimpse.run.lib import config
from glimpse.run.lib.config import RunConfig
from glimpse.run.study import grid

DEFAULT_OPTIONS = {
    "weights": "student",
    "mask": "none",
    "ensemble": 1,
}  # evaluation during training
RESAMPLES = 10_000


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Metrics are named KIND/SET/METRIC as in results.jsonl, `teacher/...` with the average's weights.
    Options of run/evaluate.py follow in brackets: `zero_shot/shapes/top1 (ensemble 2)`. Values are
    shares, as in that file.
    """

    run: Path
    # complete, partial (cut off, still training, or not evaluated), failed (as the caller knows),
    # absent (never began)
    state: str
    reason: str = ""  # why it is not complete
    config: RunConfig | None = None
    provenance: dict = field(default_factory=dict)  # commit, started, ranks, versions
    commands: tuple[str, ...] = ()
    # {metric: (samples seen, value)}, ascending
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    # {metric: value} after the last sample; empty where that was not reached
    final: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)  # (samples seen, loss)
    samples: int = 0  # seen, up to the last record
    # of training, over all its jobs, and of the run that it began from; None if no speed is known
    seconds: float | None = None
    samples_per_s: float | None = None  # over all ranks
    mfu: float | None = None
    memory_gib: float | None = None  # rank 0's peak


def read_result(run: Path, error: str = "") -> RunResult:
    """Return the result of the run in a folder; error: why its job ended, if the caller knows."""
    path = run / "config.yaml"
    try:
        cfg = config.load(path)
        provenance = yaml.safe_load(path.read_text()).get("provenance", {})
    except (ValueError, OSError) as fault:
        state = "failed" if error else "absent"
        return RunResult(run, state, error or describe_missing_config(run, fault))

    # How far it came. If the last record of training was cut off, its evaluation still counts.
    rows = read_records(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    measured = read_records(run / "results.jsonl")
    samples = max((row.get("samples", 0) for row in rows + measured), default=0)
    ended = samples + cfg.batch > cfg.samples  # the rest is no full batch

    # Its metrics, final ones if it ended.
    curve = metric_curves(measured)
    final = {}
    for name, points in curve.items():
        last_samples, value = points[-1]
        if ended and last_samples >= samples:
            final[name] = value

    state, reason = run_state(cfg, samples, ended, final, error)
    losses = [(row["samples"], row["loss"]) for row in steps if row["loss"] is not None]
    command = run / "command.txt"
    commands = command.read_text().splitlines() if command.exists() else []
    return RunResult(
        run,
        state,
        reason,
        config=cfg,
        provenance=provenance,
        commands=tuple(commands),
        curve=curve,
        final=final,
        losses=losses,
        samples=samples,
        **cost_with_initial_run(run, cfg, steps),
    )


def describe_missing_config(run: Path, fault: Exception) -> str:
    """Describe why a run has no config; fault: raised by reading it."""
    path = run / "config.yaml"
    if path.exists():
        return f"{path}: {fault}"
    if run.exists():
        return f"never began: {run} has no config.yaml"
    return f"not run: there is no {run}"


def run_state(
    cfg: RunConfig, samples: int, ended: bool, final: dict[str, float], error: str
) -> tuple[str, str]:
    """Return the state of a run that began, and the reason if it is not complete."""
    if not ended:
        reason = f"trained on {samples:,} of {cfg.samples:,} samples"
    elif cfg.evals and not final:
        reason = "trained, but not evaluated"
    else:
        return "complete", ""
    if error:
        return "failed", f"{error} ({reason})"
    return "partial", reason


def cost_with_initial_run(run: Path, cfg: RunConfig, steps: list[dict]) -> dict[str, float | None]:
    """Return the cost of a run, its seconds with those of the run that it began from."""
    spent = training_cost(steps)
    before = initial_run(run, cfg)
    if before and spent.get("seconds"):
        earlier = read_result(before).seconds
        spent["seconds"] = earlier and spent["seconds"] + earlier
    return spent


def initial_run(run: Path, cfg: RunConfig) -> Path | None:
    """Return the run whose weights it began with, at its path or beside it.

    None if there is none, or it is a converted model.
    """
    if not cfg.init:
        return None
    for place in (Path(cfg.init), run.parent / Path(cfg.init).name):
        if (place / "metrics.jsonl").exists() and place.resolve() != run.resolve():
            return place
    return None


def read_records(path: Path) -> list[dict]:
    """Return the records of a file, none if there is no file.

    A last line that is still being written or was cut off is left out.
    """
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def metric_curves(results: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return {metric: [(samples, value)]}, ascending; of two values at one place the later."""
    points: dict[str, dict[int, float]] = {}
    for row in results:
        if "samples" not in row:
            continue
        # How it was evaluated; training's own evaluation needs no mention.
        options = {}
        for key, value in row.items():
            if "/" not in key and key not in ("step", "samples"):
                options[key] = value
        weights = options.pop("weights", "student")
        prefix = "" if weights == "student" else f"{weights}/"
        asked = [
            f"{key} {value}" for key, value in options.items() if DEFAULT_OPTIONS.get(key) != value
        ]
        suffix = f" ({', '.join(asked)})" if asked else ""

        for name, value in row.items():
            if "/" in name and value is not None:
                points.setdefault(f"{prefix}{name}{suffix}", {})[row["samples"]] = value
    return {name: sorted(at.items()) for name, at in points.items()}


def training_cost(steps: list[dict]) -> dict[str, float | None]:
    """Return seconds, speed, MFU and memory from the records of training.

    The time is that of the samples at their measured speeds: evaluations, starts, and work that a
    killed job did after its last checkpoint are not in it. Samples before a record without a speed
    (a job's first) count at the median.
    """
    memory = max((row["memory_gib"] for row in steps if row.get("memory_gib")), default=None)
    speeds = [row["samples_per_s"] for row in steps if row.get("samples_per_s")]
    if not speeds:
        return dict(memory_gib=memory)
    usual = median(speeds)
    seconds = 0.0
    before = 0
    for row in steps:
        seconds += (row["samples"] - before) / (row.get("samples_per_s") or usual)
        before = row["samples"]
    shares = [row["mfu"] for row in steps if row.get("mfu")]
    return dict(
        seconds=seconds,
        samples_per_s=before / seconds,
        mfu=median(shares) if shares else None,
        memory_gib=memory,
    )


def group_by_seed(results: list[RunResult]) -> dict[str, list[RunResult]]:
    """Return {label: runs that differ in seed and folder alone}, in the order of the results.

    Labels are the common part of the runs' folders.
    """
    groups: list[list[RunResult]] = []
    for result in results:
        group = next((group for group in groups if differ_only_in_seed(result, group[0])), None)
        # two runs of one seed are no group
        if group and result.config.seed not in [other.config.seed for other in group]:
            group.append(result)
        else:
            groups.append([result])

    # Folders as labels: their common part, as far as that tells groups apart, without the path
    # above all of them.
    paths = [common_path([os.path.abspath(result.run) for result in group]) for group in groups]
    if len(set(paths)) < len(paths):
        paths = [os.path.abspath(group[0].run) for group in groups]
    above = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {os.path.relpath(path, above): group for path, group in zip(paths, groups)}


def differ_only_in_seed(a: RunResult, b: RunResult) -> bool:
    """Return True if two runs differ in their seed and folder at most."""
    if a.config is None or b.config is None:
        return False
    return without_seed(a.config) == without_seed(b.config)


def common_path(paths: list[str]) -> str:
    """Return a/flip for a/flip-seed0 and a/flip-seed1."""
    if len(paths) == 1:
        return paths[0]
    return re.sub(r"[-_.=/]+(seed|s)?[-_.=]*\d*$", "", os.path.commonprefix(paths))


def without_seed(cfg: RunConfig) -> RunConfig:
    """Return the part of a config that runs of other seeds share.

    The runs that they began from or learn from differ in seed, too.
    """
    same = replace(cfg, run="", seed=0, init=grid.strip_seed(cfg.init))
    teacher = getattr(cfg.options, "teacher", "")
    if not teacher:
        return same
    return replace(same, options=replace(cfg.options, teacher=grid.strip_seed(teacher)))


def mean_interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Return (mean, low, high): the 95 % percentile bootstrap interval of the mean of runs.

    low and high are nan for one run. For two or three runs they are the range of the values. With
    few runs the interval is too narrow: for normal values it contains the mean in 50 % of the cases
    with two runs, 75 % with three, about 84 % with five.
    """
    low, high = percentile_bounds(resample_means(values, seed))
    return float(np.mean(values)), low, high


def difference_interval(
    a: list[float], b: list[float], seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean of a - mean of b, low, high) of two independent groups, as `interval`."""
    low, high = percentile_bounds(resample_means(a, seed) - resample_means(b, seed + 1))
    return float(np.mean(a) - np.mean(b)), low, high


def resample_means(values: list[float], seed: int) -> np.ndarray:
    """Return means of samples drawn with replacement, independent of the order of values."""
    if not values:
        raise ValueError(
            "values: none; an interval is of one run or more, and a run that is absent has no value"
        )
    if len(values) == 1:
        return np.full(RESAMPLES, np.nan)
    generator = np.random.default_rng(seed)
    samples = generator.choice(np.sort(values), (RESAMPLES, len(values)))
    return samples.mean(1)


def percentile_bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
