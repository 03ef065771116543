"""What is read of run folders: how far a run came, what it cost, results by seed, intervals against
known numbers.

Run: pytest tests/run/study/test_results.py
"""

import json
import math

import numpy as np
import pytest

from glimpse.run.study.results import by_seed, difference, interval, read
from glimpse.tests.helpers.tiny import recorded

TOP1 = "zero_shot/shapes/top1"


def test_a_whole_run(tmp_path):
    run = recorded(
        tmp_path / "run", (None, 50, 100, None, 200), {200: {TOP1: 0.25}, 500: {TOP1: 0.5}}
    )
    found = read(run)
    assert (found.state, found.reason, found.samples) == ("complete", "", 500)
    assert found.curve == {TOP1: [(200, 0.25), (500, 0.5)]} and found.final == {TOP1: 0.5}
    assert found.losses[0] == (100, 5.0) and len(found.losses) == 5
    # 100 samples each: two at their median of 100 a second, for want of a speed, and 2 + 1 + 0.5 s
    assert found.seconds == pytest.approx(
        1 + 2 + 1 + 1 + 0.5
    ) and found.samples_per_s == pytest.approx(500 / 5.5)
    assert (
        found.memory_gib == pytest.approx(1.05)
        and found.mfu == 0.25
        and found.provenance["ranks"] == 2
    )
    assert "run/pretrain.py" in found.commands[0]


def test_runs_that_are_not_whole(tmp_path):
    cut = recorded(
        tmp_path / "cut", (None, 50, 50), {200: {TOP1: 0.25}, 300: {TOP1: 0.3}}, "samples=400"
    )
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "samp')  # still being written
    found = read(cut)
    assert (found.state, found.reason) == ("partial", "trained on 300 of 400 samples")
    assert found.final == {} and found.curve[TOP1] == [
        (200, 0.25),
        (300, 0.3),
    ], "a result on the way is none at the end"
    assert read(cut, "out of memory").state == "failed" and read(
        cut, "out of memory"
    ).reason.startswith("out of memory (trained on 300")
    unevaluated = recorded(tmp_path / "unevaluated", (50, 50), {100: {TOP1: 0.25}})
    assert (
        read(unevaluated).reason == "trained, but not evaluated" and read(unevaluated).final == {}
    )
    assert read(recorded(tmp_path / "no_evals", (50, 50), {}, "evals=[]")).state == "complete"
    (tmp_path / "empty").mkdir()
    for name, why in (("empty", "never began"), ("nowhere", "not run")):
        found = read(tmp_path / name)
        assert (
            found.state == "absent"
            and found.reason.startswith(why)
            and not found.final
            and found.seconds is None
        )
    assert read(tmp_path / "nowhere", "exit code 1").state == "failed"
    (tmp_path / "empty/config.yaml").write_text("method: clip")
    assert "empty/config.yaml: run: missing" in read(tmp_path / "empty").reason


def test_a_last_record_that_was_cut_off(tmp_path):
    """The evaluation after it tells that the run came to its end."""
    run = recorded(tmp_path / "run", (50, 50, 50), {300: {TOP1: 0.3}})
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(
        "".join(
            line[:20] if '"samples": 300' in line and "loss" in line else line for line in lines
        )
    )
    assert read(run).losses[-1][0] == 200 and (
        read(run).state,
        read(run).samples,
        read(run).final,
    ) == ("complete", 300, {TOP1: 0.3})


def test_the_time_of_a_run_is_with_that_of_the_run_it_began_from(tmp_path):
    for seed in (0, 1):
        recorded(tmp_path / f"base-seed{seed}", (100, 100), {200: {TOP1: 0.25}}, f"seed={seed}")
        recorded(
            tmp_path / f"tuned-seed{seed}",
            (50,),
            {100: {TOP1: 0.5}},
            f"seed={seed}",
            f"init={tmp_path}/base-seed{seed}",
        )
    tuned = read(tmp_path / "tuned-seed0")
    assert tuned.seconds == 2 + 2 and tuned.samples == 100 and tuned.samples_per_s == 50
    runs = [read(tmp_path / f"{name}-seed{seed}") for name in ("base", "tuned") for seed in (0, 1)]
    assert {label: len(group) for label, group in by_seed(runs).items()} == {"base": 2, "tuned": 2}
    (tmp_path / "elsewhere").mkdir()
    for name in ("base-seed0", "tuned-seed0"):  # moved together
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert read(tmp_path / "elsewhere/tuned-seed0").seconds == 4


def test_a_last_part_of_a_batch_is_not_trained_on(tmp_path):
    assert (
        read(recorded(tmp_path / "run", (50, 50), {200: {TOP1: 0.25}}, "samples=299")).state
        == "complete"
    )


def test_evaluations_of_all_kinds_keep_apart(tmp_path):
    run = recorded(tmp_path / "run", (50, 50), {200: {TOP1: 0.25}})
    more = [
        dict(weights="teacher", mask="none", ensemble=1, **{TOP1: 0.3}),
        dict(weights="student", mask="none", ensemble=2, **{TOP1: 0.4}),
        dict(weights="student", mask="random(0.5)", ensemble=1, crop="square", **{TOP1: 0.2}),
        dict(
            weights="student",
            mask="none",
            ensemble=1,
            **{TOP1: 0.26, "linear_probe/shapes/top1": 0.6, "knn/shapes/top1": None},
        ),
    ]
    with (run / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(dict(step=2, samples=200, **row)) + "\n" for row in more)
    assert read(run).final == {
        TOP1: 0.26,
        f"teacher/{TOP1}": 0.3,
        f"{TOP1} (ensemble 2)": 0.4,
        "linear_probe/shapes/top1": 0.6,
        f"{TOP1} (mask random(0.5), crop square)": 0.2,
    }


def test_runs_that_differ_in_their_seed_alone(tmp_path):
    made = [
        recorded(tmp_path / f"{name}{seed}", (50, 50), {}, f"seed={seed}", f"optim.lr={lr}")
        for name, lr in (("flip-seed", 1e-3), ("flip_high_", 2e-3))
        for seed in (0, 1)
    ]
    groups = by_seed([*map(read, made), read(tmp_path / "nowhere")])
    assert {label: [one.run for one in group] for label, group in groups.items()} == {
        "flip": made[:2],
        "flip_high": made[2:],
        "nowhere": [tmp_path / "nowhere"],
    }
    assert list(by_seed([read(made[0])])) == ["flip-seed0"]
    nested = [
        recorded(
            tmp_path / f"deep/{name}/seed-{seed}", (50, 50), {}, f"seed={seed}", f"optim.lr={lr}"
        )
        for name, lr in (("base", 3e-3), ("large", 4e-3))
        for seed in (0, 1)
    ]
    assert list(by_seed(list(map(read, nested)))) == ["base", "large"]
    assert list(by_seed([read(p) for p in (made[0], made[2], nested[0])])) == [
        "flip-seed0",
        "flip_high_0",
        "deep/base/seed-0",
    ]
    assert list(
        by_seed([read(made[0]), read(recorded(tmp_path / "again", (50, 50), {}, "optim.lr=1e-3"))])
    ) == ["flip-seed0", "again"]


def test_intervals():
    assert interval([0.5, 0.25]) == (0.375, 0.25, 0.5) and interval([1, 2, 3]) == (
        2,
        1,
        3,
    ), "the range, of two or three"
    mean, low, high = interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high), "one run does not tell its spread"
    values = list(np.random.default_rng(0).normal(10, 2, 400))
    mean, low, high = interval(values)
    half = 1.96 * np.std(values) / 20  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.03) and high == pytest.approx(
        mean + half, abs=0.03
    )
    assert interval(values[::-1]) == (pytest.approx(mean), low, high), "deterministic, in any order"
    with pytest.raises(ValueError, match="values: none"):
        interval([])


def test_differences():
    assert difference([3, 4], [1, 2]) == (2, 1, 3) and difference(
        [0.5, 0.5], [0.2, 0.2]
    ) == pytest.approx((0.3, 0.3, 0.3))
    assert math.isnan(difference([3], [1, 2])[1])
    rng = np.random.default_rng(0)
    a, b = list(rng.normal(1, 1, 300)), list(rng.normal(0, 2, 300))
    found, low, high = difference(a, b)
    half = 1.96 * (np.var(a) / 300 + np.var(b) / 300) ** 0.5
    assert low == pytest.approx(found - half, abs=0.02) and high == pytest.approx(
        found + half, abs=0.02
    )
    assert low < 1 < high
