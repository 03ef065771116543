"""Another number of ranks: what is known of it without any.  (Real runs: tests/test_resume.py, tests/test_teacher.py.)

Run: pytest tests/test_elastic.py
"""
import json
import os
from pathlib import Path

import pytest

from model.methods import METHODS
from run.lib.elastic import convert
from tests.test_methods import VARIANTS, build


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of two ranks at stage 3, as far as its files' names go."""
    path = tmp_path / "step-00000001"
    path.mkdir()
    for rank in range(2):
        for kind in ("optim", "model"):
            (path / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").write_bytes(b"no checkpoint")
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
        os.truncate(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", 4 << 40)  # sparse
    with pytest.raises(OSError, match=r"needs a copy of 21990\.2 GB beside it for a while, the disk has .* or go on on 2 ranks"):
        convert(checkpoint, checkpoint.with_name("universal-step-00000001"))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_conversion_that_fails_leaves_nothing(checkpoint):
    (target := checkpoint.with_name("universal-step-00000001")).mkdir()
    with pytest.raises(OSError, match="step-00000001: conversion to the universal format failed"):
        convert(checkpoint, target)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
