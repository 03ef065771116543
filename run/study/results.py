"""Read the results of run folders, group runs by seed, and compute bootstrap intervals.

    result = read_result(Path("runs/flip-seed0"))
    result.final["zero_shot/shapes/top1"]
    group_by_seed([result, ...])       {"flip": [result of seed 0, result of seed 1]}
    mean, low, high = mean_interval([0.31, 0.33, 0.30])

Reading never raises: a run without a folder has the state `absent` and a reason. A metric that was
not measured is missing in `final`, never 0.
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

# Options of the evaluation during training; the names of metrics leave them out.
DEFAULT_OPTIONS = {"weights": "student", "mask": "none", "ensemble": 1}
RESAMPLES = 10_000


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Metrics are named KIND/SET/METRIC as in results.jsonl, with the prefix `teacher/` for the
    weights of the EMA teacher. Options of run/evaluate.py follow in parentheses:
    `zero_shot/shapes/top1 (ensemble 2)`. Values are fractions, as in that file.
    """

    run: Path
    # complete; partial: interrupted, still training, or not evaluated; failed: its job ended with
    # an error; absent: never started
    state: str
    reason: str = ""  # why it is not complete
    config: RunConfig | None = None
    provenance: dict = field(default_factory=dict)  # commit, started, ranks, versions
    commands: tuple[str, ...] = ()
    # {metric: [(samples seen, value)]}, ascending
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    # {metric: value} after the last sample; empty if the run has not reached it
    final: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)  # (samples seen, loss)
    samples: int = 0  # seen, up to the last record
    # Training time over all jobs, including the run it was initialized from; None if unknown.
    seconds: float | None = None
    samples_per_s: float | None = None  # over all ranks
    mfu: float | None = None
    memory_gib: float | None = None  # peak of rank 0


def read_result(run: Path, error: str = "") -> RunResult:
    """Read the result of a run folder.

    error: why the run's job ended, if the caller knows.
    """
    path = run / "config.yaml"
    try:
        cfg = config.load(path)
        provenance = yaml.safe_load(path.read_text()).get("provenance", {})
    except (ValueError, OSError) as fault:
        state = "failed" if error else "absent"
        return RunResult(run, state, error or describe_missing_config(run, fault))

    # Progress. An evaluation counts even if the last record of training is truncated.
    rows = read_records(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = read_records(run / "results.jsonl")
    samples = max((row.get("samples", 0) for row in rows + evaluations), default=0)
    has_ended = samples + cfg.batch > cfg.samples  # the rest is not a full batch

    # Metrics. They are final if they were measured after the last sample.
    curve = metric_curves(evaluations)
    final = {}
    for name, points in curve.items():
        last_samples, value = points[-1]
        if has_ended and last_samples >= samples:
            final[name] = value

    state, reason = run_state(cfg, samples, has_ended, final, error)
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
    """Describe why a run has no config; fault: the exception raised by reading it."""
    path = run / "config.yaml"
    if path.exists():
        return f"{path}: {fault}"
    if run.exists():
        return f"not started: {run} has no config.yaml"
    return f"not run: {run} does not exist"


def run_state(
    cfg: RunConfig, samples: int, has_ended: bool, final: dict[str, float], error: str
) -> tuple[str, str]:
    """Return the state of a run that was started, and why it is not complete."""
    if not has_ended:
        reason = f"trained on {samples:,} of {cfg.samples:,} samples"
    elif cfg.evals and not final:
        reason = "trained, but not evaluated"
    else:
        return "complete", ""
    if error:
        return "failed", f"{error} ({reason})"
    return "partial", reason


def cost_with_initial_run(run: Path, cfg: RunConfig, steps: list[dict]) -> dict[str, float | None]:
    """Return the cost of a run; `seconds` includes the run that it was initialized from."""
    cost = training_cost(steps)
    initial = initial_run(run, cfg)
    if initial and cost.get("seconds"):
        seconds = read_result(initial).seconds
        cost["seconds"] = seconds and cost["seconds"] + seconds
    return cost


def initial_run(run: Path, cfg: RunConfig) -> Path | None:
    """Return the run folder that `init:` names, at its path or next to this run.

    None if the run starts from scratch or from a converted model.
    """
    if not cfg.init:
        return None
    for folder in (Path(cfg.init), run.parent / Path(cfg.init).name):
        if (folder / "metrics.jsonl").exists() and folder.resolve() != run.resolve():
            return folder
    return None


def read_records(path: Path) -> list[dict]:
    """Return the records of a JSON-lines file, or [] if there is no file.

    A truncated last line is left out.
    """
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def metric_curves(evaluations: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return {metric: [(samples, value)]}, ascending.

    If a metric was measured twice after the same number of samples, the later value counts.
    """
    points: dict[str, dict[int, float]] = {}
    for row in evaluations:
        if "samples" not in row:
            continue
        # The options of this evaluation that differ from those of training.
        options = {}
        for key, value in row.items():
            if "/" not in key and key not in ("step", "samples"):
                options[key] = value
        weights = options.pop("weights", "student")
        prefix = "" if weights == "student" else f"{weights}/"
        texts = [
            f"{key} {value}" for key, value in options.items() if DEFAULT_OPTIONS.get(key) != value
        ]
        suffix = f" ({', '.join(texts)})" if texts else ""

        for name, value in row.items():
            if "/" in name and value is not None:
                points.setdefault(f"{prefix}{name}{suffix}", {})[row["samples"]] = value
    return {name: sorted(values.items()) for name, values in points.items()}


def training_cost(steps: list[dict]) -> dict[str, float | None]:
    """Return seconds, samples_per_s, mfu and memory_gib from the records of training.

    The time is the sum of samples / speed over the records. It leaves out evaluations, startup, and
    the work of a killed job after its last checkpoint. Records without a speed (the first of each
    job) use the median speed.
    """
    memory = max((row["memory_gib"] for row in steps if row.get("memory_gib")), default=None)
    speeds = [row["samples_per_s"] for row in steps if row.get("samples_per_s")]
    if not speeds:
        return dict(memory_gib=memory)
    median_speed = median(speeds)
    seconds = 0.0
    samples = 0
    for row in steps:
        seconds += (row["samples"] - samples) / (row.get("samples_per_s") or median_speed)
        samples = row["samples"]
    mfus = [row["mfu"] for row in steps if row.get("mfu")]
    return dict(
        seconds=seconds,
        samples_per_s=samples / seconds,
        mfu=median(mfus) if mfus else None,
        memory_gib=memory,
    )


def group_by_seed(results: list[RunResult]) -> dict[str, list[RunResult]]:
    """Return {label: runs that differ only in seed and folder}, in the order of the results.

    A label is the common part of the folders of a group.
    """
    groups: list[list[RunResult]] = []
    for result in results:
        group = next((group for group in groups if differ_only_in_seed(result, group[0])), None)
        # Two runs with the same seed belong to different groups.
        if group and result.config.seed not in [other.config.seed for other in group]:
            group.append(result)
        else:
            groups.append([result])

    # Label each group by the common part of its folders, or by its first folder if two groups
    # would have the same label. Parent folders that all groups share are left out.
    paths = [common_path([os.path.abspath(result.run) for result in group]) for group in groups]
    if len(set(paths)) < len(paths):
        paths = [os.path.abspath(group[0].run) for group in groups]
    parent = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {os.path.relpath(path, parent): group for path, group in zip(paths, groups)}


def differ_only_in_seed(a: RunResult, b: RunResult) -> bool:
    """Return True if the configs are equal apart from seed and folder."""
    if a.config is None or b.config is None:
        return False
    return without_seed(a.config) == without_seed(b.config)


def common_path(paths: list[str]) -> str:
    """Return the common prefix without a seed: a/flip for a/flip-seed0 and a/flip-seed1."""
    if len(paths) == 1:
        return paths[0]
    return re.sub(r"[-_.=/]+(seed|s)?[-_.=]*\d*$", "", os.path.commonprefix(paths))


def without_seed(cfg: RunConfig) -> RunConfig:
    """Return the config without the values that depend on the seed.

    These include the names of other runs: the initial weights and the teacher have seeds, too.
    """
    shared = replace(cfg, run="", seed=0, init=grid.strip_seed(cfg.init))
    teacher = getattr(cfg.options, "teacher", "")
    if not teacher:
        return shared
    return replace(shared, options=replace(cfg.options, teacher=grid.strip_seed(teacher)))


def mean_interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Return (mean, low, high): the 95 % percentile bootstrap interval of the mean over runs.

    low and high are nan for one run, and the range of the values for two or three. With few runs
    the interval is too narrow: for normally distributed values it contains the mean in 50 % of the
    cases with two runs, in 75 % with three, and in about 84 % with five.
    """
    low, high = percentile_bounds(resample_means(values, seed))
    return float(np.mean(values)), low, high


def difference_interval(
    a: list[float], b: list[float], seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean of a - mean of b, low, high) for two independent groups, as `mean_interval`."""
    low, high = percentile_bounds(resample_means(a, seed) - resample_means(b, seed + 1))
    return float(np.mean(a) - np.mean(b)), low, high


def resample_means(values: list[float], seed: int) -> np.ndarray:
    """Return means of RESAMPLES bootstrap samples, independent of the order of the values."""
    if not values:
        raise ValueError(
            "values: the list is empty; an interval needs the values of one run or more"
        )
    if len(values) == 1:
        return np.full(RESAMPLES, np.nan)
    generator = np.random.default_rng(seed)
    samples = generator.choice(np.sort(values), (RESAMPLES, len(values)))
    return samples.mean(1)


def percentile_bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
