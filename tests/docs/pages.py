"""The runnable parts of README.md and docs/*.md, and a workspace to run them in.

A page's fenced blocks are marked by their language, or by a comment on the line above the fence:

    ```bash                                      commands to run, in order
    <!-- checked: arguments only (reason) -->    commands to parse, because they need e.g. Slurm
    <!-- file: PATH -->                          a new file
    <!-- append: PATH -->                        lines for the end of a file
    <!-- edit: PATH -->                          a diff: lines to keep, remove (-) and add (+)

Other blocks are read by people alone.
"""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from glimpse.run.lib.config import ROOT

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
HISTORY = "docs/log.md"  # the commands of its entries belong to older commits
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```\n", re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or one command of it."""

    kind: str  # run, parse, file, append, edit
    text: str
    line: int
    path: str = ""  # of a file, append or edit


def blocks(page: str) -> list[Block]:
    """Return the page's runnable blocks; blocks of commands are split into commands."""
    text = (ROOT / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        kind, _, argument = (match["mark"] or "").partition(": ")
        line = text.count("\n", 0, match.start("text")) + 1
        if kind in ("file", "append", "edit"):
            found.append(Block(kind, match["text"], line, argument))
        elif match["language"] == "bash":
            is_parsed = kind == "checked" and argument.startswith("arguments only")
            for offset, command in commands(match["text"]):
                found.append(Block("parse" if is_parsed else "run", command, line + offset))
    return found


def commands(block: str) -> list[tuple[int, str]]:
    """Return (line within the block, command) for each command; continued lines are joined."""
    found = []
    command, first = "", 0
    for number, line in enumerate(block.splitlines()):
        if not command:
            first = number
        command += line
        if line.endswith("\\"):
            command += "\n"
            continue
        if command.strip() and not command.lstrip().startswith("#"):
            found.append((first, command))
        command = ""
    return found


def apply(block: Block, workspace: Path) -> None:
    """Write a block that is a file, or a change of a file, into the workspace."""
    path = workspace / block.path
    if block.kind == "file":
        assert not path.exists(), f"{block.path} exists already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    elif block.kind == "append":
        path.write_text(f"{path.read_text()}\n\n{block.text}")
    else:
        text = path.read_text()
        for hunk in block.text.strip("\n").split("\n\n"):
            lines = hunk.splitlines()
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(before) == 1, (
                f"{block.path} does not have these lines once:\n{before}"
            )
            text = text.replace(before, after)
        path.write_text(text)


def copy_checkout(target: Path) -> None:
    """Copy the files that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run(command: str, workspace: Path, timeout: int = 600) -> subprocess.CompletedProcess:
    """Run a command in bash, with `glimpse` imported from the workspace.

    A command that runs longer than `timeout` seconds is killed with all the processes it started.
    """
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nkilled after {timeout} s"
    return subprocess.CompletedProcess(command, process.returncode, output)
