"""Streamed shards, from a real HTTP server through webdataset: nothing is left out, nothing is lost
by a resume, broken shards are named.

    bash run/test.sh tests/data/test_stream.py
        -s prints how often samples were seen again after a kill
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
from glimpse.data.loader import DataConfig, Reader
from glimpse.data.shards import headers, write_shard
from glimpse.data.stream import Stream, is_stream
from glimpse.data.transforms import View
from glimpse.tests.helpers.tiny import ROOT, command, environment, launch, settings
from glimpse.tests.helpers.tiny import shards as make_shards

COUNT, SHARDS = 120, 6


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("stream"), COUNT, COUNT // SHARDS)


@pytest.fixture(scope="module")
def url(data):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(data)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    # less than a shard, so that the cursor moves within the test
    monkeypatch.setattr(stream_module, "BUFFER", 15)


def stream(data, *train, workers=0, **more):
    cfg = DataConfig(
        train=train, tokenizer=f"sentencepiece({data}/tokenizer.model)", context=12, workers=workers
    )
    reader = Reader(
        cfg, {"image": View(crop=(0.5, 1.0), mask="random(0.5)")}, image_size=32, patch=8, seed=0
    )
    return Stream(reader, train, **{"batch": 8, **more})


def read_until(loader, shard, limit=400):
    """Batches until no reader of this loader needs a shard before that one: Counter of (epoch,
    shard, key).
    """
    seen = Counter()
    for parts in loader.stream(range(limit), pin=False):
        seen.update(key for part in parts for key in loader.keys(part))
        if loader.position() >= shard:
            return seen
    raise AssertionError(f"still at shard {loader.position()} after {limit} batches")


def epochs(seen, count):
    return {key: n for key, n in seen.items() if key[0] < count}


EVERYTHING = {(epoch, f"{i // 20:05d}.tar", f"{i:06d}") for epoch in (0, 1) for i in range(COUNT)}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_every_sample_of_every_epoch(data, url, world, workers):
    """Once each, where nothing interrupts, however many readers share the shards."""
    seen = Counter()
    for rank in range(world):
        seen += read_until(
            stream(
                data, url + "/train/{00000..00005}.tar", rank=rank, world=world, workers=workers
            ),
            2 * SHARDS,
        )
    assert epochs(seen, 2).keys() == EVERYTHING and set(epochs(seen, 2).values()) == {1}


def test_what_travels_and_the_order(data, url):
    first, again = (
        list(
            stream(data, url + "/train/{00000..00005}.tar", accumulate=2).stream(
                range(6), pin=False
            )
        )
        for _ in range(2)
    )
    keys = [part["keys"] for parts in first for part in parts]
    assert keys == [part["keys"] for parts in again for part in parts], (
        "the same run reads the same"
    )
    part = first[0][1]
    assert (
        len(first[0]) == 2
        and part["samples"].shape == (4, 2)
        and part["views"]["image"]["patches"].shape == (4, 8, 192)
    )
    order = [int(key) for row in keys for _, _, key in row]
    assert sum(b == a + 1 for a, b in zip(order, order[1:])) < 12, "samples are mixed"


@pytest.mark.parametrize("then", [1, 2])
def test_a_resume_loses_nothing(data, url, then):
    """Two ranks stop after some batches; one or two go on from the cursor: every sample of both
    epochs was seen.
    """
    train, seen, cursors = url + "/train/{00000..00005}.tar", Counter(), []
    for rank in range(2):
        loader = stream(data, train, rank=rank, world=2)
        assert loader.position() == 0
        seen += Counter(
            key
            for parts in loader.stream(range(25), pin=False)
            for part in parts
            for key in loader.keys(part)
        )
        cursors.append(loader.position())
    assert min(cursors) > 0, "it goes on from somewhere"
    for rank in range(then):
        seen += read_until(
            stream(data, train, rank=rank, world=then, cursor=min(cursors)), 2 * SHARDS
        )
    assert epochs(seen, 2).keys() == EVERYTHING
    print(
        f"cursor {cursors}: {sum(n - 1 for n in epochs(seen, 2).values())} of {2 * COUNT} samples"
        " seen again"
    )


def test_fewer_shards_than_readers(data, url):
    with pytest.raises(ValueError, match="6 streamed shards for 8 readers .*fewer workers"):
        stream(data, url + "/train/{00000..00005}.tar", world=4, workers=2)


def test_pipes_and_several_sources(data, url):
    loader = stream(
        data, f"pipe:cat {data}/train/{{00000..00002}}.tar", url + "/train/{00003..00005}.tar"
    )
    seen = epochs(read_until(loader, 2 * SHARDS), 2)
    assert {key for _, _, key in seen} == {f"{i:06d}" for i in range(COUNT)} and set(
        seen.values()
    ) == {1}
    assert (
        is_stream(("pipe:cat x.tar",))
        and is_stream(("s3://x.tar", "https://y.tar"))
        and not is_stream(("/data/x",))
    )
    with pytest.raises(ValueError, match="pipe:cat x is a stream and /data/y a folder"):
        is_stream(("/data/y", "pipe:cat x"))


def test_broken_shards_are_named_and_survived(data, tmp_path):
    """One cut off in a file, one that is no tar, one that is not there, one broken picture; the
    rest of the epoch is all there.
    """
    path = data / "train" / "00000.tar"
    # within the tenth image; webdataset holds the ninth back
    whole, cut = path.read_bytes(), headers(path)[18][2] + 100
    for name, content in (("0", whole), ("1", whole[:cut]), ("2", b"<html>" * 200)):
        (tmp_path / f"{name}.tar").write_bytes(content)
    write_shard(
        tmp_path / "4.tar",
        [("good", {"png": whole[512 : 512 + 2000], "txt": b"x"}), ("mute", {"jpg": b"x"})],
    )
    loader, bad = stream(data, f"pipe:cat {tmp_path}/{{0..4}}.tar", batch=4), []
    for parts in loader.stream(range(30), pin=False):
        bad += parts[0]["bad"]
    named = {shard: (key, why) for shard, key, why in bad}
    assert named.keys() == {"1.tar", "2.tar", "3.tar", "4.tar"}
    assert [named[f"{n}.tar"][0] for n in (1, 2, 3)] == [
        "after 8 samples",
        "after 0 samples",
        "after 0 samples",
    ]
    seen = read_until(stream(data, f"pipe:cat {tmp_path}/{{0..4}}.tar", batch=4), 5)
    assert {key for epoch, shard, key in seen if (epoch, shard) == (0, "0.tar")} == {
        f"{i:06d}" for i in range(20)
    }


@pytest.mark.parametrize(
    "train",
    [
        "pipe:cat /nowhere/{0..3}.tar",
        "http://127.0.0.1:9/{0..3}.tar",
        "pipe:head -c 10240 /dev/zero",
    ],
)
def test_nothing_to_read_is_an_error_and_no_endless_wait(data, train):
    with pytest.raises(ValueError, match="streamed shards in a row gave nothing"):
        next(stream(data, train).stream(range(1), pin=False))


def test_nothing_readable_is_an_error(data, tmp_path):
    write_shard(tmp_path / "0.tar", [(f"{i}", {"jpg": b"x", "txt": b"x"}) for i in range(30)])
    with pytest.raises(ValueError, match="20 samples in a row cannot be read, the last 0.tar"):
        next(stream(data, f"pipe:cat {tmp_path}/0.tar").stream(range(1), pin=False))


@pytest.mark.slow
def test_a_run_on_streams_is_stopped_and_goes_on(data, url):
    run = data / "run"
    overrides = (
        "data.train=" + url + "/train/{00000..00005}.tar",
        "data.workers=1",
        "data.trace=true",
        "save_every=64",
        "samples=8000",
    )
    with (data / "run.log").open("w") as log:
        line = command(2, "run/pretrain.py", *settings(data, run, *overrides))
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        while not (
            (run / "metrics.jsonl").exists()
            and len((run / "metrics.jsonl").read_text().splitlines()) > 5
        ):
            assert process.poll() is None, (data / "run.log").read_text()[-3000:]
            time.sleep(0.1)
        # as schedulers do: deepspeed's own process passes nothing on
        os.killpg(process.pid, signal.SIGTERM)
        limit = time.time() + 60
        while "go on with --resume" not in (text := (data / "run.log").read_text()):
            assert time.time() < limit, text[-3000:]
            time.sleep(0.1)
        process.wait(10)
    manifest = json.loads(
        sorted((run / "checkpoints").glob("step-*/manifest.json"))[-1].read_text()
    )
    stopped = manifest["samples"]
    more = (*overrides, f"samples={stopped + 160}")
    done = launch(2, "run/pretrain.py", *settings(data, run, *more), "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "6 streamed shards" in done.stdout
    assert len((run / "command.txt").read_text().splitlines()) == 2, "rank 0 alone keeps the folder"
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == list(range(16, stopped + 161, 16)), "each step once"
    assert rows[-1]["loss"] < rows[0]["loss"]
