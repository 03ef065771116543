"""The run folder: refused if it exists, and opened with what explains the run.

Its files:

    RUN/config.yaml      the resolved config, with git commit, package versions and ranks
    RUN/command.txt      every command that worked on it
    RUN/tokenizer.model  the vocabulary under its own name, so that the folder can be moved; none
                         where a package brings it
    RUN/metrics.jsonl    one record a line (run/train/log.py)
    RUN/results.jsonl    one evaluation a line
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
from glimpse.run.lib.config import ROOT, RunConfig
from glimpse.run.lib.distributed import rank, world_size

PACKAGES = ("torch", "deepspeed", "numpy", "pillow")
LOCKS: list[int] = []  # file handles, open as long as this process lives


def is_locked(home: Path) -> bool:
    """Return True if a process holds the lock of this run's folder."""
    try:
        handle = os.open(home / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file, without waiting; False if another process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def acquire_lock(home: Path) -> None:
    """Take the lock, or raise ValueError if another job has it.

    Two jobs that train one run would overwrite each other's records and checkpoints.
    """
    handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    LOCKS.append(handle)
    for _ in range(10):  # loader processes of a killed job live on for a moment
        if try_lock(handle):
            return
        time.sleep(1)
    if not try_lock(handle):
        raise ValueError(
            f"run: {home} is being trained by another job; wait until it has ended, or stop it"
        )


def check_run_folder(home: Path, resume: bool) -> Path:
    """Return the run's folder, or raise ValueError: a run is never overwritten."""
    if home.exists() and not resume:
        raise ValueError(
            f"run: {home} exists; go on with it by --resume, or name another with --set run=..."
        )
    if resume and not (home / "config.yaml").exists():
        raise ValueError(
            f"--resume: {home} is no run folder (it has no config.yaml); see `run:` in the config"
        )
    return home


def prepare_run_folder(home: Path, cfg: RunConfig, samples: int, resume: bool) -> None:
    """Make the folder, or prepare it for going on from `samples`.

    Records beyond them are dropped: their steps will be taken again. Rank 0 does it, before any
    rank opens a record: `trim` replaces the file.
    """
    if rank():
        return

    # A folder that another job with the same `run:` has made meanwhile is refused.
    home.mkdir(parents=True, exist_ok=resume)
    if not resume:
        acquire_lock(home)

    # What explains the run: command, config and vocabulary.
    with (home / "command.txt").open("a") as file:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(started, shlex.join(sys.argv), f"# {world_size()} ranks", file=file)
    config_file = home / "config.yaml"
    if config_file.exists() and config.load(config_file) != cfg:
        shutil.copy(config_file, home / f"config.until-{samples}.yaml")
    config.save(cfg, home / "config.yaml.part", provenance())
    os.replace(home / "config.yaml.part", config_file)  # at no moment without it
    if vocab := vocabulary(cfg.data.tokenizer):
        copy_if_changed(vocab, home / vocab.name)

    # The records, without those of steps that will be taken again.
    trace = home / "trace"
    if cfg.data.trace:
        trace.mkdir(exist_ok=True)
    for records in [home / "metrics.jsonl", home / "results.jsonl", *trace.glob("*.jsonl")]:
        drop_records_after(records, samples)


def copy_if_changed(file: Path, copy: Path) -> None:
    """Copy a file, unless the same copy exists."""
    if copy.exists() and filecmp.cmp(file, copy, shallow=False):
        return
    part = copy.with_name(f".{copy.name}.part")
    shutil.copyfile(file, part)
    os.replace(part, copy)


def drop_records_after(records: Path, samples: int) -> None:
    """Drop the records of steps after `samples`, and a last line that a kill cut off."""
    if not records.exists():
        return
    lines = []
    for line in records.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["samples"] <= samples:
            lines.append(line + "\n")
    part = records.with_name(records.name + ".part")
    part.write_text("".join(lines))
    os.replace(part, records)


def provenance() -> dict:
    """Return the commit, the time, the ranks and the versions that a run was started with."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return dict(
        commit=commit,
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        ranks=world_size(),
        python=platform.python_version(),
        **versions,
    )
