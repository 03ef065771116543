"""Streamed shards, read by webdataset from a real HTTP server.

All samples of an epoch are read, also across a resume, and broken shards are reported.

    bash run/test.sh tests/data/test_stream.py
        -s prints how many samples are repeated after a resume
"""

import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from glimpse.data import stream as stream_module
from glimpse.data.loader import DataConfig, SampleReader
from glimpse.data.shards import list_files, write_shard
from glimpse.data.stream import Stream, is_stream
from glimpse.data.transforms import View
from glimpse.tests.helpers.tiny import (
    ROOT,
    environment,
    launch,
    launcher_command,
    tiny_run_arguments,
)
from glimpse.tests.helpers.tiny import write_dataset as make_shards

COUNT, SHARDS = 120, 6


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("stream"), COUNT, COUNT // SHARDS)


@pytest.fixture(scope="module")
def url(data):
    handler = functools.partial(QuietHandler, directory=str(data))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    # Smaller than a shard, so that the cursor moves within the test.
    monkeypatch.setattr(stream_module, "SHUFFLE_BUFFER", 15)


def make_stream(data, *train, workers=0, **options):
    """A stream of batches of 8; options: of Stream."""
    cfg = DataConfig(
        train=train, tokenizer=f"sentencepiece({data}/tokenizer.model)", context=12, workers=workers
    )
    view = View(crop=(0.5, 1.0), mask="random(0.5)")
    reader = SampleReader(cfg, {"image": view}, image_size=32, patch=8, seed=0)
    options = {"batch": 8, **options}
    return Stream(reader, train, **options)


def read_batches(loader, count):
    """Read the first batches of a loader, each a list of micro-batches."""
    return list(loader.iterate(range(count), pin_memory=False))


def read_until(loader, shard, limit=400):
    """Read until no worker of this loader needs an earlier shard.

    Return how often each (epoch, shard, key) was read.
    """
    counts = Counter()
    for micro_batches in loader.iterate(range(limit), pin_memory=False):
        for micro_batch in micro_batches:
            counts.update(loader.keys(micro_batch))
        if loader.resume_cursor() >= shard:
            return counts
    raise AssertionError(f"still at shard {loader.resume_cursor()} after {limit} batches")


def select_epochs(counts, epochs):
    """Return the counts of the first epochs."""
    return {key: n for key, n in counts.items() if key[0] < epochs}


ALL_SHARDS = "/train/{00000..00005}.tar"
KEYS = [f"{i:06d}" for i in range(COUNT)]
ONE_EPOCH = [(f"{i // 20:05d}.tar", key) for i, key in enumerate(KEYS)]
TWO_EPOCHS = {(epoch, *sample) for epoch in (0, 1) for sample in ONE_EPOCH}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_every_sample_of_every_epoch(data, url, world_size, workers):
    """Each sample is read once if nothing interrupts, with any number of readers."""
    total = Counter()
    for rank in range(world_size):
        loader = make_stream(
            data, url + ALL_SHARDS, rank=rank, world_size=world_size, workers=workers
        )
        total += read_until(loader, 2 * SHARDS)

    counts = select_epochs(total, 2)
    assert counts.keys() == TWO_EPOCHS
    assert set(counts.values()) == {1}


def test_what_travels_and_the_order(data, url):
    first = read_batches(make_stream(data, url + ALL_SHARDS, accumulate=2), 6)
    again = read_batches(make_stream(data, url + ALL_SHARDS, accumulate=2), 6)

    keys = [micro_batch["keys"] for micro_batches in first for micro_batch in micro_batches]
    keys_again = [micro_batch["keys"] for micro_batches in again for micro_batch in micro_batches]
    assert keys == keys_again, "the order is deterministic"
    assert len(first[0]) == 2
    micro_batch = first[0][1]
    assert micro_batch["samples"].shape == (4, 2)
    assert micro_batch["views"]["image"]["patches"].shape == (4, 8, 192)

    order = [int(key) for row in keys for _, _, key in row]
    neighbors = sum(b == a + 1 for a, b in zip(order, order[1:]))
    assert neighbors < 12, "samples are mixed"


@pytest.mark.parametrize("resumed_ranks", [1, 2])
def test_a_resume_loses_nothing(data, url, resumed_ranks):
    """Two ranks stop after some batches, and one or two resume from the cursor.

    Together they read every sample of both epochs.
    """
    train = url + ALL_SHARDS
    total = Counter()
    cursors = []
    for rank in range(2):
        loader = make_stream(data, train, rank=rank, world_size=2)
        assert loader.resume_cursor() == 0
        for micro_batches in loader.iterate(range(25), pin_memory=False):
            for micro_batch in micro_batches:
                total.update(loader.keys(micro_batch))
        cursors.append(loader.resume_cursor())
    cursor = min(cursors)
    assert cursor > 0, "the cursor has advanced"

    for rank in range(resumed_ranks):
        loader = make_stream(data, train, rank=rank, world_size=resumed_ranks, cursor=cursor)
        total += read_until(loader, 2 * SHARDS)

    counts = select_epochs(total, 2)
    assert counts.keys() == TWO_EPOCHS
    repeated = sum(counts.values()) - len(counts)
    print(f"cursor {cursors}: {repeated} of {2 * COUNT} samples read again")


def test_fewer_shards_than_readers(data, url):
    with pytest.raises(ValueError, match="6 streamed shards for 8 readers .*fewer workers"):
        make_stream(data, url + ALL_SHARDS, world_size=4, workers=2)


def test_pipes_and_several_sources(data, url):
    pipe = f"pipe:cat {data}/train/{{00000..00002}}.tar"
    loader = make_stream(data, pipe, url + "/train/{00003..00005}.tar")

    counts = select_epochs(read_until(loader, 2 * SHARDS), 2)

    assert {key for _, _, key in counts} == set(KEYS)
    assert set(counts.values()) == {1}


def test_what_is_a_stream():
    assert is_stream(("pipe:cat x.tar",))
    assert is_stream(("s3://x.tar", "https://y.tar"))
    assert not is_stream(("/data/x",))
    with pytest.raises(ValueError, match="pipe:cat x is a stream and /data/y a folder"):
        is_stream(("/data/y", "pipe:cat x"))


def test_broken_shards_are_named_and_survived(data, tmp_path):
    """A truncated shard, one that is not a tar, one that is missing, and a broken image.

    All other samples of the epoch are read.
    """
    path = data / "train" / "00000.tar"
    content = path.read_bytes()
    # Within the tenth image. webdataset has not yet returned the ninth.
    cut_at = list_files(path)[18][2] + 100
    (tmp_path / "0.tar").write_bytes(content)
    (tmp_path / "1.tar").write_bytes(content[:cut_at])
    (tmp_path / "2.tar").write_bytes(b"<html>" * 200)
    readable = {"png": content[512 : 512 + 2000], "txt": b"x"}
    write_shard(tmp_path / "4.tar", [("readable", readable), ("no caption", {"jpg": b"x"})])
    train = f"pipe:cat {tmp_path}/{{0..4}}.tar"

    bad = []
    for micro_batches in read_batches(make_stream(data, train, batch=4), 30):
        bad += micro_batches[0]["bad"]

    keys = {shard: key for shard, key, _ in bad}
    assert keys.keys() == {"1.tar", "2.tar", "3.tar", "4.tar"}
    assert keys["1.tar"] == "after 8 samples"
    assert keys["2.tar"] == "after 0 samples"
    assert keys["3.tar"] == "after 0 samples"

    counts = read_until(make_stream(data, train, batch=4), 5)
    first_shard = {key for epoch, shard, key in counts if (epoch, shard) == (0, "0.tar")}
    assert first_shard == set(KEYS[:20])


@pytest.mark.parametrize(
    "train",
    [
        "pipe:cat /nowhere/{0..3}.tar",
        "http://127.0.0.1:9/{0..3}.tar",
        "pipe:head -c 10240 /dev/zero",
    ],
)
def test_nothing_to_read_is_an_error_and_no_endless_wait(data, train):
    with pytest.raises(ValueError, match="streamed shards in a row yielded no samples"):
        read_batches(make_stream(data, train), 1)


def test_nothing_readable_is_an_error(data, tmp_path):
    rows = [(f"{i}", {"jpg": b"x", "txt": b"x"}) for i in range(30)]
    write_shard(tmp_path / "0.tar", rows)

    with pytest.raises(ValueError, match="20 samples in a row cannot be read, the last 0.tar"):
        read_batches(make_stream(data, f"pipe:cat {tmp_path}/0.tar"), 1)


@pytest.mark.slow
def test_a_run_on_streams_is_stopped_and_goes_on(data, url):
    run = data / "run"
    overrides = (
        "data.train=" + url + ALL_SHARDS,
        "data.workers=1",
        "data.trace=true",
        "save_every=64",
        "samples=8000",
    )

    arguments = tiny_run_arguments(data, run, *overrides)
    train_and_stop(launcher_command(2, "run/pretrain.py", *arguments), run)
    last = sorted((run / "checkpoints").glob("step-*/manifest.json"))[-1]
    stopped = json.loads(last.read_text())["samples"]
    arguments = tiny_run_arguments(data, run, *overrides, f"samples={stopped + 160}")
    result = launch(2, "run/pretrain.py", *arguments, "--resume")

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "6 streamed shards" in result.stdout
    assert len((run / "command.txt").read_text().splitlines()) == 2, (
        "only rank 0 writes to the run folder"
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == list(range(16, stopped + 161, 16)), (
        "each step is logged once"
    )
    assert rows[-1]["loss"] < rows[0]["loss"]


def train_and_stop(command, run):
    """Start a training run, and stop it with SIGTERM after some steps."""
    log = run.with_suffix(".log")
    metrics = run / "metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
        while not metrics.exists() or len(metrics.read_text().splitlines()) <= 5:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        # To the process group, like schedulers: the deepspeed launcher does not forward signals.
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.time() + 60
        while "continue with --resume" not in log.read_text():
            assert time.time() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        process.wait(10)
