"""A run that is killed repeatedly sees every sample of every epoch exactly once.

It has the losses of an uninterrupted run, also when it resumes on other numbers of ranks. The
method has a teacher.

    KILLS=10 bash run/test.sh tests/run/train/test_resume.py -s
        kills ten times; the default is three
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter

import pytest

from glimpse.run.train import checkpoint, zero_reader
from glimpse.tests.helpers.tiny import (
    ROOT,
    environment,
    launch,
    launcher_command,
    tiny_run_arguments,
    write_dataset,
)

KILLS = int(os.environ.get("KILLS", 3))
# 45 steps of 16, 6 epochs; a checkpoint every 4th step
STEPS = 45
BATCH = 16
EPOCH = 120
EPOCHS = STEPS * BATCH // EPOCH
SCHEDULE = (
    "samples=720",
    "save_every=64",
    "data.trace=true",
    "data.workers=1",
    "method=maskclip",
    "views.image.mask=random(0.75)",
    "model.vision.pool=mean",
    "options={momentum: [0.9, 0.99]}",
    "optim.eps=1e-5",  # see tiny_config() in tests/workers/curves_worker.py
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("resume"), EPOCH)


@pytest.fixture(scope="module")
def uninterrupted(data):
    done = launch(
        2, "run/pretrain.py", *tiny_run_arguments(data, data / "uninterrupted", *SCHEDULE)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return losses(data / "uninterrupted")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    return {row["samples"]: row["loss"] for row in records(run / "metrics.jsonl") if "loss" in row}


def count_samples(run):
    """Return {(epoch, shard, key): count} over the run, from its trace.

    Of steps that were repeated, only the last time counts.
    """
    steps = {}
    for path in sorted((run / "trace").glob("*.jsonl")):
        for row in records(path):
            steps.setdefault(row["samples"], {})[path.name] = row["keys"]
    counts = Counter()
    for ranks in steps.values():
        for keys in ranks.values():
            counts.update(tuple(key) for key in keys)
    return counts


def check_epochs(run):
    """Check that every epoch has every sample once."""
    counts = count_samples(run)
    assert set(counts.values()) == {1}
    samples_of_epoch = Counter(epoch for epoch, _, _ in counts)
    assert samples_of_epoch == dict.fromkeys(range(EPOCHS), EPOCH)


def start(line, log):
    """Start a command in a new process group, with its output in an open log file."""
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
    )


def kill_at(data, run, ranks, step, *more):
    """Start or resume the run, kill it once metrics.jsonl has the step, and return its exit code.

    SIGKILL goes to the process group. more: config overrides.
    """
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    line = launcher_command(
        ranks, "run/pretrain.py", *tiny_run_arguments(data, run, *SCHEDULE, *more), *resume
    )
    with (data / "killed.log").open("a") as log:
        process = start(line, log)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            has_records = (run / "metrics.jsonl").exists()
            if has_records and max(losses(run), default=0) >= step * BATCH:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait()
    return process.returncode


@pytest.mark.slow
def test_killed_at_random_steps(data, uninterrupted):
    run = data / "killed"
    kills = sorted(random.Random(0).sample(range(2, STEPS - 1), KILLS))

    codes = [kill_at(data, run, 2, step) for step in kills]
    assert codes == [-signal.SIGKILL] * KILLS, (data / "killed.log").read_text()[-3000:]
    done = launch(2, "run/pretrain.py", *tiny_run_arguments(data, run, *SCHEDULE), "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    check_epochs(run)
    assert losses(run) == uninterrupted, "bit for bit"
    print(
        f"killed at steps {kills}: {STEPS} losses bit-equal, {STEPS * BATCH} samples, each of"
        f" {EPOCHS} epochs exactly once"
    )


@pytest.mark.slow
def test_other_numbers_of_ranks_and_workers(data, uninterrupted):
    # Train on 2 ranks, then 4, then 1.
    run = data / "elastic"
    assert kill_at(data, run, 2, 14) == -signal.SIGKILL
    leftover = run / "checkpoints" / "universal-step-00000004"
    leftover.mkdir()  # as after a job that was killed during the conversion
    assert kill_at(data, run, 4, 26, "data.workers=2") == -signal.SIGKILL
    assert not leftover.exists()
    last = tiny_run_arguments(data, run, *SCHEDULE, "data.workers=0")
    done = launch(1, "run/pretrain.py", *last, "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    # Compare with the uninterrupted run on 2 ranks.
    prefixes = {path.name[:5] for path in (run / "checkpoints").iterdir() if path.is_dir()}
    resumed = losses(run)
    loss_difference = max(abs(resumed[step] - loss) / loss for step, loss in uninterrupted.items())
    weights = zero_reader.read_weights(checkpoint.newest_checkpoint(run))
    reference = zero_reader.read_weights(checkpoint.newest_checkpoint(data / "uninterrupted"))
    weight_difference = max(
        float((weights[name] - reference[name]).abs().max()) for name in reference
    )
    print(
        f"2 -> 4 -> 1 ranks, 1 -> 2 -> 0 workers: losses differ by at most {loss_difference:.1e},"
        f" weights (of the teacher too) by {weight_difference:.1e}"
    )

    assert prefixes == {"step-"}
    check_epochs(run)
    assert resumed.keys() == uninterrupted.keys()
    assert loss_difference < 1e-4
    assert weights.keys() == reference.keys()
    assert weight_difference < 1e-4


@pytest.mark.slow
def test_sigterm_saves_and_leaves(data):
    run = data / "stopped"
    output = data / "stopped.log"
    more = tiny_run_arguments(data, run, "samples=1600k", "data.workers=1")
    with output.open("w") as log:
        process = start(launcher_command(2, "run/pretrain.py", *more), log)
        while not ((run / "metrics.jsonl").exists() and len(losses(run)) > 5):
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)

        # To the process group, as from a scheduler or Ctrl-C; the launcher forwards no signals.
        begin = time.time()
        os.killpg(process.pid, signal.SIGTERM)
        # The launcher exits before its ranks do.
        while "continue with --resume" not in output.read_text():
            assert time.time() - begin < 30, output.read_text()[-2000:]
            time.sleep(0.1)
        process.wait()

    manifest = json.loads(next((run / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert manifest["samples"] == max(losses(run)), "saved at the last step"
    print(f"SIGTERM: saved and exited in {time.time() - begin:.1f} s")


@pytest.mark.slow
def test_a_failing_rank_ends_the_job(data):
    """Rank 1 fails in its third step; the job ends within a minute, with the error message."""
    begin = time.time()
    done = launch(2, "tests/workers/failing_worker.py", *tiny_run_arguments(data, data / "failing"))

    assert done.returncode != 0
    assert "the disk is on fire" in done.stderr + done.stdout
    assert time.time() - begin < 60
