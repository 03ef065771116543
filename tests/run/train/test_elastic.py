"""Resume on another number of ranks.

The fast tests check errors. The slow ones train on 2 -> 4 -> 1 ranks with every kind of state, ZeRO
stage and precision, and check the results of tests/workers/elastic_worker.py.
tests/run/train/test_resume.py kills and resumes complete runs.

    WHOLE=1 bash run/test.sh tests/run/train/test_elastic.py -s
        prints the differences; without WHOLE it has two cases less
"""

import json
import os
from pathlib import Path

import pytest
import torch

from glimpse.run.train.elastic import convert_to_universal
from glimpse.run.train.engine import check_buffers
from glimpse.tests.helpers.tiny import launch, write_dataset
from glimpse.tests.model.methods.test_methods import VARIANTS, build
from glimpse.tests.workers.elastic_worker import CASES, RANK_COUNTS, STEPS_PER_LAUNCH


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Return a checkpoint of two ranks at stage 3; its files have the right names only."""
    path = tmp_path / "step-00000001"
    path.mkdir()
    for rank in range(2):
        for kind in ("optim", "model"):
            file = path / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            file.write_bytes(b"no checkpoint")
    manifest = dict(ranks=2, stage=3, files={})
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("name, options", VARIANTS)
def test_no_method_has_a_persistent_buffer(name, options):
    """DeepSpeed's universal format would silently drop it."""
    check_buffers(build(name, **options))


def test_a_method_with_a_persistent_buffer_is_refused():
    method = build("clip")
    method.register_buffer("queue", torch.zeros(2))

    with pytest.raises(ValueError, match="Clip has a persistent buffer, queue, which"):
        check_buffers(method)


def test_a_module_that_stands_in_two_places_is_no_buffer():
    method = build("clip")
    method.frozen = method.towers.vision

    check_buffers(method)


def test_a_disk_without_room_is_refused_before_anything_is_written(checkpoint):
    for rank in range(2):
        # a sparse file of 4 TiB
        os.truncate(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", 4 << 40)

    message = (
        r"a different number of ranks needs 21990\.2 GB of temporary disk space, .* GB are free;"
        " .* resume on 2 ranks"
    )
    with pytest.raises(OSError, match=message):
        convert_to_universal(checkpoint, checkpoint.with_name("universal-step-00000001"))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_conversion_that_fails_leaves_nothing(checkpoint):
    target = checkpoint.with_name("universal-step-00000001")
    target.mkdir()

    with pytest.raises(OSError, match="step-00000001: conversion to the universal format failed"):
        convert_to_universal(checkpoint, target)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {ranks: the results of tests/workers/elastic_worker.py}.

    Each launch resumes from the checkpoints of the previous one.
    """
    data = write_dataset(tmp_path_factory.mktemp("elastic"))
    by_ranks = {}
    for ranks in RANK_COUNTS:
        out = data / f"{ranks}.json"
        done = launch(ranks, "tests/workers/elastic_worker.py", str(data), str(out), timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        by_ranks[ranks] = json.loads(out.read_text())
    return by_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANK_COUNTS[1:])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_on_another_number_of_ranks(results, name, ranks):
    """All state equals the saved state, bit for bit.

    That is weights, fp32 copies, moments, frozen weights, averages, buffers and step counters.
    """
    result = results[ranks][name]
    method = CASES[name][0]
    steps = STEPS_PER_LAUNCH * RANK_COUNTS.index(ranks)

    kinds = result["kinds"]
    different = result["different"]
    assert different == [], f"{len(different)} of {sum(kinds.values())} tensors"
    assert kinds["weight"] == kinds["fp32"] == kinds["exp_avg"] == kinds["exp_avg_sq"] > 35
    assert result["moments"] > 0
    assert kinds.get("frozen", 0) > 20 or method == "clip"
    assert kinds.get("average", 0) == 20 or method != "maskclip"
    assert result["resumed"] == [steps], "of every group, on every rank"
    assert result["counters"] == [steps + STEPS_PER_LAUNCH], "of every group, on every rank"
    first_settings = results[RANK_COUNTS[0]][name]["group settings"]
    assert result["group settings"] == first_settings, "each group has its own weight decay"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_follow_those_of_a_run_that_stays(results, name):
    """The losses differ from those of an uninterrupted run only by rounding.

    In fp32 the order of sums differs. In bf16 gradients are also rounded before they are summed
    over the ranks.
    """
    uninterrupted = results[RANK_COUNTS[0]][name]["uninterrupted"]
    losses = [loss for ranks in RANK_COUNTS for loss in results[ranks][name]["losses"]]
    difference = max(abs(a - b) / b for a, b in zip(losses, uninterrupted, strict=True))
    order = " -> ".join(map(str, RANK_COUNTS))
    print(
        f"{name}: {len(losses)} losses on {order} ranks, at most {difference:.1e} from those on"
        f" {RANK_COUNTS[0]}"
    )

    bf16 = CASES[name][2]
    assert difference < (2e-2 if bf16 else 1e-4)
