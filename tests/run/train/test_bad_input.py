"""What a user can get wrong ends in one line that says what, what is allowed and what to change,
with a non-zero exit, before training.

Most start run/pretrain.py as one process, the last go through the launcher.  `-s` prints the lines.
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
from glimpse.run.lib.run_dir import trained_elsewhere
from glimpse.tests.helpers.tiny import (
    ROOT,
    command,
    environment,
    launch,
    picture,
    settings,
    shards,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("bad"))


def folder(path, rows=None):
    """A folder with one shard of those rows, not indexed."""
    path.mkdir()
    one = [("a", {"png": picture("red circle", np.random.default_rng(0)), "txt": b"x"})]
    write_shard(path / "0.tar", one if rows is None else rows)
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


def truncated(tmp):
    path = folder(tmp / "x") / "0.tar"
    path.write_bytes(path.read_bytes()[:900])
    return path.parent


CASES = {  # name: (overrides made from a folder to write in, what the line says)
    "misspelt key": (lambda tmp: ["bacth=16"], ["'bacth'", "did you mean 'batch'"]),
    "unknown mask": (
        lambda tmp: ["views.image.mask=gausian(0.5)"],
        ["gausian", "gaussian", "random"],
    ),
    "ratio 1.0": (lambda tmp: ["views.image.mask=random(1.0)"], ["1.0", "[0, 1)"]),
    "missing shards": (
        lambda tmp: [f"data.train={tmp}/nowhere"],
        ["nowhere", "no such folder", "data.train"],
    ),
    "folder without shards": (lambda tmp: [f"data.train={tmp}"], ["no *.tar"]),
    "no captions": (
        lambda tmp: [f"data.train={no_captions(tmp)}"],
        ["0.tar", "no captions", "txt, json"],
    ),
    "empty shard": (lambda tmp: [f"data.train={folder(tmp / 'x', [])}"], ["0.tar", "empty shard"]),
    "truncated tar": (lambda tmp: [f"data.train={truncated(tmp)}"], ["0.tar", "truncated"]),
    "accumulate": (lambda tmp: ["accumulate=3"], ["batch: 16", "accumulate 3"]),
    "unknown evaluation": (
        lambda tmp: ["evals=[zeroshot:x]"],
        ["zeroshot", "did you mean 'zero_shot'"],
    ),
    "missing evaluation set": (
        lambda tmp: [f"evals=[zero_shot:{tmp}/none]"],
        ["no evaluation set"],
    ),
    "tokenizer": (lambda tmp: ["data.tokenizer=bpe"], ["bpe", "clip_bpe"]),
    "image size": (lambda tmp: ["model.image_size=30"], ["30", "multiple"]),
    "DeepSpeed JSON": (
        lambda tmp: [f"deepspeed={tmp}/none.json"],
        ["no such file", "ds_configs/zero3.json"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, data, tmp_path):
    overrides, words = CASES[name]
    done = pretrain(*settings(data, tmp_path / "run", *overrides(tmp_path)))
    assert done.returncode not in (0, -6), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    print(f"{name:24} exit {done.returncode}  {errors}")
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "run").exists(), "nothing was started"


def fails(done, *words):
    assert done.returncode not in (0, -6) and "Traceback" not in done.stderr, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    print(errors)
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors


def test_deepspeed_json_with_batch(data, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train_batch_size": 8}))
    fails(
        pretrain(*settings(data, tmp_path / "run"), "--deepspeed_config", str(path)),
        "train_batch_size",
        "the config owns",
        "`batch`",
    )


def test_existing_run_and_other_architecture(data, tmp_path):
    run = tmp_path / "run"
    assert pretrain(*settings(data, run, "samples=32")).returncode == 0
    fails(pretrain(*settings(data, run, "samples=64")), "exists", "--resume")
    fails(
        pretrain(*settings(data, run, "samples=64", "model.vision.pool=cls"), "--resume"),
        "model.vision.pool",
        "mean_with_cls",
        "cls",
    )
    fails(pretrain(*settings(data, tmp_path / "other", "samples=64"), "--resume"), "no run folder")


def test_a_run_that_is_being_trained(data, tmp_path):
    """A second job is refused as long as the first lives, and goes on when that was killed."""
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "run/pretrain.py", *settings(data, run, "samples=1M", "save_every=16")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.time() + 60
        while not list(run.glob("checkpoints/*/manifest.json")):
            assert first.poll() is None and time.time() < until
            time.sleep(0.1)
        assert trained_elsewhere(run)
        fails(
            pretrain(*settings(data, run, "samples=1M"), "--resume"),
            "is being trained by another job",
        )
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert not trained_elsewhere(run)
    step = len((run / "metrics.jsonl").read_text().splitlines())
    assert pretrain(*settings(data, run, f"samples={16 * (step + 2)}"), "--resume").returncode == 0


def test_broken_images_beyond_the_budget(data, tmp_path):
    rng = np.random.default_rng(0)
    good = [
        (f"g{i}", {"jpg": picture("red circle", rng, "jpg"), "txt": b"a red circle"})
        for i in range(60)
    ]
    broken = [
        (f"b{i}", {"jpg": picture("red circle", rng, "jpg")[:200], "txt": b"a red circle"})
        for i in range(30)
    ]
    bad = folder(tmp_path / "x", good + broken)
    build_index(bad)
    done = pretrain(*settings(data, tmp_path / "run", f"data.train={bad}"))
    fails(done, "data.max_bad", "0.tar b", "more than 1.0%")
    assert "skipped 0.tar b" in done.stdout, "each is named when it is met"
    kept = pretrain(
        *settings(data, tmp_path / "kept", f"data.train={bad}", "data.max_bad=0.9", "samples=64")
    )
    assert kept.returncode == 0 and "skipped" in kept.stdout


def test_more_ranks_than_devices(data, tmp_path):
    """One more than there are GPUs; without GPUs, one more than the cores that the launcher may
    use.
    """
    devices = torch.cuda.device_count() or 1
    cores = (
        []
        if torch.cuda.is_available()
        else ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    )
    line = [*cores, *command(devices + 1, "run/pretrain.py", *settings(data, tmp_path / "run"))]
    alone = {key: value for key, value in environment().items() if key != "OVERSUBSCRIBE"}
    done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120)
    fails(done, "--num_accelerators", f"a machine with {devices}", f"start at most {devices}")
    assert not (tmp_path / "run").exists()


def test_through_the_launcher(data, tmp_path):
    fails(
        launch(2, "run/pretrain.py", *settings(data, tmp_path / "run", "batch=15")),
        "batch: 15 does not divide by 2 ranks",
    )
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    done = launch(
        2, "run/pretrain.py", *settings(data, tmp_path / "run", f"data.train={tmp_path}/nowhere")
    )
    fails(done, "no such folder")
    assert "c10d" not in done.stderr, (
        "the other rank hears of it, and does not lose its store with a trace"
    )
