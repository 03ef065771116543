"""Measure Glimpse on this machine, against a peer in the same process tree. Ratios carry over to
other machines; seconds do not.

    python run/bench.py step     a B/16's training step at masks of 0, 50, 75 %, short and long
                                 captions, and open_clip's
    python run/bench.py methods  a B/16's training step by each method, to clip's, beside the ratio
        of FLOPs
    python run/bench.py data     images/s of decode + augment + mask + patches on one core, and
                                 open_clip's transform
    python run/bench.py loss     time and memory of the tiled loss and of the dense one

open_clip and the photographs come with requirements-dev.txt; the peer is left out where it is not
installed.
Letters: B batch, P patch side.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

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

RATIOS = (0.0, 0.5, 0.75)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}"


def table(head: list[str], rows: list[list]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, the runs taking turns so that other load on the machine meets them
    all; one turn warms up.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            took[name] += [time.perf_counter() - begin] * (turn > 0)
    return {name: statistics.median(times) for name, times in took.items()}


# --------------------------------------------------------------------------------------------------
# step


def our_step(cfg: config.Run, tokens: float, batch: int) -> Callable[[], object]:
    """Forward, loss, backward, AdamW and the teacher's average, on a batch whose captions have
    `tokens` tokens on average.
    """
    torch.manual_seed(0)
    method = METHODS[cfg.method](cfg.model, 49408, cfg.data.context, cfg.options).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-5)
    part = to_device(synthetic_batch.part(cfg, tokens, batch))
    pairs = [
        pair
        for teacher, student in method.averaged()
        for pair in zip(teacher.parameters(), student.parameters())
    ]

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = method.loss(method(part))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for teacher, student in pairs:
            teacher.data.lerp_(student.data, 0.004)

    return step


def peer_step(ratio: float, batch: int) -> Callable[[], object]:
    """The same of open_clip's ViT-B-16 with its patch dropout; its captions are always padded to 77
    tokens.
    """
    import open_clip

    torch.manual_seed(0)
    model = (
        open_clip.create_model("ViT-B-16", force_patch_dropout=ratio, output_dict=True)
        .to(DEVICE)
        .train()
    )
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-5), open_clip.ClipLoss()
    image, text = (
        torch.randn(batch, 3, 224, 224, device=DEVICE),
        torch.randint(1, 49000, (batch, 77), device=DEVICE),
    )

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            found = loss(**model(image, text))
        found.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_step(args) -> None:
    def ours(tokens):
        return lambda ratio: our_step(
            config.load(
                config.ROOT / "run/configs/clip_b16.yaml",
                [
                    f"model.size={args.size}",
                    f"views.image.mask={f'random({ratio})' if ratio else 'none'}",
                ],
            ),
            tokens,
            args.batch,
        )

    kinds = {"11 tokens on average": ours(11), "77 tokens": ours(77)}
    if importlib.util.find_spec("open_clip") and args.size == "B/16":
        kinds["open_clip ViT-B-16, 77 tokens"] = lambda ratio: peer_step(ratio, args.batch)
    print(f"Training step of {args.size}, B {args.batch}, median of {args.repeats}, {machine()}\n")
    rows = []
    for kind, make in kinds.items():
        took = medians({str(ratio): make(ratio) for ratio in RATIOS}, args.repeats)
        whole = took["0.0"]
        rows += [
            [
                kind,
                f"{ratio:.0%}",
                took[str(ratio)],
                took[str(ratio)] / whole,
                args.batch / took[str(ratio)],
            ]
            for ratio in RATIOS
        ]
    table(["captions", "mask", "s/step", "to unmasked", "samples/s"], rows)


# --------------------------------------------------------------------------------------------------
# methods

# to CLIP, A-CLIP's Table 1 and MaskCLIP's
PAPER_TIME = {"aclip": 1.16, "aclip_eff": 0.86, "maskclip": 1.56, "slip": 2.67, "mae": 1.30}


def bench_methods(args) -> None:
    """Each method's step in a process tree of its own would meet other noise: two at a time, the
    method and clip, in turns.
    """
    print(
        f"Training step of {args.size}, B {args.batch}, captions of 11 tokens, to clip's; median of"
        f" {args.repeats}, {machine()}\n"
    )
    rows, clip = (
        [],
        make_method("slip", args, ["method=clip", "views.augmented=null", "options=null"]),
    )
    flops = {"clip": counted(clip)}
    for name, time_there in PAPER_TIME.items():
        step = make_method(name, args, [])
        flops[name] = counted(step)
        took = medians({"clip": clip, name: step}, args.repeats)
        time, work = took[name] / took["clip"], flops[name] / flops["clip"]
        rows.append([name, took[name], time, work, time / work, time_there])
    table(["method", "s/step", "to clip", "FLOPs to clip", "time / FLOPs", "paper's time"], rows)


def make_method(name: str, args, overrides: list[str]) -> Callable[[], object]:
    return our_step(
        config.load(
            config.ROOT / f"run/configs/{name}_b16.yaml", [f"model.size={args.size}", *overrides]
        ),
        11,
        args.batch,
    )


def counted(step: Callable[[], object]) -> int:
    """FLOPs of a step, by torch's counter."""
    with flops.counter() as found:
        step()
    return found.get_total_flops()


# --------------------------------------------------------------------------------------------------
# data


def bench_data(args) -> None:
    files = (
        [path.read_bytes() for path in sorted(Path(args.images).glob("*.jp*g"))]
        if args.images
        else photographs()
    )
    if not files:
        raise ValueError(f"--images {args.images}: no .jpg in it")
    torch.set_num_threads(1)
    runs = {
        f"glimpse, {spec}": each(files, our_sample(spec))
        for spec in ("none", "random(0.5)", "random(0.75)", "gaussian(0.75)")
    }
    if importlib.util.find_spec("open_clip"):
        import open_clip

        transform = open_clip.image_transform(224, is_train=True, aug_cfg=dict(scale=(0.5, 1.0)))
        runs["open_clip, decode alone"] = each(
            files, lambda data: Image.open(io.BytesIO(data)).convert("RGB")
        )
        runs["open_clip"] = each(
            files, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))
        )
    print(
        f"{len(files)} images of {args.images or 'scikit-image'} to 224-px views, crop scale 0.5-1,"
        f" one core, median of {args.repeats}\n"
    )
    took = medians(runs, args.repeats)
    table(
        ["path", "images/s", "to open_clip"],
        [
            [name, round(len(files) / s), took["open_clip"] / s if "open_clip" in took else "-"]
            for name, s in took.items()
        ],
    )


def photographs(count: int = 100) -> list[bytes]:
    """JPEGs of about 500 pixels (quality 90, 4:2:0): windows of scikit-image's photographs with a
    little sensor noise.
    """
    import skimage.data

    rng, files = np.random.default_rng(0), []
    for i in range(count):
        name = ("astronaut", "chelsea", "coffee", "rocket")[i % 4]
        picture = Image.fromarray(getattr(skimage.data, name)())
        width, height = ((500, 375), (500, 333), (375, 500), (500, 400), (500, 500))[
            rng.integers(5)
        ]
        zoom = min(picture.width / width, picture.height / height) * rng.uniform(0.8, 1)
        left, top = (
            rng.uniform(0, picture.width - zoom * width),
            rng.uniform(0, picture.height - zoom * height),
        )
        window = picture.resize(
            (width, height),
            Image.BICUBIC,
            box=(left, top, left + zoom * width, top + zoom * height),
        )
        noisy = np.clip(np.asarray(window) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(
            np.uint8
        )
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=90, subsampling=2)
        files.append(out.getvalue())
    return files


def each(files: list[bytes], do: Callable[[bytes], object]) -> Callable[[], object]:
    return lambda: [do(data) for data in files]


def our_sample(spec: str) -> Callable[[bytes], object]:
    """What a loader does for one image, from its bytes to visible uint8 patches."""
    rng, view, mask = np.random.default_rng(0), View(crop=(0.5, 1.0), mask=spec), parse(spec)

    def sample(data):
        image, _ = random_view(data, 224, view, rng)
        keep = mask(torch.from_numpy(rng.random((1, 196), dtype=np.float32)), (14, 14))[0].numpy()
        return visible(image, 16, keep)

    return sample


# --------------------------------------------------------------------------------------------------
# loss


def bench_loss(args) -> None:
    """Each case in a process of its own: its peak memory above what it held before is the
    loss's.
    """
    if args.case:
        return loss_case(*args.case)
    print(f"Contrastive loss, forward and backward, one process, E 512, {machine()}\n")
    rows = []
    for size in args.sizes:
        found = {}
        for kind in ("tiled", "dense"):
            need = 2 + 18 * (size / 32768) ** 2 if kind == "dense" else 2
            if DEVICE.type == "cpu" and free_gib() < need:
                found[kind] = dict(seconds=f"needs {need:.0f} GiB free", peak="-")
                continue
            done = subprocess.run(
                [sys.executable, __file__, "loss", "--case", kind, str(size)],
                capture_output=True,
                text=True,
            )
            found[kind] = (
                json.loads(done.stdout)
                if not done.returncode
                else dict(seconds=f"failed ({done.returncode})", peak="-")
            )
        rows.append([size, *(found[kind][what] for what in ("seconds", "peak") for kind in found)])
    table(["B", "tiled s", "dense s", "tiled GiB", "dense GiB"], rows)


def free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def loss_case(kind: str, size: str) -> None:
    def inputs(n):
        torch.manual_seed(0)
        image = torch.nn.functional.normalize(torch.randn(n, 512, device=DEVICE), dim=1)
        text = torch.nn.functional.normalize(image + 0.05 * torch.randn_like(image), dim=1)
        return [x.requires_grad_() for x in (image, text, torch.full((1,), 14.3, device=DEVICE))]

    def step(tensors):
        loss = (
            losses.contrastive(*tensors)[0]
            if kind == "tiled"
            else losses.dense_contrastive(*tensors)
        )
        loss.backward()

    medians({"warm": lambda: step(inputs(256))}, 1)
    tensors, before = inputs(int(size)), peak_gib()
    seconds = medians({kind: lambda: step(tensors)}, 1 if int(size) > 16384 else 3)[kind]
    print(json.dumps(dict(seconds=seconds, peak=peak_gib() - before)))


def main() -> None:
    parser = config.parser(__doc__)
    kinds = parser.add_subparsers(required=True, metavar="step | methods | data | loss")
    step, methods = (
        kinds.add_parser("step", help="training step by mask"),
        kinds.add_parser("methods", help="training step by method"),
    )
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
