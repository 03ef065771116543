"""Proves that worker processes end when their pool does, however long they took to begin.

    bash run/test.sh tests/test_workers.py
"""
import subprocess
import sys

from tests.tiny import ROOT, environment

SCRIPT = """
import os, time
from data.workers import workers
from run.lib.cli import run_script

def main():
    os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # a busy machine: the pool is left before its workers are there
    with workers():
        pass
    print("left")

run_script(main)
"""


def test_a_pool_may_be_left_before_its_workers_have_begun():
    """The signal that ends a worker comes while it is forked, from a parent that has a handler of its own (run_script)."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("left\n", "", 0)
