"""What scripts without ranks share: how they end, and their progress bar. (Scripts on ranks end
through run/lib/distributed.py.)

    if __name__ == "__main__":
        run_script(main)
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm


def run_script(main: Callable[[], int | None]) -> None:
    """Run main and exit with its code; what a user can mend is told in one line and exits with
    2.
    """
    # what is half made is removed, as on Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
        if sys.stdout:
            sys.stdout.flush()  # here, where it may still fail
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and unheard():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes at its end
            sys.exit(128 + signal.SIGPIPE)
        named = isinstance(error, OSError) and error.filename
        print(
            f"error: {error.filename}: {error.strerror}" if named else f"error: {error}",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def unheard() -> bool:
    """Has who reads what is printed had enough, as `| head`?"""
    printed = select.poll()
    printed.register(1, 0)
    return any(event & select.POLLERR for _, event in printed.poll(0))


def bar(
    items: Iterable, text: str, unit: str = "", total: int | None = None, scale: int = 1
) -> Iterable:
    """The items, with a progress bar on a terminal and silently elsewhere; scale: units to an
    item.
    """
    return tqdm(
        items,
        desc=text,
        unit=unit,
        total=total,
        unit_scale=scale if scale > 1 else False,
        file=sys.stderr,
        disable=None,
        smoothing=0.05,
    )
