"""The papers' experiments as grids of runs: planned, trained, told in tables and plots.

    python run/scaling.py list
        the grids and their cells
    python run/scaling.py plan
        --grid flip_table8 --scale paper          what each cell costs
    python run/scaling.py launch --grid flip_table8 --scale glyphs
        train what is not trained yet; the same command goes on
    python run/scaling.py status --grid flip_table8 --scale glyphs
    python run/scaling.py table  --grid flip_table8 --scale glyphs
        means over seeds beside the paper's figures
    python run/scaling.py plot
        --grid flip_table8 --scale glyphs         curves, cost: PNG, CSV and a page with each run's
        config
    python run/scaling.py claims --scale glyphs
        what of the papers' claims holds at this scale

A run is named by what it trains, under OUT/SCALE, so grids share what they have in common.
docs/scaling.md has the rest.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from glimpse.run.lib import config
from glimpse.run.lib.cli import run_script
from glimpse.run.lib.config import ROOT
from glimpse.run.plan import planner
from glimpse.run.reports import html_report
from glimpse.run.study import grid
from glimpse.run.study.claims import judged, markdown, tested
from glimpse.run.study.jobs import Jobs, command, line_of, state, why
from glimpse.run.study.results import Result, difference, interval
from glimpse.run.train.log import clock, short


def main() -> int | None:
    args = config.parser(__doc__)
    kinds = args.add_subparsers(required=True, metavar="list|plan|launch|status|table|plot|claims")
    kinds.add_parser("list", help="the grids and their cells").set_defaults(do=show)
    for name, do, text in (
        ("plan", costs, "what each cell would cost on a cluster"),
        ("launch", launch, "train what is not trained yet"),
        ("status", status, "how far each run is"),
        ("table", table, "means over seeds"),
        ("plot", plot, "curves, results and cost: plots, tables, a page"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("cells", nargs="*", metavar="CELL", help="default: all")
        every = (
            "claims: all that the claims are of; " if name in ("plan", "launch", "status") else ""
        )
        kind.add_argument(
            "--grid", required=True, help=f"{every}{', '.join(grid.names())}, or a file"
        )
        common(kind)
        kind.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="of every cell, on top of the scale's",
        )
        kind.set_defaults(do=do)
        if name == "plan":
            config.cluster_arguments(kind)
        if name == "launch":
            kind.add_argument(
                "--ranks", type=config.count, default=2, help="processes, or GPUs, of each run"
            )
            kind.add_argument(
                "--jobs", type=config.count, default=1, help="runs at a time, each on so many ranks"
            )
            kind.add_argument(
                "--write",
                type=Path,
                metavar="DIR",
                help="instead of training, write a SLURM script for each run",
            )
            kind.add_argument(
                "--nodes",
                type=config.count,
                default=1,
                help="of a SLURM script; each with --ranks processes",
            )
    kind = kinds.add_parser("claims", help="what of the papers' claims holds")
    common(kind)
    kind.set_defaults(do=claims)
    found = args.parse_args()
    return found.do(found)


def common(kind) -> None:
    kind.add_argument("--scale", default="glyphs", help="as the grid has them: paper, glyphs")
    kind.add_argument("--seeds", type=config.count, default=3)
    kind.add_argument(
        "--out", type=Path, default=Path("runs/scaling"), help="where the run folders go"
    )


def planned(args) -> dict[str, list[grid.Planned]]:
    if args.grid == "claims" and args.do in (costs, launch, status):
        if args.cells:
            raise ValueError(
                f"CELL: {args.cells[0]!r}: --grid claims is of all cells that are claimed of; name"
                " cells with their own grid"
            )
        return tested(args.scale, args.seeds, args.out, args.set)
    return grid.read(args.grid).runs(args.scale, args.cells, args.seeds, args.out, args.set)


def show(args) -> None:
    for name in grid.names():
        one = grid.read(name)
        print(
            f"{name}: {one.title}\n  {one.source}\n  cells: {' | '.join(one.cells)}\n  scales:"
            f" {' | '.join(one.scales)}"
        )


def costs(args) -> None:
    """A line a cell: the cheapest way in which one of its runs fits into the cluster, and what all
    of them take.
    """
    cluster, total, without = planner.Cluster.asked(args), 0.0, 0
    print(
        f"{args.ranks} x {cluster.name}, MFU {cluster.mfu:.0%} as the configs are, more where less"
        " is computed twice; run/pretrain.py --plan tells a run's in full\n"
    )
    print(
        "| cell | parameters | GFLOP a sample | JSON | parts | recompute | MFU | GiB a rank | hours"
        " a run | device-hours, all seeds |"
    )
    print("|---" * 10 + "|")
    for cell, runs in planned(args).items():
        if not (found := planner.propose(runs[0].cfg, cluster, args.caption)):
            without += 1
            print(f"| {cell} | does not fit: more ranks, or devices of more memory |" + " |" * 8)
            continue
        total += found.device_hours * len(runs)
        print(
            f"| {cell} | {short(found.weights.all)} | {found.model_flops / 1e9:.3g} |"
            f" {found.cfg.deepspeed} | {found.cfg.accumulate} |"
            f" {'yes' if found.cfg.model.checkpoint_activations else 'no'} | {found.mfu:.0%} |"
            f" {found.peak[1] / planner.GIB:.1f} | {found.hours:.3g} |"
            f" {found.device_hours * len(runs):,.0f} |"
        )
    left_out = f", without the {without} that do not fit" * bool(without)
    print(
        f"\nin all {total:,.0f} device-hours{left_out}"
        + (f", {total * cluster.price:,.0f} in money" if cluster.price else "")
    )


def launch(args) -> int:
    runs = [run for cell in planned(args).values() for run in cell]
    if args.write:
        return write_scripts(runs, args)
    runs.sort(key=lambda run: run.cfg.seed)  # one seed of every cell before the next
    if not Jobs(runs, args.ranks, args.jobs).go():
        return 1
    print("{}: {n} of {n} runs are complete".format(args.grid, n=len(grid.once(runs))))
    return 0


def write_scripts(runs: list[grid.Planned], args) -> int:
    """One sbatch script a run, for a cluster, with the launcher's processes by srun
    (docs/running.md); and submit.sh, which submits all.
    """
    if (args.write / "submit.sh").exists():
        raise ValueError(
            f"--write {args.write}: it has a submit.sh, which may have been edited; name another"
            " folder, or remove it"
        )
    args.write.mkdir(parents=True, exist_ok=True)
    runs = grid.once(runs)
    submit = [
        "#!/bin/bash",
        "# What needs another's weights waits for it.",
        "set -e",
        'cd "$(dirname "$0")"',
        "declare -A job",
    ]
    for run in runs:
        lines = [command(run, ["python"]), *(line_of(run, item, 1) for item in run.evaluate)]
        train, *evaluate = (shlex.join(["python", *line[1:]]) for line in lines)
        (args.write / f"{run.folder.name}.sbatch").write_text(
            f"""#!/bin/bash
#SBATCH --job-name={run.folder.name}
#SBATCH --chdir={ROOT}
#SBATCH --nodes={args.nodes}
#SBATCH --ntasks-per-node={args.ranks}
#SBATCH --gpus-per-node={args.ranks}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export resume=$([ -e {shlex.quote(f"{run.folder}/config.yaml")} ] && echo --resume)
on_all() {{
  srun bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' bash "$@"
}}
set -e
on_all {train} $resume
"""
            + "".join(f"on_all {line}\n" for line in evaluate)
        )
        after = "".join(f":${{job[{need.name}]}}" for need in run.needs)
        waits = f"--dependency=afterok{after} " * bool(run.needs)
        submit.append(
            f"job[{run.folder.name}]=$(sbatch --parsable {waits}{run.folder.name}.sbatch)"
        )
    (args.write / "submit.sh").write_text(
        "\n".join([*submit, f'echo "submitted {len(runs)} jobs"', ""])
    )
    print(
        f"{args.write}: {len(runs)} scripts; bash {args.write / 'submit.sh'} submits them, each"
        " after those that it needs"
    )
    return 0


def status(args) -> None:
    for cell, runs in planned(args).items():
        for run in runs:
            found = state(run.folder)
            took = (
                f"{clock(found.seconds)}, {short(found.samples_per_s)}/s" if found.seconds else ""
            )
            print(
                f"{cell:24} seed {run.cfg.seed}  {found.state:9} {took or found.reason} "
                f" {run.folder}"
            )


def table(args) -> None:
    """A Markdown table: the metric with its interval, its difference to the first cell, the
    paper's, and the cost.
    """
    one = grid.read(args.grid)
    metric, runs = one.scale(args.scale).metric, planned(args)
    done = {cell: [state(run.folder) for run in found] for cell, found in runs.items()}
    first = next(iter(one.cells))
    base, theirs = html_report.values(done.get(first, []), metric), one.paper.get(first)
    print(f"{one.title}\n\n{args.scale}: {metric}, per cent. The paper: {one.source}.\n")
    print(
        f"| cell | here | to {first} | paper | to {first} | samples/s | seconds | GiB |\n"
        + "|---" * 8
        + "|"
    )
    for cell, results in done.items():
        for item in ("", *one.evaluate.get(cell, ())):
            name, asked = (f"{cell}, {item}", f"{metric} ({item})") if item else (cell, metric)
            mine, paper = html_report.values(results, asked), one.paper.get(name)
            to = f"{paper - theirs:+.1f}" if paper and theirs and name != first else ""
            there = f"| {paper or ''} | {to} |"
            if not mine:
                print(f"| {name} | absent: {why(results, asked)} | {there} | | |")
                continue
            to = (
                html_report.told(difference(mine, base), 100, "+.2f")
                if base and name != first
                else ""
            )
            cost = (
                ["", "", ""]
                if item
                else [
                    f"{mean(results, key):.3g}"
                    for key in ("samples_per_s", "seconds", "memory_gib")
                ]
            )
            value = html_report.told(interval(mine), 100, ".2f")
            print(f"| {name} | {value} n={len(mine)} | {to} {there} {' | '.join(cost)} |")


def plot(args) -> None:
    """The grid's plots, tables and page beside its runs, without pictures of masks, which
    run/report.py has.
    """
    groups = {cell: [state(run.folder) for run in runs] for cell, runs in planned(args).items()}
    one = grid.read(args.grid)
    found, *others = html_report.write(
        args.out / args.scale / f"{Path(args.grid).stem}.html",
        groups,
        title=one.title,
        metric=one.scale(args.scale).metric,
    )
    print(f"wrote {found}, and beside it {', '.join(path.name for path in others)}")


def mean(results: list[Result], name: str) -> float:
    known = [
        getattr(result, name)
        for result in results
        if result.state == "complete" and getattr(result, name)
    ]
    return sum(known) / len(known) if known else float("nan")


def claims(args) -> None:
    found = judged(args.scale, args.seeds, args.out)
    if args.scale != "glyphs":  # what was learned is of that scale
        found = [replace(row, claim=replace(row.claim, learned="")) for row in found]
    metrics = {grid.read(row.claim.grid).scale(args.scale).metric for row in found}
    print(markdown(found, " | ".join(metrics)))


if __name__ == "__main__":
    run_script(main)
