"""A small real data set and real launches, for the tests that train.

The data are drawn shapes with captions, in shards; launches use the deepspeed launcher.

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
from glimpse.data.tokenizer import build, train_sentencepiece
from glimpse.model.methods import METHODS
from glimpse.run.lib import config
from glimpse.run.study.grid import PlannedRun
from glimpse.run.train.log import Log

WHOLE = "WHOLE" in os.environ  # what CI shortens is done in full
ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
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
    """Return a shape of that color somewhere on a 48 x 40 picture, as a png, webp or jpeg."""
    colour, shape = name.split()
    background = tuple(rng.integers(200, 256, 3).tolist())
    image = Image.new("RGB", (48, 40), background)
    draw = ImageDraw.Draw(image)
    x, y = (int(place) for place in rng.integers((14, 14), (34, 26)))
    r = int(rng.integers(8, 13))
    left, top, right, bottom = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), (x, top)], fill=colour)
    else:
        draw.line((left, top, right, bottom), fill=colour, width=4)
        draw.line((left, bottom, right, top), fill=colour, width=4)
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return out.getvalue()


def shards(folder: Path, count: int = 120, per_shard: int = 40) -> Path:
    """Write a training set, two evaluation sets and a tokenizer, and return their folder.

    folder/train has `count` pairs in several shards, folder/eval/shapes has every name twice,
    folder/eval/retrieval has every name with two captions; folder/tokenizer.model.
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
    """Write a zero-shot set of every name twice, and of the first a third time."""
    rows = []
    for i in range(2 * len(NAMES) + 1):
        label = i % len(NAMES)
        rows.append((f"{i:04d}", {"png": picture(NAMES[label], rng), "cls": str(label).encode()}))
    write_test(folder / "test", rows)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}")


def write_retrieval(folder: Path, rng: np.random.Generator) -> None:
    """Write a retrieval set: a picture of every name, with two captions."""
    rows = []
    for i, name in enumerate(NAMES):
        captions = f"a {name}\nthe {name}".encode()
        rows.append((f"{i:04d}", {"png": picture(name, rng), "txt": captions}))
    write_test(folder / "test", rows)


def write_test(folder: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows)
    (folder / "nshards.txt").write_text("1")


def evaluation_set(
    folder: Path,
    rows: list[dict[str, bytes]],
    names: str = "ape\nbee\ncat",
    templates: str = "a {c}",
) -> Path:
    """Write an evaluation set of one shard, and return its folder.

    rows: {extension: content} of each sample, to which a white picture is added.
    """
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(out, "PNG")
    samples = [(f"{i:03d}", {"png": out.getvalue(), **row}) for i, row in enumerate(rows)]
    (folder / "test").mkdir(parents=True)
    write_shard(folder / "test" / "0.tar", samples)
    (folder / "classnames.txt").write_text(names)
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return folder


def untrained(tokenizer: Path, *more: str) -> tuple:
    """Return (method, config, tokenizer) of a nano CLIP that was never trained.

    more: settings that go on top.
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
    text_tokenizer = build(cfg.data.tokenizer, cfg.data.context)
    vocab_size = text_tokenizer.vocab_size
    method = METHODS["clip"](cfg.model, vocab_size, cfg.data.context, cfg.options)
    for parameter in method.towers.parameters():
        parameter.data.mul_(1.5)  # untrained embeddings lie close together: spread them
    return method, cfg, text_tokenizer


def settings(data: Path, run: Path, *more: str) -> list[str]:
    """Return the command line of a tiny run on that data."""
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
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    # 2 and 4 ranks, on any number of cores
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "OVERSUBSCRIBE": "1"}
    return {**os.environ, **fixed, "PATH": os.pathsep.join(paths)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(ranks: int, script: str, *args: str) -> list[str]:
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
        command(ranks, script, *args),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def growth(before: str, work: str) -> float:
    """Return by how many MiB a process's peak memory grows while it runs the lines of `work`.

    It runs the lines of `before` first.
    (getrusage's figure begins at that of the process that started it, and would tell nothing.)
    """
    program = f"""
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
{before}
begun = peak()
{work}
print(peak() - begun)"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"grew by {float(done.stdout):.0f} MiB")
    return float(done.stdout)


def recorded(
    run: Path,
    speeds: tuple[float | None, ...],
    results: dict[int, dict[str, float]],
    *settings: str,
) -> Path:
    """Write a run folder as training leaves it, without having trained, and return it.

    speeds: samples/s of each step, where known; results: {samples seen: metrics}.
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


def finished(
    run: Path,
    planned: PlannedRun,
    value: float,
    how: dict | None = None,
    metric: str = "zero_shot/seen_concepts_unseen_style/top5",
) -> None:
    """Write a run folder as after training, where `metric` is `value`, evaluated as `how` says."""
    run.mkdir(parents=True)
    config.save(planned.cfg, run / "config.yaml", {})
    samples = planned.cfg.steps * planned.cfg.batch
    record = dict(step=1, samples=samples, loss=1.0, samples_per_s=100.0)
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    row = {"step": 1, "samples": samples, "weights": "student", **(how or {}), metric: value}
    (run / "results.jsonl").write_text(json.dumps(row) + "\n")
