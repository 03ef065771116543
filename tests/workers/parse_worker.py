"""Parse the command line of a script without running it, and load its config.

    python -m glimpse.tests.workers.parse_worker run/pretrain.py --config ...
    python -m glimpse.tests.workers.parse_worker deepspeed --hostfile hostfile run/pretrain.py ...

Prints "parsed" and exits with 0, or fails with the error of the parser or the config.
"""

import argparse
import runpy
import sys

from glimpse.run.lib import config


def stop_after_parsing() -> None:
    """Make every ArgumentParser exit after it has parsed its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_exit(self, args=None, namespace=None):
        values = parse_args(self, args, namespace)
        if getattr(values, "config", None):
            config.load(values.config, values.set)
        print("parsed")
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_and_exit


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launcher = parse_args(arguments[1:])
        module = ["-m"] if launcher.module else []
        arguments = [*module, launcher.user_script, *launcher.user_args]
    stop_after_parsing()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
