"""Evaluate a run's checkpoint, on one process or on all ranks.

    python run/evaluate.py --run runs/quickstart --evals
    zero_shot:datasets/glyphs/eval/unseen_concepts_seen_style
    deepspeed run/evaluate.py --run runs/flip_l16 --evals zero_shot:/data/imagenet1k
    retrieval:/data/flickr30k
    python run/evaluate.py --run runs/aclip_nano --weights teacher --ensemble 2
    python run/evaluate.py --run runs/flip_l16 --evals suite:flip --data /data --templates 80

Prints a table and appends a line to RUN/results.jsonl. docs/evaluating.md has the kinds and what a
set may look like.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from dataclasses import replace
from functools import partial

from glimpse.data.masking import parse as parse_mask
from glimpse.data.transforms import CROPS
from glimpse.run.evals import EVALS, evaluate, parse
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib import config, distributed
from glimpse.run.train import load_model
from glimpse.run.train.log import table


def main() -> None:
    args = config.parser(__doc__)
    args.add_argument(
        "--run",
        required=True,
        help="a run folder, one of its checkpoints, or a folder that run/convert.py wrote",
    )
    args.add_argument(
        "--evals",
        nargs="+",
        metavar="KIND:FOLDER",
        help=(
            f"kinds: {', '.join(sorted(EVALS))} (suite:NAME); options as KIND(option=value):FOLDER;"
            " default: the run's own"
        ),
    )
    args.add_argument(
        "--data",
        metavar="DIR",
        help="where the sets of suite:NAME lie; default: the run's eval_data",
    )
    args.add_argument(
        "--templates",
        default="",
        metavar="7|80|85|FILE",
        help="for evaluations that name none; default: each set's own",
    )
    args.add_argument(
        "--crop", choices=CROPS, help="how an image becomes square; default: the run's eval_crop"
    )
    args.add_argument(
        "--weights",
        nargs="+",
        choices=("student", "teacher"),
        help="teacher: the moving average; default: what the run has",
    )
    args.add_argument(
        "--mask",
        default="none",
        help="which patches of an image are seen, e.g. 'random(0.5)' (FLIP, table 1d)",
    )
    args.add_argument(
        "--ensemble",
        type=int,
        default=1,
        metavar="N",
        help="mean over N random views that together show every patch once",
    )
    args.add_argument("--local_rank", type=int, help="from the launcher")
    found = args.parse_args()
    if found.mask != "none" and found.ensemble > 1:
        raise ValueError(
            "--mask, --ensemble: give one; an ensemble's views show 1/N of the patches each"
        )
    if found.ensemble < 1:
        raise ValueError(f"--ensemble {found.ensemble}: a number of views, 1 or more")
    parse_mask(found.mask)
    path = load_model.find(Path(found.run).resolve())
    home = load_model.home(path)
    distributed.start()
    cfg = load_model.config_of(path)
    given = {"templates": found.templates} if found.templates else {}
    evals = distributed.once(
        lambda: parse(found.evals or cfg.evals, data=found.data or cfg.eval_data, **given)
    )
    if not evals:
        raise ValueError(
            "--evals: none given, and the run's config names none; e.g. --evals zero_shot:FOLDER"
        )
    cfg, tokenizer, method = load_model.opened(path)
    if found.crop:
        cfg, given = replace(cfg, eval_crop=found.crop), given | {"crop": found.crop}
    for weights in found.weights or ["student"] + ["teacher"] * bool(method.averaged()):
        how = dict(weights=weights, mask=found.mask, ensemble=found.ensemble)
        results: dict[str, float] = {}
        try:
            evaluate(
                Embedder(method, cfg, tokenizer, home=home, tag=path.name, **how),
                evals,
                partial(told, results),
            )
        finally:  # what was done before something failed is kept
            if results and distributed.rank() == 0:
                report(results, path, home, how | given)
    left_out = {fault: None for e in evals if e.kind == "suite" for fault in e.options.faults}
    if left_out:
        raise ValueError(
            "\n  ".join(
                [f"{len(left_out)} of the sets could not be evaluated; all others are", *left_out]
            )
        )


def told(results: dict[str, float], label: str, made: dict[str, float]) -> None:
    results |= {f"{label}/{metric}": value for metric, value in made.items()}
    distributed.say(
        f"{label}: {', '.join(f'{metric} {value:.4f}' for metric, value in made.items())}"
    )


def report(results: dict[str, float], path: Path, home: Path, how: dict) -> None:
    found = load_model.origin(path)
    with (home / "results.jsonl").open("a") as file:
        print(json.dumps(dict(**found, **how, **results)), file=file)
    print(table(results))
    print(f"{', '.join(f'{key} {value}' for key, value in how.items())}")
    trained = f": step {found['step']}, {found['samples']:,} samples" if found else ""
    print(f"{path}{trained}; appended to {home / 'results.jsonl'}")


if __name__ == "__main__":
    distributed.run_script(main)
