"""A small data set, and launches of real ranks, for the tests that train.

The images are drawn shapes with captions, in shards. Launches use the deepspeed launcher.

    folder = shards(tmp_path)             train/*.tar, eval/shapes/, tokenizer.model
    run = launch(2, "run/pretrain.py", "--config", ...)   a CompletedProcess
"""

import io
import json
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from glimpse.data.shards import build_index, write_shard
from glimpse.data.tokenizer import build_tokenizer, train_sentencepiece
from glimpse.model.methods import METHODS
from glimpse.run.lib import config
from glimpse.run.study.grid import PlannedRun
from glimpse.run.train.log import Log

RUN_EVERYTHING = "WHOLE" in os.environ  # without it, some tests take fewer steps or cases
ROOT = Path(__file__).parents[2]
COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
TINY = (
    "model.size=nano/8",
    "model.image_size=32",
    "batch=16",
    "samples=320",
    "log_every=1",
    "data.workers=0",
    "optim.warmup=64",
    "evals=[]",
)


def picture(name: str, rng: np.random.Generator, kind: str = "png") -> bytes:
    """Return an encoded 48 x 40 picture of a shape, e.g. "red circle", at a random position.

    kind: png, webp or jpg.
    """
    color, shape = name.split()
    background = tuple(rng.integers(200, 256, 3).tolist())
    image = Image.new("RGB", (48, 40), background)
    draw = ImageDraw.Draw(image)
    x, y = rng.integers((14, 14), (34, 26)).tolist()
    radius = int(rng.integers(8, 13))
    left, top, right, bottom = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=color)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=color)
    elif shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), (x, top)], fill=color)
    else:
        draw.line((left, top, right, bottom), fill=color, width=4)
        draw.line((left, bottom, right, top), fill=color, width=4)
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return out.getvalue()


def write_dataset(folder: Path, count: int = 120, per_shard: int = 40) -> Path:
    """Write a training set, two evaluation sets and a tokenizer, and return their folder.

    folder/train                `count` pairs, in shards of `per_shard`
    folder/eval/shapes          a zero-shot set with two pictures of every name
    folder/eval/retrieval       a retrieval set with two captions for every name
    folder/tokenizer.model      a SentencePiece vocabulary
    """
    rng = np.random.default_rng(0)
    write_train(folder / "train", rng, count, per_shard)
    write_shapes(folder / "eval" / "shapes", rng)
    write_retrieval(folder / "eval" / "retrieval", rng)
    captions = [f"{word} {name}" for name in NAMES for word in ("a", "the")]
    train_sentencepiece(captions, folder / "tokenizer.model", 320)
    return folder


def write_train(folder: Path, rng: np.random.Generator, count: int, per_shard: int) -> None:
    rows = []
    for i in range(count):
        name = NAMES[i % len(NAMES)]
        kind = ("png", "jpg", "webp")[i % 3]
        rows.append((f"{i:06d}", {kind: picture(name, rng, kind), "txt": f"a {name}".encode()}))
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, count, per_shard)):
        write_shard(folder / f"{number:05d}.tar", rows[start : start + per_shard])
    build_index(folder)


def write_shapes(folder: Path, rng: np.random.Generator) -> None:
    """Write a zero-shot set with two pictures of every name, and a third one of the first."""
    rows = []
    for i in range(2 * len(NAMES) + 1):
        label = i % len(NAMES)
        rows.append((f"{i:04d}", {"png": picture(NAMES[label], rng), "cls": str(label).encode()}))
    write_test(folder / "test", rows)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}")


def write_retrieval(folder: Path, rng: np.random.Generator) -> None:
    """Write a retrieval set with one picture and two captions of every name."""
    rows = []
    for i, name in enumerate(NAMES):
        captions = f"a {name}\nthe {name}".encode()
        rows.append((f"{i:04d}", {"png": picture(name, rng), "txt": captions}))
    write_test(folder / "test", rows)


def write_test(folder: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows)
    (folder / "nshards.txt").write_text("1")


def write_evaluation_set(
    folder: Path,
    rows: list[dict[str, bytes]],
    names: str = "ape\nbee\ncat",
    templates: str = "a {c}",
) -> Path:
    """Write an evaluation set with one shard of white pictures, and return its folder.

    rows: {extension: content} of each sample's other files.
    """
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(out, "PNG")
    samples = [(f"{i:03d}", {"png": out.getvalue(), **row}) for i, row in enumerate(rows)]
    (folder / "test").mkdir(parents=True)
    write_shard(folder / "test" / "0.tar", samples)
    (folder / "classnames.txt").write_text(names)
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return folder


def untrained_method(tokenizer: Path, *more: str) -> tuple:
    """Return (method, config, tokenizer) of a nano CLIP with initial weights.

    more: config overrides.
    """
    cfg = config.load(
        "run/configs/quickstart.yaml",
        [
            f"data.tokenizer=sentencepiece({tokenizer})",
            "model.size=nano/8",
            "model.image_size=32",
            "data.workers=0",
            *more,
        ],
    )
    torch.manual_seed(0)
    text_tokenizer = build_tokenizer(cfg.data.tokenizer, cfg.data.context)
    vocab_size = text_tokenizer.vocab_size
    method = METHODS["clip"](cfg.model, vocab_size, cfg.data.context, cfg.options)
    for parameter in method.towers.parameters():
        parameter.data.mul_(1.5)  # spread the embeddings; initially they are close together
    return method, cfg, text_tokenizer


def tiny_run_arguments(data: Path, run: Path, *more: str) -> list[str]:
    """Return the arguments of run/pretrain.py for a tiny run.

    data: a folder of write_dataset(). run: the run folder. more: config overrides.
    """
    return [
        "--config",
        "run/configs/quickstart.yaml",
        "--set",
        f"data.train={data}/train",
        f"data.tokenizer=sentencepiece({data}/tokenizer.model)",
        f"run={run}",
        *TINY,
        *more,
    ]


def environment() -> dict[str, str]:
    """Return environment variables with which ranks run on the CPU, and may share cores."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "OVERSUBSCRIBE": "1"}
    return {**os.environ, **variables, "PATH": os.pathsep.join(paths)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launcher_command(ranks: int, script: str, *args: str) -> list[str]:
    return [
        "deepspeed",
        "--quiet",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        script,
        *args,
    ]


def launch(ranks: int, script: str, *args: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a script on real ranks under the deepspeed launcher."""
    return subprocess.run(
        launcher_command(ranks, script, *args),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def memory_growth(before: str, work: str) -> float:
    """Return the growth of a process's peak memory in MiB while it runs the code `work`.

    before: code that runs first. The peak is read from /proc, because that of getrusage() includes
    the process that started it.
    """
    program = f"""
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
{before}
peak_before = peak()
{work}
print(peak() - peak_before)"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"grew by {float(done.stdout):.0f} MiB")
    return float(done.stdout)


def write_recorded_run(
    run: Path,
    speeds: tuple[float | None, ...],
    results: dict[int, dict[str, float]],
    *settings: str,
) -> Path:
    """Write the run folder that a training would leave, and return it.

    speeds: samples/s of each step, None to leave it out. results: {samples seen: metrics}.
    """
    cfg = config.load(
        ROOT / "run/configs/quickstart.yaml",
        [f"run={run}", "batch=100", f"samples={100 * len(speeds)}", *settings],
    )
    run.mkdir(parents=True)
    config.save(
        cfg,
        run / "config.yaml",
        dict(commit="0123456789ab", started="2026-01-01 00:00:00", ranks=2),
    )
    (run / "command.txt").write_text(
        f"2026-01-01 00:00:00 run/pretrain.py --config quickstart.yaml --set run={run} # 2 ranks\n"
    )
    log = Log(run, 0, len(speeds), cfg.batch)
    for step, speed in enumerate(speeds, 1):
        samples = 100 * step
        record = dict(loss=5 / step, memory_gib=1 + step / 100)
        if speed is not None:
            record |= dict(samples_per_s=speed, mfu=0.25)
        log.write_record(step, samples, record)
        log.record_evaluation(step, samples, results.get(samples, {}), "student")
    log.close()
    return run


def write_finished_run(
    run: Path,
    planned: PlannedRun,
    value: float,
    extra: dict | None = None,
    metric: str = "zero_shot/seen_concepts_unseen_style/top5",
) -> None:
    """Write the run folder of a complete run of a grid, with a value of `metric`.

    how: further keys of its record in results.jsonl.
    """
    run.mkdir(parents=True)
    config.save(planned.cfg, run / "config.yaml", {})
    samples = planned.cfg.steps * planned.cfg.batch
    record = dict(step=1, samples=samples, loss=1.0, samples_per_s=100.0)
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    row = {"step": 1, "samples": samples, "weights": "student", **(extra or {}), metric: value}
    (run / "results.jsonl").write_text(json.dumps(row) + "\n")
