"""Test the results of run folders: progress, cost, grouping by seed, and intervals.

Run: pytest tests/run/study/test_results.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from glimpse.run.study.results import difference_interval, group_by_seed, mean_interval, read_result
from glimpse.tests.helpers.tiny import write_recorded_run

TOP1 = "zero_shot/shapes/top1"


def test_a_whole_run(tmp_path):
    speeds = (None, 50, 100, None, 200)
    run = write_recorded_run(tmp_path / "run", speeds, {200: {TOP1: 0.25}, 500: {TOP1: 0.5}})

    result = read_result(run)

    assert result.state == "complete"
    assert result.reason == ""
    assert result.samples == 500
    assert result.curve == {TOP1: [(200, 0.25), (500, 0.5)]}
    assert result.final == {TOP1: 0.5}
    assert result.losses[0] == (100, 5.0)
    assert len(result.losses) == 5
    # Steps of 100 samples. The two without a speed count at the median of 100 samples/s; the others
    # take 2, 1 and 0.5 s.
    assert result.seconds == pytest.approx(1 + 2 + 1 + 1 + 0.5)
    assert result.samples_per_s == pytest.approx(500 / 5.5)
    assert result.memory_gib == pytest.approx(1.05)
    assert result.mfu == 0.25
    assert result.provenance["ranks"] == 2
    assert "run/pretrain.py" in result.commands[0]


def test_runs_that_are_not_whole(tmp_path):
    curve = {200: {TOP1: 0.25}, 300: {TOP1: 0.3}}
    partial = write_recorded_run(tmp_path / "partial", (None, 50, 50), curve, "samples=400")
    with (partial / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "samp')  # still being written

    result = read_result(partial)

    assert result.state == "partial"
    assert result.reason == "trained on 300 of 400 samples"
    assert result.curve[TOP1] == [(200, 0.25), (300, 0.3)]
    assert result.final == {}, "an evaluation during training is not the final result"

    failed_result = read_result(partial, "out of memory")

    assert failed_result.state == "failed"
    assert failed_result.reason.startswith("out of memory (trained on 300")

    unevaluated = write_recorded_run(tmp_path / "unevaluated", (50, 50), {100: {TOP1: 0.25}})
    assert read_result(unevaluated).reason == "trained, but not evaluated"
    assert read_result(unevaluated).final == {}
    no_evals = write_recorded_run(tmp_path / "no_evals", (50, 50), {}, "evals=[]")
    assert read_result(no_evals).state == "complete"

    (tmp_path / "empty").mkdir()
    for name, reason in (("empty", "not started"), ("nowhere", "not run")):
        result = read_result(tmp_path / name)
        assert result.state == "absent"
        assert result.reason.startswith(reason)
        assert not result.final
        assert result.seconds is None
    assert read_result(tmp_path / "nowhere", "exit code 1").state == "failed"
    (tmp_path / "empty/config.yaml").write_text("method: clip")
    assert "empty/config.yaml: run: missing" in read_result(tmp_path / "empty").reason


def test_a_last_record_that_was_cut_off(tmp_path):
    """The evaluation after a truncated record shows that the run reached its end."""
    run = write_recorded_run(tmp_path / "run", (50, 50, 50), {300: {TOP1: 0.3}})
    path = run / "metrics.jsonl"
    text = ""
    for line in path.read_text().splitlines(keepends=True):
        is_last = '"samples": 300' in line and "loss" in line
        text += line[:20] if is_last else line
    path.write_text(text)

    result = read_result(run)

    assert result.losses[-1][0] == 200
    assert result.state == "complete"
    assert result.samples == 300
    assert result.final == {TOP1: 0.3}


def test_the_time_of_a_run_is_with_that_of_the_run_it_began_from(tmp_path):
    for seed in (0, 1):
        write_recorded_run(
            tmp_path / f"base-seed{seed}", (100, 100), {200: {TOP1: 0.25}}, f"seed={seed}"
        )
        write_recorded_run(
            tmp_path / f"tuned-seed{seed}",
            (50,),
            {100: {TOP1: 0.5}},
            f"seed={seed}",
            f"init={tmp_path}/base-seed{seed}",
        )
    tuned = read_result(tmp_path / "tuned-seed0")
    assert tuned.seconds == 2 + 2
    assert tuned.samples == 100
    assert tuned.samples_per_s == 50

    runs = [
        read_result(tmp_path / f"{name}-seed{seed}")
        for name in ("base", "tuned")
        for seed in (0, 1)
    ]
    sizes = {label: len(group) for label, group in group_by_seed(runs).items()}
    assert sizes == {"base": 2, "tuned": 2}

    (tmp_path / "elsewhere").mkdir()
    for name in ("base-seed0", "tuned-seed0"):  # both runs are moved
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert read_result(tmp_path / "elsewhere/tuned-seed0").seconds == 4


def test_a_last_part_of_a_batch_is_not_trained_on(tmp_path):
    run = write_recorded_run(tmp_path / "run", (50, 50), {200: {TOP1: 0.25}}, "samples=299")

    assert read_result(run).state == "complete"


def test_evaluations_of_all_kinds_keep_apart(tmp_path):
    run = write_recorded_run(tmp_path / "run", (50, 50), {200: {TOP1: 0.25}})
    defaults = dict(step=2, samples=200, weights="student", mask="none", ensemble=1)
    rows = [
        defaults | {"weights": "teacher", TOP1: 0.3},
        defaults | {"ensemble": 2, TOP1: 0.4},
        defaults | {"mask": "random(0.5)", "crop": "square", TOP1: 0.2},
        defaults | {TOP1: 0.26, "linear_probe/shapes/top1": 0.6, "knn/shapes/top1": None},
    ]
    with (run / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    assert read_result(run).final == {
        TOP1: 0.26,
        f"teacher/{TOP1}": 0.3,
        f"{TOP1} (ensemble 2)": 0.4,
        "linear_probe/shapes/top1": 0.6,
        f"{TOP1} (mask random(0.5), crop square)": 0.2,
    }


def test_runs_that_differ_in_their_seed_alone(tmp_path):
    def run(name: str, seed: int, lr: float) -> Path:
        return write_recorded_run(tmp_path / name, (50, 50), {}, f"seed={seed}", f"optim.lr={lr}")

    flip = [run(f"flip-seed{seed}", seed, 1e-3) for seed in (0, 1)]
    high = [run(f"flip_high_{seed}", seed, 2e-3) for seed in (0, 1)]
    nowhere = tmp_path / "nowhere"

    groups = group_by_seed([read_result(path) for path in (*flip, *high, nowhere)])

    folders = {label: [result.run for result in group] for label, group in groups.items()}
    assert folders == {"flip": flip, "flip_high": high, "nowhere": [nowhere]}
    assert list(group_by_seed([read_result(flip[0])])) == ["flip-seed0"]

    base = [run(f"deep/base/seed-{seed}", seed, 3e-3) for seed in (0, 1)]
    large = [run(f"deep/large/seed-{seed}", seed, 4e-3) for seed in (0, 1)]
    nested = group_by_seed([read_result(path) for path in (*base, *large)])
    assert list(nested) == ["base", "large"]

    single = group_by_seed([read_result(path) for path in (flip[0], high[0], base[0])])
    assert list(single) == ["flip-seed0", "flip_high_0", "deep/base/seed-0"]

    repeated = run("again", 0, 1e-3)
    assert list(group_by_seed([read_result(flip[0]), read_result(repeated)])) == [
        "flip-seed0",
        "again",
    ]


def test_intervals():
    assert mean_interval([0.5, 0.25]) == (0.375, 0.25, 0.5), "two values: their range"
    assert mean_interval([1, 2, 3]) == (2, 1, 3), "three values: their range"

    mean, low, high = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low), "one run has no interval"
    assert math.isnan(high), "one run has no interval"

    values = list(np.random.default_rng(0).normal(10, 2, 400))
    mean, low, high = mean_interval(values)
    half = 1.96 * np.std(values) / 20  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.03)
    assert high == pytest.approx(mean + half, abs=0.03)
    assert mean_interval(values[::-1]) == (pytest.approx(mean), low, high), (
        "the order of the values does not matter"
    )

    with pytest.raises(ValueError, match="values: the list is empty"):
        mean_interval([])


def test_differences():
    assert difference_interval([3, 4], [1, 2]) == (2, 1, 3)
    assert difference_interval([0.5, 0.5], [0.2, 0.2]) == pytest.approx((0.3, 0.3, 0.3))
    assert math.isnan(difference_interval([3], [1, 2])[1])

    rng = np.random.default_rng(0)
    a = list(rng.normal(1, 1, 300))
    b = list(rng.normal(0, 2, 300))
    mean, low, high = difference_interval(a, b)
    half = 1.96 * (np.var(a) / 300 + np.var(b) / 300) ** 0.5  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)
    assert low < 1 < high
