"""The papers' claims: cells that exist, the papers' figures, verdicts from differences over seeds.

bash run/test.sh tests/run/study/test_claims.py
"""

import sys
from dataclasses import replace

import pytest

from glimpse.run.scaling import main
from glimpse.run.study import claims, grid
from glimpse.tests.helpers.tiny import finished

GRIDS = {name: grid.read_grid(name) for name in grid.grid_names()}


@pytest.mark.parametrize("claim", claims.read_claims(), ids=lambda claim: claim.says)
def test_claims_are_of_cells_and_say_what_their_papers_do(claim):
    claimed_in = GRIDS[claim.grid]
    for (cell, how), paper in zip(claim.sides, claim.paper):
        assert cell in claimed_in.cells
        assert not how or how in claimed_in.evaluate[cell]
        key = f"{cell}, {how}" if how else cell
        assert claimed_in.paper[key] == paper
    assert claim.paper[0] > claim.paper[1]


def test_there_are_claims_of_all_four_papers():
    rows = claims.read_claims()
    assert len(rows) >= 12
    papers = {row.source.split()[0] for row in rows}
    assert papers == {"FLIP", "GLIP", "A-CLIP", "MaskCLIP"}


@pytest.mark.parametrize(
    "gains, verdict",
    [
        ((0.02, 0.03, 0.04), "reproduced"),
        ((-0.02, 0.01, 0.00), "not distinguishable"),
        ((-0.02, -0.03, -0.02), "opposite"),
        ((0.02, 0.03), "absent"),
    ],
)
def test_a_verdict_is_of_the_interval(gains, verdict, tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "gaussian 50")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for planned in runs[claim.worse]:
        finished(planned.folder, planned, 0.1)
    for planned, gain in zip(runs[claim.better], gains):
        finished(planned.folder, planned, 0.1 + gain)

    judged = claims.judge_claim(claim, "glyphs", 3, tmp_path)

    assert judged.verdict == verdict
    table = claims.format_claims([judged], "top5")
    assert verdict in table
    assert ("1 run: not trained" in table) == (verdict == "absent")
    explained = replace(judged, claim=replace(claim, learned="why so"))
    table = claims.format_claims([explained], "top5")
    assert table.endswith(f"- {claim.says}: {verdict}. why so") == (verdict != "absent"), (
        "nothing was learned of what was not run"
    )


@pytest.mark.parametrize(
    "no_gain, seeds, verdict",
    [
        (False, ((0.30, 0.20, 0.25), (0.28, 0.18, 0.23)), "reproduced"),
        (False, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "not distinguishable"),
        (True, ((0.30, 0.20, 0.25), (0.31, 0.19, 0.25)), "reproduced"),
        (True, ((0.28, 0.18, 0.23), (0.30, 0.20, 0.25)), "opposite"),
    ],
)
def test_what_began_from_the_other_is_compared_seed_by_seed(no_gain, seeds, verdict, tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "mask 75 + tuning")
    claim = replace(claim, no_gain=no_gain)
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 3, tmp_path)
    for cell, values in zip((claim.better, claim.worse), seeds):
        for planned, value in zip(runs[cell], values):
            finished(planned.folder, planned, value)

    assert claims.judge_claim(claim, "glyphs", 3, tmp_path).verdict == verdict


def test_seeds_that_only_one_side_has_are_not_compared(tmp_path):
    claim = next(claim for claim in claims.read_claims() if claim.better == "mask 75 + tuning")
    runs = GRIDS[claim.grid].runs("glyphs", [claim.better, claim.worse], 5, tmp_path)
    for seeds, cell in (((0, 1, 2), claim.better), ((2, 3, 4), claim.worse)):
        for seed in seeds:
            planned = runs[cell][seed]
            gain = 0.1 if cell == claim.better else 0.0
            finished(planned.folder, planned, 0.2 + 0.01 * seed + gain)

    judged = claims.judge_claim(claim, "glyphs", 5, tmp_path)

    assert judged.verdict == "absent"
    assert judged.reason == "1 of 3 seeds have both"

    for planned, seed in zip(runs[claim.better][3:], (3, 4), strict=True):
        finished(planned.folder, planned, 0.3 + 0.01 * seed)

    judged = claims.judge_claim(claim, "glyphs", 5, tmp_path)

    assert judged.verdict == "reproduced"
    assert judged.seeds == (3, 3)
    assert judged.difference == pytest.approx((0.1, 0.1, 0.1))


def test_all_that_is_claimed_of_can_be_launched_at_once(tmp_path):
    cells = claims.claimed_runs("glyphs", 3, tmp_path)

    runs = [run for cell in cells.values() for run in cell]
    by_folder = {run.folder: run for run in runs}
    assert len(by_folder) == len(runs) == 3 * len(cells)
    for claim in claims.read_claims():
        for cell, how in claim.sides:
            planned = GRIDS[claim.grid].runs("glyphs", [cell], 3, tmp_path)[cell][2]
            run = by_folder[planned.folder]
            assert not how or how in run.evaluate
    needed = set()
    for run in runs:
        needed.update(run.dependencies)
    assert needed
    assert needed <= set(by_folder), "what a cell begins from is among them"


def test_a_run_of_two_cells_is_evaluated_in_the_ways_of_both(tmp_path):
    cells = claims.claimed_runs("glyphs", 3, tmp_path)
    run, *others = [run for cell in cells.values() for run in cell]
    before = replace(run, evaluate=("ensemble 2",))
    after = replace(run, evaluate=("mask random(0.5)", "ensemble 2"))

    merged = grid.merge_runs([before, *others, after])

    assert merged == [replace(run, evaluate=("ensemble 2", "mask random(0.5)")), *others]


@pytest.mark.parametrize("scale", ["glyphs", "paper"])
def test_what_was_learned_is_of_the_scale_where_it_was(scale, tmp_path, monkeypatch, capsys):
    claim = next(claim for claim in claims.read_claims() if claim.better == "joint")
    claimed_in = GRIDS["flip_table8"]
    metric = claimed_in.scale(scale).metric
    cells = claimed_in.runs(scale, [claim.better, claim.worse], 3, tmp_path)
    for runs in cells.values():
        for planned in runs:
            finished(planned.folder, planned, 0.1, metric=metric)
    command = f"run/scaling.py claims --scale {scale} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())

    main()

    output = capsys.readouterr().out
    assert "0 reproduced, 1 not distinguishable, 0 opposite, 33 absent" in output
    assert (claim.learned in output) == (scale == "glyphs")
