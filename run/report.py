"""Make pages to look at from runs: one file each, no network.

    python run/report.py runs/study/* --out report.html
        curves, results and cost of runs, of several seeds with intervals; what masks keep; configs
        and commands. Plots (PNG) and tables (CSV) beside it
    python run/report.py masks --run runs/aclip_nano
        what each strategy keeps of the same images, the model's attention, and where an image
        resembles its caption

Runs that differ in their seed alone are one group, and the first group is what the others are
compared with. A run that is missing, cut off or not evaluated is told as absent, with the reason.
`masks` writes RUN/report/masks.png and masks.html. For pictures a run's last checkpoint is read;
nothing of a run is changed.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from glimpse.data.shards import Shards
from glimpse.data.stream import is_stream
from glimpse.run.lib import config, distributed
from glimpse.run.reports import html_report, markup, pictures
from glimpse.run.study.jobs import read_state
from glimpse.run.study.results import RunResult, group_by_seed
from glimpse.run.train import load_model


def compare_runs() -> None:
    parser = config.parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; the first is what the others are compared with",
    )
    parser.add_argument("--out", default="report.html", help="the page; default: report.html")
    parser.add_argument(
        "--images",
        nargs="+",
        help="folders of shards for the pictures; default: each run's own data.train",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=4,
        help="images of each group; 0: no pictures, and no checkpoint is read",
    )
    args = parser.parse_args()

    # RUNS/* names what run/scaling.py puts beside them, too
    runs = [read_state(Path(run)) for run in args.runs if not Path(run).is_file()]
    if not runs:
        raise ValueError(f"RUN: {args.runs[0]}: no run folder")
    if all(run.config is None for run in runs):
        more = f", and {len(runs) - 1} more like it" if len(runs) > 1 else ""
        raise ValueError(f"RUN: {runs[0].run}: {runs[0].reason}{more}")

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
    page, *others = html_report.write_report(Path(args.out), groups, galleries)
    print(f"wrote {page}, and beside it {', '.join(path.name for path in others)}")


def group_gallery(
    group: list[RunResult], images: list[str] | None, count: int
) -> tuple[dict, list[str]] | str:
    """Return (pictures, captions) of the first run that has a checkpoint, or why none has."""
    reason = ""
    for run in group:
        try:
            columns, captions, _ = model_gallery(load_model.find(run.run.resolve()), images, count)
            return columns, captions
        except (ValueError, OSError) as fault:
            reason = run.reason or str(fault)
    return reason


def write_masks() -> None:
    parser = config.parser(__doc__)
    parser.add_argument("masks")
    parser.add_argument(
        "--run", required=True, help="a run folder, one of its checkpoints, or a converted model"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        help="folders of shards to take images from; default: the run's own data.train",
    )
    parser.add_argument("--count", type=int, default=8, help="images")
    args = parser.parse_args()
    path = load_model.find(Path(args.run).resolve())
    if args.count < 1:
        raise ValueError(f"--count {args.count}: a number of images, 1 or more")

    columns, captions, cfg = model_gallery(path, args.images, args.count)
    folder = load_model.home(path) / "report"
    folder.mkdir(exist_ok=True)
    image_file = folder / "masks.png"
    image_file.write_bytes(markup.encode_image(pictures.tile_gallery(columns), "png"))

    samples = load_model.origin(path).get("samples")
    after = "" if samples is None else f", after {samples:,} samples"
    about = f"{cfg.run}: {cfg.method}, {cfg.model.size}{after}. {html_report.PICTURE_LEGEND}"
    body = f"<h1>What each mask keeps</h1><p>{markup.escape(about)}</p>"
    body += markup.gallery_table(columns, captions)
    page = folder / "masks.html"
    page.write_text(markup.html_document(f"Masks: {cfg.run}", body))
    print(f"columns: {' | '.join(columns)}\nwrote {image_file} and {page}")


def model_gallery(
    path: Path, images: list[str] | None, count: int
) -> tuple[dict, list[str], config.RunConfig]:
    """Return (columns of pictures, captions, config) of a model that load_model.find returned.

    Without `images`, the pictures are the model's own training images.
    """
    if not images:
        converted = load_model.home(path) == path
        if converted or is_stream(load_model.config_of(path).data.train):
            raise ValueError(
                "--images: the model was trained on no folder of shards that is known here; name"
                " one"
            )
    cfg, tokenizer, method = load_model.opened(path)
    examples = pictures.read_examples(Shards(images or cfg.data.train), count)
    if not examples:
        raise ValueError(
            f"--images: none of {count} samples can be read; run: run/prepare.py check DIR"
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
