"""The one writer: a progress line, metrics.jsonl, TensorBoard. Silent off rank 0, so that no caller
asks for its rank.

A record is one JSON object a line: {"step": 40, "samples": 10240, "loss": 4.1, ...}. Speeds are
over the steps since the last record: samples_per_s over all ranks; mfu the share of the devices'
peak spent on the model's own FLOPs (recomputation not counted); stall the
share of the time in which the training loop waited for data.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

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
    # dense bf16 (fp16 where there is no bf16), from the vendor's data sheets
    "RTX 4090": 165,
    "V100": 125,
    "T4": 65,
}


def peak_flops() -> float:
    """FLOP/s that this rank's device could do: by its name on a GPU, by a timed matmul on a CPU;
    nan where the GPU is not in the table.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next(
            (tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), float("nan")
        )
    n, times = 1024, []
    a, b = torch.randn(n, n), torch.randn(n, n)
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def peak_gib() -> float:
    """The most memory that this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Log:
    """Writes what a run does into its folder and to the terminal; on other ranks than 0 every call
    does nothing.
    """

    def __init__(self, folder: Path, rank: int, steps: int, batch: int):
        self.rank, self.on, self.steps, self.batch = rank, rank == 0, steps, batch
        self.waited, self.since, self.last_step = 0.0, time.perf_counter(), None
        if not self.on:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.text = (folder / "log.txt").open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard")
        self.live = sys.stdout.isatty()

    def say(self, message: str) -> None:
        """A line for people: terminal and log.txt."""
        if self.on:
            print(f"\r\033[K{message}" if self.live else message, flush=True)
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self.text)

    def warn(self, message: str) -> None:
        """Something is wrong with this rank's data: said on every rank."""
        if self.on:
            self.say(message)
        else:
            print(f"rank {self.rank}: {message}", flush=True)

    def wait(self, seconds: float) -> None:
        """Time in which the loop had no batch."""
        self.waited += seconds

    def step(self, step: int, samples: int, flops_per_sample: float, peak: float, **values) -> None:
        """Record a training step; step counts from 1, peak is of all devices together."""
        if not self.on:
            return
        now, values = time.perf_counter(), numbers(values)
        values["memory_gib"] = peak_gib()
        if self.last_step is not None:
            took = max(now - self.since, 1e-9)
            speed = (step - self.last_step) * self.batch / took
            values.update(
                samples_per_s=speed,
                mfu=speed * flops_per_sample / peak,
                stall=min(1.0, self.waited / took),
            )
        self.last_step, self.since, self.waited = step, now, 0.0
        self.write(step, samples, values)
        line = self.line(step, samples, values)
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def line(self, step: int, samples: int, values: dict) -> str:
        parts = [
            f"step {step}/{self.steps}",
            f"{short(samples)} samples",
            f"loss {values['loss']:.4f}",
        ]
        if "temperature" in values:
            parts.append(f"temperature {values['temperature']:.4f}")
        if "samples_per_s" in values:
            left = (self.steps - step) * self.batch / values["samples_per_s"]
            speed, mfu = (
                short(values["samples_per_s"]),
                "?" if math.isnan(values["mfu"]) else f"{values['mfu']:.0%}",
            )
            parts += [
                f"{speed}/s",
                f"MFU {mfu}",
                f"data stall {values['stall']:.0%}",
                f"ETA {clock(left)}",
            ]
        return " · ".join(parts)

    def evaluation(self, step: int, samples: int, values: dict[str, float], weights: str) -> None:
        """weights: whose results these are, student or teacher."""
        if self.on and values:
            self.write(
                step,
                samples,
                (
                    values
                    if weights == "student"
                    else {f"{weights}/{name}": value for name, value in values.items()}
                ),
            )
            with (self.folder / "results.jsonl").open("a") as results:
                print(
                    json.dumps(dict(step=step, samples=samples, weights=weights, **values)),
                    file=results,
                )
            self.say(
                f"evaluated the {weights} after step {step}, {short(samples)}"
                f" samples:\n{table(values)}"
            )
        # evaluating is not training time
        self.since, self.waited, self.last_step = time.perf_counter(), 0.0, step

    def write(self, step: int, samples: int, values: dict) -> None:
        # JSON has no nan or inf
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps(dict(step=step, samples=samples, **finite)) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, samples)

    def picture(self, name: str, image: Tensor, samples: int) -> None:
        """image (3, H, W) uint8, onto TensorBoard."""
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
    return {name: float(value) for name, value in values.items() if value is not None}


def short(count: float) -> str:
    """12800000000 -> '12.8B'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # 999,950 is 1M, not 1e+03k
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(results: dict[str, float]) -> str:
    """{kind/set/metric: share} as a line a set, in per cent; top1 also as a multiple of chance."""
    rows: dict[str, dict] = {}
    for name, value in results.items():
        kind, benchmark, metric = name.split("/")
        rows.setdefault(f"{kind:10} {benchmark}", {})[metric] = value
    wide = max(map(len, rows))
    return "\n".join(
        f"{name:{wide}}  " + "  ".join(map(cell, values.items())) + against_chance(values)
        for name, values in rows.items()
    )


def cell(item: tuple[str, float]) -> str:
    return f"{item[0]} {item[1]:7.2%}"


def against_chance(values: dict) -> str:
    return (
        f"  ({values['top1'] / values['chance']:.0f}x chance)"
        if {"top1", "chance"} <= values.keys()
        else ""
    )
