"""Test the papers' claims: their cells and values, and the verdicts.

bash run/test.sh tests/run/study/test_claims.py
"""

import sys
import tarfile
from dataclasses import replace

import pytest

from glimpse.run.scaling import main
from glimpse.run.study import claims, grid
from glimpse.tests.helpers.tiny import ROOT, write_finished_run

RESULTS = ROOT / "docs/results"
GRIDS = {name: grid.read_grid(name) for name in grid.grid_names()}


@pytest.mark.parametrize("claim", claims.read_claims(), ids=lambda claim: claim.says)
def test_claims_are_of_cells_and_say_what_their_papers_do(claim):
    claim_grid = GRIDS[claim.grid]
    for (cell, evaluation), paper in zip(claim.sides, claim.paper):
        assert cell in claim_grid.cells
        assert not evaluation or evaluation in claim_grid.evaluate[cell]
        key = f"{cell}, {evaluation}" if evaluation else cell
        assert claim_grid.paper[key] == paper
    assert claim.paper[0] > claim.paper[1]


def test_there_are_claims_of_all_four_papers():
    all_claims = claims.read_claims()

    papers = {claim.source.split()[0] for claim in all_claims}
    assert len(all_claims) >= 12
    assert papers == {"FLIP", "GLIP", "A-CLIP", "MaskCLIP"}


@pytest.mark.parametrize(
    "gains, verdict",
    [
        ((0.02, 0.03, 0.04), "reproduced"),
        ((-0.02, 0.01, 0.00), "inconclusive"),
        ((-0.02, -0.03, -0.02), "contradicted"),
        ((0.02, 0.03), "absent"),
    ],
)
def test_a_verdict_is_of_the_interval(gains, verdict, tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "gaussian 50")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for planned_run in runs[claim.worse]:
        write_finished_run(planned_run.folder, planned_run, 0.1)
    for planned_run, gain in zip(runs[claim.better], gains):
        write_finished_run(planned_run.folder, planned_run, 0.1 + gain)

    result = claims.judge_claim(claim, "glyphs", 3, tmp_path)
    table = claims.format_claims([result], "top5")

    assert result.verdict == verdict
    assert verdict in table
    assert ("1 run: not trained" in table) == (verdict == "absent")

    explained = replace(result, claim=replace(claim, learned="the reason"))
    table = claims.format_claims([explained], "top5")

    assert table.endswith(f"- {claim.says}: {verdict}. the reason") == (verdict != "absent"), (
        "a claim without runs has no explanation"
    )


@pytest.mark.parametrize(
    "no_gain, seeds, verdict",
    [
        (False, ((0.30, 0.20, 0.25), (0.28, 0.18, 0.23)), "reproduced"),
        (False, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "inconclusive"),
        (True, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "reproduced"),
        (True, ((0.28, 0.18, 0.23), (0.30, 0.20, 0.25)), "contradicted"),
    ],
)
def test_what_began_from_the_other_is_compared_seed_by_seed(no_gain, seeds, verdict, tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "mask 75 + tuning")
    claim = replace(claim, no_gain=no_gain)
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for cell, values in zip((claim.better, claim.worse), seeds):
        for planned_run, value in zip(runs[cell], values):
            write_finished_run(planned_run.folder, planned_run, value)

    assert claims.judge_claim(claim, "glyphs", 3, tmp_path).verdict == verdict


def test_seeds_that_only_one_side_has_are_not_compared(tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "mask 75 + tuning")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 5, tmp_path)
    for seed in (0, 1, 2):
        planned_run = runs[claim.better][seed]
        write_finished_run(planned_run.folder, planned_run, 0.3 + 0.01 * seed)
    for seed in (2, 3, 4):
        planned_run = runs[claim.worse][seed]
        write_finished_run(planned_run.folder, planned_run, 0.2 + 0.01 * seed)

    result = claims.judge_claim(claim, "glyphs", 5, tmp_path)

    assert result.verdict == "absent"
    assert result.reason == "1 of 3 seeds have both"

    for planned_run, seed in zip(runs[claim.better][3:], (3, 4), strict=True):
        write_finished_run(planned_run.folder, planned_run, 0.3 + 0.01 * seed)

    result = claims.judge_claim(claim, "glyphs", 5, tmp_path)

    assert result.verdict == "reproduced"
    assert result.seeds == (3, 3)
    assert result.difference == pytest.approx((0.1, 0.1, 0.1))


def test_all_that_is_claimed_of_can_be_launched_at_once(tmp_path):
    cells = claims.claimed_runs("glyphs", 3, tmp_path)

    runs = [run for cell in cells.values() for run in cell]
    by_folder = {run.folder: run for run in runs}
    assert len(runs) == 3 * len(cells)
    assert len(by_folder) == len(runs), "each run is listed once"

    for claim in claims.read_claims():
        for cell, evaluation in claim.sides:
            planned_run = GRIDS[claim.grid].runs("glyphs", [cell], 3, tmp_path)[cell][2]
            run = by_folder[planned_run.folder]
            assert not evaluation or evaluation in run.evaluate

    dependencies = set()
    for run in runs:
        dependencies.update(run.dependencies)
    assert dependencies
    assert dependencies <= set(by_folder), "the runs that others start from are included"


def test_a_run_of_two_cells_is_evaluated_in_the_ways_of_both(tmp_path):
    cells = claims.claimed_runs("glyphs", 3, tmp_path)
    run, *others = [run for cell in cells.values() for run in cell]
    first = replace(run, evaluate=("ensemble 2",))
    second = replace(run, evaluate=("mask random(0.5)", "ensemble 2"))

    unique_runs = grid.merge_runs([first, *others, second])

    assert unique_runs == [replace(run, evaluate=("ensemble 2", "mask random(0.5)")), *others]


@pytest.mark.parametrize("scale", ["glyphs", "paper"])
def test_what_was_learned_is_of_the_scale_where_it_was(scale, tmp_path, monkeypatch, capsys):
    claim = next(claim for claim in claims.read_claims() if claim.better == "joint")
    claim_grid = GRIDS["flip_table8"]
    metric = claim_grid.scale(scale).metric
    cells = claim_grid.runs(scale, [claim.better, claim.worse], 3, tmp_path)
    for runs in cells.values():
        for planned_run in runs:
            write_finished_run(planned_run.folder, planned_run, 0.1, metric=metric)
    command = f"run/scaling.py claims --scale {scale} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())

    main()

    output = capsys.readouterr().out
    assert "0 reproduced, 0 contradicted, 1 inconclusive, 33 absent" in output
    assert (claim.learned in output) == (scale == "glyphs")


TABLES = sorted(path.stem for path in RESULTS.glob("*_table*.md"))


@pytest.fixture(scope="module")
def committed_runs(tmp_path_factory):
    """Unpack the records of the runs behind docs/results; return the folder of the runs."""
    folder = tmp_path_factory.mktemp("scaling")
    with tarfile.open(RESULTS / "scaling_runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    "command, file",
    [("claims", "claims.md"), *((f"table --grid {name}", f"{name}.md") for name in TABLES)],
)
def test_committed_results_are_what_the_commands_print(
    command, file, committed_runs, monkeypatch, capsys
):
    """The tables in docs/results can be printed again from the records of the runs."""
    line = f"run/scaling.py {command} --out {committed_runs}"
    monkeypatch.setattr(sys, "argv", line.split())

    main()

    assert capsys.readouterr().out == (RESULTS / file).read_text()
