"""Another number of ranks: what is known of it without any; then 2 -> 4 -> 1 of them with every
kind of state, ZeRO stage and precision.

    WHOLE=1 bash run/test.sh tests/run/train/test_elastic.py -s
        prints the differences; else two cases fewer; -m "not slow" is the first part
The slow cases are values that tests/workers/elastic_worker.py found, launched once on each number.
Whole
runs, killed: tests/run/train/test_resume.py.
"""

import json
import os
from pathlib import Path

import pytest

from glimpse.model.methods import METHODS
from glimpse.run.train.elastic import convert
from glimpse.tests.helpers.tiny import launch, shards
from glimpse.tests.model.methods.test_methods import VARIANTS, build
from glimpse.tests.workers.elastic_worker import CASES, EACH, ORDER


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of two ranks at stage 3, as far as its files' names go."""
    path = tmp_path / "step-00000001"
    path.mkdir()
    for rank in range(2):
        for kind in ("optim", "model"):
            (path / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").write_bytes(
                b"no checkpoint"
            )
    (path / "manifest.json").write_text(json.dumps(dict(ranks=2, stage=3, files={})))
    return path


@pytest.mark.parametrize("name, options", VARIANTS)
def test_no_method_has_a_persistent_buffer(name, options):
    """DeepSpeed's universal format would drop it, silently."""
    assert {name for name, _ in VARIANTS} == set(METHODS)
    method = build(name, **options)
    assert method.state_dict().keys() == dict(method.named_parameters()).keys()


def test_a_disk_without_room_is_refused_before_anything_is_written(checkpoint):
    for rank in range(2):
        # sparse
        os.truncate(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", 4 << 40)
    with pytest.raises(
        OSError,
        match=(
            r"needs a copy of 21990\.2 GB beside it for a while, the disk has .* or go on on 2"
            r" ranks"
        ),
    ):
        convert(checkpoint, checkpoint.with_name("universal-step-00000001"))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_conversion_that_fails_leaves_nothing(checkpoint):
    (target := checkpoint.with_name("universal-step-00000001")).mkdir()
    with pytest.raises(OSError, match="step-00000001: conversion to the universal format failed"):
        convert(checkpoint, target)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{ranks: what tests/workers/elastic_worker.py found there}; the later numbers go on from the
    earlier
    ones' checkpoints.
    """
    data, every = shards(tmp_path_factory.mktemp("elastic")), {}
    for ranks in ORDER:
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/elastic_worker.py", str(data), str(out), timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        every[ranks] = json.loads(out.read_text())
    return every


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ORDER[1:])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_on_another_number_of_ranks(found, name, ranks):
    """Weights, fp32 copies, moments, frozen weights, averages, buffers and step counters are the
    saved ones, bit for bit.
    """
    got, (method, *_), done = found[ranks][name], CASES[name], EACH * ORDER.index(ranks)
    assert got["other"] == [], f"{len(got['other'])} of {sum(got['kinds'].values())} tensors"
    kinds = got["kinds"]
    assert (
        kinds["weight"] == kinds["fp32"] == kinds["exp_avg"] == kinds["exp_avg_sq"] > 35
        and got["moments"] > 0
    )
    assert kinds.get("frozen", 0) > 20 or method == "clip"
    assert kinds.get("average", 0) == 20 or method != "maskclip"
    assert got["resumed"] == [done] and got["counters"] == [done + EACH], (
        "of every group, on every rank"
    )
    assert got["rules"] == found[ORDER[0]][name]["rules"], "each group's own weight decay"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_follow_those_of_a_run_that_stays(found, name):
    """In fp32 but for the order of sums; in bf16 the ranks' gradients are rounded before they are
    summed.
    """
    straight, losses = (
        found[ORDER[0]][name]["straight"],
        [loss for ranks in ORDER for loss in found[ranks][name]["losses"]],
    )
    far = max(abs(a - b) / b for a, b in zip(losses, straight, strict=True))
    print(
        f"{name}: {len(straight)} losses on {' -> '.join(map(str, ORDER))} ranks, at most {far:.1e}"
        f" from those on {ORDER[0]}"
    )
    assert far < (2e-2 if CASES[name][2] else 1e-4)
