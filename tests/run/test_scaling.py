"""Test grids of runs: shipped grids, shared runs, commands, SLURM scripts, and killed jobs.

bash run/test.sh tests/run/test_scaling.py -m slow -s
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from glimpse.run.lib import config
from glimpse.run.scaling import main
from glimpse.run.study import grid, jobs
from glimpse.tests.helpers.tiny import ROOT, environment, write_dataset, write_finished_run

STEPS = 30
GRIDS = {name: grid.read_grid(name) for name in grid.grid_names()}
SCALES = [(name, scale) for name, spec in GRIDS.items() for scale in spec.scales]


def folders_of(runs: dict[str, list[grid.PlannedRun]]) -> list[Path]:
    return [run.folder for cell in runs.values() for run in cell]


@pytest.fixture
def scaling(monkeypatch, capsys):
    """scaling("table --grid ...") -> (exit code, stdout)."""

    def run(line):
        monkeypatch.setattr(sys, "argv", ["run/scaling.py", *line.split()])
        code = main()
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("name, scale", SCALES)
def test_every_cell_is_a_config(name, scale):
    runs = GRIDS[name].runs(scale, [], 2, Path("out"))

    assert set(runs) == set(GRIDS[name].cells)
    folders = folders_of(runs)
    assert len(folders) == len(set(folders)), "two cells of a grid share a run"
    for cell in runs.values():
        for run in cell:
            cfg = config.load(run.config_file, run.changes)
            assert cfg == run.cfg, "the command line gives the planned config"


def test_the_cells_of_flips_table_8():
    runs = GRIDS["flip_table8"].runs("paper", [], 1, Path("out"))

    settings = {}
    for cell, (run,) in runs.items():
        settings[cell] = (run.cfg.model.size, run.cfg.data.train, run.cfg.samples)
    assert settings == {
        "baseline": ("L/16", ("/data/laion400m",), 12_800_000_000),
        "model": ("H/14", ("/data/laion400m",), 12_800_000_000),
        "data": ("L/16", ("/data/laion2b",), 12_800_000_000),
        "schedule": ("L/16", ("/data/laion400m",), 25_600_000_000),
        "model+data": ("H/14", ("/data/laion2b",), 12_800_000_000),
        "joint": ("H/14", ("/data/laion2b",), 25_600_000_000),
    }


def test_the_costs_of_a_grid(scaling):
    _, output = scaling("plan --grid maskclip_table7 --scale paper --ranks 64 --price 2")

    assert "| with average |" in output
    assert "| without |" in output
    assert "device-hours, which cost " in output

    _, output = scaling(
        "plan --grid maskclip_table7 --ranks 1 --peak-tflops 100 --gpu-memory 0.01 --set batch=2"
    )

    assert "| without | does not fit" in output
    assert "total: 0 device-hours, without the 2 cells that do not fit" in output


def test_grids_share_runs():
    table2 = folders_of(GRIDS["glip_table2"].runs("glyphs", [], 1, Path("out")))
    table7 = folders_of(GRIDS["glip_table7"].runs("glyphs", [], 1, Path("out")))

    shared = set(table2) & set(table7)
    assert len(shared) == 4, "random and Gaussian 50 % masks, with and without tuning"


def test_a_folder_is_named_by_the_settings_that_affect_results():
    path = "run/configs/quickstart.yaml"
    digest = grid.digest(config.load(path))

    for change in (
        "seed=3",
        "run=elsewhere",
        "log_every=3",
        "data.workers=0",
        "deepspeed=ds_configs/zero1.json",
    ):
        assert grid.digest(config.load(path, [change])) == digest

    for change in (
        "samples=129k",
        "views.image.mask=random(0.6)",
        "model.vision.eps=1e-5",
        "data.text_mask=random(0.5)",
    ):
        assert grid.digest(config.load(path, [change])) != digest


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(cells=dict(a=["init={b}"], b=["init={a}"])),
            "cells: a needs b needs a; remove one of these {CELL} references",
        ),
        (
            dict(evaluate=dict(a=["weights teacher"])),
            "evaluate: a: 'weights teacher' is not a further evaluation; use `mask STRATEGY` or"
            " `ensemble N`",
        ),
        (dict(paper={"a, ensemble 2": 1.0}), "paper: unknown 'a, ensemble 2'; known: a, b"),
    ],
)
def test_invalid_grids(change, message, tmp_path):
    tree = dict(
        title="t",
        source="s",
        cells=dict(a=[], b=[]),
        scales=dict(glyphs=dict(config="quickstart", metric="m")),
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree | change))

    with pytest.raises(ValueError, match=re.escape(message)):
        grid.read_grid(str(path)).runs("glyphs", [], 1, tmp_path)


def test_a_grid_that_is_not_yaml(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("title: [")

    with pytest.raises(ValueError, match="tiny.yaml is not YAML"):
        grid.read_grid(str(path))


def test_a_tuned_run_is_the_same_wherever_it_lies(tmp_path):
    cell = "mask 75 + tuning"

    here = GRIDS["flip_table1"].runs("glyphs", [cell], 2, Path("runs"))[cell]
    there = GRIDS["flip_table1"].runs("glyphs", [cell], 2, tmp_path)[cell]

    assert [run.folder.name for run in here] == [run.folder.name for run in there]
    name = grid.strip_seed(str(here[0].folder))
    assert grid.strip_seed(str(there[1].folder)) == name, "seeds differ in -seedN only"


def test_a_grid_sets_seeds_itself(tmp_path):
    with pytest.raises(ValueError, match="--set: seed=5 is set by the grid"):
        GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path, ["seed=5"])


def test_scripts_for_slurm(tmp_path, scaling):
    """Scripts are valid shell, start in the current folder, train, and then evaluate.

    submit.sh submits tuning with a dependency on the run that it tunes.
    """
    line = (
        f"launch --grid flip_table1 --seeds 1 --out {tmp_path}/a;b --write {tmp_path}/jobs"
        " --ranks 8 --nodes 4"
    )

    code, _ = scaling(line)

    assert code == 0
    jobs_folder = tmp_path / "jobs"
    names = {}
    for cell, (run,) in GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path / "a;b").items():
        names[cell] = run.folder.name
    scripts = sorted(jobs_folder.glob("*.sbatch"))
    assert [script.stem for script in scripts] == sorted(names.values())
    for script in [*scripts, jobs_folder / "submit.sh"]:
        subprocess.run(["bash", "-n", script], check=True)

    # A script trains, then evaluates with the options of the grid.
    text = (jobs_folder / f"{names['mask 75']}.sbatch").read_text()
    assert f"--chdir={Path.cwd()}" in text
    assert "--nodes=4" in text
    assert "--ntasks-per-node=8" in text
    train, *evaluations = [line for line in text.splitlines() if line.startswith("on_all ")]
    assert "run/pretrain.py" in train
    assert train.endswith(" $resume")
    assert "--set" in shlex.split(train)
    options = [shlex.split(evaluation)[-2:] for evaluation in evaluations]
    assert options == [["--mask", "random(0.75)"], ["--ensemble", "4"]]

    # submit.sh submits all scripts, tuning after the run that it tunes.
    calls = submit(jobs_folder, tmp_path, len(scripts))
    numbers = {}
    for i, arguments in enumerate(calls, 1):
        name = arguments.split()[-1].removesuffix(".sbatch")
        numbers[name] = i
    base = numbers[names["mask 75"]]
    tuned = numbers[names["mask 75 + tuning"]]
    assert f"--dependency=afterok:{base} " in calls[tuned - 1]
    assert "afterok" not in calls[base - 1]

    # An edited submit.sh is not overwritten.
    with pytest.raises(ValueError, match="jobs/submit.sh exists and may have been edited"):
        scaling(line)


def submit(jobs_folder: Path, tmp_path: Path, count: int) -> list[str]:
    """Run submit.sh with a fake sbatch, and return the arguments of each call.

    The fake prints the number of the call as the id of the job.
    """
    record = tmp_path / "calls"
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {record}\nwc -l < {record}\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"

    process = subprocess.run(
        ["bash", jobs_folder / "submit.sh"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    calls = record.read_text().splitlines()
    assert len(calls) == count
    assert f"submitted {count} jobs" in process.stdout
    return calls


@pytest.mark.parametrize(
    "cells, message",
    [
        ("{50: []}", "tiny.yaml: cells: YAML reads the name 50 as int, not text; put it in quotes"),
        ("{on: []}", "cells: YAML reads the name True as bool, not text"),
        ("{one: [modle.size=H/14]}", "cells: one: modle: unknown 'modle'"),
    ],
)
def test_an_error_in_a_grid_names_its_cell(cells, message, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"title: tiny\nsource: none\ncells: {cells}\n"
        "scales: {glyphs: {config: quickstart, metric: zero_shot/a/top1}}\n"
    )

    with pytest.raises(ValueError, match=re.escape(message)):
        grid.read_grid(str(path)).runs("glyphs", [], 1, tmp_path)


def test_a_table_has_a_row_for_each_way_of_evaluating(tmp_path, scaling):
    (run,) = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]
    write_finished_run(run.folder, run, 0.25, {"ensemble": 2})

    _, output = scaling(f"table --grid flip_table1 --seeds 1 --out {tmp_path}")

    assert "zero_shot/seen_concepts_unseen_style/top5, in per cent" in output
    assert "| mask 50, ensemble 2 | 25.00 n=1 |" in output
    assert "| 68.1 | -0.5 |" in output
    assert "| mask 50 | absent: 1 run: " in output
    assert "| mask 75 | absent: 1 run: not trained | | 68.2 | -0.4 | | | |" in output


def test_launch_reports_that_all_runs_are_complete(tmp_path, scaling):
    runs = GRIDS["flip_table8"].runs("glyphs", ["baseline"], 2, tmp_path)
    for planned_run in runs["baseline"]:
        write_finished_run(planned_run.folder, planned_run, 0.25)

    code, output = scaling(f"launch baseline --grid flip_table8 --seeds 2 --out {tmp_path}")

    assert code == 0
    assert output == "flip_table8: 2 of 2 runs are complete\n"


# --- training


def write_tiny_grid(folder: Path) -> Path:
    """Write a grid of four short runs, one of which fails and one of which depends on it."""
    data = write_dataset(folder / "data")
    settings = [
        f"data.train={data / 'train'}",
        f"data.tokenizer=sentencepiece({data / 'tokenizer.model'})",
        "data.workers=0",
        "model.size=nano/8",
        "model.image_size=32",
        "batch=16",
        f"samples={16 * STEPS}",
        "log_every=1",
        "save_every=64",
        "optim.warmup=64",
        f"evals=[zero_shot:{data / 'eval' / 'shapes'}]",
    ]
    scale = dict(
        config="quickstart",
        metric="zero_shot/shapes/top1",
        changes=dict(more=["views.image.mask=none"]),
        set=settings,
    )
    cells = dict(
        base=[],
        tuned=["init={base}", "more"],
        broken=["data.train=nowhere"],
        after=["init={broken}"],
    )
    tree = dict(
        title="tiny",
        source="none",
        cells=cells,
        evaluate={"base": ["mask random(0.5)"]},
        scales=dict(glyphs=scale),
    )
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(tmp_path):
    """Repeating the command after kills trains every step exactly once.

    The first kill leaves the rank that trains alive, the second one kills all processes of a run.
    """
    path = write_tiny_grid(tmp_path)
    out = tmp_path / "runs"
    options = f"--grid {path} --seeds 1 --out {out}".split()
    launch = [sys.executable, "run/scaling.py", "launch", *options, "--ranks", "1"]
    runs = {}
    for cell, (run,) in grid.read_grid(str(path)).runs("glyphs", [], 1, out).items():
        runs[cell] = run.folder

    launch_until(launch, runs["base"], 5)
    kill_processes(runs["base"], ranks=False)  # its rank continues without a launcher
    launch_until(launch, runs["tuned"], 5)
    kill_processes(runs["tuned"], ranks=True)
    process = subprocess.run(launch, cwd=ROOT, env=environment(), capture_output=True, text=True)

    print(process.stdout)
    assert process.returncode == 1, "the cell `broken` cannot be trained"
    for cell in ("base", "tuned"):
        assert jobs.read_state(runs[cell]).state == "complete", cell
        assert recorded_steps(runs[cell]) == list(range(1, STEPS + 1)), cell
    assert len((runs["base"] / "command.txt").read_text().splitlines()) == 1, "trained once"
    assert any(name.endswith("(mask random(0.5))") for name in jobs.read_state(runs["base"]).final)
    assert "no such folder of shards" in jobs.read_state(runs["broken"]).reason

    table = [sys.executable, "run/scaling.py", "table", *options]
    process = subprocess.run(table, cwd=ROOT, env=environment(), capture_output=True, text=True)

    print(process.stdout)
    assert (
        "| broken | absent: 1 run: exit code 2: error: nowhere: no such folder of shards; see"
        " data.train" in process.stdout
    )
    assert (
        f"| after | absent: 1 run: it depends on {runs['broken']}, which failed" in process.stdout
    )


def launch_until(line: list[str], run: Path, step: int) -> None:
    """Start the command, and kill only its own process when a run has recorded `step` steps."""
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while len(recorded_steps(run)) < step:
        assert process.poll() is None, (run, list(run.parent.rglob("*.log")))
        assert time.time() < deadline, (run, list(run.parent.rglob("*.log")))
        time.sleep(0.05)
    process.kill()
    process.wait()


def kill_processes(run: Path, ranks: bool) -> None:
    """Kill the processes of a run; without `ranks`, only those that are not ranks."""
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
            if str(run) in line and (ranks or "--local_rank" not in line):
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue


def recorded_steps(run: Path) -> list[int]:
    """Return the steps that a run has recorded."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may be incomplete.
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if "loss" in row]
