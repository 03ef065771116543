"""Train every method and option for a short while on the glyphs, and print what each costs and what it gives.

    python run/compare.py                                 all rows, one after another on two ranks, into runs/compare/
    python run/compare.py clip aclip --samples 51200 --out runs/compare-long        some rows, for longer

A row that is done is not trained again; one that was cut off goes on.  These are figures of short runs on small pictures: they show
that a method works and what it costs here (run/bench.py: at B/16), not which one is better.
"""
import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402

from run.lib import cli, config  # noqa: E402

# Row: the config and its overrides.  `{clip}` is the folder of the row clip, whose model is a first-stage teacher.
ROWS = {
    "clip": ("clip_nano", []),
    "flip": ("quickstart", []),
    "flip, text random": ("quickstart", ["data.text_mask=random(0.5)"]),
    "flip, text prioritised": ("quickstart", ["data.text_mask=prioritised(0.5)"]),
    "slip": ("slip_nano", []),
    "slip, as released": ("slip_nano", ["options.as_released=true"]),
    "mae": ("mae_nano", []),
    "mae, on the masked image": ("mae_nano", ["options.contrast=visible", "views.image.mask=random(0.5)"]),
    "mae, plain pixels": ("mae_nano", ["options.normalise=false"]),
    "maskclip": ("maskclip_nano", []),
    "maskclip, half sum": ("maskclip_nano", ["options.convention=half", "options.weight=0.5"]),
    "maskclip, normalised targets": ("maskclip_nano", ["options.normalise=true"]),
    "maskclip, without average": ("maskclip_nano", ["options.teacher=student"]),
    "maskclip, second stage": ("maskclip_nano", ["options.teacher={clip}", "options.contrast=false"]),
    "maskclip, teacher of a run": ("maskclip_nano", ["options.teacher={clip}"]),
    "maskclip, gaussian masks": ("maskclip_nano", ["views.image.mask=gaussian(0.75)"]),
    "aclip": ("aclip_nano", []),
    "aclip, plain": ("aclip_nano", ["options.simclr=0", "options.byol=0", "views.view.jitter=[0, 0, 0, 0]", "views.view.grey=0",
                                    "views.view.blur=0"]),
    "aclip, SimSiam": ("aclip_nano", ["options.simclr=0", "options.simsiam=1"]),
    "aclip, half resolution": ("aclip_nano", ["views.teacher.size=24"]),
    "aclip, high": ("aclip_nano", ["options.strategy=high"]),
    "aclip, mixed": ("aclip_nano", ["options.strategy=mixed"]),
    "aclip, random": ("aclip_nano", ["options.strategy=random"]),
    "aclip, single patches": ("aclip_nano", ["options.block=8"]),
    "aclip, last layer": ("aclip_nano", ["options.layers=last"]),
    "aclip, one view": ("aclip_nano", ["views.view.count=1", "options.keep=0.5", "options.simclr=0"]),
    "aclip, 3 views": ("aclip_nano", ["views.view.count=3"]),
    "aclip, 4 views": ("aclip_nano", ["views.view.count=4"]),
    "aclip, as released": ("aclip_nano", ["options.as_released=true", "options.average_text=true", "views.teacher.enlarge=true"]),
}
EVAL = "zero_shot/seen_concepts_seen_style"


def main() -> int:
    args = config.parser(__doc__)
    args.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"default: all; known: {'; '.join(ROWS)}")
    args.add_argument("--samples", type=int, default=6400, help="pairs that each run sees")
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--ranks", type=int, default=2, help="processes, or GPUs, of each run")
    args.add_argument("--out", default="runs/compare", help="where the run folders go")
    found = args.parse_args()
    for row in found.rows:
        config.check_choice("ROW", row, ROWS)
    rows = list(dict.fromkeys(["clip", *found.rows]))
    done = {}
    for row in rows:
        print(f"{row} ...", flush=True)
        done[row] = measured(trained(row, Path(found.out), found))
    report(done)
    return int(None in done.values())


def trained(row: str, out: Path, found) -> Path:
    """The run folder of a row, trained as far as `--samples`."""
    run = out / row.replace(", ", "-").replace(" ", "_")
    name, overrides = ROWS[row]
    if run.exists():
        was = config.load(run / "config.yaml")
        if (was.samples, was.batch) != (found.samples, found.batch):
            raise ValueError(f"--out {out}: {run} is a run of {was.samples} samples in batches of {was.batch}; name another folder")
    if (run / "results.jsonl").exists():
        return run
    settings = [f"run={run}", f"samples={found.samples}", f"batch={found.batch}", f"optim.warmup={found.samples // 16}", "log_every=10",
                "optim.lr=5e-4", "evals=[zero_shot:datasets/glyphs/eval/seen_concepts_seen_style]",
                *(o.format(clip=out / "clip") for o in overrides)]
    with socket.socket() as free:  # so that comparisons may run side by side
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", str(found.ranks), "--master_port", port,
               str(config.ROOT / "run/pretrain.py"),
               "--config", str(config.ROOT / f"run/configs/{name}.yaml"), "--set", *settings,
               *(["--resume"] if run.exists() else [])]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}, capture_output=True, text=True)
    if ended.returncode:
        print((ended.stdout + ended.stderr)[-2000:], file=sys.stderr)
    return run


def measured(run: Path) -> dict | None:
    """What a run folder tells; None where the run did not end."""
    if not (run / "results.jsonl").exists():
        return None
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    results = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    result = next(result for result in results if result.get("weights", "student") == "student")  # the first is the training's own
    return dict(speed=statistics.median(step["samples_per_s"] for step in steps if "samples_per_s" in step),
                memory=max(step["memory_gib"] for step in steps), first=steps[0]["loss"], last=steps[-1]["loss"],
                top1=result[f"{EVAL}/top1"], chance=result[f"{EVAL}/chance"])


def report(done: dict[str, dict | None]) -> None:
    """A Markdown table; time and memory as ratios to clip's."""
    clip = done["clip"] or dict(speed=float("nan"), memory=float("nan"))
    print("\n| method | step time to clip | peak memory to clip | loss, first to last | zero-shot top-1 | to chance |\n" + "|---" * 6 + "|")
    for row, found in done.items():
        if found is None:
            print(f"| {row} | did not end: see above | | | | |")
            continue
        time, memory = clip["speed"] / found["speed"], found["memory"] / clip["memory"]
        print(f"| {row} | {time:.2f} | {memory:.2f} | {found['first']:.2f} to {found['last']:.2f} | {found['top1']:.1%} "
              f"| {found['top1'] / found['chance']:.0f}x |")


if __name__ == "__main__":
    cli.run_script(main)
