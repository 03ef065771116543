"""A run that is killed again and again, and goes on on other numbers of ranks, sees every sample of
every epoch once and has the uninterrupted run's losses; its method has a teacher.

    KILLS=10 bash run/test.sh tests/run/train/test_resume.py -s
        the full count; CI kills fewer times
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
from glimpse.tests.helpers.tiny import ROOT, command, environment, launch, settings, shards

KILLS = int(os.environ.get("KILLS", 3))
STEPS, EPOCH = 45, 120
# 45 steps of 16, 6 epochs; a checkpoint every 4th step
SCHEDULE = (
    "samples=720",
    "save_every=64",
    "data.trace=true",
    "data.workers=1",
    "method=maskclip",
    "views.image.mask=random(0.75)",
    "model.vision.pool=mean",
    "options={momentum: [0.9, 0.99]}",
    "optim.eps=1e-5",
)  # where rounding does not grow: tests/workers/curves_worker.py


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("resume"), EPOCH)


@pytest.fixture(scope="module")
def uninterrupted(data):
    done = launch(2, "run/pretrain.py", *settings(data, data / "straight", *SCHEDULE))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return losses(data / "straight")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    return {row["samples"]: row["loss"] for row in records(run / "metrics.jsonl") if "loss" in row}


def seen(run):
    """{(epoch, shard, key): how often} over the whole run, each step counted as it was last
    taken.
    """
    steps = {}
    for path in sorted((run / "trace").glob("*.jsonl")):
        for row in records(path):
            steps.setdefault(row["samples"], {})[path.name] = row["keys"]
    return Counter(
        tuple(key) for ranks in steps.values() for keys in ranks.values() for key in keys
    )


def check_multiset(run):
    found = seen(run)
    assert set(found.values()) == {1}
    assert Counter(epoch for epoch, _, _ in found) == {
        epoch: EPOCH for epoch in range(STEPS * 16 // EPOCH)
    }


def kill_at(data, run, ranks, step, *more):
    """Start or go on with the run, kill -9 its process group once metrics.jsonl has that step (or
    the run ends first).
    """
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    with (data / "killed.log").open("a") as log:
        line = command(ranks, "run/pretrain.py", *settings(data, run, *SCHEDULE, *more), *resume)
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        limit = time.time() + 120
        while process.poll() is None and time.time() < limit:
            if (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step * 16:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait()
    return process.returncode


@pytest.mark.slow
def test_killed_at_random_steps(data, uninterrupted):
    run, rng = data / "killed", random.Random(0)
    at = sorted(rng.sample(range(2, STEPS - 1), KILLS))
    codes = [kill_at(data, run, 2, step) for step in at]
    assert codes == [-signal.SIGKILL] * KILLS, (data / "killed.log").read_text()[-3000:]
    done = launch(2, "run/pretrain.py", *settings(data, run, *SCHEDULE), "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_multiset(run)
    assert losses(run) == uninterrupted, "bit for bit"
    print(
        f"killed at steps {at}: {STEPS} losses bit-equal, {STEPS * 16} samples, each of"
        f" {STEPS * 16 // EPOCH} epochs exact"
    )


@pytest.mark.slow
def test_other_numbers_of_ranks_and_workers(data, uninterrupted):
    run = data / "elastic"
    assert kill_at(data, run, 2, 14) == -signal.SIGKILL
    left = run / "checkpoints" / "universal-step-00000004"
    left.mkdir()  # as a job leaves it that is killed while it converts
    assert kill_at(data, run, 4, 26, "data.workers=2") == -signal.SIGKILL
    assert not left.exists()
    done = launch(
        1, "run/pretrain.py", *settings(data, run, *SCHEDULE, "data.workers=0"), "--resume"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.name[:5] for path in (run / "checkpoints").iterdir() if path.is_dir()} == {"step-"}
    check_multiset(run)
    found = losses(run)
    far = max(abs(found[step] - loss) / loss for step, loss in uninterrupted.items())
    ours, theirs = (
        zero_reader.weights(checkpoint.newest(path)) for path in (run, data / "straight")
    )
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    print(
        f"2 -> 4 -> 1 ranks, 1 -> 2 -> 0 workers: losses at most {far:.1e} apart, weights, the"
        f" teacher's too, {apart:.1e}"
    )
    assert found.keys() == uninterrupted.keys() and far < 1e-4
    assert ours.keys() == theirs.keys() and apart < 1e-4


@pytest.mark.slow
def test_sigterm_saves_and_leaves(data):
    run = data / "asked"
    with (data / "asked.log").open("w") as log:
        line = command(
            2, "run/pretrain.py", *settings(data, run, "samples=1600k", "data.workers=1")
        )
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        while not ((run / "metrics.jsonl").exists() and len(losses(run)) > 5):
            assert process.poll() is None, (data / "asked.log").read_text()
            time.sleep(0.1)
        begin = time.time()
        # as a scheduler or Ctrl-C does; DeepSpeed's launcher passes nothing on from itself alone
        os.killpg(process.pid, signal.SIGTERM)
        # the launcher leaves before its ranks do
        while "go on with --resume" not in (data / "asked.log").read_text():
            assert time.time() - begin < 30, (data / "asked.log").read_text()[-2000:]
            time.sleep(0.1)
        process.wait()
    manifest = json.loads(next((run / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert manifest["samples"] == max(losses(run)), "what was saved is where the run stopped"
    print(f"SIGTERM: saved and left in {time.time() - begin:.1f} s")


@pytest.mark.slow
def test_a_failing_rank_ends_the_job(data):
    """Rank 1 dies at its third step; the launcher's whole job is over within a minute, with its
    message.
    """
    begin = time.time()
    done = launch(2, "tests/workers/failing_worker.py", *settings(data, data / "failing"))
    assert done.returncode != 0 and "the disk is on fire" in done.stderr + done.stdout
    assert time.time() - begin < 60
