"""What 2 gloo ranks find without DeepSpeed: `found` runs this file as a script, once a rank, for
test_auxiliary.py and test_heads.py alike.

Each of them says in its `on_a_rank` what a rank does, and returns what the tests look at. pytest -m
slow tests/model/test_auxiliary.py
"""

import functools
import os
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


def found() -> list[dict]:
    """[{"auxiliary": ..., "heads": ...} of each rank], from one launch a session."""
    ranks, errors = launched()
    assert not errors, errors
    return ranks


@functools.cache
def launched() -> tuple[list[dict], str]:
    """What the ranks found, and how they failed (which is kept, too: a hang is waited for once)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, folder, str(rank)],
                env=env,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(WORLD)
        ]
        try:
            errors = [process.communicate(timeout=90)[1] for process in processes]
        except subprocess.TimeoutExpired as hang:
            return [], str(hang)
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            return [], "\n".join(errors)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)], ""


def worker(folder: str, rank: int) -> None:
    from glimpse.tests.model import test_auxiliary, test_heads  # not above: they import this file

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        world_size=WORLD,
        rank=rank,
        timeout=timedelta(seconds=30),
    )
    torch.save(
        {"auxiliary": test_auxiliary.on_a_rank(rank), "heads": test_heads.on_a_rank(rank)},
        f"{folder}/{rank}.pt",
    )
    sys.stderr.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads abort some of the processes that end through the interpreter


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)  # a deprecated collective
    worker(sys.argv[1], int(sys.argv[2]))
