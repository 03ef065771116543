"""Evaluate a run's checkpoint, on one process or on all ranks.

    python run/evaluate.py --run runs/quickstart --evals zero_shot:datasets/glyphs/eval/unseen_concepts_seen_style
    deepspeed run/evaluate.py --run runs/flip_l16 --evals zero_shot:/data/imagenet1k retrieval:/data/flickr30k

Prints a table and appends a line to RUN/results.jsonl.  Any folder in CLIP_benchmark's webdataset layout is an evaluation set.
"""
import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json  # noqa: E402

from data.tokenizer import build as build_tokenizer  # noqa: E402
from model.methods import METHODS  # noqa: E402
from run.evals import evaluate, parse  # noqa: E402
from run.lib import checkpoint, config, engine, ranks  # noqa: E402
from run.lib.log import table  # noqa: E402


def main() -> None:
    args = config.parser(__doc__)
    args.add_argument("--run", required=True, help="a run folder, or one of its checkpoints")
    args.add_argument("--evals", nargs="+", metavar="KIND:FOLDER", help="zero_shot:FOLDER or retrieval:FOLDER; default: the run's own")
    args.add_argument("--local_rank", type=int, help="from the launcher")
    found = args.parse_args()
    path = checkpoint.newest(Path(found.run).resolve())
    home = path.parents[1]
    cfg = config.load(home / "config.yaml")
    ranks.start()
    evals = ranks.once(lambda: parse(found.evals or cfg.evals))
    if not evals:
        raise ValueError("--evals: none given, and the run's config names none; e.g. --evals zero_shot:FOLDER")
    tokenizer = build_tokenizer(cfg.data.tokenizer, cfg.data.context)
    checkpoint.check_identity(path, checkpoint.identity(cfg, tokenizer.fingerprint))
    method = METHODS[cfg.method](cfg.model, tokenizer.vocab_size, cfg.data.context)
    checkpoint.load(method, path)
    results = evaluate(engine.place(method, checkpoint.manifest(path)["bf16"]), cfg, tokenizer, evals)
    if ranks.rank() == 0:
        report(results, path, home)


def report(results: dict[str, float], path: Path, home: Path) -> None:
    found = checkpoint.manifest(path)
    with (home / "results.jsonl").open("a") as file:
        print(json.dumps(dict(step=found["step"], samples=found["samples"], **results)), file=file)
    print(table(results))
    print(f"{path}: step {found['step']}, {found['samples']:,} samples; appended to {home / 'results.jsonl'}")


if __name__ == "__main__":
    ranks.run_script(main)
