"""Jobs of run/scaling.py launch: failures, work that is left, dependencies, GPUs.

bash run/test.sh tests/run/study/test_jobs.py
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from deepspeed.launcher import runner

from glimpse.run.study import grid, jobs
from glimpse.tests.helpers.tiny import finished

GRIDS = {name: grid.read_grid(name) for name in ("flip_table1", "flip_table8")}


@pytest.mark.parametrize("asked", [False, True])
def test_a_failure_is_told_by_its_own_attempt(asked, tmp_path):
    """The log of an earlier attempt does not count; one that was asked to stop did not fail."""
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    job = jobs.Job(planned)
    log = jobs.sibling_path(planned.folder, "log")
    log.parent.mkdir(parents=True)
    log.write_text("error: of yesterday\n")
    assert job.acquire_lock()
    assert not jobs.Job(planned).acquire_lock()

    job.start([sys.executable, "-c", "import sys; sys.exit('error: of today')"])
    job.process.wait()
    job.finish(asked)

    failed = jobs.sibling_path(planned.folder, "failed")
    if asked:
        assert not failed.exists()
    else:
        assert failed.read_text() == "exit code 1: error: of today\n"
    assert jobs.Job(planned).acquire_lock(), "its lock is free"


def test_an_evaluation_that_leaves_no_result_is_made_once(tmp_path):
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    finished(planned.folder, planned, 0.25)
    said = []
    launcher = jobs.JobQueue([planned], 1, 1, said.append)
    job = launcher.waiting[0]
    job.started_tasks = (jobs.next_task(planned),)

    launcher.start_jobs()

    assert not launcher.running
    assert not launcher.waiting
    assert "has no result of that" in said[-1]
    assert planned.folder in launcher.failed


def test_what_needs_a_complete_run_is_not_refused(tmp_path):
    """Though an evaluation of that run failed."""
    runs = GRIDS["flip_table1"].runs("glyphs", ["mask 75 + tuning"], 1, tmp_path)
    base, tuned = (runs[cell][0] for cell in ("mask 75", "mask 75 + tuning"))
    finished(base.folder, base, 0.25)
    launcher = jobs.JobQueue([tuned], 1, 1)
    launcher.failed = {base.folder: "an evaluation failed"}
    begun = []
    launcher.start_task = begun.append

    launcher.start_jobs()

    assert [job.planned for job in begun] == [tuned]
    assert not jobs.sibling_path(tuned.folder, "failed").exists()

    begun[0].release_lock()
    finished(tuned.folder, tuned, 0.25)

    launcher.start_jobs()

    assert not launcher.waiting, "complete itself"


def test_an_evaluation_that_failed_half_way_is_made_again(tmp_path):
    """Results of the student do not stand for the teacher's, nor those of one set for another's."""
    planned = GRIDS["flip_table8"].runs("glyphs", ["baseline"], 1, tmp_path)["baseline"][0]
    planned = replace(planned, evaluate=("ensemble 2",))
    finished(planned.folder, planned, 0.25)
    records = planned.folder / "results.jsonl"
    row = json.loads(records.read_text())
    metric = next(name for name in row if "/" in name)
    for more, wanted in (
        ({"weights": "teacher"}, "ensemble 2"),
        ({"ensemble": 2}, "ensemble 2"),
        ({"ensemble": 2, "weights": "teacher", metric: None, "other/set/top1": 0.5}, "ensemble 2"),
        ({"ensemble": 2, "weights": "teacher"}, None),
    ):
        with records.open("a") as file:
            file.write(json.dumps(row | more) + "\n")

        assert jobs.next_task(planned) == wanted, more


def test_a_run_of_another_version_says_so(tmp_path):
    planned = GRIDS["flip_table8"].runs("glyphs", ["baseline"], 1, tmp_path)["baseline"][0]
    finished(planned.folder, planned, 0.25)
    with (planned.folder / "config.yaml").open("a") as file:
        file.write("gone: 1\n")

    reason = jobs.missing_reason([jobs.read_state(planned.folder)], "any")

    assert "gone: unknown 'gone'" in reason


HOLDER = """
import fcntl, pathlib, sys, time
home = pathlib.Path(sys.argv[1])
file = open(home / "lock", "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(1)
(home / "saved").touch()
"""


def test_who_asks_to_stop_waits_for_the_rank_that_saves(tmp_path):
    """DeepSpeed's launcher is gone before its rank has saved."""
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    planned.folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(planned.folder)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE)
    rank.stdout.readline()
    launcher = jobs.JobQueue([planned], 1, 1, lambda line: None)
    job = launcher.waiting.pop()
    job.lock = os.open(tmp_path / "any", os.O_CREAT)
    job.process = subprocess.Popen(["true"])
    launcher.running = [job]
    launcher.stopping = True
    job.process.wait()

    assert not launcher.run()
    assert (planned.folder / "saved").exists()
    rank.wait()


def test_jobs_on_gpus_have_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]

    jobs.JobQueue(planned, 4, 2)
    words = "--jobs 3: with --ranks 4 each they take 12 GPUs; this machine has 8"
    with pytest.raises(ValueError, match=words):
        jobs.JobQueue(planned, 4, 3)

    for slot, gpus in ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (1, [3])):
        if gpus == [3]:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
        args = runner.parse_args(jobs.task_command(planned[0], "", len(gpus), slot)[1:])
        assert args.num_gpus == args.num_nodes == -1
        chosen = runner.parse_inclusion_exclusion({"localhost": 8}, args.include, args.exclude)
        assert chosen == {"localhost": gpus}
