"""Train for one step, and print the project's files in the order of their first call.

    python -m tests.workers.walk_worker --config ... --set ...    arguments of run/pretrain.py

The walk starts with Training.run and ends when the contrastive loss returns.
"""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from glimpse.run import pretrain

ROOT = Path(__file__).parents[2]


class Walk:
    """A profile function that records the files between Training.run and the end of the loss."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.active = False
        self.complete = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.complete or event not in ("call", "return"):
            return
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT) or ".venv" in path.as_posix():
            return
        name = f"{path.relative_to(ROOT).as_posix()}:{frame.f_code.co_qualname}"
        if name == "run/pretrain.py:Training.run":
            self.active = True
        file = name.partition(":")[0]
        if self.active and event == "call" and file not in self.files:
            self.files.append(file)
        if name == "model/losses.py:contrastive" and event == "return":
            self.complete = True
            sys.setprofile(None)


def main() -> None:
    walk = Walk()
    sys.setprofile(walk)
    pretrain.main()
    print("walk:", *walk.files)


if __name__ == "__main__":
    main()
