"""Worker processes end with their pool, however long they took to begin; a killed one is an error.

bash run/test.sh tests/data/builders/test_worker_pool.py
"""

import os
import signal
import subprocess
import sys

import pytest

from glimpse.data.builders.worker_pool import workers
from glimpse.tests.helpers.tiny import ROOT, environment

SCRIPT = """
import os, time
from glimpse.data.builders.worker_pool import workers
from glimpse.run.lib.cli import run_script

def main():
    # A busy machine: the pool is left before its workers have begun.
    os.register_at_fork(after_in_child=lambda: time.sleep(0.5))
    with workers():
        pass
    print("left")

run_script(main)
"""


def test_a_pool_may_be_left_before_its_workers_have_begun():
    """The signal that ends a worker comes while it is forked, from a parent with its own handler.

    The handler is run_script's.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("left\n", "", 0)


def test_results_come_in_order():
    with workers() as results:
        assert list(results(abs, range(-50, 0))) == list(range(50, 0, -1))


def killed_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_told():
    with pytest.raises(ValueError, match="a worker process was killed"), workers() as results:
        list(results(killed_at_five, range(20)))


def test_what_a_worker_raises_is_raised():
    with pytest.raises(ZeroDivisionError), workers() as results:
        list(results((1).__truediv__, (1, 0)))
