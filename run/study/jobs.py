"""Train the runs of a grid as processes, one after another or several at a time.

    JobQueue(planned_runs, ranks=1, max_running=2).run()         True if all runs are complete

Each run is a process of the deepspeed launcher. A complete run is skipped, an interrupted one is
resumed. Next to a run's folder, RUN.log has its output, and RUN.failed has the reason if it failed;
the next launch removes RUN.failed.

RUN.lock keeps a run from being trained twice. This process and the deepspeed launcher hold it until
rank 0 holds the lock inside the run folder (run/lib/run_dir.py). So if some of these processes are
killed, a second queue waits for the others instead of starting the run again.
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
from glimpse.run.train.log import format_duration


def sibling_path(run: Path, ending: str) -> Path:
    """Return RUN.ending, next to the run folder: training refuses a folder with unknown files."""
    return run.with_name(f"{run.name}.{ending}")


def read_state(run: Path) -> RunResult:
    """Read the result of a run, including the reason if its job failed."""
    failure_file = sibling_path(run, "failed")
    error = failure_file.read_text().strip() if failure_file.exists() else ""
    return read_result(run, error)


def missing_reason(results: list[RunResult], metric: str) -> str:
    """Describe why some runs of a cell have no value of this metric; "" if all have one."""
    counts: Counter[str] = Counter()
    for result in results:
        if result.state == "complete" and metric in result.final:
            continue
        if result.state == "absent" and not (result.run / "config.yaml").exists():
            counts["not trained"] += 1
        else:
            counts[result.reason or f"no result for {metric}"] += 1
    return "; ".join(
        f"{count} {'run' if count == 1 else 'runs'}: {reason}" for reason, count in counts.items()
    )


def next_task(planned_run: PlannedRun) -> str | None:
    """Return the next task of a run: "" to train, an evaluation's option, or None if complete.

    An evaluation is complete if it has every metric of the last evaluation in training. One that
    failed halfway is repeated.
    """
    result = read_state(planned_run.folder)
    if result.state != "complete":
        return ""
    training_metrics = [name for name in result.final if not name.endswith(")")]
    for item in planned_run.evaluate:
        expected = [f"{name} ({item})" for name in training_metrics]
        if not expected or any(name not in result.final for name in expected):
            return item
    return None


def task_command(planned_run: PlannedRun, task: str, ranks: int, slot: int = 0) -> list[str]:
    """Return the command line of a task, as returned by next_task."""
    if not task:
        return train_command(planned_run, local_launcher(ranks, slot))
    option, _, value = task.partition(" ")
    return [
        sys.executable,
        str(ROOT / "run" / "evaluate.py"),
        "--run",
        str(planned_run.folder),
        f"--{option}",
        value,
    ]


def train_command(planned_run: PlannedRun, launcher: list[str]) -> list[str]:
    """Return the command line that trains a run, or resumes it."""
    settings = ["--config", str(planned_run.config_file), "--set", *planned_run.changes]
    line = [*launcher, str(ROOT / "run" / "pretrain.py"), *settings]
    if (planned_run.folder / "config.yaml").exists():
        line.append("--resume")
    return line


def local_launcher(ranks: int, slot: int = 0) -> list[str]:
    """Return the deepspeed command line for this machine, with a free port.

    If there are GPUs, each slot uses its own `ranks` GPUs.
    """
    gpus: list[str] = []
    if torch.cuda.is_available():
        gpus = list(map(str, range(torch.cuda.device_count())))
    # With --include, DeepSpeed ignores CUDA_VISIBLE_DEVICES.
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and allowed:
        gpus = allowed.split(",")
    slot_gpus = ",".join(gpus[slot * ranks : (slot + 1) * ranks])
    devices = ["--num_accelerators", str(ranks)]
    if slot_gpus:
        devices = ["--include", f"localhost:{slot_gpus}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--quiet",
        *devices,
        "--master_port",
        port,
    ]


@dataclass
class Job:
    """A run in a queue, and the process that works on it."""

    planned_run: PlannedRun
    process: subprocess.Popen | None = None
    lock: int = -1  # a file descriptor; -1: not held
    log_offset: int = 0  # size of the log when the process was started
    slot: int = 0  # position among the running jobs, which selects its GPUs
    task: str = ""  # the task that was started last, as returned by next_task
    started_tasks: tuple[str, ...] = ()

    def acquire_lock(self) -> bool:
        """Lock the run; return False if another job holds it or its ranks are still training."""
        path = sibling_path(self.planned_run.folder, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:  # a file system without locks
            pass
        if run_dir.is_locked(self.planned_run.folder):
            os.close(handle)
            return False
        self.lock = handle
        return True

    def release_lock(self) -> None:
        os.close(self.lock)
        self.lock = -1

    def start(self, line: list[str]) -> None:
        """Start a command line in its own session, with its output appended to RUN.log."""
        run = self.planned_run.folder
        sibling_path(run, "failed").unlink(missing_ok=True)
        # A folder without a config is left by a job that was killed while it created the folder.
        if run.is_dir() and not (run / "config.yaml").exists():
            shutil.rmtree(run)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with sibling_path(run, "log").open("a") as log:
            self.log_offset = os.fstat(log.fileno()).st_size
            self.process = subprocess.Popen(
                line,
                stdout=log,
                stderr=log,
                pass_fds=[self.lock],  # the launcher keeps the lock if this process is killed
                env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path},
                start_new_session=True,
            )

    def finish(self, was_stopped: bool) -> None:
        """Release the lock; if the process failed, write the reason to RUN.failed.

        was_stopped: the process was asked to stop, so that a nonzero exit code is no failure.
        """
        code = self.process.returncode
        if code and not was_stopped:
            output = sibling_path(self.planned_run.folder, "log").read_bytes()[self.log_offset :]
            lines = output.decode(errors="replace").splitlines()
            errors = [line for line in lines if "rror" in line]
            reasons = errors or lines or ["no output"]
            failure_file = sibling_path(self.planned_run.folder, "failed")
            failure_file.write_text(f"exit code {code}: {reasons[-1].strip()[:300]}\n")
        self.release_lock()

    def stop(self) -> None:
        """Ask the process to save a checkpoint and exit."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def is_alive(self) -> bool:
        """Return True if the process is running, or a rank is saving after its launcher exited."""
        return self.process.poll() is None or run_dir.is_locked(self.planned_run.folder)


class JobQueue:
    """Train runs in an order in which each comes after the runs that it depends on."""

    def __init__(
        self,
        planned_runs: list[PlannedRun],
        ranks: int,
        max_running: int,
        report: Callable[[str], None] = print,
    ):
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            needed = ranks * max_running
            if needed > gpus:
                raise ValueError(
                    f"--jobs: {max_running} jobs with --ranks {ranks} need {needed} GPUs, and this"
                    f" machine has {gpus}; use fewer jobs or ranks"
                )
        self.ranks = ranks
        self.max_running = max_running
        self.report = report
        self.waiting = [Job(run) for run in merge_runs(planned_runs)]
        self.running: list[Job] = []
        self.failed: dict[Path, str] = {}
        self.stopping = False

    def run(self) -> bool:
        """Train all runs; return False if some failed, or if a signal stopped the queue."""

        def request_stop(*_: object) -> None:
            self.stopping = True

        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, request_stop) for number in signals}
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
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopping:
            self.report("stopped by a signal; repeat the command to continue")
        return not (self.stopping or self.failed)

    def start_jobs(self) -> None:
        """Start waiting jobs up to the limit, as far as the runs they depend on are complete."""
        for job in list(self.waiting):
            if len(self.running) >= self.max_running:
                return
            if next_task(job.planned_run) is None:
                self.waiting.remove(job)
                continue
            incomplete = []
            for dependency in job.planned_run.dependencies:
                if read_state(dependency).state != "complete":
                    incomplete.append(dependency)
            failures = [dependency for dependency in incomplete if dependency in self.failed]
            if failures:
                run = job.planned_run.folder
                sibling_path(run, "failed").write_text(
                    f"it depends on {failures[0]}, which failed\n"
                )
                self.fail(job, read_state(run).reason)
            elif not incomplete and job.acquire_lock():
                self.start_task(job)

    def start_task(self, job: Job) -> None:
        """Start the next task of a job whose lock is held."""
        run = job.planned_run.folder
        # Look again: another queue may have completed the task before this one got the lock.
        task = next_task(job.planned_run)
        if task is None:
            job.release_lock()
            self.waiting.remove(job)
            return
        if task and task in job.started_tasks:
            job.release_lock()
            self.fail(job, f"the evaluation with --{task} ended without writing its results")
            return

        self.waiting.remove(job)
        job.task = task
        job.started_tasks = (*job.started_tasks, task)
        if task:
            self.report(f"{run}: evaluating with --{task}")
        else:
            self.report(f"{run}: {'resuming' if run.exists() else 'starting'}")
        free_slots = set(range(self.max_running)) - {other.slot for other in self.running}
        job.slot = min(free_slots)
        self.running.append(job)
        job.start(task_command(job.planned_run, task, self.ranks, job.slot))

    def collect_ended(self) -> None:
        """Remove the jobs that have ended from `running`, and report their results."""
        ended_jobs = [job for job in self.running if not job.is_alive()]
        for job in ended_jobs:
            run = job.planned_run.folder
            self.running.remove(job)
            job.finish(self.stopping)
            result = read_state(run)
            if result.state == "complete" and not job.process.returncode:
                self.waiting.insert(0, job)  # it may have evaluations left
                if not job.task:
                    time_text = (
                        f", {format_duration(result.seconds)} of training" if result.seconds else ""
                    )
                    self.report(f"{run}: complete{time_text}")
            elif self.stopping:
                self.report(f"{run}: {result.reason or 'stopped during an evaluation'}")
            else:
                self.fail(job, result.reason or sibling_path(run, "failed").read_text().strip())

    def fail(self, job: Job, reason: str) -> None:
        """Record a job as failed and stop trying."""
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job.planned_run.folder] = reason
        self.report(f"{job.planned_run.folder}: {reason}")
