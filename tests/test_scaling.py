"""Grids of runs: every shipped one resolves, what two have in common is trained once, kills lose and repeat nothing, claims are judged.

    bash run/test.sh tests/test_scaling.py -m slow -s
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher import runner

from run.lib import claims, config, grid, jobs
from run.scaling import main
from tests.tiny import ROOT, environment, shards

STEPS = 30
GRIDS = {name: grid.read(name) for name in grid.names()}


@pytest.mark.parametrize("name, scale", [(name, scale) for name, one in GRIDS.items() for scale in one.scales])
def test_every_cell_is_a_config(name, scale):
    runs = GRIDS[name].runs(scale, [], 2, Path("out"))
    assert list(runs) == list(GRIDS[name].cells) or set(runs) == set(GRIDS[name].cells)
    folders = [run.folder for cell in runs.values() for run in cell]
    assert len(folders) == len(set(folders)), "two cells of a grid train the same"
    for run in (run for cell in runs.values() for run in cell):
        assert config.load(run.source, run.changes) == run.cfg, "the command line trains what was planned"


def test_the_cells_of_flips_table_8():
    runs = {cell: runs[0].cfg for cell, runs in GRIDS["flip_table8"].runs("paper", [], 1, Path("out")).items()}
    assert {cell: (cfg.model.size, cfg.data.train, cfg.samples) for cell, cfg in runs.items()} == {
        "baseline": ("L/16", ("/data/laion400m",), 12_800_000_000), "model": ("H/14", ("/data/laion400m",), 12_800_000_000),
        "data": ("L/16", ("/data/laion2b",), 12_800_000_000), "schedule": ("L/16", ("/data/laion400m",), 25_600_000_000),
        "model+data": ("H/14", ("/data/laion2b",), 12_800_000_000), "joint": ("H/14", ("/data/laion2b",), 25_600_000_000)}


def test_what_a_grid_costs_is_told(monkeypatch, capsys):
    line = "run/scaling.py plan --grid maskclip_table7 --scale paper --ranks 64 --price 2"
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    told = capsys.readouterr().out
    assert "| with average |" in told and "| without |" in told and "in money" in told


def test_what_grids_have_in_common_is_one_run():
    both = [{run.folder for cell in GRIDS[name].runs("glyphs", [], 1, Path("out")).values() for run in cell}
            for name in ("glip_table2", "glip_table7")]
    assert len(both[0] & both[1]) == 4, "random and gaussian masks of half, and these tuned"


def test_a_folder_is_named_by_what_its_results_depend_on():
    one = config.load("run/configs/quickstart.yaml")
    for same in ("seed=3", "run=elsewhere", "log_every=3", "data.workers=0", "deepspeed=ds_configs/zero1.json"):
        assert grid.digest(config.load("run/configs/quickstart.yaml", [same])) == grid.digest(one)
    for other in ("samples=129k", "views.image.mask=random(0.6)", "model.vision.eps=1e-5", "data.text_mask=random(0.5)"):
        assert grid.digest(config.load("run/configs/quickstart.yaml", [other])) != grid.digest(one)


@pytest.mark.parametrize("claim", claims.read(), ids=lambda claim: claim.says)
def test_claims_are_of_cells_and_say_what_their_papers_do(claim):
    one = GRIDS[claim.grid]
    for cell, how, paper in ((claim.better, claim.better_as, claim.paper[0]), (claim.worse, claim.worse_as, claim.paper[1])):
        assert cell in one.cells
        assert not how or how in one.evaluate[cell]
        assert one.paper[f"{cell}, {how}" if how else cell] == paper
    assert claim.paper[0] > claim.paper[1]


def test_there_are_claims_of_all_four_papers():
    rows = claims.read()
    assert len(rows) >= 12 and {row.source.split()[0] for row in rows} == {"FLIP", "GLIP", "A-CLIP", "MaskCLIP"}


@pytest.mark.parametrize("change, said", [
    (dict(cells=dict(a=["init={b}"], b=["init={a}"])), "cells: a needs b needs a; none of them can be trained first"),
    (dict(evaluate=dict(a=["weights teacher"])), "evaluate: a: 'weights teacher'; it must be `mask STRATEGY` or `ensemble N`"),
    (dict(paper={"a, ensemble 2": 1.0}), "paper: unknown 'a, ensemble 2'; known: a, b")])
def test_grids_that_cannot_be(change, said, tmp_path):
    tree = dict(title="t", source="s", cells=dict(a=[], b=[]), scales=dict(glyphs=dict(config="quickstart", metric="m"))) | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=re.escape(said)):
        grid.read(str(tmp_path / "mine.yaml")).runs("glyphs", [], 1, tmp_path)


def test_a_grid_that_is_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: [")
    with pytest.raises(ValueError, match="mine.yaml is no YAML"):
        grid.read(str(tmp_path / "mine.yaml"))


def test_a_tuned_run_is_the_same_wherever_it_lies(tmp_path):
    one, other = (GRIDS["flip_table1"].runs("glyphs", ["mask 75 + tuning"], 2, out)["mask 75 + tuning"] for out in (Path("runs"), tmp_path))
    assert [run.folder.name for run in one] == [run.folder.name for run in other]
    assert grid.unseeded(str(one[0].folder)) == grid.unseeded(str(other[1].folder)), "and of every seed but for the seed"


def test_a_grid_sets_seeds_itself(tmp_path):
    with pytest.raises(ValueError, match="--set seed=5: a grid sets it"):
        GRIDS["flip_table1"].runs("glyphs", [], 1, tmp_path, ["seed=5"])


def test_scripts_for_slurm(tmp_path, monkeypatch):
    """Each is shell, begins at the repository, trains, then evaluates; submit.sh has tuning wait for what it tunes.

    sbatch is a stand-in that answers a number and notes what it was asked."""
    line = f"run/scaling.py launch --grid flip_table1 --seeds 1 --out {tmp_path}/a;b --write {tmp_path}/jobs --ranks 8 --nodes 4"
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
    assert "run/pretrain.py" in tasks[0] and tasks[0].endswith(" $resume") and "--set" in shlex.split(tasks[0])
    assert [shlex.split(task)[-2:] for task in tasks[1:]] == [["--mask", "random(0.75)"], ["--ensemble", "4"]]
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\nwc -l < {tmp_path}/asked\n')
    stand_in.chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "jobs/submit.sh"], env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
                          capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == len(scripts) and f"submitted {len(scripts)} jobs" in done.stdout
    number = {one.split()[-1].removesuffix(".sbatch"): i for i, one in enumerate(asked, 1)}
    base, tuned = number[names["mask 75"]], number[names["mask 75 + tuning"]]
    assert f"--dependency=afterok:{base} " in asked[tuned - 1] and "afterok" not in asked[base - 1]
    with pytest.raises(ValueError, match="jobs: it has a submit.sh, which may have been edited"):
        main()


@pytest.mark.parametrize("cells, wrong", [("{50: []}", "mine.yaml: cells: 50: YAML reads this name as no text; put it in quotes"),
                                          ("{on: []}", "cells: True: YAML reads this name as no text"),
                                          ("{one: [modle.size=H/14]}", "cells: one: modle: unknown 'modle'")])
def test_what_is_wrong_in_a_grid_names_its_cell(cells, wrong, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"title: mine\nsource: none\ncells: {cells}\nscales: {{glyphs: {{config: quickstart, metric: zero_shot/a/top1}}}}\n")
    with pytest.raises(ValueError, match=re.escape(wrong)):
        grid.read(str(path)).runs("glyphs", [], 1, tmp_path)


def test_a_table_has_a_row_for_each_way_of_evaluating(tmp_path, monkeypatch, capsys):
    runs = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]
    finished(runs[0].folder, runs[0], 0.25, {"ensemble": 2})
    monkeypatch.setattr(sys, "argv", f"run/scaling.py table --grid flip_table1 --seeds 1 --out {tmp_path}".split())
    main()
    told = capsys.readouterr().out
    assert "zero_shot/seen_concepts_unseen_style/top5, per cent" in told
    assert "| mask 50, ensemble 2 | 25.00 n=1 |" in told and "| 68.1 | -0.5 |" in told
    assert "| mask 50 | absent: 1 run: " in told and "| mask 75 | absent: 1 run: not trained | | 68.2 | -0.4 | | | |" in told


def finished(run: Path, planned: grid.Planned, value: float, how: dict | None = None) -> None:
    """A run folder as after training, whose metric is `value`, evaluated as `how` says."""
    run.mkdir(parents=True)
    config.save(planned.cfg, run / "config.yaml", {})
    samples = planned.cfg.steps * planned.cfg.batch
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=1, samples=samples, loss=1.0, samples_per_s=100.0)) + "\n")
    row = {"step": 1, "samples": samples, "weights": "student", **(how or {}), "zero_shot/seen_concepts_unseen_style/top5": value}
    (run / "results.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("gains, verdict", [((0.02, 0.03, 0.04), "reproduced"), ((-0.02, 0.01, 0.00), "not distinguishable"),
                                            ((-0.02, -0.03, -0.02), "opposite"), ((0.02, 0.03), "absent")])
def test_a_verdict_is_of_the_interval(gains, verdict, tmp_path):
    claim = next(claim for claim in claims.read() if claim.better == "gaussian 50")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for planned in runs[claim.worse]:
        finished(planned.folder, planned, 0.1)
    for planned, gain in zip(runs[claim.better], gains):
        finished(planned.folder, planned, 0.1 + gain)
    found = claims.judge(claim, "glyphs", 3, tmp_path)
    assert found.verdict == verdict
    line = claims.markdown([found], "top5")
    assert verdict in line and (("1 run: not trained" in line) == (verdict == "absent"))
    line = claims.markdown([replace(found, claim=replace(claim, learned="why so"))], "top5")
    assert line.endswith(f"- {claim.says}: {verdict}. why so") == (verdict != "absent"), "nothing was learned of what was not run"


@pytest.mark.parametrize("no_gain, seeds, verdict", [
    (False, ((0.30, 0.20, 0.25), (0.28, 0.18, 0.23)), "reproduced"),
    (False, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "not distinguishable"),
    (True, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "reproduced"), (True, ((0.28, 0.18, 0.23), (0.30, 0.20, 0.25)), "opposite")])
def test_what_began_from_the_other_is_compared_seed_by_seed(no_gain, seeds, verdict, tmp_path):
    claim = replace(next(claim for claim in claims.read() if claim.better == "mask 75 + tuning"), no_gain=no_gain)
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for cell, values in zip((claim.better, claim.worse), seeds):
        for planned, value in zip(runs[cell], values):
            finished(planned.folder, planned, value)
    assert claims.judge(claim, "glyphs", 3, tmp_path).verdict == verdict


def test_seeds_that_only_one_side_has_are_not_compared(tmp_path):
    claim = next(claim for claim in claims.read() if claim.better == "mask 75 + tuning")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 5, tmp_path)
    for seeds, cell in (((0, 1, 2), claim.better), ((2, 3, 4), claim.worse)):
        for seed in seeds:
            finished(runs[cell][seed].folder, runs[cell][seed], 0.2 + 0.01 * seed + 0.1 * (cell == claim.better))
    found = claims.judge(claim, "glyphs", 5, tmp_path)
    assert (found.verdict, found.reason) == ("absent", "1 of 3 seeds have both")
    for seed in (3, 4):
        finished(runs[claim.better][seed].folder, runs[claim.better][seed], 0.3 + 0.01 * seed)
    found = claims.judge(claim, "glyphs", 5, tmp_path)
    assert found.verdict == "reproduced" and found.seeds == (3, 3) and found.found == pytest.approx((0.1, 0.1, 0.1))


def test_all_that_is_claimed_of_can_be_launched_at_once(tmp_path):
    runs = claims.tested("glyphs", 3, tmp_path)
    folders = {run.folder: run for cell in runs.values() for run in cell}
    assert len(folders) == sum(map(len, runs.values())) == 3 * len(runs)
    for claim in claims.read():
        for cell, how in ((claim.better, claim.better_as), (claim.worse, claim.worse_as)):
            run = folders[GRIDS[claim.grid].runs("glyphs", [cell], 3, tmp_path)[cell][2].folder]
            assert not how or how in run.evaluate
    needed = {path for cell in runs.values() for run in cell for path in run.needs}
    assert needed and needed <= set(folders), "what a cell begins from is among them"
    one, *others = folders.values()
    again = grid.once([replace(one, evaluate=("ensemble 2",)), *others, replace(one, evaluate=("mask random(0.5)", "ensemble 2"))])
    assert again == [replace(one, evaluate=("ensemble 2", "mask random(0.5)")), *others]


@pytest.mark.parametrize("asked", [False, True])
def test_a_failure_is_told_by_its_own_attempt(asked, tmp_path):
    """Not by what an earlier one left in the log, and not at all where it was asked to stop."""
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    job, log = jobs.Job(planned), jobs.beside(planned.folder, "log")
    log.parent.mkdir(parents=True)
    log.write_text("error: of yesterday\n")
    assert job.claim() and not jobs.Job(planned).claim()
    job.start([sys.executable, "-c", "import sys; sys.exit('error: of today')"])
    job.process.wait()
    job.ended(asked)
    failed = jobs.beside(planned.folder, "failed")
    assert not failed.exists() if asked else failed.read_text() == "exit code 1: error: of today\n"
    assert jobs.Job(planned).claim(), "its lock is free"


def test_an_evaluation_that_leaves_no_result_is_made_once(tmp_path):
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    finished(planned.folder, planned, 0.25)
    told = []
    launcher = jobs.Jobs([planned], 1, 1, told.append)
    job = launcher.waiting[0]
    job.made = (jobs.left_to_do(planned),)
    launcher.fill()
    assert not launcher.running and not launcher.waiting and "has no result of that" in told[-1] and planned.folder in launcher.failed


HOLDER = """
import fcntl, pathlib, sys, time
home = pathlib.Path(sys.argv[1])
file = open(home / "lock", "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(2)
(home / "saved").touch()
"""


def test_who_asks_to_stop_waits_for_the_rank_that_saves(tmp_path):
    """DeepSpeed's launcher is gone before its rank has saved."""
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"][0]
    planned.folder.mkdir(parents=True)
    rank = subprocess.Popen([sys.executable, "-c", HOLDER, str(planned.folder)], stdout=subprocess.PIPE)
    rank.stdout.readline()
    launcher = jobs.Jobs([planned], 1, 1, lambda told: None)
    job = launcher.waiting.pop()
    job.lock, job.process = os.open(tmp_path / "any", os.O_CREAT), subprocess.Popen(["true"])
    launcher.running, launcher.stopping = [job], True
    job.process.wait()
    assert not launcher.go() and (planned.folder / "saved").exists()
    rank.wait()


def test_jobs_on_gpus_have_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    planned = GRIDS["flip_table1"].runs("glyphs", ["mask 50"], 1, tmp_path)["mask 50"]
    jobs.Jobs(planned, 4, 2)
    with pytest.raises(ValueError, match="--jobs 3: with --ranks 4 each they take 12 GPUs; this machine has 8"):
        jobs.Jobs(planned, 4, 3)
    for slot, own in ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (1, [3])):
        if own == [3]:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
        args = runner.parse_args(jobs.line_of(planned[0], "", len(own), slot)[1:])
        assert args.num_gpus == args.num_nodes == -1
        assert runner.parse_inclusion_exclusion({"localhost": 8}, args.include, args.exclude) == {"localhost": own}


# --- training

def tiny_grid(folder: Path) -> Path:
    data = shards(folder / "data")
    settings = [f"data.train={data / 'train'}", f"data.tokenizer=sentencepiece({data / 'tokenizer.model'})", "data.workers=0",
                "model.size=nano/8", "model.image_size=32", "batch=16", f"samples={16 * STEPS}", "log_every=1", "save_every=64",
                "optim.warmup=64", f"evals=[zero_shot:{data / 'eval' / 'shapes'}]"]
    scale = dict(config="quickstart", metric="zero_shot/shapes/top1", changes=dict(more=["views.image.mask=none"]), set=settings)
    cells = dict(base=[], tuned=["init={base}", "more"], broken=["data.train=nowhere"], after=["init={broken}"])
    tree = dict(title="tiny", source="none", cells=cells, evaluate={"base": ["mask random(0.5)"]}, scales=dict(glyphs=scale))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(tmp_path):
    """All but the rank that trains is killed, and that goes on; then all of the next run; the same command then finishes what is left."""
    path, out = tiny_grid(tmp_path), tmp_path / "runs"
    line = [sys.executable, "run/scaling.py", "launch", "--grid", path, "--seeds", "1", "--out", out, "--ranks", "1"]
    runs = {cell: runs[0].folder for cell, runs in grid.read(str(path)).runs("glyphs", [], 1, out).items()}

    def begun(run: Path, step: int) -> subprocess.Popen:
        process = subprocess.Popen(list(map(str, line)), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    done = subprocess.run(list(map(str, line)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 1, "one cell cannot be trained"
    for cell in ("base", "tuned"):
        assert jobs.state(runs[cell]).state == "complete" and steps(runs[cell]) == list(range(1, STEPS + 1)), cell
    assert len((runs["base"] / "command.txt").read_text().splitlines()) == 1, "trained once"
    assert any(name.endswith("(mask random(0.5))") for name in jobs.state(runs["base"]).final)
    assert "no such folder of shards" in jobs.state(runs["broken"]).reason
    told = subprocess.run(list(map(str, [*line[:2], "table", *line[3:-2]])), cwd=ROOT, env=environment(), capture_output=True, text=True)
    print(told.stdout)
    assert "| broken | absent: 1 run: exit code 2: error: nowhere: no such folder of shards; see data.train" in told.stdout
    assert f"| after | absent: 1 run: it needs {runs['broken']}, which failed" in told.stdout


def steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]
