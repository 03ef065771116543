"""What run folders tell: curves, results, cost, and how far a run came; the same of several seeds
with intervals.

    found = read(Path("runs/flip-seed0"))
        never raises: a run that is not there is told as absent, with the reason
    found.final["zero_shot/shapes/top1"]
        after the whole schedule; what was not measured is not in it, and never 0
    by_seed([found, ...])
        {"flip": [found of seed 0, found of seed 1]}
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
from glimpse.run.lib.config import Run
from glimpse.run.study import grid

AS_USUAL = {"weights": "student", "mask": "none", "ensemble": 1}  # how training itself evaluates
RESAMPLES = 10_000


@dataclass(frozen=True)
class Result:
    """One run. Metrics are named KIND/SET/METRIC as in results.jsonl, `teacher/...` of the
    average's weights, and with what was asked of run/evaluate.py in brackets:
    `zero_shot/shapes/top1 (ensemble 2)`. Values are shares, as there.
    """

    run: Path
    # complete, partial (cut off, still training, or not evaluated), failed (as the caller knows),
    # absent (never began)
    state: str
    reason: str = ""  # why it is not complete
    config: Run | None = None
    provenance: dict = field(default_factory=dict)  # commit, started, ranks, versions
    commands: tuple[str, ...] = ()
    # {metric: (samples seen, value)}, ascending
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    # {metric: value} after the last sample; empty where that was not reached
    final: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)  # (samples seen, loss)
    samples: int = 0  # seen, as far as records go
    # of training, over all its jobs, with that of the run that it began from; None where no speed
    # is known
    seconds: float | None = None
    samples_per_s: float | None = None  # over all ranks
    mfu: float | None = None
    memory_gib: float | None = None  # rank 0's peak


def read(run: Path, error: str = "") -> Result:
    """The run in a folder; error: why its job ended, where the caller knows it."""
    try:
        cfg = config.load(run / "config.yaml")
        provenance = yaml.safe_load((run / "config.yaml").read_text()).get("provenance", {})
    except (ValueError, OSError) as fault:
        why = f"{run / 'config.yaml'}: {fault}"
        if not (run / "config.yaml").exists():
            why = (
                f"never began: {run} has no config.yaml"
                if run.exists()
                else f"not run: there is no {run}"
            )
        return Result(run, "failed" if error else "absent", error or why)
    rows = records(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    measured = records(run / "results.jsonl")
    curve = curves(measured)
    # of a record that was cut off, its evaluation still tells
    samples = max((row.get("samples", 0) for row in rows + measured), default=0)
    ended = samples + cfg.batch > cfg.samples  # what is left is no whole batch
    final = {
        name: points[-1][1] for name, points in curve.items() if ended and points[-1][0] >= samples
    }
    if not ended:
        reason = f"trained on {samples:,} of {cfg.samples:,} samples"
    else:
        reason = "trained, but not evaluated" if cfg.evals and not final else ""
    state, reason = (
        ("failed", f"{error} ({reason})")
        if reason and error
        else ("partial" if reason else "complete", reason)
    )
    command, spent = run / "command.txt", cost(steps)
    if (before := began_from(run, cfg)) and spent.get("seconds"):
        earlier = read(before).seconds
        spent["seconds"] = earlier and spent["seconds"] + earlier
    return Result(
        run,
        state,
        reason,
        cfg,
        provenance,
        tuple(command.read_text().splitlines()) if command.exists() else (),
        curve,
        final,
        [(row["samples"], row["loss"]) for row in steps if row["loss"] is not None],
        samples,
        **spent,
    )


def began_from(run: Path, cfg: Run) -> Path | None:
    """The run whose weights it began with, at its path or beside it; None where there is none, or
    it is a converted model.
    """
    places = [Path(cfg.init), run.parent / Path(cfg.init).name] if cfg.init else []
    return next(
        (
            place
            for place in places
            if (place / "metrics.jsonl").exists() and place.resolve() != run.resolve()
        ),
        None,
    )


def records(path: Path) -> list[dict]:
    """The records of a file, without a last line that is still being written or was cut off; none
    where there is no file.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def curves(results: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(samples, value)]}, ascending; of two measurements at one place the later
    counts.
    """
    found: dict[str, dict[int, float]] = {}
    for row in results:
        how = {
            key: value
            for key, value in row.items()
            if "/" not in key and key not in ("step", "samples")
        }
        before = "" if how.get("weights", "student") == "student" else f"{how['weights']}/"
        asked = ", ".join(
            f"{key} {value}"
            for key, value in how.items()
            if key != "weights" and AS_USUAL.get(key) != value
        )
        for name, value in row.items():
            if "/" in name and value is not None and "samples" in row:
                found.setdefault(f"{before}{name}" + f" ({asked})" * bool(asked), {})[
                    row["samples"]
                ] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def cost(steps: list[dict]) -> dict[str, float | None]:
    """Seconds, speed, MFU and memory of the records of training.

    The time is that of the samples at their measured speeds: evaluations, starts, and what a killed
    job did after its last checkpoint are not in it. Samples before a record without a speed (a
    job's first) count at the median.
    """
    memory = max((row["memory_gib"] for row in steps if row.get("memory_gib")), default=None)
    speeds = [row["samples_per_s"] for row in steps if row.get("samples_per_s")]
    if not speeds:
        return dict(memory_gib=memory)
    usual, seconds, before = median(speeds), 0.0, 0
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


def by_seed(results: list[Result]) -> dict[str, list[Result]]:
    """{label: runs that differ in seed and folder alone}, in the order given; labels are what their
    folders have in common.
    """
    groups: list[list[Result]] = []
    for one in results:
        same = (
            g
            for g in groups
            if one.config and g[0].config and unseeded(one.config) == unseeded(g[0].config)
        )
        # the same again is no other seed
        if (group := next(same, None)) and one.config.seed not in [
            other.config.seed for other in group
        ]:
            group.append(one)
        else:
            groups.append([one])
    paths = [common([os.path.abspath(one.run) for one in group]) for group in groups]
    if len(set(paths)) < len(paths):
        paths = [os.path.abspath(group[0].run) for group in groups]
    above = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {os.path.relpath(path, above): group for path, group in zip(paths, groups)}


def common(paths: list[str]) -> str:
    """a/flip of a/flip-seed0 and a/flip-seed1."""
    return (
        re.sub(r"[-_.=/]+(seed|s)?[-_.=]*\d*$", "", os.path.commonprefix(paths))
        if len(paths) > 1
        else paths[0]
    )


def unseeded(cfg: Run) -> Run:
    """What runs of other seeds have in common; those that they began from or learn from differ in
    seed, too.
    """
    same = replace(cfg, run="", seed=0, init=grid.unseeded(cfg.init))
    teacher = getattr(cfg.options, "teacher", "")
    return (
        replace(same, options=replace(cfg.options, teacher=grid.unseeded(teacher)))
        if teacher
        else same
    )


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % percentile bootstrap interval of the mean of runs; nan, nan of
    one run, which says nothing of its spread.

    Of two or three runs it is their range, and of few it is too narrow: for normal values the mean
    lies in it in 50 % of the cases with
    two runs, 75 % with three, about 84 % with five.
    """
    means = resampled(values, seed)
    return float(np.mean(values)), *bounds(means)


def difference(a: list[float], b: list[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean of a - mean of b, low, high) of two independent groups of runs, as `interval`."""
    return float(np.mean(a) - np.mean(b)), *bounds(resampled(a, seed) - resampled(b, seed + 1))


def resampled(values: list[float], seed: int) -> np.ndarray:
    """Means of samples drawn from values with replacement; the order of values does not matter."""
    if not values:
        raise ValueError(
            "values: none; an interval is of one run or more, and a run that is absent has no value"
        )
    if len(values) == 1:
        return np.full(RESAMPLES, np.nan)
    return np.random.default_rng(seed).choice(np.sort(values), (RESAMPLES, len(values))).mean(1)


def bounds(means: np.ndarray) -> tuple[float, float]:
    return tuple(float(edge) for edge in np.quantile(means, (0.025, 0.975)))
