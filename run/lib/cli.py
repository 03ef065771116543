"""The main function and the progress bar of scripts that run in a single process.

    if __name__ == "__main__":
        run_script(main)

Scripts that run on several ranks end through run_script() of run/lib/distributed.py instead.
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm


def run_script(main: Callable[[], int | None]) -> None:
    """Run main and exit with the code that it returns.

    ValueError and OSError are errors that the user can fix: print one line and exit with 2.
    """
    # SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that unfinished output is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
        if sys.stdout:
            sys.stdout.flush()  # inside the try: writing may still fail
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and stdout_closed():
            # Exit as other tools do; Python flushes stdout on exit, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + signal.SIGPIPE)
        print(f"error: {describe_error(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def describe_error(error: ValueError | OSError) -> str:
    """Return the error's message; for an operating system error, "FILE: REASON"."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def stdout_closed() -> bool:
    """Return True if stdout's reader has closed the pipe (as `head` does)."""
    stdout = select.poll()
    stdout.register(1, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def progress_bar(
    items: Iterable, text: str, unit: str = "", total: int | None = None, scale: int = 1
) -> Iterable:
    """Iterate over items with a progress bar, which is shown only on a terminal.

    scale: units per item, e.g. images per batch.
    """
    unit_scale = scale if scale > 1 else False
    return tqdm(
        items,
        desc=text,
        unit=unit,
        total=total,
        unit_scale=unit_scale,
        file=sys.stderr,
        disable=None,
        smoothing=0.05,
    )
