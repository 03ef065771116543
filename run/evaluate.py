"""Evaluate a run, one of its checkpoints or a converted model, on one process or on all ranks.

    python run/evaluate.py --run runs/quickstart \\
        --evals zero_shot:datasets/glyphs/eval/unseen_concepts_seen_style
    deepspeed run/evaluate.py --run runs/flip_l16 \\
        --evals zero_shot:/data/imagenet1k retrieval:/data/flickr30k
    python run/evaluate.py --run runs/aclip_nano --weights teacher --ensemble 2
    python run/evaluate.py --run runs/flip_l16 --evals suite:flip --data /data --templates 80

Prints a table and appends a line to RUN/results.jsonl. docs/evaluating.md describes the kinds of
evaluations and the layouts of sets.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from dataclasses import replace
from functools import partial

from glimpse.data.masking import parse_mask
from glimpse.data.transforms import CROPS
from glimpse.run.evals import EVALS, evaluate, parse_evaluations
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib import config, distributed
from glimpse.run.train import load_model
from glimpse.run.train.log import format_results


def main() -> None:
    args = parse_arguments()
    path = load_model.find_model(Path(args.run).resolve())
    results_folder = load_model.results_folder(path)
    distributed.start()

    # 1. Open the evaluation sets before the model, so that a wrong path is reported at once.
    cfg = load_model.read_run_config(path)
    defaults = {"templates": args.templates} if args.templates else {}
    specs = args.evals or cfg.evals
    data = args.data or cfg.eval_data
    evaluations = distributed.rank0_first(lambda: parse_evaluations(specs, data=data, **defaults))
    if not evaluations:
        raise ValueError(
            "--evals: not given, and the run's config has no evals; give e.g. --evals"
            " zero_shot:FOLDER"
        )

    # 2. Evaluate the student, the teacher or both.
    cfg, tokenizer, method = load_model.open_model(path)
    if args.crop:
        cfg = replace(cfg, eval_crop=args.crop)
        defaults["crop"] = args.crop
    all_weights = args.weights
    if not all_weights:
        all_weights = ["student", "teacher"] if method.ema_pairs() else ["student"]
    for weights in all_weights:
        settings = dict(weights=weights, mask=args.mask, ensemble=args.ensemble)
        model = Embedder(
            method, cfg, tokenizer, results_folder=results_folder, tag=path.name, **settings
        )
        results: dict[str, float] = {}
        try:
            evaluate(model, evaluations, partial(print_and_collect, results))
        finally:  # if an evaluation fails, write the results of the earlier ones
            if results and distributed.rank() == 0:
                write_results(results, path, results_folder, settings | defaults)

    # 3. Report the sets of suites that were left out.
    left_out: dict[str, None] = {}
    for evaluation in evaluations:
        if evaluation.kind == "suite":
            left_out |= dict.fromkeys(evaluation.options.faults)
    if left_out:
        header = f"{len(left_out)} of the sets could not be evaluated; all others were"
        raise ValueError("\n  ".join([header, *left_out]))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = config.argument_parser(__doc__)
    parser.add_argument(
        "--run",
        required=True,
        help="a run folder, one of its checkpoints, or a folder that run/convert.py wrote",
    )
    parser.add_argument(
        "--evals",
        nargs="+",
        metavar="KIND:FOLDER",
        help=f"kinds: {', '.join(sorted(EVALS))} (suite:NAME); set options with"
        " KIND(option=value):FOLDER; default: the run's evals",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the sets of suite:NAME; default: the run's eval_data",
    )
    parser.add_argument(
        "--templates",
        default="",
        metavar="7|80|85|FILE",
        help="templates of evaluations that do not set their option; default: each set's own",
    )
    parser.add_argument(
        "--crop", choices=CROPS, help="how images are cropped; default: the run's eval_crop"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=("student", "teacher"),
        help="teacher: the moving average; default: all that the run has",
    )
    parser.add_argument(
        "--mask",
        default="none",
        help="mask of the images' patches, e.g. 'random(0.5)' (FLIP, table 1d)",
    )
    parser.add_argument(
        "--ensemble",
        type=int,
        default=1,
        metavar="N",
        help="average the embeddings of N random views that together show every patch once",
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    args = parser.parse_args()
    if args.mask != "none" and args.ensemble > 1:
        raise ValueError(
            "--mask, --ensemble: use only one of them; each view of an ensemble already shows only"
            " 1/N of the patches"
        )
    if args.ensemble < 1:
        raise ValueError(f"--ensemble: {args.ensemble} views are too few; use 1 or more")
    parse_mask(args.mask)
    return args


def print_and_collect(results: dict[str, float], label: str, metrics: dict[str, float]) -> None:
    """Print an evaluation's metrics, and add them to the results as LABEL/METRIC."""
    for metric, value in metrics.items():
        results[f"{label}/{metric}"] = value
    values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
    distributed.print_rank0(f"{label}: {values}")


def write_results(results: dict[str, float], path: Path, folder: Path, settings: dict) -> None:
    """Append a line to FOLDER/results.jsonl, and print the results of the model at `path`."""
    progress = load_model.training_progress(path)
    with (folder / "results.jsonl").open("a") as file:
        print(json.dumps(dict(**progress, **settings, **results)), file=file)
    print(format_results(results))
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    trained = f": step {progress['step']}, {progress['samples']:,} samples" if progress else ""
    print(f"{path}{trained}; appended to {folder / 'results.jsonl'}")


if __name__ == "__main__":
    distributed.run_script(main)
