"""Training runs of a grid, one after another or several at a time.

    Jobs(planned, ranks=1, at_once=2).go()          True if all are complete

Each run is a process of the deepspeed launcher. A complete run is left alone, an interrupted one is
resumed. A run's lock is held here and by the deepspeed launcher until its rank 0 has one of its own
(run/lib/run_dir.py). So if some of these processes are killed, no second job starts beside the
others, but waits for them. A run's output is beside its folder, RUN.log; the reason of a failure is
RUN.failed, which the next launch removes.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
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
    """Return a path beside a run's folder; training refuses a folder with unknown files."""
    return run.with_name(f"{run.name}.{ending}")


def state(run: Path) -> Result:
    """Return the result of a run, with the reason its job failed, if it did."""
    failed = beside(run, "failed")
    error = failed.read_text().strip() if failed.exists() else ""
    return read(run, error)


def why(results: list[Result], metric: str) -> str:
    """Describe why some of a cell's runs have no value of this metric."""
    counts: Counter[str] = Counter()
    for result in results:
        if result.state == "complete" and metric in result.final:
            continue
        if result.state == "absent" and not (result.run / "config.yaml").exists():
            counts["not trained"] += 1
        else:
            counts[result.reason or f"has no {metric}"] += 1
    return "; ".join(
        f"{count} {'run' if count == 1 else 'runs'}: {reason}" for reason, count in counts.items()
    )


def left_to_do(planned: Planned) -> str | None:
    """Return the next thing to do: "" for training, an evaluation, or None when all is done.

    An evaluation that failed half-way lacks some metric of training's last evaluation, and is done
    again.
    """
    result = state(planned.folder)
    if result.state != "complete":
        return ""
    in_training = [name for name in result.final if not name.endswith(")")]
    for item in planned.evaluate:
        wanted = [f"{name} ({item})" for name in in_training]
        if not wanted or any(name not in result.final for name in wanted):
            return item
    return None


def line_of(planned: Planned, what: str, ranks: int, slot: int = 0) -> list[str]:
    """Return the command line of what left_to_do returned."""
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
    """Return the command line that trains a run, or resumes it."""
    settings = ["--config", str(planned.source.relative_to(ROOT)), "--set", *planned.changes]
    line = [*launcher, str(ROOT / "run" / "pretrain.py"), *settings]
    if (planned.folder / "config.yaml").exists():
        line.append("--resume")
    return line


def local(ranks: int, slot: int = 0) -> list[str]:
    """Return the launcher's command line on this machine, with a port that is free now.

    Each slot has `ranks` GPUs of its own, if there are GPUs.
    """
    gpus: list[str] = []
    if torch.cuda.is_available():
        gpus = list(map(str, range(torch.cuda.device_count())))
    # DeepSpeed ignores this variable where it has --include
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and allowed:
        gpus = allowed.split(",")
    slot_gpus = ",".join(gpus[slot * ranks : (slot + 1) * ranks])
    devices = ["--num_accelerators", str(ranks)]
    if slot_gpus:
        devices = ["--include", f"localhost:{slot_gpus}"]
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
    slot: int = 0  # of those that run at a time, each with its GPUs
    doing: str = ""  # what was started last, as left_to_do returns it
    made: tuple[str, ...] = ()  # evaluations that were started

    def claim(self) -> bool:
        """Take the run's lock; return False while another job has it, or its ranks still train."""
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
        """Write down why it failed, if it did and was not asked to stop; free the lock."""
        code = self.process.returncode
        if code and not asked:
            output = beside(self.planned.folder, "log").read_bytes()[self.before :]
            lines = output.decode(errors="replace").splitlines()
            errors = [line for line in lines if "rror" in line]
            reasons = errors or lines or ["it printed nothing"]
            failed = beside(self.planned.folder, "failed")
            failed.write_text(f"exit code {code}: {reasons[-1].strip()[:300]}\n")
        self.free()

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def alive(self) -> bool:
        """Return True if it runs, or a rank still saves after its launcher has gone."""
        return self.process.poll() is None or run_dir.trained_elsewhere(self.planned.folder)


class Jobs:
    """Runs in an order in which each comes after those that it needs."""

    def __init__(
        self, planned: list[Planned], ranks: int, at_once: int, say: Callable[[str], None] = print
    ):
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            needed = ranks * at_once
            if needed > gpus:
                raise ValueError(
                    f"--jobs {at_once}: with --ranks {ranks} each they take {needed} GPUs;"
                    f" this machine has {gpus}"
                )
        self.ranks = ranks
        self.at_once = at_once
        self.say = say
        self.waiting = [Job(run) for run in once(planned)]
        self.running: list[Job] = []
        self.failed: dict[Path, str] = {}
        self.stopping = False

    def go(self) -> bool:
        """Train all; return False if some failed, or if asked to stop."""

        def stop(*_: object) -> None:
            self.stopping = True

        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, stop) for number in signals}
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
        """Start the jobs that can start."""
        for job in list(self.waiting):
            if len(self.running) >= self.at_once:
                return
            if left_to_do(job.planned) is None:
                self.waiting.remove(job)
                continue
            missing = [need for need in job.planned.needs if state(need).state != "complete"]
            broken = [need for need in missing if need in self.failed]
            if broken:
                run = job.planned.folder
                beside(run, "failed").write_text(f"it needs {broken[0]}, which failed\n")
                self.end(job, state(run).reason)
            elif not missing and job.claim():
                self.begin(job)

    def begin(self, job: Job) -> None:
        """Start the next thing to do of a job whose lock is held."""
        run = job.planned.folder
        what = left_to_do(job.planned)  # again: another job may have done it before the lock
        if what is None:
            job.free()
            self.waiting.remove(job)
            return
        if what and what in job.made:
            job.free()
            self.end(job, f"was evaluated, --{what}, and has no result of that")
            return

        self.waiting.remove(job)
        job.doing = what
        job.made = (*job.made, what)
        if what:
            self.say(f"{run}: is evaluated, --{what}")
        else:
            self.say(f"{run}: {'goes on' if run.exists() else 'begins'}")
        free_slots = set(range(self.at_once)) - {other.slot for other in self.running}
        job.slot = min(free_slots)
        self.running.append(job)
        job.start(line_of(job.planned, what, self.ranks, job.slot))

    def reap(self) -> None:
        """Take note of the jobs that have ended."""
        ended = [job for job in self.running if not job.alive()]
        for job in ended:
            run = job.planned.folder
            self.running.remove(job)
            job.ended(self.stopping)
            result = state(run)
            if result.state == "complete" and not job.process.returncode:
                self.waiting.insert(0, job)  # there may be an evaluation to run
                if not job.doing:
                    spent = f", {clock(result.seconds)} of training" if result.seconds else ""
                    self.say(f"{run}: complete{spent}")
            elif self.stopping:
                self.say(f"{run}: {result.reason or 'stopped in an evaluation'}")
            else:
                self.end(job, result.reason or beside(run, "failed").read_text().strip())

    def end(self, job: Job, why: str) -> None:
        """Give a job up as failed."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job.planned.folder] = why
        self.say(f"{job.planned.folder}: {why}")
