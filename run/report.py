"""Make pages to look at from runs: one file each, no network.

    python run/report.py runs/study/* --out report.html
        curves, results and cost of runs, of several seeds with intervals; what
                                                                masks keep; configs and commands.
                                                                Plots (PNG) and tables (CSV) beside
                                                                it
    python run/report.py masks --run runs/aclip_nano
        what each strategy keeps of the same images, the model's attention,
                                                                and where an image resembles its
                                                                caption
Runs that differ in their seed alone are one group, and the first group is what the others are
compared with. A run that is missing,
cut off or not evaluated is told as absent, with the reason. `masks` writes RUN/report/masks.png and
masks.html. For pictures a run's
last checkpoint is read; nothing of a run is changed.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from glimpse.data.shards import Shards
from glimpse.data.stream import is_stream
from glimpse.run.lib import config, distributed
from glimpse.run.reports import html_report, markup, pictures
from glimpse.run.study.jobs import state
from glimpse.run.study.results import by_seed
from glimpse.run.train import load_model


def compare() -> None:
    args = config.parser(__doc__)
    args.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; the first is what the others are compared with",
    )
    args.add_argument("--out", default="report.html", help="the page; default: report.html")
    args.add_argument(
        "--images",
        nargs="+",
        help="folders of shards for the pictures; default: each run's own data.train",
    )
    args.add_argument(
        "--count",
        type=int,
        default=4,
        help="images of each group; 0: no pictures, and no checkpoint is read",
    )
    found = args.parse_args()
    # RUNS/* names what run/scaling.py puts beside them, too
    runs = [state(Path(run)) for run in found.runs if not Path(run).is_file()]
    if not runs:
        raise ValueError(f"RUN: {found.runs[0]}: no run folder")
    if all(run.config is None for run in runs):
        raise ValueError(
            f"RUN: {runs[0].run}: {runs[0].reason}"
            + f", and {len(runs) - 1} more like it" * (len(runs) > 1)
        )
    groups, galleries = by_seed(runs), {}
    for label, group in groups.items() if found.count > 0 else ():
        for run in group:  # the first that has a checkpoint
            try:
                galleries[label] = gallery(
                    load_model.find(run.run.resolve()), found.images, found.count
                )[:2]
                break
            except (ValueError, OSError) as fault:
                galleries[label] = run.reason or str(fault)
    for label, group in groups.items():
        states = []
        for run in group:
            reason = f" ({run.reason})" if run.reason else ""
            states.append(f"{run.run.name} {run.state}{reason}")
        print(f"{label}: {', '.join(states)}")
    page, *others = html_report.write(Path(found.out), groups, galleries)
    print(f"wrote {page}, and beside it {', '.join(path.name for path in others)}")


def masks() -> None:
    args = config.parser(__doc__)
    args.add_argument("masks")
    args.add_argument(
        "--run", required=True, help="a run folder, one of its checkpoints, or a converted model"
    )
    args.add_argument(
        "--images",
        nargs="+",
        help="folders of shards to take images from; default: the run's own data.train",
    )
    args.add_argument("--count", type=int, default=8, help="images")
    given = args.parse_args()
    path = load_model.find(Path(given.run).resolve())
    if given.count < 1:
        raise ValueError(f"--count {given.count}: a number of images, 1 or more")
    found, captions, cfg = gallery(path, given.images, given.count)
    folder = load_model.home(path) / "report"
    folder.mkdir(exist_ok=True)
    (folder / "masks.png").write_bytes(markup.encoded(pictures.sheet(found), "png"))
    seen = load_model.origin(path).get("samples")
    after = "" if seen is None else f", after {seen:,} samples"
    what = f"{cfg.run}: {cfg.method}, {cfg.model.size}{after}. {html_report.KEY}"
    (folder / "masks.html").write_text(
        markup.document(
            f"Masks: {cfg.run}",
            f"<h1>What each mask keeps</h1><p>{markup.escape(what)}</p>"
            + markup.gallery_table(found, captions),
        )
    )
    print(f"columns: {' | '.join(found)}\nwrote {folder / 'masks.png'} and {folder / 'masks.html'}")


def gallery(path: Path, images: list[str] | None, count: int) -> tuple[dict, list[str], config.Run]:
    """(columns of pictures, captions, config) of what models.find found, on its own images where no
    others are named.
    """
    if not images and (
        load_model.home(path) == path or is_stream(load_model.config_of(path).data.train)
    ):
        raise ValueError(
            "--images: the model was trained on no folder of shards that is known here; name one"
        )
    cfg, tokenizer, method = load_model.opened(path)
    chosen = pictures.examples(Shards(images or cfg.data.train), count)
    if not chosen:
        raise ValueError(
            f"--images: none of {count} samples can be read; run: run/prepare.py check DIR"
        )
    return pictures.gallery(method, cfg, tokenizer, *chosen), chosen[1], cfg


def main() -> None:
    distributed.start()
    (masks if sys.argv[1:2] == ["masks"] else compare)()


if __name__ == "__main__":
    distributed.run_script(main)
