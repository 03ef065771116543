"""Results of 2 gloo ranks without DeepSpeed, for test_auxiliary.py and test_heads.py.

rank_results() runs this file as a script, once per rank. Each of the two test modules has a
function run_on_rank(), which returns a rank's results.

    pytest -m slow tests/model/test_auxiliary.py
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
    """Return {"auxiliary": ..., "heads": ...} of each rank; the ranks are launched only once."""
    ranks, errors = launch_ranks()
    assert not errors, errors
    return ranks


@functools.cache
def launch_ranks() -> tuple[list[dict], str]:
    """Return (the ranks' results, their errors).

    Errors are cached too, so that all tests together wait only once for ranks that hang.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(WORLD):
            command = [sys.executable, __file__, folder, str(rank)]
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            errors = [process.communicate(timeout=90)[1] for process in processes]
        except subprocess.TimeoutExpired as timeout:
            return [], str(timeout)
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            return [], "\n".join(errors)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)], ""


def worker(folder: str, rank: int) -> None:
    """Write the results of this rank to FOLDER/RANK.pt."""
    from glimpse.tests.model import test_auxiliary, test_heads  # here: they import this file

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        world_size=WORLD,
        rank=rank,
        timeout=timedelta(seconds=30),
    )
    results = {"auxiliary": test_auxiliary.run_on_rank(rank), "heads": test_heads.run_on_rank(rank)}
    torch.save(results, f"{folder}/{rank}.pt")
    sys.stderr.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads abort some processes during the interpreter's shutdown


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)  # fail on a deprecated collective
    worker(sys.argv[1], int(sys.argv[2]))
