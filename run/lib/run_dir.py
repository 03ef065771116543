"""Create, lock and resume the run folder.

    RUN/config.yaml      the resolved config, with git commit, package versions and ranks
    RUN/command.txt      every command that trained the run
    RUN/tokenizer.model  a copy of the vocabulary file, under its original name, so that the folder
                         can be moved; missing if the vocabulary is part of a Python package
    RUN/metrics.jsonl    one record per line (run/train/log.py)
    RUN/results.jsonl    one evaluation per line
    RUN/log.txt, RUN/tensorboard/, RUN/checkpoints/, RUN/trace/ (data.trace)
    RUN/lock             locked by rank 0 of the job that trains the run

An existing run folder is never overwritten, only resumed.
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

from glimpse.data.tokenizer import vocabulary_file
from glimpse.run.lib import config
from glimpse.run.lib.config import ROOT, RunConfig
from glimpse.run.lib.distributed import rank, world_size

PACKAGES = ("torch", "deepspeed", "numpy", "pillow")
LOCK_HANDLES: list[int] = []  # kept open until the process ends, which releases the locks


def is_locked(run_folder: Path) -> bool:
    """Return True if a process holds the lock of a run folder."""
    try:
        handle = os.open(run_folder / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file without waiting; return False if another process holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks: train without
        pass
    return True


def acquire_lock(run_folder: Path) -> None:
    """Lock the run folder, or raise ValueError if another job holds the lock.

    Two jobs that train the same run would overwrite each other's records and checkpoints.
    """
    handle = os.open(run_folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    LOCK_HANDLES.append(handle)
    # Retry: after a job is killed, its loader processes hold the lock for another moment.
    for _ in range(10):
        if try_lock(handle):
            return
        time.sleep(1)
    if not try_lock(handle):
        raise ValueError(
            f"run: {run_folder} is being trained by another job; wait until it ends, or stop it"
        )


def check_run_folder(run_folder: Path, resume: bool) -> Path:
    """Return the run folder, or raise ValueError if it cannot be created or resumed."""
    if run_folder.exists() and not resume:
        raise ValueError(
            f"run: {run_folder} exists; continue it with --resume, or choose another folder with"
            " --set run=..."
        )
    if resume and not (run_folder / "config.yaml").exists():
        raise ValueError(
            f"--resume: {run_folder} is not a run folder (no config.yaml in it); correct `run:` in"
            " the config, or start without --resume"
        )
    return run_folder


def prepare_run_folder(run_folder: Path, cfg: RunConfig, samples: int, resume: bool) -> None:
    """Create the run folder, or prepare it to resume after `samples` samples. Rank 0 only.

    Records after `samples` are dropped, because those steps are repeated. This must happen before
    any rank opens a record file: the file is replaced, and they would write to the old one.
    """
    if rank():
        return

    # 1. Create and lock the folder. mkdir fails if another job has created it in the meantime.
    run_folder.mkdir(parents=True, exist_ok=resume)
    if not resume:
        acquire_lock(run_folder)

    # 2. Save command, config and vocabulary. A resumed run may have a changed config: keep the old.
    with (run_folder / "command.txt").open("a") as file:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(started, shlex.join(sys.argv), f"# {world_size()} ranks", file=file)
    config_file = run_folder / "config.yaml"
    if config_file.exists() and config.load(config_file) != cfg:
        shutil.copy(config_file, run_folder / f"config.until-{samples}.yaml")
    config.save(cfg, run_folder / "config.yaml.part", provenance())
    os.replace(run_folder / "config.yaml.part", config_file)  # atomic
    if vocab := vocabulary_file(cfg.data.tokenizer):
        copy_if_changed(vocab, run_folder / vocab.name)

    # 3. Drop the records of steps that are repeated.
    trace = run_folder / "trace"
    if cfg.data.trace:
        trace.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "results.jsonl"):
        drop_records_after(run_folder / name, samples)
    for records in trace.glob("*.jsonl"):
        drop_records_after(records, samples)


def copy_if_changed(file: Path, copy: Path) -> None:
    """Copy a file, unless the copy exists with the same content."""
    if copy.exists() and filecmp.cmp(file, copy, shallow=False):
        return
    temporary = copy.with_name(f".{copy.name}.part")
    shutil.copyfile(file, temporary)
    os.replace(temporary, copy)


def drop_records_after(records: Path, samples: int) -> None:
    """Drop the records of steps after `samples` from a JSONL file, and an incomplete last line."""
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
    temporary = records.with_name(records.name + ".part")
    temporary.write_text("".join(lines))
    os.replace(temporary, records)


def git_commit(root: Path) -> str:
    """Return the commit of the checkout at `root`, or "unknown" if git does not track this code.

    An installed package may be in a virtual environment inside the checkout of another project,
    whose commit must not be recorded.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return ""
        return done.stdout.strip()

    is_tracked = git("ls-files", "run/lib/run_dir.py")
    commit = git("describe", "--always", "--dirty", "--abbrev=12") if is_tracked else ""
    return commit or "unknown"


def provenance() -> dict:
    """Return the commit, start time, number of ranks and package versions of a run."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return dict(
        commit=git_commit(ROOT),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        ranks=world_size(),
        python=platform.python_version(),
        **versions,
    )
