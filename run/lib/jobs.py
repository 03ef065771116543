"""Training runs of a grid, one after another or several at a time: each by the deepspeed launcher, from where it was left.

    Jobs(planned, ranks=1, at_once=2).go()          True if all are complete

A run that is complete is left alone, one that was broken off goes on.  A run's lock is held by its launcher and ranks themselves, so
that after a kill of this process alone no second job starts beside them: it is waited for.  What a run printed is beside its folder,
RUN.log; why it failed, RUN.failed, which the next launch removes.
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
from dataclasses import dataclass, replace
from pathlib import Path

from run.lib.config import ROOT
from run.lib.grid import Planned
from run.lib.results import Result, read


def beside(run: Path, ending: str) -> Path:
    """A file beside a run's folder, which training itself refuses to find there."""
    return run.with_name(f"{run.name}.{ending}")


def state(run: Path) -> Result:
    """What became of a run, and why, as far as its folder and its job tell."""
    failed = beside(run, "failed")
    return read(run, failed.read_text().strip() if failed.exists() else "")


def why(results: list[Result], metric: str) -> str:
    """Why some of a cell's runs have no such value, for people."""
    lacking = [result for result in results if result.state != "complete" or metric not in result.final]
    told = ["not trained" if result.state == "absent" else result.reason or f"has no {metric}" for result in lacking]
    return "; ".join(f"{told.count(reason)} {reason}" for reason in dict.fromkeys(told))


def left_to_do(planned: Planned, ranks: int) -> list[str] | None:
    """The command line of what comes next: training, then each evaluation that is not in its results; None when all is done."""
    found = state(planned.folder)
    if found.state != "complete":
        return command(planned, local(ranks))
    for item in planned.evaluate:
        if not any(name.endswith(f"({item})") for name in found.final):
            option, _, value = item.partition(" ")
            return [sys.executable, str(ROOT / "run" / "evaluate.py"), "--run", str(planned.folder), f"--{option}", value]
    return None


def command(planned: Planned, launcher: list[str]) -> list[str]:
    """The command line that trains it, from the beginning or from where it was left."""
    resume = ["--resume"] * (planned.folder / "config.yaml").exists()
    settings = ["--config", str(planned.source.relative_to(ROOT)), "--set", *planned.changes]
    return [*launcher, str(ROOT / "run" / "pretrain.py"), *settings, *resume]


def local(ranks: int) -> list[str]:
    """The launcher on this machine, on a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", str(ranks), "--master_port", port]


@dataclass
class Job:
    planned: Planned
    process: subprocess.Popen | None = None
    lock: int = -1  # a file handle; -1: not held
    last: str = ""  # what was started last

    def claim(self) -> bool:
        """Take the run's lock; False while another job has it."""
        path = beside(self.planned.folder, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self.lock = handle
        return True

    def start(self, line: list[str]) -> None:
        run, self.last = self.planned.folder, " ".join(line[-2:])
        beside(run, "failed").unlink(missing_ok=True)
        if run.is_dir() and not (run / "config.yaml").exists():  # killed in its first moment
            shutil.rmtree(run)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with beside(run, "log").open("a") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, pass_fds=[self.lock],
                                            env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}, start_new_session=True)

    def ended(self) -> None:
        """Note why it failed, if it did; free the lock."""
        if self.process.returncode:
            log = beside(self.planned.folder, "log").read_text().splitlines()
            why = [line for line in log if "rror" in line] or log or ["it printed nothing"]
            beside(self.planned.folder, "failed").write_text(f"exit code {self.process.returncode}: {why[-1].strip()[:300]}\n")
        os.close(self.lock)

    def stop(self) -> None:
        """Ask it to save and leave."""
        os.killpg(self.process.pid, signal.SIGTERM)


class Jobs:
    """Runs in an order in which what one needs comes before it."""

    def __init__(self, planned: list[Planned], ranks: int, at_once: int, say: Callable[[str], None] = print):
        once: dict[Path, Planned] = {}
        for p in planned:  # two grids may ask for other evaluations of one run
            known = once.get(p.folder)
            once[p.folder] = replace(p, evaluate=tuple(dict.fromkeys((*known.evaluate, *p.evaluate)))) if known else p
        self.waiting = [Job(p) for p in once.values()]
        self.ranks, self.at_once, self.say = ranks, at_once, say
        self.running: list[Job] = []
        self.failed: dict[Path, str] = {}

    def go(self) -> bool:
        """Train all; False where some failed, or when asked to stop."""
        stopping = False

        def stop(*_) -> None:
            nonlocal stopping
            stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or self.waiting and not stopping:
                if stopping:
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
        if stopping:
            self.say("asked to stop; the same command goes on")
        return not (stopping or self.failed)

    def fill(self) -> None:
        """Start what can be started."""
        for job in list(self.waiting):
            if len(self.running) >= self.at_once:
                return
            folder = job.planned.folder
            if broken := [str(need) for need in job.planned.needs if need in self.failed]:
                beside(folder, "failed").write_text(f"it needs {broken[0]}, which failed\n")
                self.end(job, state(folder).reason)
            elif not (line := left_to_do(job.planned, self.ranks)):
                self.waiting.remove(job)
            elif all(state(need).state == "complete" for need in job.planned.needs) and job.claim():
                self.waiting.remove(job)
                self.running.append(job)
                doing = "goes on" if folder.exists() else "begins"
                self.say(f"{folder}: {f'is evaluated, {line[-2]} {line[-1]}' if line[0] == sys.executable else doing}")
                job.start(line)

    def reap(self) -> None:
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            job.ended()
            found = state(job.planned.folder)
            if job.process.returncode or found.state != "complete":
                self.end(job, found.reason or beside(job.planned.folder, "failed").read_text().strip())
            else:
                self.waiting.insert(0, job)  # there may be an evaluation to make
                self.say(f"{job.planned.folder}: complete, {found.seconds:.0f} s")

    def end(self, job: Job, why: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.failed[job.planned.folder] = why
        self.say(f"{job.planned.folder}: {why}")
