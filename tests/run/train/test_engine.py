"""The engine and its checkpoints: missing gradients, the temperature under bf16, saving, loading.

    bash run/test.sh tests/run/train/test_engine.py

The slow tests check the results of one launch of 2 ranks (tests/workers/engine_worker.py).
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glimpse.model.methods import build_method
from glimpse.model.methods.base import EmaMethod, Method
from glimpse.run.lib import config
from glimpse.run.train import checkpoint
from glimpse.run.train.engine import read_deepspeed_json
from glimpse.run.train.optim import parameter_groups
from glimpse.tests.helpers.tiny import launch, write_dataset
from glimpse.tests.run.train.test_optim import FLAVOURS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    data = write_dataset(tmp_path_factory.mktemp("engine"))
    out = data / "results.json"
    done = launch(2, "tests/workers/engine_worker.py", str(data), str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_without_gradient_is_named(results, stage):
    assert "2 trainable parameters, e.g. forgotten.bias" in results[f"guard {stage}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_temperature_keeps_its_fp32_value(results, stage):
    result = results[f"temperature {stage}"]

    assert result["dtype"] == "torch.bfloat16"
    assert result["rounded"] == float(torch.tensor(result["master"]).bfloat16())
    assert result["rounded"] != result["master"]
    assert result["rounded"] + result["residual"] == result["master"], "exact"
    assert result["scale"] == pytest.approx(math.exp(result["master"]), rel=1e-6)
    assert abs(math.exp(result["rounded"]) / result["scale"] - 1) > 1e-3, "bf16 would be wrong"
    assert result["clamped"] == pytest.approx(100, rel=1e-6)
    assert math.isfinite(result["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_groups_under_zero3(results, flavour):
    """The groups are those of an unsharded method.

    Under ZeRO-3 every parameter is one-dimensional and empty.
    """
    cfg = config.load(
        "run/configs/quickstart.yaml",
        ["model.size=nano/8", "model.image_size=32", *FLAVOURS[flavour]],
    )
    method = build_method(cfg, 320)
    names = {id(p): name for name, p in method.named_parameters()}
    patch_bias = {"towers.vision.patch.bias"}  # the worker's clip flavor has it

    unsharded = parameter_groups(method, cfg.optim)
    for group, sharded in zip(unsharded, results[f"groups {flavour}"], strict=True):
        expected = {names[id(p)]: p.numel() for p in group["params"]}
        assert {name: sharded[name] for name in expected} == expected
        assert sharded.keys() - expected.keys() <= patch_bias


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
def test_weights_go_from_run_to_run(results, case):
    """The fp32 values are read and loaded, bit for bit.

    case: ZeRO stage and bf16 of the saved run, ZeRO stage of the run that starts from it.
    """
    result = results[f"saved {case}"]

    assert result["count"] > 90
    assert result["missing"] == []
    assert result["read differently"] == []
    assert result["loaded differently"] == []
    assert result["moments"] == 0, "the optimizer starts anew"
    assert result["steps"] == 0, "the optimizer starts anew"
    assert result["checkpoints"] == ["step-00000004", "step-00000005"]
    assert result["newest"] == "step-00000005"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(results):
    assert results["stop"] == [3, 3], "signalled before its third step (2), seen one step later"


@pytest.mark.parametrize(
    "base, lacks",
    [
        (Method, "forward, loss|'forward', 'loss'"),
        (EmaMethod, "momentum"),
    ],
)
def test_an_incomplete_method_cannot_be_made(base, lacks):
    class Half(base):
        pass

    with pytest.raises(TypeError, match=lacks):
        Half(None, 320, 12, None)


@pytest.mark.parametrize(
    "ds_config, message",
    [
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "sets zero_optimization.round_robin_gradients, .*; remove it",
        ),
        ({"fp16": {"enabled": True}}, "enables fp16; .* use bf16"),
        ({"bf16": {"enabled": True}}, "bf16 without ZeRO .*; use stage 1"),
    ],
)
def test_what_a_deepspeed_json_may_not_set(ds_config, message, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(ds_config))

    with pytest.raises(ValueError, match=f"deepspeed: {path}:? {message}"):
        read_deepspeed_json(str(path))


SHARD = "0_optim_states.pt"


class Engine:
    """An engine with the attributes that checkpoint.save() uses; it writes two files."""

    samples = 160
    stage = 3
    bf16 = False

    def __init__(self, step):
        self.ds = SimpleNamespace(global_steps=step, save_checkpoint=self.write)
        self.averages = SimpleNamespace(pairs={})

    def write(self, folder, tag, **_):
        path = Path(folder) / tag
        assert not path.exists()
        (path / "sub").mkdir(parents=True)
        for name in (SHARD, "sub/b.pt"):
            (path / name).write_bytes(bytes(1000))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return RUN/checkpoints, with those of steps 2, 3 and 4."""
    monkeypatch.setattr(checkpoint, "barrier", lambda: None)
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        checkpoint.save(Engine(step), folder, dict(identity={}, shards=0), keep=3)
    return folder


def steps(folder):
    return [int(path.name[-8:]) for path in checkpoint.complete_checkpoints(folder)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(folder):
    manifest = checkpoint.manifest_if_complete(folder / "step-00000004")

    assert steps(folder) == [4, 3, 2]
    assert names(folder) == ["step-00000002", "step-00000003", "step-00000004"]
    assert checkpoint.newest_checkpoint(folder.parent).name == "step-00000004"
    assert checkpoint.newest_checkpoint(folder / "step-00000002").name == "step-00000002"
    assert manifest["step"] == 4
    assert manifest["samples"] == 160
    assert manifest["files"] == {SHARD: 1000, "sub/b.pt": 1000}


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda path: (path / "sub" / "b.pt").write_bytes(bytes(999)),
            r"step-00000004: sub/b.pt has 999 bytes, [\d,]+ were saved: damaged",
        ),
        (
            lambda path: (path / SHARD).unlink(),
            f"{SHARD} is missing, .*; .*step-00000003 is complete: pass it",
        ),
        (lambda path: (path / "manifest.json").unlink(), ""),
        (lambda path: (path / "manifest.json").write_text('{"st'), ""),
    ],
)
def test_a_torn_checkpoint_is_skipped_and_written_again(folder, damage, message):
    """Training resumes from an older checkpoint.

    Reading the weights of a run fails if its newest checkpoint is damaged, instead of silently
    reading an older one.
    """
    damage(folder / "step-00000004")

    assert steps(folder) == [3, 2]
    if message:
        with pytest.raises(ValueError, match=message):
            checkpoint.newest_checkpoint(folder.parent)
    else:
        assert checkpoint.newest_checkpoint(folder.parent).name == "step-00000003"

    checkpoint.save(Engine(4), folder, dict(identity={}, shards=0), keep=2)

    assert steps(folder) == [4, 3]
    assert names(folder) == ["step-00000003", "step-00000004"]


def test_no_checkpoint_and_another_model(folder, tmp_path):
    run = tmp_path / "run"
    causal = dict(model=dict(size="B/16", text=dict(causal=True)))
    bidirectional = dict(model=dict(size="B/16", text=dict(causal=False)))

    with pytest.raises(ValueError, match="no such folder"):
        checkpoint.newest_checkpoint(run)

    run.mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.newest_checkpoint(run)

    path = checkpoint.save(Engine(9), folder, dict(identity=causal), keep=3)
    checkpoint.check_identity(path, causal)
    with pytest.raises(ValueError, match="model.text.causal: True, but this config has False"):
        checkpoint.check_identity(path, bidirectional)


def test_a_manifest_that_is_needed(folder):
    path = folder / "step-00000004"
    assert checkpoint.read_manifest(path) == checkpoint.manifest_if_complete(path)

    (path / SHARD).unlink()
    with pytest.raises(ValueError, match=f"step-00000004: {SHARD} is missing, .*: damaged"):
        checkpoint.read_manifest(path)

    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="step-00000004: no complete checkpoint"):
        checkpoint.read_manifest(path)
