"""Several ranks in one process, each a thread: for fast tests of evaluations.

Their sums over ranks then really add up.

    with ranks(monkeypatch, world=3, batch=4) as run:
        a, b, c = run(work)
"""

import ast
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from glimpse.run import evals

PACKAGE = evals.__name__
CHUNK = 7  # small, so that the evaluations' loops over chunks take several turns


@contextmanager
def ranks(monkeypatch: pytest.MonkeyPatch, world: int, batch: int) -> Iterator[Callable]:
    """Yield run(work), which returns what each of `world` ranks returns from work().

    Each has its own rank(); images come in rounds of `batch`, and chunks are small.
    """
    this_thread = threading.local()
    barrier = threading.Barrier(world)
    slots = [None] * world

    def exchange(value) -> list:
        """Return the values of all ranks, in order; every rank must call."""
        slots[this_thread.rank] = value
        barrier.wait(30)
        values = list(slots)
        barrier.wait(30)  # before anybody writes the next value
        return values

    def broadcast(tensor, source: int) -> None:
        tensor.copy_(exchange(tensor.clone())[source])

    fakes = {"BATCH": batch, "CHUNK": CHUNK}
    fakes["rank"] = lambda: this_thread.rank
    fakes["world_size"] = lambda: world
    fakes["barrier"] = lambda: barrier.wait(30)
    fakes["rank0_first"] = lambda make: make()
    fakes["broadcast_from_rank0"] = lambda make: exchange(make())[0]
    fakes["all_reduce_sum"] = lambda values: sum(exchange(values.clone()))
    fakes["all_reduce_min"] = lambda value: min(exchange(value))
    fakes["all_gather_list"] = lambda items: sum(exchange(items), [])
    fakes["dist"] = SimpleNamespace(broadcast=broadcast)
    replace_in_evals(monkeypatch, fakes)
    features = sys.modules[f"{PACKAGE}.features"]
    monkeypatch.setattr(features, "CHUNK", 2 * batch)
    lock_parser(monkeypatch)

    yield lambda work: run_threads(work, this_thread, barrier)


def run_threads(work: Callable, this_thread: threading.local, barrier: threading.Barrier) -> list:
    """Return what work() returns in each of as many threads as the barrier has parties."""
    results = [None] * barrier.parties
    errors = []

    def run_rank(rank: int) -> None:
        this_thread.rank = rank
        try:
            results[rank] = work()
        except BaseException as error:
            errors.append(error)
            barrier.abort()  # the others would wait for this one

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # Other ranks' broken barriers follow from the first error.
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return results


def replace_in_evals(monkeypatch: pytest.MonkeyPatch, fakes: dict) -> None:
    """Replace these names in all modules of run/evals that have them."""
    for module in pkgutil.iter_modules(evals.__path__):
        importlib.import_module(f"{PACKAGE}.{module.name}")
    modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    for module in modules:
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)


def lock_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one thread at a time parse Python.

    Python 3.11's parser fails now and then when threads use it at once (np.load reads its headers
    by it).
    """
    parse = ast.parse
    lock = threading.Lock()

    def parse_alone(*args, **kwargs):
        with lock:
            return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parse_alone)
