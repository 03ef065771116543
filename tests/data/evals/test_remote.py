"""Evaluation sets at URLs: fetched once from a server of this machine or out of a pipe, then read
like local ones.

    bash run/test.sh tests/data/evals/test_remote.py
"""

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from glimpse.data.evals import remote
from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.run.evals import parse
from glimpse.tests.helpers.tiny import NAMES, evaluation_set, free_port, picture


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [
        {"png": picture(name, np.random.default_rng(0)), "cls": b"%d" % i}
        for i, name in enumerate(NAMES[:10])
    ]
    made = evaluation_set(tmp_path / "there" / "wds_shapes", rows, "\n".join(NAMES[:10]))
    (made / "test" / "nshards.txt").write_text("1\n")
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    return made


@pytest.fixture
def server(folder):
    """(URL of the set, what was asked for)."""
    if not shutil.which("curl"):
        pytest.skip("webdataset reads URLs through curl, which is not installed")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            asked.append(
                str(values[0]).split()[1].removeprefix("/wds_shapes/")
                if "GET" in str(values[0])
                else ""
            )

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder.parent))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/wds_shapes", asked
    http.shutdown()
    http.server_close()


def same(found, folder):
    here = Benchmark(folder)
    assert (
        len(found) == len(here) == 10
        and found.classes() == here.classes()
        and found.templates() == here.templates()
    )
    assert [(found.image(i), found.label(i)) for i in range(10)] == [
        (here.image(i), here.label(i)) for i in range(10)
    ]


def test_a_set_at_a_url_is_fetched_once(server, folder):
    url, asked = server
    (made,) = parse([f"zero_shot:{url}"])
    assert made.label == "zero_shot/wds_shapes"
    same(made.images, folder)
    assert asked.count("test/0.tar") == 1 and "classnames.txt" in asked
    before = len(asked)
    same(Benchmark(url + "/"), folder)
    assert len(asked) == before, "the second time nothing is asked for"
    with pytest.raises(ValueError, match=f"{url}/train/nshards.txt cannot be read"):
        made.images.other("train")


def test_a_pipe(folder):
    same(Benchmark(f"pipe:cat {folder}"), folder)
    found = Benchmark(f"pipe:cat {folder}/{{file}} | cat")
    assert found.name == "wds_shapes"
    same(found, folder)


def test_what_cannot_be_reached_is_named(server, folder):
    for url, words in (
        (
            f"http://127.0.0.1:{free_port()}/x",
            "/x/test/nshards.txt cannot be read: the host cannot be reached",
        ),
        (
            server[0] + "2",
            "wds_shapes2/test/nshards.txt cannot be read: the server says that it is not there",
        ),
        ("pipe:cat /nowhere", "cat /nowhere/test/nshards.txt cannot be read: .*exit 1"),
        ("abc://host/set", "abc://host/set/test/nshards.txt cannot be read: .*no gopen handler"),
    ):
        with pytest.raises(ValueError, match=f"evals: .*{words}"):
            parse([f"zero_shot:{url}"])
    (folder / "test" / "nshards.txt").write_text("2")
    with pytest.raises(ValueError, match="test/1.tar cannot be read: the server"):
        Benchmark(server[0])
    (folder / "test" / "nshards.txt").write_text("1")
    same(Benchmark(server[0]), folder)
    (folder / "test" / "nshards.txt").write_text("<html>")
    with pytest.raises(
        ValueError, match="nshards.txt is '<html>'; it must be the number of shards"
    ):
        Benchmark(f"pipe:cat {folder}")


def test_no_half_of_a_file_is_kept(folder, tmp_path):
    with pytest.raises(ValueError, match="test/0.tar.* cannot be read: .*exit 1"):
        Benchmark(f"pipe:head -c 9000 {folder}/{{file}}; [ {{file}} != test/0.tar ]")
    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_addresses():
    face = "https://huggingface.co/datasets/some/wds_vtab-dtd"
    for given in (face, f"{face}/tree/main", f"{face}/tree/main/"):
        assert remote.address(given) == (f"{face}/resolve/main/{{file}}", "wds_vtab-dtd")
    assert remote.address("https://host/a/b") == ("https://host/a/b/{file}", "b")
    assert remote.address("pipe:aws s3 cp s3://bucket/{file} -") == (
        "pipe:aws s3 cp s3://bucket/{file} -",
        "bucket",
    )
