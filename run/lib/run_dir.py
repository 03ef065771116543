"""The run folder: refused if it is there, opened with what explains the run, and audited sample by
sample.

    RUN/config.yaml      the resolved config, with git commit, package versions and ranks
    RUN/command.txt      every command that worked on it
    RUN/tokenizer.model  the vocabulary under its own name, so that the folder can be moved; none
        where a package brings it
    RUN/metrics.jsonl    one record a line (run/train/log.py); RUN/results.jsonl one evaluation a
                         line
    RUN/log.txt, RUN/tensorboard/, RUN/checkpoints/, RUN/trace/ (data.trace)
    RUN/lock             held by the rank 0 that trains it, while that lives
"""

import fcntl
import filecmp
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from glimpse.data.tokenizer import vocabulary
from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT, Run
from glimpse.run.lib.distributed import rank, world

PACKAGES = ("torch", "deepspeed", "numpy", "pillow")


LOCKS: list[int] = []  # file handles, open as long as this process lives


def trained_elsewhere(home: Path) -> bool:
    """Does a process hold the lock of this run's folder?"""
    try:
        handle = os.open(home / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def hold(home: Path) -> None:
    """Take the lock, or ValueError: two jobs that train one run would overwrite each other's
    records and checkpoints.
    """
    LOCKS.append(os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644))
    for last in (False,) * 10 + (True,):  # loaders of a killed job live on for a moment
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if last:
                raise ValueError(
                    f"run: {home} is being trained by another job; wait until it has ended, or"
                    " stop it"
                ) from None
            time.sleep(1)
        except OSError:  # a file system without locks
            return


def check(home: Path, resume: bool) -> Path:
    """The run's folder, or ValueError: a run is never written over."""
    if home.exists() and not resume:
        raise ValueError(
            f"run: {home} exists; go on with it by --resume, or name another with --set run=..."
        )
    if resume and not (home / "config.yaml").exists():
        raise ValueError(
            f"--resume: {home} is no run folder (it has no config.yaml); see `run:` in the config"
        )
    return home


def open_folder(home: Path, cfg: Run, samples: int, resume: bool) -> None:
    """Make the folder, or prepare it for going on from `samples`: records beyond them are of steps
    that will be taken again.

    Rank 0 does it, and must be done before any rank opens a record: `trim` puts a new file in the
    place of the one that is there.
    """
    if rank():
        return
    # made meanwhile by another job with the same `run:`, it is refused
    home.mkdir(parents=True, exist_ok=resume)
    if not resume:
        hold(home)
    with (home / "command.txt").open("a") as file:
        print(
            time.strftime("%Y-%m-%d %H:%M:%S"),
            shlex.join(sys.argv),
            f"# {world()} ranks",
            file=file,
        )
    saved = home / "config.yaml"
    if saved.exists() and config.load(saved) != cfg:
        shutil.copy(saved, home / f"config.until-{samples}.yaml")
    config.save(cfg, home / "config.yaml.part", provenance())
    os.replace(home / "config.yaml.part", saved)  # at no moment without it
    if vocab := vocabulary(cfg.data.tokenizer):
        keep(vocab, home / vocab.name)
    if cfg.data.trace:
        (home / "trace").mkdir(exist_ok=True)
    for records in [
        home / "metrics.jsonl",
        home / "results.jsonl",
        *(home / "trace").glob("*.jsonl"),
    ]:
        trim(records, samples)


def keep(file: Path, copy: Path) -> None:
    """A copy of a file, where it is not there yet."""
    if not copy.exists() or not filecmp.cmp(file, copy, shallow=False):
        part = copy.with_name(f".{copy.name}.part")
        shutil.copyfile(file, part)
        os.replace(part, copy)


def trim(records: Path, samples: int) -> None:
    """Drop the records of steps after `samples`, and a last line that a kill cut off."""
    if not records.exists():
        return
    kept = []
    for line in records.read_text().splitlines():
        try:
            if json.loads(line)["samples"] <= samples:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            pass
    part = records.with_name(records.name + ".part")
    part.write_text("".join(kept))
    os.replace(part, records)


def provenance() -> dict:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    versions = dict(
        python=platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    )
    return dict(
        commit=git.stdout.strip() or "unknown",
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        ranks=world(),
        **versions,
    )
