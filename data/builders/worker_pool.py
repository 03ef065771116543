"""Worker processes on all cores, to draw or read whole sets of samples."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def workers(
    begin: Callable[..., None] | None = None, *arguments
) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Fork one process per core; each first calls begin(*arguments).

        with workers() as results:
            for result in results(function, items):       in the order of the items

    The processes end at once when the `with` block is left, also by Ctrl-C.

    ValueError: a worker was killed. multiprocessing's Pool replaces it, but waits forever for the
    lost result.

    Pool ends its workers by SIGTERM. A signal that arrives while a worker is being forked must be
    neither lost nor handled by the parent's handler, whose exception Python drops there: the
    worker would stay, and the parent would wait for it. So signals are blocked until the worker
    has the system's default handlers.
    """
    cores = len(os.sched_getaffinity(0))
    others = set(multiprocessing.active_children())
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pool = multiprocessing.Pool(cores, initializer=_start, initargs=(begin, arguments))
        begun = set(multiprocessing.active_children()) - others
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def results(function: Callable, items: Iterable) -> Iterator:
        outputs = pool.imap(function, items)
        while True:
            # The timeout is the chance to notice that a worker is gone.
            try:
                yield outputs.next(timeout=1)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                if not all(worker.is_alive() for worker in begun):
                    raise ValueError(
                        "a worker process was killed, as systems do that run out of memory; free"
                        " some, or allow fewer cores by taskset"
                    ) from None

    with pool:
        yield results


def _start(begin: Callable[..., None] | None, arguments: tuple) -> None:
    """Set a new worker's signal handlers, then call begin(*arguments)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Ctrl-C also reaches the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if begin:
        begin(*arguments)
