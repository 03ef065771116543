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
        self.is_rank0 = rank == 0
        self.steps = steps
        self.batch = batch
        # since the last record: seconds without a batch, its time, its step
        self.wait_seconds = 0.0
        self.last_time = time.perf_counter()
        self.last_step: int | None = None
        if not self.is_rank0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.text = (folder / "log.txt").open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard")
        self.is_terminal = sys.stdout.isatty()

    def info(self, message: str) -> None:
        """Write a line for people: terminal and log.txt."""
        if self.is_rank0:
            self.print_line(message, end="\n")
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self.text)

    def print_line(self, line: str, end: str) -> None:
        """Print a line; on a terminal in place of the progress line."""
        clear = "\r\033[K" if self.is_terminal else ""
        print(f"{clear}{line}", end=end, flush=True)

    def warning(self, message: str) -> None:
        """Write a line about this rank's data, on every rank."""
        if self.is_rank0:
            self.info(message)
        else:
            print(f"rank {self.rank}: {message}", flush=True)

    def add_wait_time(self, seconds: float) -> None:
        """Count time in which the loop had no batch."""
        self.wait_seconds += seconds

    def record_step(
        self, step: int, samples: int, flops_per_sample: float, peak: float, **values
    ) -> None:
        """Record a training step; step counts from 1, peak is of all devices together."""
        if not self.is_rank0:
            return
        now = time.perf_counter()
        values = to_floats(values)
        values["memory_gib"] = peak_gib()
        if self.last_step is not None:
            elapsed = max(now - self.last_time, 1e-9)
            speed = (step - self.last_step) * self.batch / elapsed
            values["samples_per_s"] = speed
            values["mfu"] = speed * flops_per_sample / peak
            values["stall"] = min(1.0, self.wait_seconds / elapsed)
        self.last_step = step
        self.last_time = now
        self.wait_seconds = 0.0
        self.write_record(step, samples, values)
        self.print_line(
            self.progress_line(step, samples, values), end="" if self.is_terminal else "\n"
        )

    def progress_line(self, step: int, samples: int, values: dict) -> str:
        """Return the progress line of a step."""
        parts = [
            f"step {step}/{self.steps}",
            f"{format_count(samples)} samples",
            f"loss {values['loss']:.4f}",
        ]
        if "temperature" in values:
            parts.append(f"temperature {values['temperature']:.4f}")
        if "samples_per_s" in values:
            speed = values["samples_per_s"]
            mfu = "?" if math.isnan(values["mfu"]) else f"{values['mfu']:.0%}"
            seconds_left = (self.steps - step) * self.batch / speed
            parts += [
                f"{format_count(speed)}/s",
                f"MFU {mfu}",
                f"data stall {values['stall']:.0%}",
                f"ETA {format_duration(seconds_left)}",
            ]
        return " · ".join(parts)

    def record_evaluation(
        self, step: int, samples: int, values: dict[str, float], weights: str
    ) -> None:
        """Record an evaluation; weights: whose results these are, student or teacher."""
        if self.is_rank0 and values:
            names = values
            if weights != "student":
                names = {f"{weights}/{name}": value for name, value in values.items()}
            self.write_record(step, samples, names)
            record = dict(step=step, samples=samples, weights=weights, **values)
            with (self.folder / "results.jsonl").open("a") as results:
                print(json.dumps(record), file=results)
            self.info(
                f"evaluated the {weights} after step {step}, {format_count(samples)} samples:\n"
                f"{format_results(values)}"
            )
        # evaluating is not training time
        self.last_time = time.perf_counter()
        self.wait_seconds = 0.0
        self.last_step = step

    def write_record(self, step: int, samples: int, values: dict) -> None:
        """Append a record to metrics.jsonl and TensorBoard."""
        # JSON has no nan or inf
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = dict(step=step, samples=samples, **finite)
        self.metrics.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, samples)

    def add_image(self, name: str, image: Tensor, samples: int) -> None:
        """Show an image (3, H, W) uint8 on TensorBoard."""
        if self.is_rank0:
            self.board.add_image(name, image, samples)

    def close(self) -> None:
        if self.is_rank0:
            if self.is_terminal:
                print(flush=True)
            self.board.close()
            self.metrics.close()
            self.text.close()


def to_floats(values: dict) -> dict[str, float]:
    """Return the values as floats, without those that are None."""
    return {name: float(value) for name, value in values.items() if value is not None}


def format_count(count: float) -> str:
    """Return a count with a unit: 12800000000 -> '12.8B'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # 999,950 is 1M, not 1e+03k
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def format_duration(seconds: float) -> str:
    """Return a time as minutes and seconds, or hours too: 90061 -> '25:01:01'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_results(results: dict[str, float]) -> str:
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
        lines.append(f"{name:{width}}  {cells}{format_chance_ratio(values)}")
    return "\n".join(lines)


def format_chance_ratio(values: dict[str, float]) -> str:
    """Return top1 as a multiple of chance, or "" if either is missing."""
    if "top1" not in values or "chance" not in values:
        return ""
    return f"  ({values['top1'] / values['chance']:.0f}x chance)"
