"""Training runs of a grid, one after another or several at a time: each by the deepspeed launcher,
from where it was left.

    Jobs(planned, ranks=1, at_once=2).go()          True if all are complete

A run that is complete is left alone, one that was broken off goes on. A run's lock is held here and
by the deepspeed launcher until its rank 0 has one of its own (run/lib/run_dir.py), so that after a
kill of some of these processes no second job starts beside the others:
they are waited for. What a run printed is beside its folder, RUN.log; why it failed, RUN.failed,
which the next launch removes.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from glimpse.run.lib import run_dir
from glimpse.run.lib.config import ROOT
from glimpse.run.study.grid import Planned, once
from glimpse.run.study.results import Result, read
from glimpse.run.train.log import clock


def beside(run: Path, ending: str) -> Path:
    """A file beside a run's folder, which training itself refuses to find there."""
    return run.with_name(f"{run.name}.{ending}")


def state(run: Path) -> Result:
    """What became of a run, and why, as far as its folder and its job tell."""
    failed = beside(run, "failed")
    return read(run, failed.read_text().strip() if failed.exists() else "")


def why(results: list[Result], metric: str) -> str:
    """Why some of a cell's runs have no such value, for people."""
    lacking = [
        result for result in results if result.state != "complete" or metric not in result.final
    ]
    told = [
        (
            result.reason or f"has no {metric}"
            if result.state != "absent" or (result.run / "config.yaml").exists()
            else "not trained"
        )
        for result in lacking
    ]
    return "; ".join(
        f"{(n := told.count(reason))} run{'s' * (n > 1)}: {reason}"
        for reason in dict.fromkeys(told)
    )


def left_to_do(planned: Planned) -> str | None:
    """What comes next: "" is training, then each evaluation that is not in its results; None when
    all is done.

    One that failed half-way has not every metric that training's own last evaluation has.
    """
    found = state(planned.folder)
    if found.state != "complete":
        return ""
    own = [name for name in found.final if not name.endswith(")")]
    return next(
        (
            item
            for item in planned.evaluate
            if not own or any(f"{name} ({item})" not in found.final for name in own)
        ),
        None,
    )


def line_of(planned: Planned, what: str, ranks: int, slot: int = 0) -> list[str]:
    """The command line of what left_to_do told."""
    if not what:
        return command(planned, local(ranks, slot))
    option, _, value = what.partition(" ")
    return [
        sys.executable,
        str(ROOT / "run" / "evaluate.py"),
        "--run",
        str(planned.folder),
        f"--{option}",
        value,
    ]


def command(planned: Planned, launcher: list[str]) -> list[str]:
    """The command line that trains it, from the beginning or from where it was left."""
    resume = ["--resume"] * (planned.folder / "config.yaml").exists()
    settings = ["--config", str(planned.source.relative_to(ROOT)), "--set", *planned.changes]
    return [*launcher, str(ROOT / "run" / "pretrain.py"), *settings, *resume]


def local(ranks: int, slot: int = 0) -> list[str]:
    """The launcher on this machine, on a port that is free now; on GPUs each slot has `ranks` of
    its own.
    """
    gpus = list(map(str, range(torch.cuda.device_count()))) if torch.cuda.is_available() else []
    # which DeepSpeed passes over where it is told what to take
    if gpus and (allowed := os.environ.get("CUDA_VISIBLE_DEVICES")):
        gpus = allowed.split(",")
    own = ",".join(gpus[slot * ranks : (slot + 1) * ranks])
    devices = ["--include", f"localhost:{own}"] if own else ["--num_accelerators", str(ranks)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--quiet",
        *devices,
        "--master_port",
        port,
    ]


@dataclass
class Job:
    planned: Planned
    process: subprocess.Popen | None = None
    lock: int = -1  # a file handle; -1: not held
    before: int = 0  # bytes that earlier attempts wrote into its log
    slot: int = 0  # of those that run at a time; GPUs are its own
    doing: str = ""  # what was started last, as left_to_do tells it
    made: tuple[str, ...] = ()  # evaluations that were started

    def claim(self) -> bool:
        """Take the run's lock; False while another job has it, or its ranks train on."""
        path = beside(self.planned.folder, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:  # a file system without locks
            pass
        if run_dir.trained_elsewhere(self.planned.folder):
            os.close(handle)
            return False
        self.lock = handle
        return True

    def free(self) -> None:
        os.close(self.lock)
        self.lock = -1

    def start(self, line: list[str]) -> None:
        run = self.planned.folder
        beside(run, "failed").unlink(missing_ok=True)
        if run.is_dir() and not (run / "config.yaml").exists():  # killed in its first moment
            shutil.rmtree(run)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with beside(run, "log").open("a") as log:
            self.before = os.fstat(log.fileno()).st_size
            self.process = subprocess.Popen(
                line,
                stdout=log,
                stderr=log,
                pass_fds=[self.lock],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path},
                start_new_session=True,
            )

    def ended(self, asked: bool) -> None:
        """Note why it failed, if it did and was not asked to stop; free the lock."""
        if self.process.returncode and not asked:
            log = (
                beside(self.planned.folder, "log")
                .read_bytes()[self.before :]
                .decode(errors="replace")
                .splitlines()
            )
            why = [line for line in log if "rror" in line] or log or ["it printed nothing"]
            beside(self.planned.folder, "failed").write_text(
                f"exit code {self.process.returncode}: {why[-1].strip()[:300]}\n"
            )
        self.free()

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def alive(self) -> bool:
        """Does it, or a rank that still saves after its launcher has gone?"""
        return self.process.poll() is None or run_dir.trained_elsewhere(self.planned.folder)


class Jobs:
    """Runs in an order in which what one needs comes before it."""

    def __init__(
        self, planned: list[Planned], ranks: int, at_once: int, say: Callable[[str], None] = print
    ):
        if torch.cuda.is_available() and ranks * at_once > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"--jobs {at_once}: with --ranks {ranks} each they take {ranks * at_once} GPUs;"
                f" this machine has {gpus}"
            )
        self.waiting = [Job(one) for one in once(planned)]
        self.ranks, self.at_once, self.say = ranks, at_once, say
        self.running: list[Job] = []
        self.failed: dict[Path, str] = {}
        self.stopping = False

    def go(self) -> bool:
        """Train all; False where some failed, or when asked to stop."""

        def stop(*_) -> None:
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or self.waiting and not self.stopping:
                if self.stopping:
                    for job in self.running:
                        job.stop()
                    self.waiting = []
                else:
                    self.fill()
                self.reap()
                time.sleep(0.5)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping:
            self.say("asked to stop; the same command goes on")
        return not (self.stopping or self.failed)

    def fill(self) -> None:
        """Start what can be started."""
        for job in list(self.waiting):
            if len(self.running) >= self.at_once:
                return
            run = job.planned.folder
            if left_to_do(job.planned) is None:
                self.waiting.remove(job)
            elif broken := [
                str(need)
                for need in job.planned.needs
                if need in self.failed and state(need).state != "complete"
            ]:
                beside(run, "failed").write_text(f"it needs {broken[0]}, which failed\n")
                self.end(job, state(run).reason)
            elif all(state(need).state == "complete" for need in job.planned.needs) and job.claim():
                self.begin(job)

    def begin(self, job: Job) -> None:
        """Start what is left to do of a job whose lock is held; another may just have done it."""
        run, what = job.planned.folder, left_to_do(job.planned)
        if what and what in job.made:
            job.free()
            self.end(job, f"was evaluated, --{what}, and has no result of that")
        elif what is None:
            job.free()
            self.waiting.remove(job)
        else:
            self.waiting.remove(job)
            job.doing, job.made = what, (*job.made, what)
            self.say(
                f"{run}:"
                f" {f'is evaluated, --{what}' if what else 'goes on' if run.exists() else 'begins'}"
            )
            job.slot = min(set(range(self.at_once)) - {other.slot for other in self.running})
            self.running.append(job)
            job.start(line_of(job.planned, what, self.ranks, job.slot))

    def reap(self) -> None:
        for job in [job for job in self.running if not job.alive()]:
            self.running.remove(job)
            job.ended(self.stopping)
            found = state(job.planned.folder)
            if found.state == "complete" and not job.process.returncode:
                self.waiting.insert(0, job)  # there may be an evaluation to make
                if not job.doing:
                    self.say(
                        f"{job.planned.folder}: complete"
                        + (f", {clock(found.seconds)} of training" if found.seconds else "")
                    )
            elif self.stopping:
                self.say(f"{job.planned.folder}: {found.reason or 'stopped in an evaluation'}")
            else:
                self.end(
                    job, found.reason or beside(job.planned.folder, "failed").read_text().strip()
                )

    def end(self, job: Job, why: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job.planned.folder] = why
        self.say(f"{job.planned.folder}: {why}")
