"""Several ranks in one process, each a thread, for fast tests of evaluations.

The threads form a real process group (torch's "threaded" backend), so that torch.distributed and
run/lib/distributed.py work in them as they do in processes.

    with ranks(monkeypatch, world=3, batch=4) as run:
        first, second, third = run(work)
"""

import ast
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from glimpse.run.evals import embed, features, knn, linear_probe, retrieval, segmentation
from glimpse.run.lib import distributed

CHUNK = 7  # small, so that the evaluations' loops over chunks take several turns
TIMEOUT = 60  # seconds that the other ranks get to end after one has failed


@contextmanager
def ranks(monkeypatch: pytest.MonkeyPatch, world: int, batch: int) -> Iterator[Callable]:
    """Yield run(work), which calls work() on each of `world` ranks and returns their results.

    The evaluations embed `batch` images at once and compute in small chunks.
    """
    use_small_batches(monkeypatch, batch)
    monkeypatch.setattr(distributed, "exit_process", raise_exit)
    lock_parser(monkeypatch)

    # Let each thread have its own process groups, in Python and in C++.
    _install_threaded_pg()
    _set_thread_isolation_mode(True)
    try:
        yield lambda work: run_threads(work, world)
    finally:
        _set_thread_isolation_mode(False)
        _uninstall_threaded_pg()


def use_small_batches(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Set the sizes of batches and chunks of the evaluations."""
    for module in (embed, features, segmentation):
        monkeypatch.setattr(module, "BATCH", batch)
    for module in (knn, linear_probe, retrieval):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(features, "CHUNK", 2 * batch)


def run_threads(work: Callable, world: int) -> list:
    """Return what work() returns on each rank of a new process group; raise a rank's error."""
    store = dist.HashStore()
    results = [None] * world
    errors = []

    def run_rank(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work()
            dist.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # ends the ranks that wait in a collective

    threads = [threading.Thread(target=run_rank, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.1)
        thread.join(TIMEOUT)
    ProcessLocalGroup.reset()

    # The exits of other ranks follow from the first error.
    causes = [error for error in errors if not isinstance(error, SystemExit)]
    if errors:
        raise (causes or errors)[0]
    return results


def raise_exit(code: int = 0) -> None:
    """End the thread of a rank; os._exit() would end the process, with all ranks."""
    raise SystemExit(code)


def lock_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only one thread at a time parse Python.

    Python 3.11's parser sometimes fails if several threads use it at once, and np.load parses
    headers with it.
    """
    parse = ast.parse
    lock = threading.Lock()

    def locked_parse(*args, **kwargs):
        with lock:
            return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", locked_parse)
