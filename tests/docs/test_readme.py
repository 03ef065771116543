"""README.md's walk of one batch names the files that a training step really enters, in order."""

import re
import subprocess
import sys

import pytest

from glimpse.run.lib.config import ROOT
from glimpse.tests.helpers.tiny import environment, tiny_run_arguments, write_dataset

HEADING = "## One batch, from tar to loss"


@pytest.mark.slow
def test_the_walk_of_one_batch_is_true(tmp_path):
    data = write_dataset(tmp_path / "data")
    readme = (ROOT / "README.md").read_text()
    block = re.search(rf"{HEADING}\n.*?```text\n(.*?)```", readme, re.S)[1]
    described_files = [line.split()[0] for line in block.splitlines()]

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "glimpse.tests.workers.walk_worker",
            *tiny_run_arguments(data, tmp_path / "run", "samples=16", "optim.warmup=0"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("walk: "))
    assert line.split()[1:] == described_files
