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
from glimpse.run.study.grid import PlannedRun, merge_runs
from glimpse.run.study.results import RunResult, read_result
from glimpse.run.train.log import clock


def sibling_path(run: Path, ending: str) -> Path:
    """Return a path beside a run's folder; training refuses a folder with unknown files."""
    return run.with_name(f"{run.name}.{ending}")


def read_state(run: Path) -> RunResult:
    """Return the result of a run, with the reason its job failed, if it did."""
    failed = sibling_path(run, "failed")
    error = failed.read_text().strip() if failed.exists() else ""
    return read_result(run, error)


def missing_reason(results: list[RunResult], metric: str) -> str:
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


def next_task(planned: PlannedRun) -> str | None:
    """Return the next thing to do: "" for training, an evaluation, or None when all is done.

    An evaluation that failed half-way lacks some metric of training's last evaluation, and is done
    again.
    """
    result = read_state(planned.folder)
    if result.state != "complete":
        return ""
    in_training = [name for name in result.final if not name.endswith(")")]
    for item in planned.evaluate:
        wanted = [f"{name} ({item})" for name in in_training]
        if not wanted or any(name not in result.final for name in wanted):
            return item
    return None


def task_command(planned: PlannedRun, what: str, ranks: int, slot: int = 0) -> list[str]:
    """Return the command line of what left_to_do returned."""
    if not what:
        return train_command(planned, local_launcher(ranks, slot))
    option, _, value = what.partition(" ")
    return [
        sys.executable,
        str(ROOT / "run" / "evaluate.py"),
        "--run",
        str(planned.folder),
        f"--{option}",
        value,
    ]


def train_command(planned: PlannedRun, launcher: list[str]) -> list[str]:
    """Return the command line that trains a run, or resumes it."""
    settings = ["--config", str(planned.config_file.relative_to(ROOT)), "--set", *planned.changes]
    line = [*launcher, str(ROOT / "run" / "pretrain.py"), *settings]
    if (planned.folder / "config.yaml").exists():
        line.append("--resume")
    return line


def local_launcher(ranks: int, slot: int = 0) -> list[str]:
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
    planned: PlannedRun
    process: subprocess.Popen | None = None
    lock: int = -1  # a file handle; -1: not held
    log_offset: int = 0  # bytes that earlier attempts wrote into its log
    slot: int = 0  # of those that run at a time, each with its GPUs
    task: str = ""  # what was started last, as left_to_do returns it
    started_tasks: tuple[str, ...] = ()  # evaluations that were started

    def acquire_lock(self) -> bool:
        """Take the run's lock; return False while another job has it, or its ranks still train."""
        path = sibling_path(self.planned.folder, "lock")
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

    def release_lock(self) -> None:
        os.close(self.lock)
        self.lock = -1

    def start(self, line: list[str]) -> None:
        run = self.planned.folder
        sibling_path(run, "failed").unlink(missing_ok=True)
        if run.is_dir() and not (run / "config.yaml").exists():  # killed in its first moment
            shutil.rmtree(run)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with sibling_path(run, "log").open("a") as log:
            self.log_offset = os.fstat(log.fileno()).st_size
            self.process = subprocess.Popen(
                line,
                stdout=log,
                stderr=log,
                pass_fds=[self.lock],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path},
                start_new_session=True,
            )

    def finish(self, asked: bool) -> None:
        """Write down why it failed, if it did and was not asked to stop; free the lock."""
        code = self.process.returncode
        if code and not asked:
            output = sibling_path(self.planned.folder, "log").read_bytes()[self.log_offset :]
            lines = output.decode(errors="replace").splitlines()
            errors = [line for line in lines if "rror" in line]
            reasons = errors or lines or ["it printed nothing"]
            failed = sibling_path(self.planned.folder, "failed")
            failed.write_text(f"exit code {code}: {reasons[-1].strip()[:300]}\n")
        self.release_lock()

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def is_alive(self) -> bool:
        """Return True if it runs, or a rank still saves after its launcher has gone."""
        return self.process.poll() is None or run_dir.trained_elsewhere(self.planned.folder)


class JobQueue:
    """Runs in an order in which each comes after those that it needs."""

    def __init__(
        self,
        planned: list[PlannedRun],
        ranks: int,
        at_once: int,
        say: Callable[[str], None] = print,
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
        self.max_running = at_once
        self.report = say
        self.waiting = [Job(run) for run in merge_runs(planned)]
        self.running: list[Job] = []
        self.failed: dict[Path, str] = {}
        self.stopping = False

    def run(self) -> bool:
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
                    self.start_jobs()
                self.collect_ended()
                time.sleep(0.5)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping:
            self.report("asked to stop; the same command goes on")
        return not (self.stopping or self.failed)

    def start_jobs(self) -> None:
        """Start the jobs that can start."""
        for job in list(self.waiting):
            if len(self.running) >= self.max_running:
                return
            if next_task(job.planned) is None:
                self.waiting.remove(job)
                continue
            missing = [
                need for need in job.planned.dependencies if read_state(need).state != "complete"
            ]
            broken = [need for need in missing if need in self.failed]
            if broken:
                run = job.planned.folder
                sibling_path(run, "failed").write_text(f"it needs {broken[0]}, which failed\n")
                self.fail(job, read_state(run).reason)
            elif not missing and job.acquire_lock():
                self.start_task(job)

    def start_task(self, job: Job) -> None:
        """Start the next thing to do of a job whose lock is held."""
        run = job.planned.folder
        what = next_task(job.planned)  # again: another job may have done it before the lock
        if what is None:
            job.release_lock()
            self.waiting.remove(job)
            return
        if what and what in job.started_tasks:
            job.release_lock()
            self.fail(job, f"was evaluated, --{what}, and has no result of that")
            return

        self.waiting.remove(job)
        job.task = what
        job.started_tasks = (*job.started_tasks, what)
        if what:
            self.report(f"{run}: is evaluated, --{what}")
        else:
            self.report(f"{run}: {'goes on' if run.exists() else 'begins'}")
        free_slots = set(range(self.max_running)) - {other.slot for other in self.running}
        job.slot = min(free_slots)
        self.running.append(job)
        job.start(task_command(job.planned, what, self.ranks, job.slot))

    def collect_ended(self) -> None:
        """Take note of the jobs that have ended."""
        ended = [job for job in self.running if not job.is_alive()]
        for job in ended:
            run = job.planned.folder
            self.running.remove(job)
            job.finish(self.stopping)
            result = read_state(run)
            if result.state == "complete" and not job.process.returncode:
                self.waiting.insert(0, job)  # there may be an evaluation to run
                if not job.task:
                    spent = f", {clock(result.seconds)} of training" if result.seconds else ""
                    self.report(f"{run}: complete{spent}")
            elif self.stopping:
                self.report(f"{run}: {result.reason or 'stopped in an evaluation'}")
            else:
                self.fail(job, result.reason or sibling_path(run, "failed").read_text().strip())

    def fail(self, job: Job, why: str) -> None:
        """Give a job up as failed."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job.planned.folder] = why
        self.report(f"{job.planned.folder}: {why}")
