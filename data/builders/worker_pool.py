"""Worker processes on all cores, for what draws or reads whole sets of samples."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def workers(
    begin: Callable[..., None] | None = None, *given
) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Forked processes, each of which calls begin(*given) first; they end at once where the `with`
    is left, also by Ctrl-C.

        with workers() as results:
            for result in results(function, items):       in the order of the items

    ValueError where a worker was killed: multiprocessing's Pool has another in its place, and waits
    for the lost result for ever.

    Pool ends its workers by SIGTERM. One that comes while a worker is being forked must neither be
    lost nor meet the parent's own
    handler, whose exception Python drops there: the worker would stay, and the parent wait for it.
    So signals are held back until the worker has the system's own handlers.
    """
    others = set(multiprocessing.active_children())
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pool = multiprocessing.Pool(
            len(os.sched_getaffinity(0)), initializer=_start, initargs=(begin, given)
        )
        begun = set(multiprocessing.active_children()) - others
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def results(function: Callable, items: Iterable) -> Iterator:
        found = pool.imap(function, items)
        while True:
            try:
                yield found.next(timeout=1)
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


def _start(begin: Callable[..., None] | None, given: tuple) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if begin:
        begin(*given)
