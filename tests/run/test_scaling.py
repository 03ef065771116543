"""Grids of runs: every shipped one resolves, what two have in common is trained once, kills lose
and repeat nothing.

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
GRIDS = {name: grid.read(name) for name in grid.names()}


@pytest.mark.parametrize(
    "name, scale", [(name, scale) for name, one in GRIDS.items() for scale in one.scales]
)
def test_every_cell_is_a_config(name, scale):
    runs = GRIDS[name].runs(scale, [], 2, Path("out"))
    assert list(runs) == list(GRIDS[name].cells) or set(runs) == set(GRIDS[name].cells)
    folders = [run.folder for cell in runs.values() for run in cell]
    assert len(folders) == len(set(folders)), "two cells of a grid train the same"
    for run in (run for cell in runs.values() for run in cell):
        assert config.load(run.source, run.changes) == run.cfg, (
            "the command line trains what was planned"
        )


def test_the_cells_of_flips_table_8():
    runs = {
        cell: runs[0].cfg
        for cell, runs in GRIDS["flip_table8"].runs("paper", [], 1, Path("out")).items()
    }
    assert {cell: (cfg.model.size, cfg.data.train, cfg.samples) for cell, cfg in runs.items()} == {
        "baseline": ("L/16", ("/data/laion400m",), 12_800_000_000),
        "model": ("H/14", ("/data/laion400m",), 12_800_000_000),
        "data": ("L/16", ("/data/laion2b",), 12_800_000_000),
        "schedule": ("L/16", ("/data/laion400m",), 25_600_000_000),
        "model+data": ("H/14", ("/data/laion2b",), 12_800_000_000),
        "joint": ("H/14", ("/data/laion2b",), 25_600_000_000),
    }


def test_what_a_grid_costs_is_told(monkeypatch, capsys):
    line = "run/scaling.py plan --grid maskclip_table7 --scale paper --ranks 64 --price 2"
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    told = capsys.readouterr().out
    assert "| with average |" in told and "| without |" in told and "in money" in told
    line = (
        "run/scaling.py plan --grid maskclip_table7 --ranks 1 --peak-tflops 100 --gpu-memory 0.01"
        " --set batch=2"
    )
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    told = capsys.readouterr().out
    assert (
        "| without | does not fit" in told
        and "in all 0 device-hours, without the 2 that do not fit" in told
    )


def test_what_grids_have_in_common_is_one_run():
    both = [
        {
            run.folder
            for cell in GRIDS[name].runs("glyphs", [], 1, Path("out")).values()
            for run in cell
        }
        for name in ("glip_table2", "glip_table7")
    ]
    assert len(both[0] & both[1]) == 4, "random and gaussian masks of half, and these tuned"


def test_a_folder_is_named_by_what_its_results_depend_on():
    one = config.load("run/configs/quickstart.yaml")
    for same in (
        "seed=3",
        "run=elsewhere",
        "log_every=3",
        "data.workers=0",
        "deepspeed=ds_configs/zero1.json",
    ):
        assert grid.digest(config.load("run/configs/quickstart.yaml", [same])) == grid.digest(one)
    for other in (
        "samples=129k",
        "views.image.mask=random(0.6)",
        "model.vision.eps=1e-5",
        "data.text_mask=random(0.5)",
    ):
        assert grid.digest(config.load("run/configs/quickstart.yaml", [other])) != grid.digest(one)


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
    tree = (
        dict(
            title="t",
            source="s",
            cells=dict(a=[], b=[]),
            scales=dict(glyphs=dict(config="quickstart", metric="m")),
        )
        | change
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=re.escape(said)):
        grid.read(str(tmp_path / "mine.yaml")).runs("glyphs", [], 1, tmp_path)


def test_a_grid_that_is_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: [")
    with pytest.raises(ValueError, match="mine.yaml is no YAML"):
        grid.read(str(tmp_path / "mine.yaml"))


def test_a_tuned_run_is_the_same_wherever_it_lies(tmp_path):
    one, other = (
        GRIDS["flip_table1"].runs("glyphs", ["mask 75 + tuning"], 2, out)["mask 75 + tuning"]
        for out in (Path("runs"), tmp_path)
    )
    assert [run.folder.name for run in one] == [run.folder.name for run in other]
    assert grid.unseeded(str(one[0].folder)) == grid.unseeded(str(other[1].folder)), (
        "and of every seed but for the seed"
    )


def test_a_grid_sets_seeds_itself(tmp_path):
    with pytest.raises(ValueError, match="--set seed=5: a grid sets it"):
        GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path, ["seed=5"])


def test_scripts_for_slurm(tmp_path, monkeypatch):
    """Each is shell, begins at the repository, trains, then evaluates; submit.sh has tuning wait
    for what it tunes.

    sbatch is a stand-in that answers a number and notes what it was asked.
    """
    line = (
        f"run/scaling.py launch --grid flip_table1 --seeds 1 --out {tmp_path}/a;b --write"
        f" {tmp_path}/jobs --ranks 8 --nodes 4"
    )
    monkeypatch.setattr(sys, "argv", line.split())
    assert main() == 0
    runs = GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path / "a;b")
    names = {cell: found[0].folder.name for cell, found in runs.items()}
    scripts = sorted((tmp_path / "jobs").glob("*.sbatch"))
    assert [script.stem for script in scripts] == sorted(names.values())
    for script in [*scripts, tmp_path / "jobs/submit.sh"]:
        subprocess.run(["bash", "-n", script], check=True)
    text = (tmp_path / "jobs" / f"{names['mask 75']}.sbatch").read_text()
    assert f"--chdir={ROOT}" in text and "--nodes=4" in text and "--ntasks-per-node=8" in text
    tasks = [task for task in text.splitlines() if task.startswith("on_all ")]
    assert (
        "run/pretrain.py" in tasks[0]
        and tasks[0].endswith(" $resume")
        and "--set" in shlex.split(tasks[0])
    )
    assert [shlex.split(task)[-2:] for task in tasks[1:]] == [
        ["--mask", "random(0.75)"],
        ["--ensemble", "4"],
    ]
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\nwc -l < {tmp_path}/asked\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "jobs/submit.sh"],
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == len(scripts) and f"submitted {len(scripts)} jobs" in done.stdout
    number = {one.split()[-1].removesuffix(".sbatch"): i for i, one in enumerate(asked, 1)}
    base, tuned = number[names["mask 75"]], number[names["mask 75 + tuning"]]
    assert f"--dependency=afterok:{base} " in asked[tuned - 1] and "afterok" not in asked[base - 1]
    with pytest.raises(ValueError, match="jobs: it has a submit.sh, which may have been edited"):
        main()


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
        f"title: mine\nsource: none\ncells: {cells}\nscales: {{glyphs: {{config: quickstart,"
        " metric: zero_shot/a/top1}}\n"
    )
    with pytest.raises(ValueError, match=re.escape(wrong)):
        grid.read(str(path)).runs("glyphs", [], 1, tmp_path)


def test_a_table_has_a_row_for_each_way_of_evaluating(tmp_path, monkeypatch, capsys):
    runs = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]
    finished(runs[0].folder, runs[0], 0.25, {"ensemble": 2})
    monkeypatch.setattr(
        sys, "argv", f"run/scaling.py table --grid flip_table1 --seeds 1 --out {tmp_path}".split()
    )
    main()
    told = capsys.readouterr().out
    assert "zero_shot/seen_concepts_unseen_style/top5, per cent" in told
    assert "| mask 50, ensemble 2 | 25.00 n=1 |" in told and "| 68.1 | -0.5 |" in told
    assert (
        "| mask 50 | absent: 1 run: " in told
        and "| mask 75 | absent: 1 run: not trained | | 68.2 | -0.4 | | | |" in told
    )


def test_launch_tells_that_all_is_complete(tmp_path, monkeypatch, capsys):
    for planned in GRIDS["flip_table8"].runs("glyphs", ["baseline"], 2, tmp_path)["baseline"]:
        finished(planned.folder, planned, 0.25)
    monkeypatch.setattr(
        sys,
        "argv",
        f"run/scaling.py launch baseline --grid flip_table8 --seeds 2 --out {tmp_path}".split(),
    )
    assert main() == 0 and capsys.readouterr().out == "flip_table8: 2 of 2 runs are complete\n"


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
    """All but the rank that trains is killed, and that goes on; then all of the next run; the same
    command then finishes what is left.
    """
    path, out = tiny_grid(tmp_path), tmp_path / "runs"
    line = [
        sys.executable,
        "run/scaling.py",
        "launch",
        "--grid",
        path,
        "--seeds",
        "1",
        "--out",
        out,
        "--ranks",
        "1",
    ]
    runs = {
        cell: runs[0].folder
        for cell, runs in grid.read(str(path)).runs("glyphs", [], 1, out).items()
    }

    def begun(run: Path, step: int) -> subprocess.Popen:
        process = subprocess.Popen(
            list(map(str, line)),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        limit = time.time() + 120
        while len(steps(run)) < step:
            assert process.poll() is None and time.time() < limit, (runs, list(out.rglob("*.log")))
            time.sleep(0.05)
        process.kill()
        process.wait()
        return process

    def kill(run: Path, ranks: bool) -> None:
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                told = Path(f"/proc/{pid}/cmdline").read_text()
                if str(run) in told and (ranks or "--local_rank" not in told):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue

    begun(runs["base"], 5)
    kill(runs["base"], ranks=False)  # its rank goes on, alone
    begun(runs["tuned"], 5)
    kill(runs["tuned"], ranks=True)
    done = subprocess.run(
        list(map(str, line)), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 1, "one cell cannot be trained"
    for cell in ("base", "tuned"):
        assert jobs.state(runs[cell]).state == "complete" and steps(runs[cell]) == list(
            range(1, STEPS + 1)
        ), cell
    assert len((runs["base"] / "command.txt").read_text().splitlines()) == 1, "trained once"
    assert any(name.endswith("(mask random(0.5))") for name in jobs.state(runs["base"]).final)
    assert "no such folder of shards" in jobs.state(runs["broken"]).reason
    told = subprocess.run(
        list(map(str, [*line[:2], "table", *line[3:-2]])),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    print(told.stdout)
    assert (
        "| broken | absent: 1 run: exit code 2: error: nowhere: no such folder of shards; see"
        " data.train" in told.stdout
    )
    assert f"| after | absent: 1 run: it needs {runs['broken']}, which failed" in told.stdout


def steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    return [row["step"] for row in rows if "loss" in row]
