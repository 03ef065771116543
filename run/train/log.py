"""The log of a run: a progress line, metrics.jsonl, TensorBoard.

It is silent on other ranks than 0, so that no caller checks its rank.

A record is one JSON object a line: {"step": 40, "samples": 10240, "loss": 4.1, ...}. Speeds are
over the steps since the last record: samples_per_s over all ranks; mfu the share of the devices'
peak spent on the model's own FLOPs (recomputation not counted); stall the share of the time in
which the training loop waited for data.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

# dense bf16 (fp16 where there is no bf16), from the vendor's data sheets
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "B200": 2250,
    "L40S": 362,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "V100": 125,
    "T4": 65,
}


def peak_flops() -> float:
    """Return the peak FLOP/s of this rank's device.

    From the table for a GPU, nan if it is not in there; by a timed matmul on a CPU.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, tflops in PEAK_TFLOPS.items():
            if part in name:
                return tflops * 1e12
        return float("nan")
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def peak_gib() -> float:
    """Return the peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Log:
    """Writes the records of a run into its folder and to the terminal.

    On other ranks than 0 every call but `warn` does nothing.
    """

    def __init__(self, folder: Path, rank: int, steps: int, batch: int):
        self.rank = rank
        self.on = rank == 0
        self.steps = steps
        self.batch = batch
        # since the last record: seconds without a batch, its time, its step
        self.waited = 0.0
        self.since = time.perf_counter()
        self.last_step: int | None = None
        if not self.on:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.text = (folder / "log.txt").open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard")
        self.live = sys.stdout.isatty()

    def say(self, message: str) -> None:
        """Write a line for people: terminal and log.txt."""
        if self.on:
            self.show(message, end="\n")
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self.text)

    def show(self, line: str, end: str) -> None:
        """Print a line; on a terminal in place of the progress line."""
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}{line}", end=end, flush=True)

    def warn(self, message: str) -> None:
        """Write a line about this rank's data, on every rank."""
        if self.on:
            self.say(message)
        else:
            print(f"rank {self.rank}: {message}", flush=True)

    def wait(self, seconds: float) -> None:
        """Count time in which the loop had no batch."""
        self.waited += seconds

    def step(self, step: int, samples: int, flops_per_sample: float, peak: float, **values) -> None:
        """Record a training step; step counts from 1, peak is of all devices together."""
        if not self.on:
            return
        now = time.perf_counter()
        values = numbers(values)
        values["memory_gib"] = peak_gib()
        if self.last_step is not None:
            elapsed = max(now - self.since, 1e-9)
            speed = (step - self.last_step) * self.batch / elapsed
            values["samples_per_s"] = speed
            values["mfu"] = speed * flops_per_sample / peak
            values["stall"] = min(1.0, self.waited / elapsed)
        self.last_step = step
        self.since = now
        self.waited = 0.0
        self.write(step, samples, values)
        self.show(self.line(step, samples, values), end="" if self.live else "\n")

    def line(self, step: int, samples: int, values: dict) -> str:
        """Return the progress line of a step."""
        parts = [
            f"step {step}/{self.steps}",
            f"{short(samples)} samples",
            f"loss {values['loss']:.4f}",
        ]
        if "temperature" in values:
            parts.append(f"temperature {values['temperature']:.4f}")
        if "samples_per_s" in values:
            speed = values["samples_per_s"]
            mfu = "?" if math.isnan(values["mfu"]) else f"{values['mfu']:.0%}"
            seconds_left = (self.steps - step) * self.batch / speed
            parts += [
                f"{short(speed)}/s",
                f"MFU {mfu}",
                f"data stall {values['stall']:.0%}",
                f"ETA {clock(seconds_left)}",
            ]
        return " · ".join(parts)

    def evaluation(self, step: int, samples: int, values: dict[str, float], weights: str) -> None:
        """Record an evaluation; weights: whose results these are, student or teacher."""
        if self.on and values:
            names = values
            if weights != "student":
                names = {f"{weights}/{name}": value for name, value in values.items()}
            self.write(step, samples, names)
            record = dict(step=step, samples=samples, weights=weights, **values)
            with (self.folder / "results.jsonl").open("a") as results:
                print(json.dumps(record), file=results)
            self.say(
                f"evaluated the {weights} after step {step}, {short(samples)} samples:\n"
                f"{table(values)}"
            )
        # evaluating is not training time
        self.since = time.perf_counter()
        self.waited = 0.0
        self.last_step = step

    def write(self, step: int, samples: int, values: dict) -> None:
        """Append a record to metrics.jsonl and TensorBoard."""
        # JSON has no nan or inf
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = dict(step=step, samples=samples, **finite)
        self.metrics.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, samples)

    def picture(self, name: str, image: Tensor, samples: int) -> None:
        """Show an image (3, H, W) uint8 on TensorBoard."""
        if self.on:
            self.board.add_image(name, image, samples)

    def close(self) -> None:
        if self.on:
            if self.live:
                print(flush=True)
            self.board.close()
            self.metrics.close()
            self.text.close()


def numbers(values: dict) -> dict[str, float]:
    """Return the values as floats, without those that are None."""
    return {name: float(value) for name, value in values.items() if value is not None}


def short(count: float) -> str:
    """Return a count with a unit: 12800000000 -> '12.8B'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # 999,950 is 1M, not 1e+03k
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, or hours too: 90061 -> '25:01:01'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(results: dict[str, float]) -> str:
    """Return {kind/set/metric: share} as a line a set, in percent.

    top1 is also shown as a multiple of chance.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, value in results.items():
        kind, benchmark, metric = name.split("/")
        rows.setdefault(f"{kind:10} {benchmark}", {})[metric] = value
    width = max(map(len, rows))
    lines = []
    for name, values in rows.items():
        cells = "  ".join(f"{metric} {value:7.2%}" for metric, value in values.items())
        lines.append(f"{name:{width}}  {cells}{against_chance(values)}")
    return "\n".join(lines)


def against_chance(values: dict[str, float]) -> str:
    """Return top1 as a multiple of chance, or "" if either is missing."""
    if "top1" not in values or "chance" not in values:
        return ""
    return f"  ({values['top1'] / values['chance']:.0f}x chance)"
