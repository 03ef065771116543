"""Train the papers' experiments as grids of runs, and compare the results with the papers.

    python run/scaling.py list
        the grids and their cells
    python run/scaling.py plan --grid flip_table8 --scale paper
        what each cell costs on a cluster
    python run/scaling.py launch --grid flip_table8 --scale glyphs
        train all runs that are not complete; repeat the command to continue
    python run/scaling.py status --grid flip_table8 --scale glyphs
        the state and progress of each run
    python run/scaling.py table --grid flip_table8 --scale glyphs
        means over seeds next to the paper's values
    python run/scaling.py plot --grid flip_table8 --scale glyphs
        plots (PNG), tables (CSV), and an HTML page with each run's config
    python run/scaling.py claims --scale glyphs
        which of the papers' claims are reproduced at this scale

Run folders are OUT/SCALE/METHOD-DIGEST-seedN, where the digest identifies the settings, so grids
share the runs that they have in common. See docs/scaling.md.
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
from glimpse.run.plan import planner
from glimpse.run.reports import html_report, plots
from glimpse.run.study import grid
from glimpse.run.study.claims import claimed_runs, format_claims, judge_claims
from glimpse.run.study.jobs import (
    JobQueue,
    missing_reason,
    read_state,
    task_command,
    train_command,
)
from glimpse.run.study.results import RunResult, difference_interval, mean_interval
from glimpse.run.train.log import format_count, format_duration

CLAIMS_COMMANDS = ("plan", "launch", "status")  # accept --grid claims: all cells in claims.yaml
COST_FIELDS = ("samples_per_s", "seconds", "memory_gib")  # fields of RunResult in a table


def main() -> int | None:
    parser = config.argument_parser(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="list|plan|launch|status|table|plot|claims"
    )
    commands.add_parser("list", help="list the grids and their cells").set_defaults(do=list_grids)
    for name, do, text in (
        ("plan", print_costs, "predict the cost of each cell on a cluster"),
        ("launch", launch, "train all runs that are not complete"),
        ("status", print_status, "print the state and progress of each run"),
        ("table", print_table, "print means over seeds next to the paper's values"),
        ("plot", write_plots, "write plots, tables and an HTML page"),
    ):
        command = commands.add_parser(name, help=text)
        takes_claims = name in CLAIMS_COMMANDS
        add_grid_arguments(command, takes_claims)
        command.set_defaults(do=do, takes_claims=takes_claims)
        if name == "plan":
            config.add_cluster_arguments(command)
        if name == "launch":
            add_launch_arguments(command)
    command = commands.add_parser("claims", help="compare the papers' claims with the runs")
    add_common_arguments(command)
    command.set_defaults(do=print_claims)

    args = parser.parse_args()
    return args.do(args)


def add_common_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scale", default="glyphs", help="a scale of the grid: glyphs (default) or paper"
    )
    command.add_argument(
        "--seeds", type=config.positive_int, default=3, help="runs per cell, with seeds 0 to N - 1"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs/scaling"),
        help="parent of the run folders; default: runs/scaling",
    )


def add_grid_arguments(command: argparse.ArgumentParser, takes_claims: bool) -> None:
    command.add_argument("cells", nargs="*", metavar="CELL", help="default: all cells")
    grids = f"one of {', '.join(grid.grid_names())}, or the path of a YAML file"
    if takes_claims:
        grids += "; or claims, for all cells in run/claims.yaml"
    command.add_argument("--grid", required=True, help=grids)
    add_common_arguments(command)
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override config keys of every cell, after those of the scale",
    )


def add_launch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ranks", type=config.positive_int, default=2, help="processes (or GPUs) per run and node"
    )
    command.add_argument(
        "--jobs",
        type=config.positive_int,
        default=1,
        help="runs at a time, each on --ranks processes",
    )
    command.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="write a SLURM script for each run instead of training",
    )
    command.add_argument(
        "--nodes",
        type=config.positive_int,
        default=1,
        help="nodes of a SLURM script, each with --ranks processes",
    )


def planned_runs(args: argparse.Namespace) -> dict[str, list[grid.PlannedRun]]:
    """Return {cell: one run per seed} for the cells on the command line."""
    if args.grid == "claims" and args.takes_claims:
        if args.cells:
            raise ValueError(
                f"CELL: {args.cells[0]!r} cannot be combined with --grid claims, which selects all"
                " cells of claims; use the cell's own grid"
            )
        return claimed_runs(args.scale, args.seeds, args.out, args.set)
    return grid.read_grid(args.grid).runs(args.scale, args.cells, args.seeds, args.out, args.set)


def run_results(args: argparse.Namespace) -> dict[str, list[RunResult]]:
    """Return {cell: results of its runs} for the cells on the command line."""
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
    """Print a row per cell: the cheapest settings with which one of its runs fits the cluster.

    The last columns are the hours of one run, and the device-hours of all runs of the cell.
    """
    cluster = planner.Cluster.from_args(args)
    print(
        f"{args.ranks} x {cluster.name}, MFU {cluster.mfu:.0%} with the configs' own settings and"
        " more if less is recomputed. See `run/pretrain.py --plan` for the details of a run.\n"
    )
    print(
        "| cell | parameters | GFLOP per sample | DeepSpeed JSON | accumulate | checkpointing | MFU"
        " | GiB per rank | hours per run | device-hours, all seeds |"
    )
    print("|---" * 10 + "|")

    total = 0.0
    without_fit = 0
    for cell, runs in planned_runs(args).items():
        plan = planner.propose(runs[0].cfg, cluster, args.caption)
        if plan is None:
            without_fit += 1
            print(f"| {cell} | does not fit: use more ranks or more memory |" + " |" * 8)
            continue
        device_hours = plan.device_hours * len(runs)
        total += device_hours
        print(f"| {cell} | {' | '.join(plan_columns(plan))} | {device_hours:,.0f} |")

    note = f", without the {without_fit} cells that do not fit" if without_fit else ""
    cost = f", which cost {total * cluster.price:,.0f}" if cluster.price else ""
    print(f"\ntotal: {total:,.0f} device-hours{cost}{note}")


def plan_columns(plan: planner.Plan) -> list[str]:
    """Return the columns of `print_costs` between the cell's name and the device-hours."""
    checkpointing = "yes" if plan.cfg.model.checkpoint_activations else "no"
    return [
        format_count(plan.parameters.total),
        f"{plan.model_flops / 1e9:.3g}",
        f"{plan.cfg.deepspeed}",
        f"{plan.cfg.accumulate}",
        checkpointing,
        f"{plan.mfu:.0%}",
        f"{plan.peak[1] / planner.GIB:.1f}",
        f"{plan.hours:.3g}",
    ]


def launch(args: argparse.Namespace) -> int:
    """Train the runs, or write scripts for them; return 1 if some failed or were interrupted."""
    runs = [run for cell in planned_runs(args).values() for run in cell]
    if args.write:
        return write_scripts(runs, args)
    # One seed of every cell before the next seed, so that all cells can be compared early.
    runs.sort(key=lambda run: run.cfg.seed)
    if not JobQueue(runs, args.ranks, args.jobs).run():
        return 1
    count = len(grid.merge_runs(runs))
    print(f"{args.grid}: {count} of {count} runs are complete")
    return 0


def write_scripts(runs: list[grid.PlannedRun], args: argparse.Namespace) -> int:
    """Write one sbatch script per run, and submit.sh, which submits them in order.

    In a script, srun starts the processes of the run (docs/launching.md).
    """
    submit_path = args.write / "submit.sh"
    if submit_path.exists():
        raise ValueError(
            f"--write: {submit_path} exists and may have been edited; use another folder, or remove"
            " it"
        )
    args.write.mkdir(parents=True, exist_ok=True)
    runs = grid.merge_runs(runs)
    submit = [
        "#!/bin/bash",
        "# Submit all runs. A run that starts from the weights of another run waits for it.",
        "set -e",
        'cd "$(dirname "$0")"',
        "declare -A job",
    ]
    for run in runs:
        name = run.folder.name
        (args.write / f"{name}.sbatch").write_text(sbatch_script(run, args))
        option = ""
        if run.dependencies:
            jobs = "".join(f":${{job[{folder.name}]}}" for folder in run.dependencies)
            option = f"--dependency=afterok{jobs} "
        submit.append(f"job[{name}]=$(sbatch --parsable {option}{name}.sbatch)")
    submit.append(f'echo "submitted {len(runs)} jobs"')
    submit_path.write_text("\n".join(submit) + "\n")
    print(f"wrote {len(runs)} scripts to {args.write}; submit them with: bash {submit_path}")
    return 0


def sbatch_script(run: grid.PlannedRun, args: argparse.Namespace) -> str:
    """Return a script that trains or resumes a run, and then evaluates it."""
    lines = [
        train_command(run, ["python"]),
        *(task_command(run, item, 1) for item in run.evaluate),
    ]
    # The command line of an evaluation starts with the path of this machine's interpreter.
    train, *evaluations = [shlex.join(["python", *line[1:]]) for line in lines]

    # Paths in a config are relative to the folder in which this command was called.
    script = f"""#!/bin/bash
#SBATCH --job-name={run.folder.name}
#SBATCH --chdir={Path.cwd()}
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
                progress = (
                    f"{format_duration(result.seconds)}, {format_count(result.samples_per_s)}/s"
                )
            seed = run.cfg.seed
            print(f"{cell:24} seed {seed}  {result.state:9} {progress}  {run.folder}")


def print_table(args: argparse.Namespace) -> None:
    """Print a Markdown table: the metric, its difference to the first cell, the paper, and cost."""
    spec = grid.read_grid(args.grid)
    metric = spec.scale(args.scale).metric
    cells = run_results(args)

    # The first cell of the grid is the baseline, for the runs and in the paper.
    baseline = next(iter(spec.cells))
    baseline_values = html_report.final_values(cells.get(baseline, []), metric)
    paper_baseline = spec.paper.get(baseline)

    print(f"{spec.title}\n\n{args.scale}: {metric}, in per cent. Paper: {spec.source}.\n")
    print(f"| cell | here | vs. {baseline} | paper | vs. {baseline} | samples/s | seconds | GiB |")
    print("|---" * 8 + "|")
    for cell, results in cells.items():
        # A row for the evaluation in training, then one for each further evaluation.
        for item in ("", *spec.evaluate.get(cell, ())):
            name, key = cell, metric
            if item:
                name, key = f"{cell}, {item}", f"{metric} ({item})"

            paper = spec.paper.get(name)
            paper_gain = ""
            if paper and paper_baseline and name != baseline:
                paper_gain = f"{paper - paper_baseline:+.1f}"
            paper_columns = f"{paper or ''} | {paper_gain}"

            values = html_report.final_values(results, key)
            if not values:
                reason = missing_reason(results, key)
                print(f"| {name} | absent: {reason} | | {paper_columns} | | | |")
                continue

            value = html_report.format_interval(mean_interval(values), 100, ".2f")
            gain = ""
            if baseline_values and name != baseline:
                difference = difference_interval(values, baseline_values)
                gain = html_report.format_interval(difference, 100, "+.2f")
            cost = [""] * len(COST_FIELDS)
            if not item:
                cost = [f"{mean_cost(results, field):.3g}" for field in COST_FIELDS]
            print(
                f"| {name} | {value} n={len(values)} | {gain} | {paper_columns} |"
                f" {' | '.join(cost)} |"
            )


def write_plots(args: argparse.Namespace) -> None:
    """Write the grid's plots, tables and HTML page next to its runs.

    The page has no pictures of masks; run/report.py adds those.
    """
    plots.check_matplotlib()
    groups = run_results(args)
    spec = grid.read_grid(args.grid)
    page, *files = html_report.write_report(
        args.out / args.scale / f"{Path(args.grid).stem}.html",
        groups,
        title=spec.title,
        metric=spec.scale(args.scale).metric,
    )
    print(f"wrote {page}, and next to it {', '.join(path.name for path in files)}")


def mean_cost(results: list[RunResult], name: str) -> float:
    """Return the mean of a field over the complete runs that have it; nan if there are none."""
    complete = [result for result in results if result.state == "complete"]
    values = [getattr(result, name) for result in complete if getattr(result, name)]
    return sum(values) / len(values) if values else float("nan")


def print_claims(args: argparse.Namespace) -> None:
    results = judge_claims(args.scale, args.seeds, args.out)
    if args.scale != "glyphs":  # the explanations in claims.yaml are about the glyphs scale
        results = [replace(result, claim=replace(result.claim, learned="")) for result in results]
    metrics = set()
    for result in results:
        metrics.add(grid.read_grid(result.claim.grid).scale(args.scale).metric)
    print(format_claims(results, " | ".join(sorted(metrics))))


if __name__ == "__main__":
    run_script(main)
