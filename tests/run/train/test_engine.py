"""The engine and its checkpoints: gradients that are missing are named, the temperature stays
exact, weights go from run to run unchanged.

    bash run/test.sh tests/run/train/test_engine.py
The slow cases are values that one launch of 2 ranks found (tests/workers/engine_worker.py).
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from glimpse.model.methods import build_method
from glimpse.model.methods.base import Averaging, Method
from glimpse.run.lib import config
from glimpse.run.train import checkpoint
from glimpse.run.train.engine import read_json
from glimpse.run.train.optim import groups
from glimpse.tests.helpers.tiny import launch, shards
from glimpse.tests.run.train.test_optim import FLAVOURS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    data = shards(tmp_path_factory.mktemp("engine"))
    done = launch(2, "tests/workers/engine_worker.py", str(data), str(data / "found.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((data / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_without_gradient_is_named(found, stage):
    assert "2 trainable parameters, e.g. forgotten.bias" in found[f"guard {stage}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_temperature_keeps_its_fp32_value(found, stage):
    t = found[f"temperature {stage}"]
    assert (
        t["kind"] == "torch.bfloat16"
        and t["copy"] == float(torch.tensor(t["master"]).bfloat16()) != t["master"]
    )
    assert t["copy"] + t["residual"] == t["master"], (
        "exact: the residual is smaller than fp32's last place of the copy"
    )
    assert t["scale"] == pytest.approx(math.exp(t["master"]), rel=1e-6)
    assert abs(math.exp(t["copy"]) / t["scale"] - 1) > 1e-3, "which rounding would have changed"
    assert t["clamped"] == pytest.approx(100, rel=1e-6) and math.isfinite(t["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_groups_under_zero3(found, flavour):
    """The very parameters and sizes of a method that is not sharded, where every parameter looks
    one-dimensional and empty.
    """
    cfg = config.load(
        "run/configs/quickstart.yaml",
        ["model.size=nano/8", "model.image_size=32", *FLAVOURS[flavour]],
    )
    method = build_method(cfg, 320)
    names = {id(p): name for name, p in method.named_parameters()}
    patch_bias = {"towers.vision.patch.bias"}  # the worker's clip flavour keeps it
    for mine, theirs in zip(groups(method, cfg.optim), found[f"groups {flavour}"], strict=True):
        wanted = {names[id(p)]: p.numel() for p in mine["params"]}
        assert {
            name: theirs[name] for name in wanted
        } == wanted and theirs.keys() - wanted.keys() <= patch_bias


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "0 False 3",
        "1 False 3",
        "3 False 1",
        "3 False 3",
        "1 True 3",
        "3 True 1",
        "3 True 2",
        "3 True 3",
    ],
)
def test_weights_go_from_run_to_run(found, case):
    """Stage, bf16, stage of the run that `init:` starts from it, with a frozen layer: fp32 values
    are read and loaded, bit for bit.
    """
    got = found[f"saved {case}"]
    assert got["count"] > 90 and got["missing"] == got["read"] == got["loaded"] == []
    assert got["moments"] == 0 and got["steps"] == 0, "the optimizer starts anew"
    assert got["kept"] == ["step-00000004", "step-00000005"] and got["newest"] == "step-00000005"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(found):
    assert found["stop"] == [3, 3], "asked before its third step (2), heard one step later"


@pytest.mark.parametrize(
    "base, lacks",
    [
        (Method, "forward, loss|'forward', 'loss'"),
        (Averaging, "momentum"),
    ],
)
def test_an_incomplete_method_cannot_be_made(base, lacks):
    class Half(base):
        pass

    with pytest.raises(TypeError, match=lacks):
        Half(None, 320, 12, None)


@pytest.mark.parametrize(
    "tree, complaint",
    [
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "sets zero_optimization.round_robin_gradients, .*; remove it",
        ),
        ({"fp16": {"enabled": True}}, "enables fp16; .* use bf16"),
        ({"bf16": {"enabled": True}}, "bf16 without ZeRO .*; use stage 1"),
    ],
)
def test_what_a_deepspeed_json_may_not_say(tree, complaint, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"deepspeed: {tmp_path}/mine.json:? {complaint}"):
        read_json(str(tmp_path / "mine.json"))


SHARD = "0_optim_states.pt"


class Engine:
    """What `save` needs of an engine, writing two files."""

    samples, stage = 160, 3

    def __init__(self, step):
        self.ds, self.bf16 = SimpleNamespace(global_steps=step, save_checkpoint=self.write), False
        self.average = SimpleNamespace(pairs={})

    def write(self, folder, tag, **_):
        assert not (checkpoint.Path(folder) / tag).exists()
        (checkpoint.Path(folder) / tag / "sub").mkdir(parents=True)
        for name in (SHARD, "sub/b.pt"):
            (checkpoint.Path(folder) / tag / name).write_bytes(bytes(1000))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "barrier", lambda: None)
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        checkpoint.save(Engine(step), folder, dict(identity={}, shards=0), keep=3)
    return folder


def steps(folder):
    return [int(path.name[-8:]) for path in checkpoint.whole(folder)]


def test_the_newest_are_kept(kept):
    assert steps(kept) == [4, 3, 2] and sorted(p.name for p in kept.iterdir()) == [
        f"step-{n:08d}" for n in (2, 3, 4)
    ]
    assert (
        checkpoint.newest(kept.parent).name == "step-00000004"
        and checkpoint.newest(kept / "step-00000002").name == "step-00000002"
    )
    found = checkpoint.manifest(kept / "step-00000004")
    assert (
        found["step"] == 4
        and found["samples"] == 160
        and found["files"] == {SHARD: 1000, "sub/b.pt": 1000}
    )


@pytest.mark.parametrize(
    "tear, flaw",
    [
        (
            lambda path: (path / "sub" / "b.pt").write_bytes(bytes(999)),
            r"step-00000004: sub/b.pt has 999 bytes, [\d,]+ were saved: damaged",
        ),
        (
            lambda path: (path / SHARD).unlink(),
            f"{SHARD} is missing, .*; .*step-00000003 is whole and may be named instead",
        ),
        (lambda path: (path / "manifest.json").unlink(), ""),
        (lambda path: (path / "manifest.json").write_text('{"st'), ""),
    ],
)
def test_a_torn_checkpoint_is_skipped_and_written_again(kept, tear, flaw):
    """Training goes on from an older one; what was whole once and is asked for its weights is not
    silently an older one.
    """
    tear(kept / "step-00000004")
    assert steps(kept) == [3, 2]
    if flaw:
        with pytest.raises(ValueError, match=flaw):
            checkpoint.newest(kept.parent)
    else:
        assert checkpoint.newest(kept.parent).name == "step-00000003"
    checkpoint.save(Engine(4), kept, dict(identity={}, shards=0), keep=2)
    assert steps(kept) == [4, 3] and sorted(p.name for p in kept.iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


def test_no_checkpoint_and_another_model(kept, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint.newest(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.newest(tmp_path / "none")
    path = checkpoint.save(
        Engine(9),
        kept,
        dict(identity=dict(model=dict(size="B/16", text=dict(causal=True)))),
        keep=3,
    )
    checkpoint.check_identity(path, dict(model=dict(size="B/16", text=dict(causal=True))))
    with pytest.raises(ValueError, match="model.text.causal: True, this config says False"):
        checkpoint.check_identity(path, dict(model=dict(size="B/16", text=dict(causal=False))))
