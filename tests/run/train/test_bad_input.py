"""A user's mistake ends run/pretrain.py before training, with one line and a non-zero exit code.

The line names the key or path, the problem, and what to change. Most tests run a single process;
the last use the launcher.

    bash run/test.sh tests/run/train/test_bad_input.py -s
        prints the lines
"""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from glimpse.data.shards import build_index, write_shard
from glimpse.run.lib.run_dir import is_locked
from glimpse.tests.helpers.tiny import (
    ROOT,
    environment,
    launch,
    launcher_command,
    picture,
    tiny_run_arguments,
    write_dataset,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bad"))


def folder(path, rows=None):
    """Write a folder with one shard that has no index; rows: its samples, by default one pair."""
    if rows is None:
        image = picture("red circle", np.random.default_rng(0))
        rows = [("a", {"png": image, "txt": b"x"})]
    path.mkdir()
    write_shard(path / "0.tar", rows)
    return path


def pretrain(*args):
    return subprocess.run(
        [sys.executable, "run/pretrain.py", *args],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def no_captions(tmp):
    return folder(tmp / "x", [("a", {"png": b"x"})])


def empty(tmp):
    return folder(tmp / "x", [])


def truncated(tmp):
    path = folder(tmp / "x") / "0.tar"
    path.write_bytes(path.read_bytes()[:900])
    return path.parent


# {name: (override, words of the error)}; {folder} is tmp_path, or the result of BROKEN[name]
CASES = {
    "misspelt key": ("bacth=16", ["'bacth'", "did you mean 'batch'"]),
    "unknown mask": ("views.image.mask=gausian(0.5)", ["gausian", "gaussian", "random"]),
    "ratio 1.0": ("views.image.mask=random(1.0)", ["1.0", "[0, 1)"]),
    "missing shards": ("data.train={folder}/nowhere", ["nowhere", "no such folder", "data.train"]),
    "folder without shards": ("data.train={folder}", ["no *.tar"]),
    "no captions": ("data.train={folder}", ["0.tar", "no captions", "txt, json"]),
    "empty shard": ("data.train={folder}", ["0.tar", "empty shard"]),
    "truncated tar": ("data.train={folder}", ["0.tar", "truncated"]),
    "accumulate": ("accumulate=3", ["batch: 16", "accumulate 3"]),
    "unknown evaluation": ("evals=[zeroshot:x]", ["zeroshot", "did you mean 'zero_shot'"]),
    "missing evaluation set": ("evals=[zero_shot:{folder}/none]", ["is not an evaluation set"]),
    "tokenizer": ("data.tokenizer=bpe", ["bpe", "clip_bpe"]),
    "image size": ("model.image_size=30", ["30", "multiple"]),
    "DeepSpeed JSON": (
        "deepspeed={folder}/none.json",
        ["no such file", "ds_configs/zero3.json"],
    ),
}
BROKEN = {"no captions": no_captions, "empty shard": empty, "truncated tar": truncated}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, data, tmp_path):
    override, words = CASES[name]
    source = BROKEN[name](tmp_path) if name in BROKEN else tmp_path

    done = pretrain(*tiny_run_arguments(data, tmp_path / "run", override.format(folder=source)))

    fails(done, *words)
    assert not (tmp_path / "run").exists(), "nothing was started"


def fails(done, *words):
    """Check that a script failed with a single error line that contains these words."""
    assert done.returncode not in (0, -6), done.stderr[-2000:]  # -6: aborted
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    print(f"exit {done.returncode}  {errors}")
    assert len(errors) == 1, done.stderr[-2000:]
    for word in words:
        assert word in errors[0]


def test_deepspeed_json_with_batch(data, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"train_batch_size": 8}))

    done = pretrain(*tiny_run_arguments(data, tmp_path / "run"), "--deepspeed_config", str(path))

    fails(done, "train_batch_size", "the config owns", "`batch`")


def test_existing_run_and_other_architecture(data, tmp_path):
    run = tmp_path / "run"
    done = pretrain(*tiny_run_arguments(data, run, "samples=32"))
    assert done.returncode == 0

    again = pretrain(*tiny_run_arguments(data, run, "samples=64"))
    other_pool = tiny_run_arguments(data, run, "samples=64", "model.vision.pool=cls")
    other = pretrain(*other_pool, "--resume")
    nothing = pretrain(*tiny_run_arguments(data, tmp_path / "other", "samples=64"), "--resume")

    fails(again, "exists", "--resume")
    fails(other, "model.vision.pool", "mean_with_cls", "cls")
    fails(nothing, "is not a run folder")


def test_a_run_that_is_being_trained(data, tmp_path):
    """A second job fails while the first trains, and resumes after that was killed."""
    # Wait until the first job has saved a checkpoint.
    run = tmp_path / "run"
    first = subprocess.Popen(
        [
            sys.executable,
            "run/pretrain.py",
            *tiny_run_arguments(data, run, "samples=1M", "save_every=16"),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.time() + 60
        while not list(run.glob("checkpoints/*/manifest.json")):
            assert first.poll() is None
            assert time.time() < deadline
            time.sleep(0.1)
        assert is_locked(run)

        # A second job fails.
        second = pretrain(*tiny_run_arguments(data, run, "samples=1M"), "--resume")

        fails(second, "is being trained by another job")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert not is_locked(run)

    # After the first was killed, another resumes.
    step = len((run / "metrics.jsonl").read_text().splitlines())
    done = pretrain(*tiny_run_arguments(data, run, f"samples={16 * (step + 2)}"), "--resume")

    assert done.returncode == 0


def test_broken_images_beyond_the_budget(data, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        rows.append((f"g{i}", {"jpg": picture("red circle", rng, "jpg"), "txt": b"a red circle"}))
    for i in range(30):
        broken = picture("red circle", rng, "jpg")[:200]
        rows.append((f"b{i}", {"jpg": broken, "txt": b"a red circle"}))
    bad = folder(tmp_path / "x", rows)
    build_index(bad)
    train = f"data.train={bad}"

    refused = pretrain(*tiny_run_arguments(data, tmp_path / "run", train))
    patient = pretrain(
        *tiny_run_arguments(data, tmp_path / "kept", train, "data.max_bad=0.9", "samples=64")
    )

    fails(refused, "data.max_bad", "0.tar b", "more than 1.0%")
    assert "skipped 0.tar b" in refused.stdout, "each is reported when it is read"
    assert patient.returncode == 0
    assert "skipped" in patient.stdout


def test_more_ranks_than_devices(data, tmp_path):
    """One more rank than GPUs; without GPUs, one more than the cores that taskset allows."""
    devices = torch.cuda.device_count() or 1
    line = launcher_command(
        devices + 1, "run/pretrain.py", *tiny_run_arguments(data, tmp_path / "run")
    )
    if not torch.cuda.is_available():
        core = str(min(os.sched_getaffinity(0)))
        line = ["taskset", "--cpu-list", core, *line]
    env = {key: value for key, value in environment().items() if key != "OVERSUBSCRIBE"}

    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)

    fails(done, "--num_accelerators", f"a machine with {devices}", f"start at most {devices}")
    assert not (tmp_path / "run").exists()


def test_through_the_launcher(data, tmp_path):
    run = tmp_path / "run"

    batch = launch(2, "run/pretrain.py", *tiny_run_arguments(data, run, "batch=15"))
    shutil.rmtree(run, ignore_errors=True)
    nowhere = launch(
        2, "run/pretrain.py", *tiny_run_arguments(data, run, f"data.train={tmp_path}/nowhere")
    )

    fails(batch, "batch: 15 does not divide by 2 ranks")
    fails(nowhere, "no such folder")
    assert "c10d" not in nowhere.stderr, (
        "the other rank exits, without a traceback about the lost store"
    )
