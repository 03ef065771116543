"""Find and load models by path: runs, checkpoints and converted models.

Other paths are errors that name the path.

    bash run/test.sh tests/run/train/test_load_model.py
"""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from glimpse.model import portable
from glimpse.model.convert import open_clip
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.run.lib import config, run_dir
from glimpse.run.train import initial_weights, load_model
from glimpse.run.verify import proofs
from glimpse.tests.helpers.tiny import (
    ROOT,
    environment,
    memory_growth,
    tiny_run_arguments,
    write_dataset,
)
from glimpse.tests.model.convert.test_convert_open_clip import FLAVOURS, made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of four steps with two checkpoints."""
    root = tmp_path_factory.mktemp("trained")
    line = tiny_run_arguments(
        write_dataset(root / "data"), root / "run", "samples=64", "save_every=32"
    )
    done = subprocess.run(
        [sys.executable, "run/pretrain.py", *line],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_a_checkpoint_by_any_of_its_names(trained, monkeypatch, tmp_path, convert):
    newest = trained.resolve() / "checkpoints/step-00000004"
    checkpoints = trained / "checkpoints"

    for where, name in (
        (trained, "."),
        (trained, "checkpoints"),
        (checkpoints, "."),
        (checkpoints, "step-00000004"),
        (newest, "."),
        (trained.parent, "run"),
    ):
        monkeypatch.chdir(where)
        code, out, errors = convert("inspect", name)
        assert code == 0, (where, name, errors)
        assert str(newest) in out, (where, name)
        assert "samples" in out, (where, name)

    monkeypatch.chdir(checkpoints)
    code, out, errors = convert("glimpse", "step-00000002", tmp_path / "out")
    assert code == 0, errors
    assert "step-00000002, after step 2, 32 samples" in out


def test_a_damaged_checkpoint_is_not_silently_an_older_one(trained, tmp_path, convert):
    shutil.copytree(trained, tmp_path / "run")
    shard = next((tmp_path / "run/checkpoints/step-00000004").glob("*_optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-5000])

    for source in ("run", "run/checkpoints/step-00000004"):
        code, _, errors = convert("glimpse", tmp_path / source, tmp_path / "out")
        assert code == 2
        assert f"step-00000004: {shard.name} has" in errors
        assert "damaged, or still being copied" in errors

    code, out, _ = convert("glimpse", tmp_path / "run/checkpoints/step-00000002", tmp_path / "out")
    assert code == 0
    assert "after step 2, 32 samples" in out


def test_deepspeeds_files_alone(trained, tmp_path, convert):
    shutil.copytree(trained / "checkpoints/step-00000004", tmp_path / "copied")
    (tmp_path / "copied/manifest.json").unlink()

    code, _, errors = convert("inspect", tmp_path / "copied")

    assert code == 2
    assert "1 ranks' files of a DeepSpeed checkpoint, but no manifest.json" in errors


def test_a_run_may_be_moved(trained, tmp_path, convert):
    """Its folder has a copy of the vocabulary."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    saved = moved / "config.yaml"
    saved.write_text(saved.read_text().replace(str(trained.parent), str(tmp_path / "gone")))

    code, _, errors = convert("glimpse", moved, tmp_path / "out")
    assert code == 0, errors
    vocab = (trained / "tokenizer.model").read_bytes()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == vocab

    code, out, errors = convert("megatron", moved, tmp_path / "mg", "--tp", "2")
    assert code == 0, errors
    assert "in 2 pieces, a tensor-parallel rank each" in out
    assert "not compared with megatron's own code" in out

    code, _, errors = convert("flip_jax", moved, tmp_path / "flip")
    assert code == 0, errors
    _, out, _ = convert("inspect", tmp_path / "flip")
    assert f"tokenizer sentencepiece({tmp_path}/flip/tokenizer.model)" in out


def test_a_converted_model_may_be_moved(trained, tmp_path, convert, monkeypatch):
    """Its folder has the vocabulary, which is found from any working directory."""
    monkeypatch.chdir(tmp_path)
    code, _, errors = convert("glimpse", trained, "out")
    assert code == 0, errors
    (tmp_path / "out").rename(tmp_path / "moved")
    tree = dict(
        base="moved/config.json",
        init=str(tmp_path / "moved"),
        run="x",
        method="clip",
        samples=16,
        batch=16,
        data=dict(train="y"),
        optim=dict(lr="0", weight_decay=0.1, warmup=16),
    )
    (tmp_path / "train.yaml").write_text(json.dumps(tree))
    monkeypatch.chdir(ROOT)

    cfg = config.load(tmp_path / "train.yaml")

    tokenizer = f"sentencepiece({tmp_path}/moved/tokenizer.model)"
    assert cfg.data.tokenizer == tokenizer
    for name in ("moved", "moved/model.safetensors"):
        path = load_model.find_model(tmp_path / name)
        assert load_model.read_run_config(path).data.tokenizer == tokenizer


def test_a_foreign_model_where_one_of_ours_belongs(tmp_path):
    open_clip.save(made(*FLAVOURS["CLIP"]), tmp_path / "foreign")

    message = (
        "foreign: a model in open_clip format; .* `python run/convert.py glimpse .*foreign OUT`"
    )
    with pytest.raises(ValueError, match=message):
        load_model.find_model(tmp_path / "foreign")


def test_a_converted_model_without_a_key(tmp_path):
    folder = tmp_path / "converted"
    portable.save_model(made(*FLAVOURS["CLIP"]), folder)
    tree = json.loads((folder / "config.json").read_text())
    del tree["provenance"]["fingerprint"]
    (folder / "config.json").write_text(json.dumps(tree))

    message = "config.json: provenance.fingerprint missing; convert the model again"
    with pytest.raises(ValueError, match=message):
        load_model.open_model(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda tree: tree.pop("model"), "config.json: model missing; convert"),
        (
            lambda tree: tree["data"].pop("tokenizer"),
            "config.json: data.tokenizer missing; convert",
        ),
        (
            lambda tree: tree.update(data=3),
            "config.json: data.context, data.tokenizer, data.pad_text missing; convert",
        ),
        (None, "config.json: no json"),
    ],
)
def test_a_damaged_config_is_reported_wherever_it_is_read(damage, message, tmp_path):
    """Opening a model and starting a run from it both name the missing key."""
    folder = tmp_path / "converted"
    portable.save_model(made(*FLAVOURS["CLIP"]), folder)
    cfg = load_model.read_run_config(folder).model
    file = folder / "config.json"
    if damage:
        tree = json.loads(file.read_text())
        damage(tree)
        file.write_text(json.dumps(tree))
    else:
        file.write_text("{x")

    with pytest.raises(ValueError, match=message):
        load_model.open_model(load_model.find_model(folder))
    with pytest.raises(ValueError, match=f"init: .*{message}"):
        initial_weights.find_source("init", str(folder), initial_weights.check_init_source, cfg, "")


@pytest.mark.parametrize(
    "shapes, required_prefix, message",
    [
        ({"a": (2,), "b": (1,)}, None, "has no weights for b"),
        ({"a": (3,)}, None, r"a has shape \(2,\), in this config it has \(3,\)"),
        ({"a": (2,)}, "", "no parameter c; "),
    ],
)
def test_weights_are_compared_before_any_are_sent(shapes, required_prefix, message, tmp_path):
    source = LazyTensors.from_dict({"a": torch.ones(2), "c": torch.ones(1)})
    expected = {name: torch.Size(shape) for name, shape in shapes.items()}

    with pytest.raises(ValueError, match=message):
        load_model.check_names_and_shapes(tmp_path, source, expected, required_prefix)
    assert load_model.check_names_and_shapes(tmp_path, source, {"a": torch.Size([2])}, None) == ""


def test_where_a_run_starts_is_looked_up_once(monkeypatch):
    """The source run may save a newer checkpoint before the fp32 copies are written."""
    lookups = []
    load_calls = []

    def weight_sources(*_):
        lookups.append(1)
        return [("step-1", {"weight": "a", "bias": "b"}, "prefix")]

    def load_weights(method, *source):
        load_calls.append(source)

    monkeypatch.setattr(initial_weights, "weight_sources", weight_sources)
    monkeypatch.setattr(initial_weights, "load_weights", load_weights)
    method = torch.nn.Linear(2, 2)

    load = initial_weights.init_weights("run", "vocabulary")
    load(method)
    method.weight._hp_mapping = None  # the attribute of parameters with an fp32 copy
    load(method)

    assert len(lookups) == 1
    assert load_calls == [
        ("step-1", {"weight": "a", "bias": "b"}, "prefix"),
        ("step-1", {"weight": "a"}, None),
    ]


def test_a_checksum_tells_models_apart():
    def quickstart(*more):
        overrides = ["data.tokenizer=sentencepiece(x)", *more]
        return config.load("run/configs/quickstart.yaml", overrides)

    cfg = quickstart()
    method = torch.nn.Linear(3, 2)
    tokenizer = SimpleNamespace(fingerprint="f")
    again = copy.deepcopy(method)
    other = copy.deepcopy(method)
    other.bias.data[0] *= -1

    first = load_model.checksum(method, cfg, tokenizer)
    changed = [
        load_model.checksum(other, cfg, tokenizer),
        load_model.checksum(method, cfg, SimpleNamespace(fingerprint="g")),
    ]
    for override in (
        "eval_crop=squash",
        "model.vision.mean=[0.5,0.5,0.5]",
        "model.vision.pool=cls",
        "data.pad_text=true",
    ):
        changed.append(load_model.checksum(method, quickstart(override), tokenizer))

    assert first == load_model.checksum(again, cfg, tokenizer)
    assert len(first) == 16
    assert len({first, *changed}) == 7


def test_a_vocabulary_is_kept_again_though_it_cannot_be_written(tmp_path):
    """The copy of a read-only file is writable, and a newer file replaces it."""
    vocab = tmp_path / "tokenizer.model"
    copied = tmp_path / "run/tokenizer.model"
    copied.parent.mkdir()
    vocab.write_bytes(b"first")
    vocab.chmod(0o444)

    run_dir.copy_if_changed(vocab, copied)
    assert copied.stat().st_mode & 0o200, "the copy can be written"

    copied.chmod(0o444)
    run_dir.copy_if_changed(copied, copied)
    vocab.chmod(0o644)
    vocab.write_bytes(b"other")
    run_dir.copy_if_changed(vocab, copied)
    assert copied.read_bytes() == b"other"
    assert len(list(copied.parent.iterdir())) == 1


def test_memory_is_that_of_the_group(tmp_path):
    """The cgroup of a job may limit its memory; cached files do not count as used."""
    job = tmp_path / "cgroup"
    job.write_text("0::/slurm/job_1\n")
    group = tmp_path / "fs/slurm/job_1"
    group.mkdir(parents=True)
    free = proofs.available_memory(job, tmp_path / "fs")

    (group / "memory.max").write_text("max\n")
    assert proofs.available_memory(job, tmp_path / "fs") == pytest.approx(free, rel=0.2)

    (group.parent / "memory.max").write_text("3000000\n")
    (group.parent / "memory.stat").write_text("anon 1000000\nfile 1900000\n")
    assert proofs.available_memory(job, tmp_path / "fs") == 2_000_000
    assert proofs.available_memory(tmp_path / "nothing", tmp_path / "fs") == pytest.approx(
        free, rel=0.2
    )


def test_a_large_tensor_is_in_memory_once(tmp_path):
    """A tensor is read from its shards without a second copy in memory."""
    torch.save({"w": torch.ones(16 << 20)}, tmp_path / "x.pt")

    megabytes = memory_growth(
        f"""
import torch
from pathlib import Path
from glimpse.run.train import zero_reader
file = Path({str(tmp_path / "x.pt")!r})
stored = zero_reader.locate(zero_reader.read_structure(file)["w"], file)
halves = [stored.slice(0, 8 << 20), stored.slice(8 << 20, 8 << 20)]
tensors = zero_reader.build_tensors({{"w": (torch.Size([16 << 20]), halves)}})""",
        """
assert float(tensors["w"].sum()) == 16 << 20""",
    )

    assert 60 < megabytes < 80, "the tensor has 64 MiB"
