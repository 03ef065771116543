"""The records of a run, its progress line, and the formatting of numbers and tables.

bash run/test.sh tests/run/train/test_log.py
"""

import json
import time

import pytest

from glimpse.run.lib.run_dir import drop_records_after
from glimpse.run.train.log import Log, format_count, format_duration, format_results, peak_flops


def strict(path):
    """Return the records of a file; NaN and Infinity, which are not JSON, are errors."""

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=fail) for line in path.read_text().splitlines()]


def test_records(tmp_path, capsys):
    log = Log(tmp_path, 0, steps=40, batch=256)
    log.record_step(1, 256, 1e9, 1e12, loss=5.5, lr=1e-3, grad_norm=None, temperature=0.07)
    begin = time.perf_counter()
    log.add_wait_time(0.02)
    time.sleep(0.08)
    log.record_step(
        11,
        2816,
        1e9,
        1e12,
        loss=4.25,
        lr=2e-3,
        grad_norm=float("inf"),
        temperature=0.06,
        accuracy=float("nan"),
    )
    elapsed = time.perf_counter() - begin
    log.info("hello")
    log.close()

    # metrics.jsonl
    first, second = strict(tmp_path / "metrics.jsonl")
    expected = dict(step=1, samples=256, loss=5.5, lr=1e-3, temperature=0.07)
    assert first.items() >= expected.items()
    assert "grad_norm" not in first
    assert "samples_per_s" not in first, "the first step has no speed: it warms up"
    assert second["grad_norm"] is None
    assert second["accuracy"] is None
    assert second["loss"] == 4.25
    assert 0.5 * 2560 / elapsed < second["samples_per_s"] <= 2560 / 0.08
    assert second["mfu"] == pytest.approx(second["samples_per_s"] * 1e9 / 1e12)
    assert second["stall"] == pytest.approx(0.02 * second["samples_per_s"] / 2560)

    # terminal, log.txt and TensorBoard
    out = capsys.readouterr().out
    assert "step 11/40 · 2.82k samples · loss 4.2500 · temperature 0.0600" in out
    assert "ETA 0:" in out
    assert "hello" in out
    assert (tmp_path / "log.txt").read_text().endswith("hello\n")
    assert list((tmp_path / "tensorboard").iterdir())


def test_evaluations(tmp_path, capsys):
    log = Log(tmp_path, 0, steps=40, batch=256)
    log.record_step(1, 256, 1e9, 1e12, loss=5.5)
    log.record_evaluation(1, 256, {}, "student")  # a config with eval_every and no evals
    assert not (tmp_path / "results.jsonl").exists()
    assert len(strict(tmp_path / "metrics.jsonl")) == 1

    values = {"zero_shot/shapes/top1": 0.5, "zero_shot/shapes/chance": 0.1}
    log.add_wait_time(0.5)
    time.sleep(0.05)
    log.record_evaluation(5, 1280, values, "student")
    time.sleep(0.02)
    log.record_step(6, 1536, 1e9, 1e12, loss=5.0)
    log.close()

    record = dict(step=5, samples=1280, weights="student", **values)
    assert strict(tmp_path / "results.jsonl") == [record]
    last = strict(tmp_path / "metrics.jsonl")[-1]
    assert last["samples_per_s"] > 256 / 0.05, "without the time of the evaluation"
    assert last["stall"] == 0, "without the time of the evaluation"
    assert "(5x chance)" in capsys.readouterr().out


def test_other_ranks_are_silent(tmp_path, capsys):
    log = Log(tmp_path, 1, steps=40, batch=256)
    log.add_wait_time(1.0)
    log.record_step(1, 256, 1e9, 1e12, loss=5.5)
    log.record_evaluation(1, 256, {"zero_shot/x/top1": 0.5}, "student")
    log.info("hello")
    log.add_image("x", None, 0)
    log.close()

    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""

    log.warning("skipped 0.tar 17")
    out = capsys.readouterr().out
    assert out == "rank 1: skipped 0.tar 17\n", "warnings about their own data are printed"


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path):
    log = Log(tmp_path, 0, steps=40, batch=16)
    for step in range(1, 7):
        log.record_step(step, 16 * step, 1e9, 1e12, loss=1.0 * step)
    log.close()
    records = tmp_path / "metrics.jsonl"
    with records.open("a") as file:
        file.write('{"step": 7, "samples": 11')  # cut off by a kill; 11 is below 64

    drop_records_after(records, 64)
    assert [row["step"] for row in strict(records)] == [1, 2, 3, 4]
    assert records.read_text().endswith("}\n")

    log = Log(tmp_path, 0, steps=40, batch=16)
    log.record_step(5, 80, 1e9, 1e12, loss=5.0)
    log.close()
    assert [row["samples"] for row in strict(records)] == [16, 32, 48, 64, 80]

    drop_records_after(records, 0)
    assert records.read_text() == ""
    drop_records_after(tmp_path / "none.jsonl", 64)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl*")) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.7, "1k"),
        (1000, "1k"),
        (51_200, "51.2k"),
        (999_499, "999k"),
        (999_950, "1M"),
        (12_800_000_000, "12.8B"),
        (0.25, "0.25"),
    ],
)
def test_short(count, text):
    assert format_count(count) == text


def test_clock():
    assert format_duration(0) == "0:00"
    assert format_duration(59.9) == "0:59"
    assert format_duration(61) == "1:01"
    assert format_duration(3600) == "1:00:00"
    assert format_duration(90_061) == "25:01:01"


def test_table():
    results = {
        "zero_shot/shapes/top1": 0.5,
        "zero_shot/shapes/top5": 1.0,
        "zero_shot/shapes/chance": 0.0417,
        "retrieval/a_longer_name/image_to_text_r1": 0.125,
    }

    first, second = format_results(results).splitlines()

    words = "zero_shot shapes top1 50.00% top5 100.00% chance 4.17% (12x chance)"
    assert first.split() == words.split()
    assert second.split() == ["retrieval", "a_longer_name", "image_to_text_r1", "12.50%"]
    assert first.index("top1") == second.index("image_to_text_r1"), "in columns"


def test_peak_of_this_machine():
    assert peak_flops() > 1e8
