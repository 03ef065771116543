"""Worker processes on all cores, for what draws or reads whole sets of samples."""
import os
import signal
from collections.abc import Callable
from multiprocessing import Pool, pool

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def workers(begin: Callable[..., None] | None = None, *given) -> pool.Pool:
    """A pool of forked processes, each of which calls begin(*given) first; it ends at once where its `with` is left, also by Ctrl-C.

    Pool ends its workers by SIGTERM.  One that comes while a worker is being forked must neither be lost nor meet the parent's own
    handler, whose exception Python drops there: the worker would stay, and the parent wait for it for ever.  So signals are held back
    until the worker has the system's own handlers.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return Pool(len(os.sched_getaffinity(0)), initializer=_start, initargs=(begin, given))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start(begin: Callable[..., None] | None, given: tuple) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if begin:
        begin(*given)
