"""Evaluation sets at URLs are downloaded once, from a server or a pipe, and read like local ones.

bash run/test.sh tests/data/evals/test_remote.py
"""

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from glimpse.data.evals import remote
from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.run.evals import parse_evaluations
from glimpse.tests.helpers.tiny import NAMES, free_port, picture, write_evaluation_set


@pytest.fixture
def folder(tmp_path, monkeypatch):
    names = NAMES[:10]
    rows = []
    for i, name in enumerate(names):
        rows.append({"png": picture(name, np.random.default_rng(0)), "cls": b"%d" % i})
    path = write_evaluation_set(tmp_path / "server" / "wds_shapes", rows, "\n".join(names))
    (path / "test" / "nshards.txt").write_text("1\n")
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    return path


@pytest.fixture
def server(folder):
    """The URL of the set, and a list of the requested files."""
    if not shutil.which("curl"):
        pytest.skip("webdataset reads URLs through curl, which is not installed")
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            request = str(values[0])
            file = ""
            if "GET" in request:
                file = request.split()[1].removeprefix("/wds_shapes/")
            requested.append(file)

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder.parent))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/wds_shapes", requested
    http.shutdown()
    http.server_close()


def assert_equal(fetched, folder):
    """Assert that the fetched set is equal to the one in the folder."""
    local = ClipBenchmarkSet(folder)
    assert len(fetched) == len(local) == 10
    assert fetched.class_names() == local.class_names()
    assert fetched.templates() == local.templates()
    for i in range(10):
        assert fetched.image(i) == local.image(i)
        assert fetched.label(i) == local.label(i)


def test_a_set_at_a_url_is_fetched_once(server, folder):
    url, requested = server

    (evaluation,) = parse_evaluations([f"zero_shot:{url}"])

    assert evaluation.label == "zero_shot/wds_shapes"
    assert_equal(evaluation.images, folder)
    assert requested.count("test/0.tar") == 1
    assert "classnames.txt" in requested

    # The second time the copy is used.
    before = len(requested)
    assert_equal(ClipBenchmarkSet(url + "/"), folder)
    assert len(requested) == before

    with pytest.raises(ValueError, match=f"{url}/train/nshards.txt cannot be read"):
        evaluation.images.open_split("train")


def test_a_pipe(folder):
    assert_equal(ClipBenchmarkSet(f"pipe:cat {folder}"), folder)

    fetched = ClipBenchmarkSet(f"pipe:cat {folder}/{{file}} | cat")

    assert fetched.name == "wds_shapes"
    assert_equal(fetched, folder)


def test_errors_name_the_url(server, folder):
    url, _requested = server
    messages = {
        f"http://127.0.0.1:{free_port()}/x": (
            "/x/test/nshards.txt cannot be read: the host cannot be reached"
        ),
        f"{url}2": ("wds_shapes2/test/nshards.txt cannot be read: the server does not have it"),
        "pipe:cat /nowhere": "cat /nowhere/test/nshards.txt cannot be read: .*exit 1",
        "abc://host/set": "abc://host/set/test/nshards.txt cannot be read: .*no gopen handler",
    }
    for source, message in messages.items():
        with pytest.raises(ValueError, match=f"evals: .*{message}"):
            parse_evaluations([f"zero_shot:{source}"])

    # A shard is missing. Once nshards.txt is corrected, the set can be read.
    shard_count = folder / "test" / "nshards.txt"
    shard_count.write_text("2")
    with pytest.raises(ValueError, match="test/1.tar cannot be read: the server"):
        ClipBenchmarkSet(url)
    shard_count.write_text("1")
    assert_equal(ClipBenchmarkSet(url), folder)

    shard_count.write_text("<html>")
    with pytest.raises(
        ValueError, match="nshards.txt is '<html>'; it must be the number of shards"
    ):
        ClipBenchmarkSet(f"pipe:cat {folder}")


def test_an_incomplete_file_is_deleted(folder, tmp_path):
    with pytest.raises(ValueError, match="test/0.tar.* cannot be read: .*exit 1"):
        ClipBenchmarkSet(f"pipe:head -c 9000 {folder}/{{file}}; [ {{file}} != test/0.tar ]")

    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_split_url():
    page = "https://huggingface.co/datasets/some/wds_vtab-dtd"
    for url in (page, f"{page}/tree/main", f"{page}/tree/main/"):
        assert remote.split_url(url) == (f"{page}/resolve/main/{{file}}", "wds_vtab-dtd")
    assert remote.split_url("https://host/a/b") == ("https://host/a/b/{file}", "b")
    pipe = "pipe:aws s3 cp s3://bucket/{file} -"
    assert remote.split_url(pipe) == (pipe, "bucket")
