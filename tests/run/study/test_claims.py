"""The papers' claims: each is of cells that are there, with the paper's figures; verdicts are of
the differences over seeds.

    bash run/test.sh tests/run/study/test_claims.py
"""

import sys
from dataclasses import replace

import pytest

from glimpse.run.scaling import main
from glimpse.run.study import claims, grid
from glimpse.tests.helpers.tiny import finished

GRIDS = {name: grid.read(name) for name in grid.names()}


@pytest.mark.parametrize("claim", claims.read(), ids=lambda claim: claim.says)
def test_claims_are_of_cells_and_say_what_their_papers_do(claim):
    one = GRIDS[claim.grid]
    for cell, how, paper in (
        (claim.better, claim.better_as, claim.paper[0]),
        (claim.worse, claim.worse_as, claim.paper[1]),
    ):
        assert cell in one.cells
        assert not how or how in one.evaluate[cell]
        assert one.paper[f"{cell}, {how}" if how else cell] == paper
    assert claim.paper[0] > claim.paper[1]


def test_there_are_claims_of_all_four_papers():
    rows = claims.read()
    assert len(rows) >= 12 and {row.source.split()[0] for row in rows} == {
        "FLIP",
        "GLIP",
        "A-CLIP",
        "MaskCLIP",
    }


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
    assert line.endswith(f"- {claim.says}: {verdict}. why so") == (verdict != "absent"), (
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
    claim = replace(
        next(claim for claim in claims.read() if claim.better == "mask 75 + tuning"),
        no_gain=no_gain,
    )
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
            finished(
                runs[cell][seed].folder,
                runs[cell][seed],
                0.2 + 0.01 * seed + 0.1 * (cell == claim.better),
            )
    found = claims.judge(claim, "glyphs", 5, tmp_path)
    assert (found.verdict, found.reason) == ("absent", "1 of 3 seeds have both")
    for seed in (3, 4):
        finished(runs[claim.better][seed].folder, runs[claim.better][seed], 0.3 + 0.01 * seed)
    found = claims.judge(claim, "glyphs", 5, tmp_path)
    assert (
        found.verdict == "reproduced"
        and found.seeds == (3, 3)
        and found.found == pytest.approx((0.1, 0.1, 0.1))
    )


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
    again = grid.once(
        [
            replace(one, evaluate=("ensemble 2",)),
            *others,
            replace(one, evaluate=("mask random(0.5)", "ensemble 2")),
        ]
    )
    assert again == [replace(one, evaluate=("ensemble 2", "mask random(0.5)")), *others]


@pytest.mark.parametrize("scale", ["glyphs", "paper"])
def test_what_was_learned_is_of_the_scale_where_it_was(scale, tmp_path, monkeypatch, capsys):
    claim = next(claim for claim in claims.read() if claim.better == "joint")
    for runs in GRIDS["flip_table8"].runs(scale, [claim.better, claim.worse], 3, tmp_path).values():
        for planned in runs:
            finished(planned.folder, planned, 0.1, metric=GRIDS["flip_table8"].scale(scale).metric)
    monkeypatch.setattr(
        sys, "argv", f"run/scaling.py claims --scale {scale} --out {tmp_path}".split()
    )
    main()
    told = capsys.readouterr().out
    assert "0 reproduced, 1 not distinguishable, 0 opposite, 33 absent" in told
    assert (claim.learned in told) == (scale == "glyphs")
