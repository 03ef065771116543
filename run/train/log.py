"""Log a run: the progress line, metrics.jsonl, results.jsonl, log.txt and TensorBoard.

All calls but warning() do nothing on ranks other than 0, so callers need not check the rank.

metrics.jsonl has one JSON object per line: {"step": 40, "samples": 10240, "loss": 4.1, ...}.
Three values are means since the previous record:

    samples_per_s   samples per second, over all ranks
    mfu             model FLOPs utilization: the model's FLOPs (without recomputation) as a share of
                    the devices' peak
    stall           the share of the time in which the training loop waited for data
"""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

# {part of the device name: TFLOP/s}: dense bf16 from the vendors' data sheets, or fp16 for devices
# without bf16
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

    GPUs are looked up in PEAK_TFLOPS (nan if missing); a CPU is measured with a matmul.
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
    """Return the peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Log:
    """Write records into a run folder and to the terminal."""

    def __init__(self, folder: Path, rank: int, steps: int, batch: int):
        """Open the files. steps: number of steps of the run. batch: global batch size."""
        self.rank = rank
        self.is_rank0 = rank == 0
        self.steps = steps
        self.batch = batch
        # The previous record, and the seconds spent waiting for data since then.
        self.last_time = time.perf_counter()
        self.last_step: int | None = None
        self.wait_seconds = 0.0
        if not self.is_rank0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.text = (folder / "log.txt").open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard")
        self.is_terminal = sys.stdout.isatty()

    def info(self, message: str) -> None:
        """Write a message to the terminal and to log.txt."""
        if self.is_rank0:
            self.print_line(message, end="\n")
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self.text)

    def print_line(self, line: str, end: str) -> None:
        """Print a line; on a terminal, overwrite the progress line."""
        clear = "\r\033[K" if self.is_terminal else ""
        print(f"{clear}{line}", end=end, flush=True)

    def warning(self, message: str) -> None:
        """Write a message about this rank's data; other ranks than 0 print it with their number."""
        if self.is_rank0:
            self.info(message)
        else:
            print(f"rank {self.rank}: {message}", flush=True)

    def add_wait_time(self, seconds: float) -> None:
        """Add seconds in which the training loop waited for a batch."""
        self.wait_seconds += seconds

    def record_step(
        self, step: int, samples: int, flops_per_sample: float, peak: float, **values
    ) -> None:
        """Record a training step.

        step: counted from 1. peak: FLOP/s of all devices together.
        """
        if not self.is_rank0:
            return
        now = time.perf_counter()
        values = to_floats(values)
        values["memory_gib"] = peak_gib()
        # The first record has no speed: it would include the start-up.
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
        """Record the results of an evaluation of the weights "student" or "teacher"."""
        if self.is_rank0 and values:
            prefixed = values
            if weights != "student":
                prefixed = {f"{weights}/{name}": value for name, value in values.items()}
            self.write_record(step, samples, prefixed)
            record = dict(step=step, samples=samples, weights=weights, **values)
            with (self.folder / "results.jsonl").open("a") as results:
                print(json.dumps(record), file=results)
            self.info(
                f"evaluated the {weights} after step {step}, {format_count(samples)} samples:\n"
                f"{format_results(values)}"
            )
        # The next record's speed must not include the evaluation.
        self.last_time = time.perf_counter()
        self.wait_seconds = 0.0
        self.last_step = step

    def write_record(self, step: int, samples: int, values: dict) -> None:
        """Append a record to metrics.jsonl and TensorBoard."""
        json_values = {}
        for name, value in values.items():
            json_values[name] = value if math.isfinite(value) else None  # JSON has no nan or inf
        record = dict(step=step, samples=samples, **json_values)
        self.metrics.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, samples)

    def add_image(self, name: str, image: Tensor, samples: int) -> None:
        """Add an image (3, H, W) uint8 to TensorBoard."""
        if self.is_rank0:
            self.board.add_image(name, image, samples)

    def close(self) -> None:
        """Close the files, and end the progress line."""
        if self.is_rank0:
            if self.is_terminal:
                print(flush=True)
            self.board.close()
            self.metrics.close()
            self.text.close()


def to_floats(values: dict) -> dict[str, float]:
    """Convert the values to floats, dropping those that are None."""
    return {name: float(value) for name, value in values.items() if value is not None}


def format_count(count: float) -> str:
    """Format a count with a unit: 12800000000 -> '12.8B'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # 999,950 -> 1M; it would round to 1e+03k
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def format_duration(seconds: float) -> str:
    """Format a duration as [hours:]minutes:seconds: 90061 -> '25:01:01'."""
    minutes, remaining_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{remaining_seconds:02d}"
    return f"{minutes}:{remaining_seconds:02d}"


def format_results(results: dict[str, float]) -> str:
    """Format {kind/set/metric: share} as one line per evaluation set, in percent.

    top1 is also given as a multiple of chance.
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
    """Format top1 as a multiple of chance; "" if either is missing."""
    if "top1" not in values or "chance" not in values:
        return ""
    return f"  ({values['top1'] / values['chance']:.0f}x chance)"
