"""Launched by test_resume.py: run/pretrain.py, with an error on rank 1 in its third step."""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from glimpse.run import pretrain
from glimpse.run.lib import distributed
from glimpse.run.train import engine

original_step = engine.Engine.step


def fail_at_three(self, *args):
    if distributed.rank() == 1 and self.samples == 2 * self.batch:
        raise OSError("the disk is on fire")
    return original_step(self, *args)


if __name__ == "__main__":
    engine.Engine.step = fail_at_three
    distributed.run_script(pretrain.main)
