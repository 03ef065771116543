"""Grids of runs: every shipped one resolves, and what two have in common is trained once.

Kills lose and repeat nothing.

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
from glimpse.tests.helpers.tiny import ROOT, environment, finished, shards

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
    assert len(folders) == len(set(folders)), "two cells of a grid train the same"
    for cell in runs.values():
        for run in cell:
            cfg = config.load(run.config_file, run.changes)
            assert cfg == run.cfg, "the command line trains what was planned"


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


def test_what_a_grid_costs_is_told(scaling):
    _, said = scaling("plan --grid maskclip_table7 --scale paper --ranks 64 --price 2")

    assert "| with average |" in said
    assert "| without |" in said
    assert "in money" in said

    _, said = scaling(
        "plan --grid maskclip_table7 --ranks 1 --peak-tflops 100 --gpu-memory 0.01 --set batch=2"
    )

    assert "| without | does not fit" in said
    assert "in all 0 device-hours, without the 2 that do not fit" in said


def test_what_grids_have_in_common_is_one_run():
    table2 = folders_of(GRIDS["glip_table2"].runs("glyphs", [], 1, Path("out")))
    table7 = folders_of(GRIDS["glip_table7"].runs("glyphs", [], 1, Path("out")))

    common = set(table2) & set(table7)
    assert len(common) == 4, "random and gaussian masks of half, and these tuned"


def test_a_folder_is_named_by_what_its_results_depend_on():
    path = "run/configs/quickstart.yaml"
    digest = grid.digest(config.load(path))

    for idle in (
        "seed=3",
        "run=elsewhere",
        "log_every=3",
        "data.workers=0",
        "deepspeed=ds_configs/zero1.json",
    ):
        assert grid.digest(config.load(path, [idle])) == digest

    for other in (
        "samples=129k",
        "views.image.mask=random(0.6)",
        "model.vision.eps=1e-5",
        "data.text_mask=random(0.5)",
    ):
        assert grid.digest(config.load(path, [other])) != digest


@pytest.mark.parametrize(
    "change, said",
    [
        (
            dict(cells=dict(a=["init={b}"], b=["init={a}"])),
            "cells: a needs b needs a; none of them can be trained first",
        ),
        (
            dict(evaluate=dict(a=["weights teacher"])),
            "evaluate: a: 'weights teacher'; it must be `mask STRATEGY` or `ensemble N`",
        ),
        (dict(paper={"a, ensemble 2": 1.0}), "paper: unknown 'a, ensemble 2'; known: a, b"),
    ],
)
def test_grids_that_cannot_be(change, said, tmp_path):
    tree = dict(
        title="t",
        source="s",
        cells=dict(a=[], b=[]),
        scales=dict(glyphs=dict(config="quickstart", metric="m")),
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree | change))

    with pytest.raises(ValueError, match=re.escape(said)):
        grid.read_grid(str(tmp_path / "mine.yaml")).runs("glyphs", [], 1, tmp_path)


def test_a_grid_that_is_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: [")

    with pytest.raises(ValueError, match="mine.yaml is no YAML"):
        grid.read_grid(str(tmp_path / "mine.yaml"))


def test_a_tuned_run_is_the_same_wherever_it_lies(tmp_path):
    cell = "mask 75 + tuning"

    here = GRIDS["flip_table1"].runs("glyphs", [cell], 2, Path("runs"))[cell]
    there = GRIDS["flip_table1"].runs("glyphs", [cell], 2, tmp_path)[cell]

    assert [run.folder.name for run in here] == [run.folder.name for run in there]
    unseeded = grid.strip_seed(str(there[1].folder))
    assert grid.strip_seed(str(here[0].folder)) == unseeded, "and of every seed but for the seed"


def test_a_grid_sets_seeds_itself(tmp_path):
    with pytest.raises(ValueError, match="--set seed=5: a grid sets it"):
        GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path, ["seed=5"])


def test_scripts_for_slurm(tmp_path, scaling):
    """Each is shell, begins at the repository, trains, then evaluates.

    submit.sh has tuning wait for what it tunes. sbatch is a stand-in that answers a number and
    notes what it was asked.
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

    # A script trains, then evaluates as the grid asks.
    text = (jobs_folder / f"{names['mask 75']}.sbatch").read_text()
    assert f"--chdir={ROOT}" in text
    assert "--nodes=4" in text
    assert "--ntasks-per-node=8" in text
    train, *evaluations = [line for line in text.splitlines() if line.startswith("on_all ")]
    assert "run/pretrain.py" in train
    assert train.endswith(" $resume")
    assert "--set" in shlex.split(train)
    options = [shlex.split(evaluation)[-2:] for evaluation in evaluations]
    assert options == [["--mask", "random(0.75)"], ["--ensemble", "4"]]

    # submit.sh submits each, tuning after the run that it tunes.
    asked = submitted(jobs_folder, tmp_path, len(scripts))
    number = {}
    for i, arguments in enumerate(asked, 1):
        name = arguments.split()[-1].removesuffix(".sbatch")
        number[name] = i
    base = number[names["mask 75"]]
    tuned = number[names["mask 75 + tuning"]]
    assert f"--dependency=afterok:{base} " in asked[tuned - 1]
    assert "afterok" not in asked[base - 1]

    with pytest.raises(ValueError, match="jobs: it has a submit.sh, which may have been edited"):
        scaling(line)


def submitted(jobs_folder: Path, tmp_path: Path, count: int) -> list[str]:
    """Run submit.sh with a stand-in for sbatch, and return the arguments of its calls."""
    asked = tmp_path / "asked"
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {asked}\nwc -l < {asked}\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"

    done = subprocess.run(
        ["bash", jobs_folder / "submit.sh"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    calls = asked.read_text().splitlines()
    assert len(calls) == count
    assert f"submitted {count} jobs" in done.stdout
    return calls


@pytest.mark.parametrize(
    "cells, wrong",
    [
        ("{50: []}", "mine.yaml: cells: 50: YAML reads this name as no text; put it in quotes"),
        ("{on: []}", "cells: True: YAML reads this name as no text"),
        ("{one: [modle.size=H/14]}", "cells: one: modle: unknown 'modle'"),
    ],
)
def test_what_is_wrong_in_a_grid_names_its_cell(cells, wrong, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"title: mine\nsource: none\ncells: {cells}\n"
        "scales: {glyphs: {config: quickstart, metric: zero_shot/a/top1}}\n"
    )

    with pytest.raises(ValueError, match=re.escape(wrong)):
        grid.read_grid(str(path)).runs("glyphs", [], 1, tmp_path)


def test_a_table_has_a_row_for_each_way_of_evaluating(tmp_path, scaling):
    (run,) = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]
    finished(run.folder, run, 0.25, {"ensemble": 2})

    _, said = scaling(f"table --grid flip_table1 --seeds 1 --out {tmp_path}")

    assert "zero_shot/seen_concepts_unseen_style/top5, per cent" in said
    assert "| mask 50, ensemble 2 | 25.00 n=1 |" in said
    assert "| 68.1 | -0.5 |" in said
    assert "| mask 50 | absent: 1 run: " in said
    assert "| mask 75 | absent: 1 run: not trained | | 68.2 | -0.4 | | | |" in said


def test_launch_tells_that_all_is_complete(tmp_path, scaling):
    runs = GRIDS["flip_table8"].runs("glyphs", ["baseline"], 2, tmp_path)
    for planned in runs["baseline"]:
        finished(planned.folder, planned, 0.25)

    code, said = scaling(f"launch baseline --grid flip_table8 --seeds 2 --out {tmp_path}")

    assert code == 0
    assert said == "flip_table8: 2 of 2 runs are complete\n"


# --- training


def tiny_grid(folder: Path) -> Path:
    data = shards(folder / "data")
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
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(tmp_path):
    """All but the rank that trains is killed, and that goes on; then all of the next run.

    The same command then finishes what is left.
    """
    path = tiny_grid(tmp_path)
    out = tmp_path / "runs"
    options = f"--grid {path} --seeds 1 --out {out}".split()
    launch = [sys.executable, "run/scaling.py", "launch", *options, "--ranks", "1"]
    runs = {}
    for cell, (run,) in grid.read_grid(str(path)).runs("glyphs", [], 1, out).items():
        runs[cell] = run.folder

    launch_until(launch, runs["base"], 5)
    kill(runs["base"], ranks=False)  # its rank goes on, alone
    launch_until(launch, runs["tuned"], 5)
    kill(runs["tuned"], ranks=True)
    done = subprocess.run(launch, cwd=ROOT, env=environment(), capture_output=True, text=True)

    print(done.stdout)
    assert done.returncode == 1, "one cell cannot be trained"
    for cell in ("base", "tuned"):
        assert jobs.read_state(runs[cell]).state == "complete", cell
        assert steps(runs[cell]) == list(range(1, STEPS + 1)), cell
    assert len((runs["base"] / "command.txt").read_text().splitlines()) == 1, "trained once"
    assert any(name.endswith("(mask random(0.5))") for name in jobs.read_state(runs["base"]).final)
    assert "no such folder of shards" in jobs.read_state(runs["broken"]).reason

    table = [sys.executable, "run/scaling.py", "table", *options]
    done = subprocess.run(table, cwd=ROOT, env=environment(), capture_output=True, text=True)

    print(done.stdout)
    assert (
        "| broken | absent: 1 run: exit code 2: error: nowhere: no such folder of shards; see"
        " data.train" in done.stdout
    )
    assert f"| after | absent: 1 run: it needs {runs['broken']}, which failed" in done.stdout


def launch_until(line: list[str], run: Path, step: int) -> None:
    """Launch, and kill the launching process, and no other, after so many steps of a run."""
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.time() + 120
    while len(steps(run)) < step:
        assert process.poll() is None, (run, list(run.parent.rglob("*.log")))
        assert time.time() < limit, (run, list(run.parent.rglob("*.log")))
        time.sleep(0.05)
    process.kill()
    process.wait()


def kill(run: Path, ranks: bool) -> None:
    """Kill the processes of a run: also its ranks, or all but them."""
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
            if str(run) in line and (ranks or "--local_rank" not in line):
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue


def steps(run: Path) -> list[int]:
    """Return the steps that a run has recorded."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may be half written.
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if "loss" in row]
