"""Write self-contained HTML pages about runs.

    python run/report.py runs/study/* --out report.html
        compare runs: curves, results and cost, masks, configs and commands;
        plots (PNG) and tables (CSV) are written next to the page
    python run/report.py masks --run runs/aclip_nano
        show what each mask keeps of some images, the model's attention, and the similarity of
        patches to the caption, in RUN/report/masks.png and masks.html

Runs that differ only in their seed form a group, shown with intervals over seeds. The first group
is the baseline for the others. A run that is missing, incomplete or not evaluated is marked as
absent, with the reason. Pictures are computed with the last checkpoint of a run. Apart from
RUN/report, run folders are not changed.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from glimpse.data.shards import Shards
from glimpse.data.stream import is_stream
from glimpse.run.lib import config, distributed
from glimpse.run.reports import html_report, markup, pictures, plots
from glimpse.run.study.jobs import read_state
from glimpse.run.study.results import RunResult, group_by_seed
from glimpse.run.train import load_model


def compare_runs() -> None:
    parser = config.argument_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; the first is the baseline for the others",
    )
    parser.add_argument(
        "--out", default="report.html", help="path of the page; default: report.html"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        help="folders of shards with images for the pictures; default: data.train of each run",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=4,
        help="images per group; 0: no pictures, so that no checkpoint is read",
    )
    args = parser.parse_args()
    plots.check_matplotlib()

    # A pattern like RUNS/* also matches the log and lock files of run/scaling.py.
    runs = [read_state(Path(run)) for run in args.runs if not Path(run).is_file()]
    if not runs:
        raise ValueError(f"RUN: {args.runs[0]} is a file; give run folders")
    if all(run.config is None for run in runs):
        others = f" (and {len(runs) - 1} more)" if len(runs) > 1 else ""
        raise ValueError(f"RUN: no run has a config: {runs[0].reason}{others}")

    groups = group_by_seed(runs)
    galleries = {}
    if args.count > 0:
        for label, group in groups.items():
            galleries[label] = group_gallery(group, args.images, args.count)
    for label, group in groups.items():
        states = []
        for run in group:
            reason = f" ({run.reason})" if run.reason else ""
            states.append(f"{run.run.name} {run.state}{reason}")
        print(f"{label}: {', '.join(states)}")
    page, *files = html_report.write_report(Path(args.out), groups, galleries)
    print(f"wrote {page}, and next to it {', '.join(path.name for path in files)}")


def group_gallery(
    group: list[RunResult], images: list[str] | None, count: int
) -> tuple[dict, list[str]] | str:
    """Return (pictures, captions) for the first run with a checkpoint, or why there is none."""
    reason = ""
    for run in group:
        try:
            columns, captions, _ = model_gallery(
                load_model.find_model(run.run.resolve()), images, count
            )
            return columns, captions
        except (ValueError, OSError) as fault:
            reason = run.reason or str(fault)
    return reason


def write_masks() -> None:
    parser = config.argument_parser(__doc__)
    parser.add_argument("masks")
    parser.add_argument(
        "--run", required=True, help="a run folder, a checkpoint in it, or a converted model"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        help="folders of shards with the images; default: the run's data.train",
    )
    parser.add_argument("--count", type=int, default=8, help="number of images")
    args = parser.parse_args()
    path = load_model.find_model(Path(args.run).resolve())
    if args.count < 1:
        raise ValueError(f"--count: {args.count} is not positive; use 1 or more images")

    columns, captions, cfg = model_gallery(path, args.images, args.count)
    folder = load_model.results_folder(path) / "report"
    folder.mkdir(exist_ok=True)
    image_file = folder / "masks.png"
    image_file.write_bytes(markup.encode_image(pictures.tile_gallery(columns), "png"))

    samples = load_model.training_progress(path).get("samples")
    progress = "" if samples is None else f", after {samples:,} samples"
    about = f"{cfg.run}: {cfg.method}, {cfg.model.size}{progress}. {html_report.PICTURE_LEGEND}"
    body = f"<h1>Masks, attention and similarity</h1><p>{markup.escape(about)}</p>"
    body += markup.gallery_table(columns, captions)
    page = folder / "masks.html"
    page.write_text(markup.html_document(f"Masks: {cfg.run}", body))
    print(f"columns: {' | '.join(columns)}\nwrote {image_file} and {page}")


def model_gallery(
    path: Path, images: list[str] | None, count: int
) -> tuple[dict, list[str], config.RunConfig]:
    """Return (columns of pictures, captions, config) of a model.

    path: a return value of load_model.find_model().
    images: folders of shards; by default the model's training data.
    """
    if not images:
        converted = load_model.results_folder(path) == path
        if converted or is_stream(load_model.read_run_config(path).data.train):
            raise ValueError(
                "--images: required for this model, because its training data is not a local folder"
                " of shards; give folders of shards"
            )
    cfg, tokenizer, method = load_model.open_model(path)
    examples = pictures.read_examples(Shards(images or cfg.data.train), count)
    if not examples:
        raise ValueError(
            f"--images: none of {count} samples can be read; find the reason with"
            " `python run/prepare.py check DIR`"
        )
    encoded_images, captions = examples
    columns = pictures.build_gallery(method, cfg, tokenizer, encoded_images, captions)
    return columns, captions, cfg


def main() -> None:
    distributed.start()
    command = write_masks if sys.argv[1:2] == ["masks"] else compare_runs
    command()


if __name__ == "__main__":
    distributed.run_script(main)
