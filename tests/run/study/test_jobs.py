"""Test the jobs of `run/scaling.py launch`: failures, remaining tasks, dependencies, GPUs.

bash run/test.sh tests/run/study/test_jobs.py
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from deepspeed.launcher import runner

from glimpse.run.lib import config
from glimpse.run.study import grid, jobs
from glimpse.tests.helpers.tiny import write_finished_run

GRIDS = {name: grid.read_grid(name) for name in ("flip_table1", "flip_table8")}


@pytest.fixture
def planned_run(tmp_path):
    """A run without dependencies and with two evaluations."""
    return GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]


@pytest.fixture
def baseline(tmp_path):
    """A run without further evaluations."""
    return GRIDS["flip_table8"].runs("glyphs", ["baseline"], 1, tmp_path)["baseline"][0]


@pytest.mark.parametrize("was_stopped", [False, True])
def test_a_failure_is_told_by_its_own_attempt(was_stopped, planned_run):
    """The log of an earlier attempt does not count, and a job that was stopped did not fail."""
    job = jobs.Job(planned_run)
    log = jobs.sibling_path(planned_run.folder, "log")
    log.parent.mkdir(parents=True)
    log.write_text("error: of yesterday\n")

    assert job.acquire_lock()
    assert not jobs.Job(planned_run).acquire_lock()

    job.start([sys.executable, "-c", "import sys; sys.exit('error: of today')"])
    job.process.wait()
    job.finish(was_stopped)

    failure_file = jobs.sibling_path(planned_run.folder, "failed")
    if was_stopped:
        assert not failure_file.exists()
    else:
        assert failure_file.read_text() == "exit code 1: error: of today\n"
    assert jobs.Job(planned_run).acquire_lock(), "the lock was released"


def test_an_evaluation_that_leaves_no_result_is_made_once(planned_run):
    write_finished_run(planned_run.folder, planned_run, 0.25)
    messages = []
    queue = jobs.JobQueue([planned_run], 1, 1, messages.append)
    job = queue.waiting[0]
    job.started_tasks = (jobs.next_task(planned_run),)

    queue.start_jobs()

    assert not queue.running
    assert not queue.waiting
    assert "ended without writing its results" in messages[-1]
    assert planned_run.folder in queue.failed


def test_what_needs_a_complete_run_is_not_refused(tmp_path):
    """A run may start from a complete run even if an evaluation of that run has failed."""
    runs = GRIDS["flip_table1"].runs("glyphs", ["mask 75 + tuning"], 1, tmp_path)
    base, tuned = (runs[cell][0] for cell in ("mask 75", "mask 75 + tuning"))
    write_finished_run(base.folder, base, 0.25)
    queue = jobs.JobQueue([tuned], 1, 1)
    queue.failed = {base.folder: "an evaluation failed"}
    started = []
    queue.start_task = started.append

    queue.start_jobs()

    assert [job.planned_run for job in started] == [tuned]
    assert not jobs.sibling_path(tuned.folder, "failed").exists()

    started[0].release_lock()
    write_finished_run(tuned.folder, tuned, 0.25)

    queue.start_jobs()

    assert not queue.waiting, "the run is complete"


def test_an_evaluation_that_failed_half_way_is_made_again(baseline):
    """An evaluation is complete only with the results of both models on all evaluation sets."""
    planned_run = replace(baseline, evaluate=("ensemble 2",))
    write_finished_run(planned_run.folder, planned_run, 0.25)
    records = planned_run.folder / "results.jsonl"
    row = json.loads(records.read_text())
    metric = next(name for name in row if "/" in name)
    for columns, expected in (
        ({"weights": "teacher"}, "ensemble 2"),
        ({"ensemble": 2}, "ensemble 2"),
        ({"ensemble": 2, "weights": "teacher", metric: None, "other/set/top1": 0.5}, "ensemble 2"),
        ({"ensemble": 2, "weights": "teacher"}, None),
    ):
        with records.open("a") as file:
            file.write(json.dumps(row | columns) + "\n")

        assert jobs.next_task(planned_run) == expected, columns


def test_a_run_of_another_version_is_reported(baseline):
    write_finished_run(baseline.folder, baseline, 0.25)
    with (baseline.folder / "config.yaml").open("a") as file:
        file.write("gone: 1\n")

    reason = jobs.missing_reason([jobs.read_state(baseline.folder)], "any")

    assert "gone: unknown 'gone'" in reason


# A rank that holds the lock of its run folder, and saves a checkpoint after a second.
RANK = """
import fcntl, pathlib, sys, time
home = pathlib.Path(sys.argv[1])
file = open(home / "lock", "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(1)
(home / "saved").touch()
"""


def test_stopping_waits_for_the_rank_that_saves(planned_run, tmp_path):
    """DeepSpeed's launcher exits before its rank has saved."""
    planned_run.folder.mkdir(parents=True)
    command = [sys.executable, "-c", RANK, str(planned_run.folder)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE)
    rank.stdout.readline()
    queue = jobs.JobQueue([planned_run], 1, 1, lambda line: None)
    job = queue.waiting.pop()
    job.lock = os.open(tmp_path / "any", os.O_CREAT)
    job.process = subprocess.Popen(["true"])
    queue.running = [job]
    queue.stopping = True
    job.process.wait()

    assert not queue.run()
    assert (planned_run.folder / "saved").exists()
    rank.wait()


def test_jobs_use_different_gpus(planned_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)

    jobs.JobQueue([planned_run], 4, 2)
    message = "--jobs: 3 jobs with --ranks 4 need 12 GPUs, and this machine has 8"
    with pytest.raises(ValueError, match=message):
        jobs.JobQueue([planned_run], 4, 3)

    assert selected_gpus(planned_run, ranks=4, slot=0) == [0, 1, 2, 3]
    assert selected_gpus(planned_run, ranks=4, slot=1) == [4, 5, 6, 7]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")

    assert selected_gpus(planned_run, ranks=1, slot=1) == [3]


def selected_gpus(planned_run: grid.PlannedRun, ranks: int, slot: int) -> list[int]:
    """Return the GPUs that DeepSpeed's launcher selects for the command of a job."""
    command = jobs.task_command(planned_run, "", ranks, slot)
    args = runner.parse_args(command[1:])
    assert args.num_gpus == -1
    assert args.num_nodes == -1
    return runner.parse_inclusion_exclusion({"localhost": 8}, args.include, args.exclude)[
        "localhost"
    ]


def test_commands_work_from_any_folder(planned_run, tmp_path, monkeypatch):
    """An installed package is not the current folder."""
    monkeypatch.chdir(tmp_path)

    line = jobs.train_command(planned_run, ["python"])

    config_file = line[line.index("--config") + 1]
    changes = line[line.index("--set") + 1 :]
    assert config.load(config_file, changes) == planned_run.cfg
