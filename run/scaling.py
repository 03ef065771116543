"""The papers' experiments as grids of runs: planned, trained, told in tables and plots.

    python run/scaling.py list
        the grids and their cells
    python run/scaling.py plan --grid flip_table8 --scale paper
        what each cell costs
    python run/scaling.py launch --grid flip_table8 --scale glyphs
        train what is not trained yet; the same command goes on
    python run/scaling.py status --grid flip_table8 --scale glyphs
    python run/scaling.py table --grid flip_table8 --scale glyphs
        means over seeds beside the paper's figures
    python run/scaling.py plot --grid flip_table8 --scale glyphs
        curves, cost: PNG, CSV and a page with each run's config
    python run/scaling.py claims --scale glyphs
        what of the papers' claims holds at this scale

A run is named by what it trains, under OUT/SCALE, so grids share what they have in common.
docs/scaling.md has the rest.
"""

import argparse
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
from glimpse.run.study.claims import claimed_runs, format_claims, judge_claims
from glimpse.run.study.jobs import JobQueue, missing_reason, read_state, task_command, train_command
from glimpse.run.study.results import RunResult, difference_interval, mean_interval
from glimpse.run.train.log import clock, short

CLAIMS_COMMANDS = ("plan", "launch", "status")  # with --grid claims: all that the claims are of
COST_FIELDS = ("samples_per_s", "seconds", "memory_gib")  # fields of a Result that `table` shows


def main() -> int | None:
    parser = config.parser(__doc__)
    kinds = parser.add_subparsers(
        required=True, metavar="list|plan|launch|status|table|plot|claims"
    )
    kinds.add_parser("list", help="the grids and their cells").set_defaults(do=list_grids)
    for name, do, text in (
        ("plan", print_costs, "what each cell would cost on a cluster"),
        ("launch", launch, "train what is not trained yet"),
        ("status", print_status, "how far each run is"),
        ("table", print_table, "means over seeds"),
        ("plot", write_plots, "curves, results and cost: plots, tables, a page"),
    ):
        kind = kinds.add_parser(name, help=text)
        takes_claims = name in CLAIMS_COMMANDS
        add_grid_arguments(kind, takes_claims)
        kind.set_defaults(do=do, takes_claims=takes_claims)
        if name == "plan":
            config.cluster_arguments(kind)
        if name == "launch":
            add_launch_arguments(kind)
    kind = kinds.add_parser("claims", help="what of the papers' claims holds")
    add_common_arguments(kind)
    kind.set_defaults(do=print_claims)

    args = parser.parse_args()
    return args.do(args)


def add_common_arguments(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--scale", default="glyphs", help="as the grid has them: paper, glyphs")
    kind.add_argument("--seeds", type=config.count, default=3)
    kind.add_argument(
        "--out", type=Path, default=Path("runs/scaling"), help="where the run folders go"
    )


def add_grid_arguments(kind: argparse.ArgumentParser, takes_claims: bool) -> None:
    kind.add_argument("cells", nargs="*", metavar="CELL", help="default: all")
    grids = f"{', '.join(grid.grid_names())}, or a file"
    if takes_claims:
        grids = f"claims: all that the claims are of; {grids}"
    kind.add_argument("--grid", required=True, help=grids)
    add_common_arguments(kind)
    kind.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of every cell, on top of the scale's",
    )


def add_launch_arguments(kind: argparse.ArgumentParser) -> None:
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


def planned_runs(args: argparse.Namespace) -> dict[str, list[grid.PlannedRun]]:
    """Return {cell: its runs}, one run a seed, of the cells that the command line names."""
    if args.grid == "claims" and args.takes_claims:
        if args.cells:
            raise ValueError(
                f"CELL: {args.cells[0]!r}: --grid claims is of all cells that are claimed of; name"
                " cells with their own grid"
            )
        return claimed_runs(args.scale, args.seeds, args.out, args.set)
    return grid.read_grid(args.grid).runs(args.scale, args.cells, args.seeds, args.out, args.set)


def run_results(args: argparse.Namespace) -> dict[str, list[RunResult]]:
    """Return {cell: what became of its runs} of the cells that the command line names."""
    results = {}
    for cell, runs in planned_runs(args).items():
        results[cell] = [read_state(run.folder) for run in runs]
    return results


def list_grids(args: argparse.Namespace) -> None:
    for name in grid.grid_names():
        spec = grid.read_grid(name)
        print(f"{name}: {spec.title}")
        print(f"  {spec.source}")
        print(f"  cells: {' | '.join(spec.cells)}")
        print(f"  scales: {' | '.join(spec.scales)}")


def print_costs(args: argparse.Namespace) -> None:
    """Print a row for each cell: the cheapest way to fit one of its runs into the cluster.

    The last columns are what such a run and all of the cell's runs take.
    """
    cluster = planner.Cluster.from_args(args)
    print(
        f"{args.ranks} x {cluster.name}, MFU {cluster.mfu:.0%} as the configs are, more where less"
        " is computed twice; run/pretrain.py --plan tells a run's in full\n"
    )
    print(
        "| cell | parameters | GFLOP a sample | JSON | parts | recompute | MFU | GiB a rank | hours"
        " a run | device-hours, all seeds |"
    )
    print("|---" * 10 + "|")

    total = 0.0
    without = 0
    for cell, runs in planned_runs(args).items():
        plan = planner.propose(runs[0].cfg, cluster, args.caption)
        if plan is None:
            without += 1
            print(f"| {cell} | does not fit: more ranks, or devices of more memory |" + " |" * 8)
            continue
        device_hours = plan.device_hours * len(runs)
        total += device_hours
        print(f"| {cell} | {' | '.join(plan_columns(plan))} | {device_hours:,.0f} |")

    left_out = f", without the {without} that do not fit" if without else ""
    money = f", {total * cluster.price:,.0f} in money" if cluster.price else ""
    print(f"\nin all {total:,.0f} device-hours{left_out}{money}")


def plan_columns(plan: planner.Plan) -> list[str]:
    """Return the columns of `costs` between the cell's name and the device-hours."""
    recompute = "yes" if plan.cfg.model.checkpoint_activations else "no"
    return [
        short(plan.parameters.total),
        f"{plan.model_flops / 1e9:.3g}",
        f"{plan.cfg.deepspeed}",
        f"{plan.cfg.accumulate}",
        recompute,
        f"{plan.mfu:.0%}",
        f"{plan.peak[1] / planner.GIB:.1f}",
        f"{plan.hours:.3g}",
    ]


def launch(args: argparse.Namespace) -> int:
    runs = [run for cell in planned_runs(args).values() for run in cell]
    if args.write:
        return write_scripts(runs, args)
    runs.sort(key=lambda run: run.cfg.seed)  # one seed of every cell before the next
    if not JobQueue(runs, args.ranks, args.jobs).run():
        return 1
    count = len(grid.merge_runs(runs))
    print(f"{args.grid}: {count} of {count} runs are complete")
    return 0


def write_scripts(runs: list[grid.PlannedRun], args: argparse.Namespace) -> int:
    """Write one sbatch script a run, for a cluster, and submit.sh, which submits all.

    srun starts the launcher's processes (docs/running.md).
    """
    submit_path = args.write / "submit.sh"
    if submit_path.exists():
        raise ValueError(
            f"--write {args.write}: it has a submit.sh, which may have been edited; name another"
            " folder, or remove it"
        )
    args.write.mkdir(parents=True, exist_ok=True)
    runs = grid.merge_runs(runs)
    submit = [
        "#!/bin/bash",
        "# What needs another's weights waits for it.",
        "set -e",
        'cd "$(dirname "$0")"',
        "declare -A job",
    ]
    for run in runs:
        name = run.folder.name
        (args.write / f"{name}.sbatch").write_text(sbatch_script(run, args))
        waits = ""
        if run.dependencies:
            jobs = "".join(f":${{job[{need.name}]}}" for need in run.dependencies)
            waits = f"--dependency=afterok{jobs} "
        submit.append(f"job[{name}]=$(sbatch --parsable {waits}{name}.sbatch)")
    submit.append(f'echo "submitted {len(runs)} jobs"')
    submit_path.write_text("\n".join(submit) + "\n")
    print(
        f"{args.write}: {len(runs)} scripts; bash {submit_path} submits them, each after those that"
        " it needs"
    )
    return 0


def sbatch_script(run: grid.PlannedRun, args: argparse.Namespace) -> str:
    """Return a script that trains a run, or goes on with it, and then evaluates it."""
    commands = [
        train_command(run, ["python"]),
        *(task_command(run, item, 1) for item in run.evaluate),
    ]
    # line_of begins with the path of this machine's interpreter
    train, *evaluations = [shlex.join(["python", *line[1:]]) for line in commands]

    script = f"""#!/bin/bash
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
    return script + "".join(f"on_all {line}\n" for line in evaluations)


def print_status(args: argparse.Namespace) -> None:
    for cell, runs in planned_runs(args).items():
        for run in runs:
            result = read_state(run.folder)
            progress = result.reason
            if result.seconds:
                progress = f"{clock(result.seconds)}, {short(result.samples_per_s)}/s"
            seed = run.cfg.seed
            print(f"{cell:24} seed {seed}  {result.state:9} {progress}  {run.folder}")


def print_table(args: argparse.Namespace) -> None:
    """Print a Markdown table of the metric, its interval, and the difference to the first cell.

    The paper's figures and the cost stand beside them.
    """
    spec = grid.read_grid(args.grid)
    metric = spec.scale(args.scale).metric
    cells = run_results(args)

    # The first cell of the grid is the baseline, here and in the paper.
    first = next(iter(spec.cells))
    baseline = html_report.final_values(cells.get(first, []), metric)
    paper_baseline = spec.paper.get(first)

    print(f"{spec.title}\n\n{args.scale}: {metric}, per cent. The paper: {spec.source}.\n")
    print(f"| cell | here | to {first} | paper | to {first} | samples/s | seconds | GiB |")
    print("|---" * 8 + "|")
    for cell, results in cells.items():
        for item in ("", *spec.evaluate.get(cell, ())):
            # A row for the plain evaluation, then one for each further way of evaluating.
            name, key = cell, metric
            if item:
                name, key = f"{cell}, {item}", f"{metric} ({item})"

            paper = spec.paper.get(name)
            paper_gain = ""
            if paper and paper_baseline and name != first:
                paper_gain = f"{paper - paper_baseline:+.1f}"
            paper_columns = f"{paper or ''} | {paper_gain}"

            values = html_report.final_values(results, key)
            if not values:
                print(
                    f"| {name} | absent: {missing_reason(results, key)} | | {paper_columns} | | | |"
                )
                continue

            value = (
                f"{html_report.format_interval(mean_interval(values), 100, '.2f')} n={len(values)}"
            )
            gain = ""
            if baseline and name != first:
                gain = html_report.format_interval(
                    difference_interval(values, baseline), 100, "+.2f"
                )
            cost = [""] * len(COST_FIELDS)
            if not item:
                cost = [f"{mean_cost(results, field):.3g}" for field in COST_FIELDS]
            print(f"| {name} | {value} | {gain} | {paper_columns} | {' | '.join(cost)} |")


def write_plots(args: argparse.Namespace) -> None:
    """Write the grid's plots, tables and page beside its runs.

    Pictures of masks are left out; run/report.py has them.
    """
    groups = run_results(args)
    spec = grid.read_grid(args.grid)
    page, *others = html_report.write_report(
        args.out / args.scale / f"{Path(args.grid).stem}.html",
        groups,
        title=spec.title,
        metric=spec.scale(args.scale).metric,
    )
    print(f"wrote {page}, and beside it {', '.join(path.name for path in others)}")


def mean_cost(results: list[RunResult], name: str) -> float:
    """Return the mean of a field over complete runs that have it; nan if there are none."""
    complete = [result for result in results if result.state == "complete"]
    values = [getattr(result, name) for result in complete if getattr(result, name)]
    return sum(values) / len(values) if values else float("nan")


def print_claims(args: argparse.Namespace) -> None:
    rows = judge_claims(args.scale, args.seeds, args.out)
    if args.scale != "glyphs":  # what was learned is of that scale
        rows = [replace(row, claim=replace(row.claim, learned="")) for row in rows]
    metrics = {grid.read_grid(row.claim.grid).scale(args.scale).metric for row in rows}
    print(format_claims(rows, " | ".join(metrics)))


if __name__ == "__main__":
    run_script(main)
