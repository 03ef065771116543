"""What every test shares: the peers' torchvision beside a CPU build of torch, and run/convert.py as
from the command line.
"""

import sys

import pytest

import glimpse.run.verify.reference_libs  # noqa: F401


@pytest.fixture
def convert(monkeypatch, capsys):
    """The script in this process: (exit code, what it printed, its complaint)."""
    from glimpse.run.convert import main
    from glimpse.run.lib.cli import run_script

    def call(*line) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run/convert.py", *map(str, line)])
        with pytest.raises(SystemExit) as left:
            run_script(main)
        return left.value.code or 0, *capsys.readouterr()

    return call
