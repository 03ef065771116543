"""Measure Glimpse on this machine, against a peer in the same process tree.

Ratios carry over to other machines; seconds do not.

    python run/bench.py step
        a B/16's training step at masks of 0, 50, 75 %, short and long captions, and open_clip's
    python run/bench.py methods
        a B/16's training step by each method, to clip's, beside the ratio of FLOPs
    python run/bench.py data
        images/s of decode + augment + mask + patches on one core, and open_clip's transform
    python run/bench.py loss
        time and memory of the tiled loss and of the dense one

open_clip and the photographs come with requirements-dev.txt; the peer is left out where it is not
installed.
Letters: B batch, P patch side.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from glimpse.data.masking import parse
from glimpse.data.patches import visible
from glimpse.data.transforms import View, random_view
from glimpse.model import losses
from glimpse.model.methods import METHODS
from glimpse.run.lib import cli, config
from glimpse.run.lib.distributed import to_device
from glimpse.run.plan import flops, synthetic_batch
from glimpse.run.train.log import peak_gib
from glimpse.run.verify import reference_libs  # noqa: F401

MASK_RATIOS = (0.0, 0.5, 0.75)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine() -> str:
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def print_table(head: list[str], rows: list[list]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |")


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run.

    The runs take turns, so that other load on the machine meets them all; one turn warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if turn > 0:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def has_open_clip() -> bool:
    """Return True if open_clip is installed; else print how to install it."""
    is_installed = importlib.util.find_spec("open_clip") is not None
    if not is_installed:
        print(
            "open_clip is not installed, so its rows are missing: pip install -r requirements-dev.txt"
        )
    return is_installed


# --------------------------------------------------------------------------------------------------
# step


def glimpse_step(cfg: config.RunConfig, tokens: float, batch: int) -> Callable[[], object]:
    """Return a training step: forward, loss, backward, AdamW and the teacher's average.

    tokens: of the batch's captions, on average.
    """
    torch.manual_seed(0)
    method = METHODS[cfg.method](cfg.model, 49408, cfg.data.context, cfg.options).to(DEVICE)
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    part = to_device(synthetic_batch.random_micro_batch(cfg, tokens, batch))
    averaged = []
    for teacher, student in method.ema_pairs():
        averaged += zip(teacher.parameters(), student.parameters())

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = method.loss(method(part))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for teacher, student in averaged:
            teacher.data.lerp_(student.data, 0.004)

    return step


def open_clip_step(ratio: float, batch: int) -> Callable[[], object]:
    """Return the same of open_clip's ViT-B-16 with its patch dropout.

    Its captions are always padded to 77 tokens.
    """
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16", force_patch_dropout=ratio, output_dict=True)
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    clip_loss = open_clip.ClipLoss()
    image = torch.randn(batch, 3, 224, 224, device=DEVICE)
    text = torch.randint(1, 49000, (batch, 77), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = clip_loss(**model(image, text))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_step(args: argparse.Namespace) -> None:
    def ours(tokens: float) -> Callable:
        def make(ratio: float) -> Callable[[], object]:
            mask = f"random({ratio})" if ratio else "none"
            cfg = config.load(
                config.ROOT / "run/configs/clip_b16.yaml",
                [f"model.size={args.size}", f"views.image.mask={mask}"],
            )
            return glimpse_step(cfg, tokens, args.batch)

        return make

    kinds = {"11 tokens on average": ours(11), "77 tokens": ours(77)}
    if args.size == "B/16" and has_open_clip():
        kinds["open_clip ViT-B-16, 77 tokens"] = lambda ratio: open_clip_step(ratio, args.batch)
    print(
        f"Training step of {args.size}, B {args.batch}, median of {args.repeats}, {describe_machine()}\n"
    )
    rows = []
    for kind, make in kinds.items():
        seconds = median_seconds({str(ratio): make(ratio) for ratio in MASK_RATIOS}, args.repeats)
        unmasked = seconds["0.0"]
        for ratio in MASK_RATIOS:
            step = seconds[str(ratio)]
            rows.append([kind, f"{ratio:.0%}", step, step / unmasked, args.batch / step])
    print_table(["captions", "mask", "s/step", "to unmasked", "samples/s"], rows)


# --------------------------------------------------------------------------------------------------
# methods

# to CLIP, A-CLIP's Table 1 and MaskCLIP's
PAPER_TIME = {"aclip": 1.16, "aclip_eff": 0.86, "maskclip": 1.56, "slip": 2.67, "mae": 1.30}


def bench_methods(args: argparse.Namespace) -> None:
    """Compare each method's step with clip's, in turns.

    In a process tree of its own, a step would meet other noise.
    """
    print(
        f"Training step of {args.size}, B {args.batch}, captions of 11 tokens, to clip's; median of"
        f" {args.repeats}, {describe_machine()}\n"
    )
    clip = make_method("slip", args, ["method=clip", "views.augmented=null", "options=null"])
    clip_flops = count_step_flops(clip)
    rows = []
    for name, paper_time in PAPER_TIME.items():
        step = make_method(name, args, [])
        work = count_step_flops(step) / clip_flops
        seconds = median_seconds({"clip": clip, name: step}, args.repeats)
        time_ratio = seconds[name] / seconds["clip"]
        rows.append([name, seconds[name], time_ratio, work, time_ratio / work, paper_time])
    print_table(
        ["method", "s/step", "to clip", "FLOPs to clip", "time / FLOPs", "paper's time"], rows
    )


def make_method(name: str, args: argparse.Namespace, overrides: list[str]) -> Callable[[], object]:
    cfg = config.load(
        config.ROOT / f"run/configs/{name}_b16.yaml", [f"model.size={args.size}", *overrides]
    )
    return glimpse_step(cfg, 11, args.batch)


def count_step_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of a step, by torch's counter."""
    with flops.create_counter() as found:
        step()
    return found.get_total_flops()


# --------------------------------------------------------------------------------------------------
# data


def bench_data(args: argparse.Namespace) -> None:
    if args.images:
        files = [path.read_bytes() for path in sorted(Path(args.images).glob("*.jp*g"))]
    else:
        files = sample_photographs()
    if not files:
        raise ValueError(f"--images {args.images}: no .jpg in it")
    torch.set_num_threads(1)

    runs = {}
    for spec in ("none", "random(0.5)", "random(0.75)", "gaussian(0.75)"):
        runs[f"glimpse, {spec}"] = for_each_file(files, sample_pipeline(spec))
    if has_open_clip():
        import open_clip

        transform = open_clip.image_transform(224, is_train=True, aug_cfg=dict(scale=(0.5, 1.0)))
        runs["open_clip, decode alone"] = for_each_file(files, decode_image)
        runs["open_clip"] = for_each_file(files, lambda data: transform(decode_image(data)))
    print(
        f"{len(files)} images of {args.images or 'scikit-image'} to 224-px views, crop scale 0.5-1,"
        f" one core, median of {args.repeats}\n"
    )
    seconds = median_seconds(runs, args.repeats)
    peer = seconds.get("open_clip")
    rows = []
    for name, taken in seconds.items():
        rows.append([name, round(len(files) / taken), peer / taken if peer else "-"])
    print_table(["path", "images/s", "to open_clip"], rows)


def sample_photographs(count: int = 100) -> list[bytes]:
    """Return JPEGs of about 500 pixels (quality 90, 4:2:0).

    They are windows of scikit-image's photographs, with a little sensor noise.
    """
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    sizes = ((500, 375), (500, 333), (375, 500), (500, 400), (500, 500))
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        picture = Image.fromarray(getattr(skimage.data, names[i % 4])())

        # A window anywhere, nearly as large as fits.
        width, height = sizes[rng.integers(5)]
        largest = min(picture.width / width, picture.height / height)
        zoom = largest * rng.uniform(0.8, 1)
        left = rng.uniform(0, picture.width - zoom * width)
        top = rng.uniform(0, picture.height - zoom * height)
        box = (left, top, left + zoom * width, top + zoom * height)
        window = np.asarray(picture.resize((width, height), Image.BICUBIC, box=box))

        noise = rng.normal(0, 2, (height, width, 3))
        noisy = np.clip(window + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90, subsampling=2)
        files.append(buffer.getvalue())
    return files


def decode_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def for_each_file(files: list[bytes], do: Callable[[bytes], object]) -> Callable[[], object]:
    return lambda: [do(data) for data in files]


def sample_pipeline(spec: str) -> Callable[[bytes], object]:
    """Return what a loader does for one image, from its bytes to visible uint8 patches."""
    rng = np.random.default_rng(0)
    view = View(crop=(0.5, 1.0), mask=spec)
    mask = parse(spec)

    def sample(data: bytes) -> np.ndarray:
        image, _ = random_view(data, 224, view, rng)
        noise = torch.from_numpy(rng.random((1, 196), dtype=np.float32))
        keep = mask(noise, (14, 14))[0].numpy()
        return visible(image, 16, keep)

    return sample


# --------------------------------------------------------------------------------------------------
# loss


def bench_loss(args: argparse.Namespace) -> None:
    """Measure each case in a process of its own.

    The loss's memory is that process's peak above what it held before.
    """
    if args.case:
        return loss_case(*args.case)
    print(f"Contrastive loss, forward and backward, one process, E 512, {describe_machine()}\n")
    rows = []
    for size in args.sizes:
        tiled = measure_loss("tiled", size)
        dense = measure_loss("dense", size)
        rows.append([size, tiled["seconds"], dense["seconds"], tiled["peak"], dense["peak"]])
    print_table(["B", "tiled s", "dense s", "tiled GiB", "dense GiB"], rows)


def measure_loss(kind: str, size: int) -> dict:
    """Return {seconds, peak in GiB} of a case; seconds is a text where it could not be measured."""
    need = 2.0
    if kind == "dense":
        need += 18 * (size / 32768) ** 2
    if DEVICE.type == "cpu" and free_gib() < need:
        return dict(seconds=f"needs {need:.0f} GiB free", peak="-")
    process = subprocess.run(
        [sys.executable, __file__, "loss", "--case", kind, str(size)],
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        return dict(seconds=f"failed ({process.returncode})", peak="-")
    return json.loads(process.stdout)


def free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) / 2**20


def loss_case(kind: str, size: str) -> None:
    def inputs(n: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        image = torch.nn.functional.normalize(torch.randn(n, 512, device=DEVICE), dim=1)
        text = torch.nn.functional.normalize(image + 0.05 * torch.randn_like(image), dim=1)
        scale = torch.full((1,), 14.3, device=DEVICE)
        return [tensor.requires_grad_() for tensor in (image, text, scale)]

    def step(tensors: list[torch.Tensor]) -> None:
        if kind == "tiled":
            loss, *_ = losses.contrastive(*tensors)
        else:
            loss = losses.dense_contrastive(*tensors)
        loss.backward()

    median_seconds({"warm": lambda: step(inputs(256))}, 1)
    tensors = inputs(int(size))
    before = peak_gib()
    repeats = 1 if int(size) > 16384 else 3
    seconds = median_seconds({kind: lambda: step(tensors)}, repeats)[kind]
    print(json.dumps(dict(seconds=seconds, peak=peak_gib() - before)))


def main() -> None:
    parser = config.parser(__doc__)
    kinds = parser.add_subparsers(required=True, metavar="step | methods | data | loss")
    step = kinds.add_parser("step", help="training step by mask")
    methods = kinds.add_parser("methods", help="training step by method")
    for sub in (step, methods):
        sub.add_argument("--batch", type=int, default=8)
        sub.add_argument("--size", default="B/16", help="a size and patch of model/towers.py")
    data = kinds.add_parser("data", help="decode and augment")
    data.add_argument(
        "--images", help="a folder of JPEGs; default: a hundred made of scikit-image's photographs"
    )
    loss = kinds.add_parser("loss", help="tiled and dense contrastive loss")
    loss.add_argument("--sizes", nargs="+", type=int, default=[4096, 16384, 32768], metavar="B")
    loss.add_argument("--case", nargs=2, help="one case, as the benchmark itself starts it")
    for sub, run in (
        (step, bench_step),
        (methods, bench_methods),
        (data, bench_data),
        (loss, bench_loss),
    ):
        sub.add_argument("--repeats", type=int, default=5)
        sub.set_defaults(run=run)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    args.run(args)


if __name__ == "__main__":
    cli.run_script(main)
