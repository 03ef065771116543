"""Measure the speed of Glimpse on this machine, next to open_clip where it is installed.

    python run/bench.py step
        training step of a B/16 with masks of 0, 50 and 75 %, and that of open_clip
    python run/bench.py methods
        training step of each method relative to CLIP, next to the ratio of FLOPs
    python run/bench.py data
        images/s of decoding, augmentation, masking and patches on one core, and of open_clip
    python run/bench.py loss
        time and memory of the tiled and the dense contrastive loss

Compare ratios between machines, not seconds. open_clip and the photographs of scikit-image come
with requirements-dev.txt.

Letters: B batch, E width of the embeddings.
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

from glimpse.data.masking import parse_mask
from glimpse.data.patches import patchify_visible
from glimpse.data.transforms import View, random_view
from glimpse.model import losses
from glimpse.model.methods import METHODS
from glimpse.run.lib import cli, config
from glimpse.run.lib.distributed import to_device
from glimpse.run.plan import flops, synthetic_batch
from glimpse.run.train.log import peak_gib
from glimpse.run.verify import reference_libs  # noqa: F401

MASK_RATIOS = (0.0, 0.5, 0.75)
VOCAB = 49408
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
    """Return the median seconds of each run, after one warm-up.

    The runs take turns, so that other load on the machine affects all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if turn > 0:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def has_open_clip() -> bool:
    """Return True if open_clip is installed; else print how to install it."""
    is_installed = importlib.util.find_spec("open_clip") is not None
    if not is_installed:
        print(
            "open_clip is not installed, so its rows are left out;"
            " run: pip install -r requirements-dev.txt"
        )
    return is_installed


# --------------------------------------------------------------------------------------------------
# step


def glimpse_step(cfg: config.RunConfig, tokens: float, batch: int) -> Callable[[], object]:
    """Return a function that runs a training step: forward, loss, backward, AdamW, EMA update.

    tokens: mean number of tokens of a caption.
    """
    torch.manual_seed(0)
    method = METHODS[cfg.method](cfg.model, VOCAB, cfg.data.context, cfg.options).to(DEVICE)
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    micro_batch = to_device(synthetic_batch.random_micro_batch(cfg, tokens, batch))
    ema_parameters = []
    for teacher, student in method.ema_pairs():
        ema_parameters += zip(teacher.parameters(), student.parameters())

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = method.loss(method(micro_batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for teacher, student in ema_parameters:
            teacher.data.lerp_(student.data, 0.004)

    return step


def open_clip_step(ratio: float, batch: int) -> Callable[[], object]:
    """Return a training step of open_clip's ViT-B-16 with patch dropout `ratio`.

    Captions are padded to 77 tokens, as always in open_clip.
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
    def glimpse_builder(tokens: float) -> Callable[[float], Callable[[], object]]:
        def build_step(ratio: float) -> Callable[[], object]:
            mask = f"random({ratio})" if ratio else "none"
            cfg = config.load(
                config.ROOT / "run/configs/clip_b16.yaml",
                [f"model.size={args.size}", f"views.image.mask={mask}"],
            )
            return glimpse_step(cfg, tokens, args.batch)

        return build_step

    builders = {
        "11 tokens on average": glimpse_builder(11),
        "77 tokens": glimpse_builder(77),
    }
    if args.size == "B/16" and has_open_clip():
        builders["open_clip ViT-B-16, 77 tokens"] = lambda ratio: open_clip_step(ratio, args.batch)
    print(
        f"Training step of {args.size}, B {args.batch}, median of {args.repeats},"
        f" {describe_machine()}\n"
    )
    rows = []
    for captions, build_step in builders.items():
        steps = {str(ratio): build_step(ratio) for ratio in MASK_RATIOS}
        seconds = median_seconds(steps, args.repeats)
        unmasked = seconds["0.0"]
        for ratio in MASK_RATIOS:
            step = seconds[str(ratio)]
            rows.append([captions, f"{ratio:.0%}", step, step / unmasked, args.batch / step])
    print_table(["captions", "mask", "s/step", "vs. unmasked", "samples/s"], rows)


# --------------------------------------------------------------------------------------------------
# methods

# Training time relative to CLIP: A-CLIP's table 1 and MaskCLIP's table 1.
PAPER_TIME = {"aclip": 1.16, "aclip_eff": 0.86, "maskclip": 1.56, "slip": 2.67, "mae": 1.30}


def bench_methods(args: argparse.Namespace) -> None:
    """Compare the step of each method with that of CLIP.

    Both run in turns in this process, so that other load on the machine affects both.
    """
    print(
        f"Training step of {args.size} relative to CLIP, B {args.batch}, captions of 11 tokens,"
        f" median of {args.repeats}, {describe_machine()}\n"
    )
    clip_overrides = ["method=clip", "views.augmented=null", "options=null"]
    clip = method_step("slip", args, clip_overrides)
    clip_flops = count_step_flops(clip)
    rows = []
    for name, paper_time in PAPER_TIME.items():
        step = method_step(name, args, [])
        flops_ratio = count_step_flops(step) / clip_flops
        seconds = median_seconds({"clip": clip, name: step}, args.repeats)
        time_ratio = seconds[name] / seconds["clip"]
        rows.append(
            [name, seconds[name], time_ratio, flops_ratio, time_ratio / flops_ratio, paper_time]
        )
    head = ["method", "s/step", "vs. CLIP", "FLOPs vs. CLIP", "time / FLOPs", "time in the paper"]
    print_table(head, rows)


def method_step(name: str, args: argparse.Namespace, overrides: list[str]) -> Callable[[], object]:
    cfg = config.load(
        config.ROOT / f"run/configs/{name}_b16.yaml", [f"model.size={args.size}", *overrides]
    )
    return glimpse_step(cfg, 11, args.batch)


def count_step_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of a step by torch's counter."""
    with flops.create_counter() as counter:
        step()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# data


def bench_data(args: argparse.Namespace) -> None:
    if args.images:
        files = [path.read_bytes() for path in sorted(Path(args.images).glob("*.jp*g"))]
    else:
        files = sample_photographs()
    if not files:
        raise ValueError(f"--images: {args.images} has no .jpg files; give a folder of JPEGs")
    torch.set_num_threads(1)

    runs = {}
    for spec in ("none", "random(0.5)", "random(0.75)", "gaussian(0.75)"):
        runs[f"glimpse, {spec}"] = for_each_file(files, sample_pipeline(spec))
    if has_open_clip():
        import open_clip

        transform = open_clip.image_transform(224, is_train=True, aug_cfg=dict(scale=(0.5, 1.0)))
        runs["open_clip, decoding only"] = for_each_file(files, decode_image)
        runs["open_clip"] = for_each_file(files, lambda data: transform(decode_image(data)))
    print(
        f"{len(files)} images of {args.images or 'scikit-image'}, 224-pixel views, crop scale"
        f" 0.5-1, one core, median of {args.repeats}\n"
    )
    seconds = median_seconds(runs, args.repeats)
    open_clip_seconds = seconds.get("open_clip")
    rows = []
    for name, run_seconds in seconds.items():
        speedup = open_clip_seconds / run_seconds if open_clip_seconds else "-"
        rows.append([name, round(len(files) / run_seconds), speedup])
    print_table(["path", "images/s", "vs. open_clip"], rows)


def sample_photographs(count: int = 100) -> list[bytes]:
    """Return JPEG files of about 500 pixels (quality 90, 4:2:0).

    They are random crops of scikit-image's photographs with a little sensor noise.
    """
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    sizes = ((500, 375), (500, 333), (375, 500), (500, 400), (500, 500))
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        picture = Image.fromarray(getattr(skimage.data, names[i % 4])())

        # A random window, at 80 to 100 % of the largest possible size.
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


def for_each_file(files: list[bytes], function: Callable[[bytes], object]) -> Callable[[], object]:
    return lambda: [function(data) for data in files]


def sample_pipeline(spec: str) -> Callable[[bytes], object]:
    """Return the loader's work on one image: from JPEG bytes to visible uint8 patches."""
    rng = np.random.default_rng(0)
    view = View(crop=(0.5, 1.0), mask=spec)
    mask = parse_mask(spec)

    def sample(data: bytes) -> np.ndarray:
        image, _ = random_view(data, 224, view, rng)
        noise = torch.from_numpy(rng.random((1, 196), dtype=np.float32))
        positions = mask(noise, (14, 14))[0].numpy()
        return patchify_visible(image, 16, positions)

    return sample


# --------------------------------------------------------------------------------------------------
# loss


def bench_loss(args: argparse.Namespace) -> None:
    """Measure each case in a new process.

    The memory of a loss is the growth of the process's peak while it is computed.
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
    """Return {seconds, peak} of a case, peak in GiB; `seconds` is a text if it was not measured."""
    needed = 2.0
    if kind == "dense":
        needed += 18 * (size / 32768) ** 2
    if DEVICE.type == "cpu" and free_gib() < needed:
        return dict(seconds=f"needs {needed:.0f} GiB of free memory", peak="-")
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
    """Print {seconds, peak} of a case as JSON."""

    def random_inputs(n: int) -> list[torch.Tensor]:
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

    median_seconds({"warm-up": lambda: step(random_inputs(256))}, 1)
    tensors = random_inputs(int(size))
    peak_before = peak_gib()
    repeats = 1 if int(size) > 16384 else 3
    seconds = median_seconds({kind: lambda: step(tensors)}, repeats)[kind]
    print(json.dumps(dict(seconds=seconds, peak=peak_gib() - peak_before)))


def main() -> None:
    parser = config.argument_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="step | methods | data | loss")
    step = commands.add_parser("step", help="training step by mask")
    methods = commands.add_parser("methods", help="training step by method")
    for command in (step, methods):
        command.add_argument("--batch", type=int, default=8)
        command.add_argument("--size", default="B/16", help="a model size of model/towers.py")
    data = commands.add_parser("data", help="decoding and augmentation")
    data.add_argument(
        "--images", help="a folder of JPEGs; default: 100 crops of scikit-image's photographs"
    )
    loss = commands.add_parser("loss", help="tiled and dense contrastive loss")
    loss.add_argument("--sizes", nargs="+", type=int, default=[4096, 16384, 32768], metavar="B")
    loss.add_argument("--case", nargs=2, help="measure one case; used by the benchmark itself")
    for command, run in (
        (step, bench_step),
        (methods, bench_methods),
        (data, bench_data),
        (loss, bench_loss),
    ):
        command.add_argument("--repeats", type=int, default=5)
        command.set_defaults(run=run)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    args.run(args)


if __name__ == "__main__":
    cli.run_script(main)
