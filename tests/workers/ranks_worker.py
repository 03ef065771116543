"""The results of 2 gloo ranks without DeepSpeed, for test_auxiliary.py and test_heads.py alike.

`found` runs this file as a script, once a rank. Each of the tests has an `on_a_rank`, which does a
rank's work and returns what the tests look at. pytest -m slow tests/model/test_auxiliary.py
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


def rank_results() -> list[dict]:
    """Return [{"auxiliary": ..., "heads": ...} of each rank], from one launch a session."""
    ranks, errors = launch_ranks()
    assert not errors, errors
    return ranks


@functools.cache
def launch_ranks() -> tuple[list[dict], str]:
    """Return the ranks' results and their errors, which are cached: a hang is waited for once."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(WORLD):
            line = [sys.executable, __file__, folder, str(rank)]
            processes.append(subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True))
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
    results = {"auxiliary": test_auxiliary.on_a_rank(rank), "heads": test_heads.on_a_rank(rank)}
    torch.save(results, f"{folder}/{rank}.pt")
    sys.stderr.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads abort some of the processes that end through the interpreter


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)  # a deprecated collective
    worker(sys.argv[1], int(sys.argv[2]))
