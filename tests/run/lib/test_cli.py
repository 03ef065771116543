"""How scripts without ranks end: on SIGTERM, and when the reader of their output has gone.

bash run/test.sh tests/run/lib/test_cli.py
"""

import signal
import subprocess
import sys

import pytest

from glimpse.tests.helpers.tiny import ROOT, environment

SCRIPT = """
import tempfile, time
from glimpse.run.lib.cli import run_script
def main():
    with tempfile.TemporaryDirectory(dir={folder!r}):
        print("started", flush=True)
        time.sleep(60)
run_script(main)
"""


def test_what_is_half_made_goes_with_a_sigterm(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path))],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "started\n"
    assert len(list(tmp_path.iterdir())) == 1

    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)

    assert errors == "interrupted\n"
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lines", (1, 100_000))  # Python flushes at the end, or in between
def test_a_reader_that_has_enough_is_no_error(lines):
    script = f"""
from glimpse.run.lib.cli import run_script
def main():
    input()
    for _ in range({lines}):
        print("line")
run_script(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    process.stdout.close()
    _, errors = process.communicate("begin\n", timeout=60)

    assert errors == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "line, code, errors",
    [
        ("pass", 0, ""),
        ("raise BrokenPipeError(32, 'no reader')", 2, "error: [Errno 32] no reader\n"),
    ],
)
def test_another_pipe_or_none(line, code, errors):
    """Stdout may be closed from the start, as in daemons; another broken pipe is an error."""
    script = (
        f"from glimpse.run.lib.cli import run_script\ndef main():\n    {line}\nrun_script(main)"
    )

    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, script],
        cwd=ROOT,
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
    )

    assert (done.returncode, done.stderr) == (code, errors)
