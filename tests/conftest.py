"""Fixtures for all tests: run/convert.py as a command line call.

Also imports run/verify/reference_libs.py, which lets the reference libraries' torchvision work with
a CPU build of torch.
"""

import sys

import pytest

import glimpse.run.verify.reference_libs  # noqa: F401


@pytest.fixture
def convert(monkeypatch, capsys):
    """Return a function that runs run/convert.py in this process with the given arguments.

    It returns (exit code, stdout, stderr).
    """
    from glimpse.run.convert import main
    from glimpse.run.lib.cli import run_script

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run/convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            run_script(main)
        return exit_info.value.code or 0, *capsys.readouterr()

    return call
