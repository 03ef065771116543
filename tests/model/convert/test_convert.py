"""run/convert.py and what all formats share: tables, files, resizing, checkpoints of any rank
count; what is broken or hostile is refused.

    bash run/test.sh tests/model/convert/test_convert.py -m slow -s
        real runs on 1, 2 and 4 ranks
"""

import json
import pickle
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from glimpse.model import portable, tensor_files
from glimpse.model.convert import common, open_clip
from glimpse.model.convert.resize import resize_model, resize_patch_embedding
from glimpse.model.convert.rules import Rule, export_tensors, import_tensors
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.towers import SIZES, ModelConfig
from glimpse.model.vision import resize_positions as resized_grid
from glimpse.run.train import initial_weights, load_model, zero_reader
from glimpse.tests.helpers.tiny import launch, memory_growth, write_dataset
from glimpse.tests.model.convert.test_convert_open_clip import (
    CLIP_TEXT,
    CLIP_VISION,
    FLAVOURS,
    made,
)

HELD = LazyTensors.from_dict({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)})


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# --- tables


def first_and_rest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[:1], rows[1:]


def join(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def test_a_table_goes_both_ways():
    rules = [Rule(("a",), ("top", "rest"), first_and_rest, join), Rule(("b",), ("c",))]

    out = export_tensors(rules, HELD)
    back = import_tensors(rules, out, "x")

    assert set(out) == {"top", "rest", "c"}
    assert out.meta["rest"].shape == (1, 3)
    assert out["top"].tolist() == [[0, 1, 2]]
    assert torch.equal(back["a"], HELD["a"])
    assert torch.equal(back["b"], HELD["b"])


def test_a_table_keeps_nothing_that_was_taken():
    source = LazyTensors(HELD.meta, lambda name: HELD[name].clone())
    rules = [Rule(("a",), ("top", "rest"), first_and_rest), Rule(("b",), ("c",))]

    out = export_tensors(rules, source)

    for names in (["top", "rest"], ["c"]):
        for storage in [weakref.ref(out[name].untyped_storage()) for name in names]:
            assert storage() is None


@pytest.mark.parametrize(
    "names, complaint",
    [
        ({"a": "a", "d": "b"}, "FILE: b is missing"),
        ({"a": "a", "b": "b", "d": "b"}, r"FILE: unexpected tensor d \(1,\)"),
    ],
)
def test_each_tensor_is_used_once(names, complaint):
    with pytest.raises(ValueError, match=complaint):
        import_tensors([Rule(("x",), ("a",)), Rule(("y",), ("b",))], HELD.rename(names), "FILE")


def test_a_tensor_of_another_shape_is_named():
    cfg, context, pad = FLAVOURS["CLIP"]
    model = made(cfg, context, pad)
    wrong = {**model.tensors, "text.norm.weight": torch.ones(3)}

    with pytest.raises(
        ValueError, match=r"text.norm.weight is \(3,\); its architecture makes it \(64,\)"
    ):
        replace(model, tensors=LazyTensors.from_dict(wrong))


# --- files


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_what_is_written_is_safetensors(dtype, tmp_path):
    tensors = {
        "w": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "ids": torch.arange(3),
        "t": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
    }
    tensors["turned"] = tensors["w"].t()
    path = tmp_path / "x.safetensors"

    tensor_files.write_safetensors(path, LazyTensors.from_dict(tensors), dtype, {"who": "me"})

    by_safetensors, lazy = load_file(path), tensor_files.read_tensors(path)
    for name, tensor in tensors.items():
        wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(by_safetensors[name], wanted)
        assert by_safetensors[name].dtype == wanted.dtype == lazy.meta[name].dtype
        assert torch.equal(lazy[name], wanted)
    assert tensor_files.read_metadata(path)["who"] == "me"


def test_shards_by_their_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))

    assert tensor_files.read_tensors(index)["b"].shape == (3,)

    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}))
    with pytest.raises(ValueError, match="2.safetensors has no c"):
        tensor_files.read_tensors(index)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_trainers_are_taken_off(prefix, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in HELD.items()}
    torch.save({"state_dict": state}, tmp_path / "x.pt")

    assert sorted(tensor_files.read_tensors(tmp_path / "x.pt")) == ["a", "b"]


def test_what_else_holds_tensors_is_named(tmp_path):
    extra = {"x": HELD["a"]}
    state = {**HELD, "extra": extra, 7: HELD["b"]}
    moments = {"state": {0: {"exp_avg": torch.ones(1)}}}
    average = dict(HELD)
    scaler = {"scale": 1.0}
    content = dict(epoch=3, ema=average, optimizer=moments, scaler=scaler, state_dict=state)
    torch.save(content, tmp_path / "x.pt")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.pt"}}))
    names = [f"t{i}" for i in range(22)]

    tensors = tensor_files.read_tensors(tmp_path / "x.pt")
    notes = common.describe_source(Path("x"), "hf", ["odd"], names)["notes"]

    assert sorted(tensors) == ["a", "b"]
    assert tensors.unused_entries == ("ema", "optimizer", "extra", "7")
    assert tensors.rename({"c": "a"}).unused_entries == tensors.unused_entries
    assert tensor_files.read_tensors(index).unused_entries[0] == "ema of x.pt"
    assert notes.startswith("odd; left out: t0, t1, ")
    assert notes.endswith(", t19 (and 2 more)")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    content = {"state_dict": {"w": torch.ones(2)}, "args": Hostile(tmp_path / "harm")}
    torch.save(content, tmp_path / "x.pt")

    with pytest.raises(ValueError, match=r"x.pt: refused .*run code"):
        tensor_files.read_tensors(tmp_path / "x.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "harm")))
    with pytest.raises(ValueError, match="old.pt: (refused|truncated)"):
        tensor_files.read_tensors(tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"x.pt: refused"):
        zero_reader.read_structure(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()

    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "harm").exists(), "the test's own pickle does no harm, so it proves nothing"


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match="a TorchScript archive.*ViT-B-32-weights.pt"):
        tensor_files.read_tensors(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("size", [0, 7, 150, -1])
def test_a_truncated_file_is_called_that(name, size, tmp_path):
    tensors = {"w": torch.randn(40)}
    save = save_file if name.endswith("safetensors") else torch.save
    save(tensors, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        tensor_files.read_tensors(tmp_path / name)


def test_files_are_written_and_checkpoints_read_a_tensor_at_a_time(tmp_path):
    """256 MiB in two ranks' shards into a file, by a process that grows by one tensor of 32 and a
    little.
    """
    numel, count, half = 2**23, 8, 2**22
    shapes = [{f"w{i}": torch.Size([2048, 4096]) for i in range(count)}]
    for rank in range(2):
        flat = torch.arange(count * half, dtype=torch.float32) + rank
        state = dict(fp32_flat_groups=[flat], optimizer_state_dict={"exp_avg": flat})
        torch.save(
            dict(optimizer_state_dict=state),
            tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        torch.save(
            dict(param_shapes=shapes, module={}),
            tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
    (tmp_path / "manifest.json").write_text('{"stage": 3}')

    megabytes = memory_growth(
        f"""
from pathlib import Path
from glimpse.model import tensor_files as files
from glimpse.run.train import zero_reader as zero_files
tensors = zero_files.read_weights(Path({str(tmp_path)!r}))""",
        f"""
files.write_safetensors(Path({str(tmp_path)!r}) / "out.safetensors", tensors)""",
    )

    assert megabytes < 1.3 * 32
    last = tensor_files.read_tensors(tmp_path / "out.safetensors")[f"w{count - 1}"].flatten()
    assert len(last) == numel
    assert last[0] == (count - 1) * half
    assert last[half] == (count - 1) * half + 1


# --- resizing


@pytest.mark.parametrize("old, new", [(16, 14), (14, 16), (16, 32), (8, 8)])
def test_the_patch_embedding_is_resized_as_timm_does(old, new):
    from timm.layers import resample_patch_embed

    torch.manual_seed(0)
    weight = torch.randn(5, 3 * old * old)
    wanted = resample_patch_embed(weight.view(5, 3, old, old), [new, new]).flatten(1)
    assert torch.allclose(
        resize_patch_embedding(weight, old, new), wanted, atol=2e-4 * float(wanted.abs().max())
    )


def test_larger_patches_see_what_the_smaller_ones_saw():
    torch.manual_seed(0)
    weight, patches = torch.randn(7, 3 * 14 * 14), torch.randn(4, 3, 14, 14)
    larger_patches = F.interpolate(patches, (16, 16), mode="bicubic", antialias=True)

    embedded = larger_patches.flatten(1) @ resize_patch_embedding(weight, 14, 16).t()

    assert torch.allclose(embedded, patches.flatten(1) @ weight.t(), atol=1e-3)


def test_patches_of_a_side_that_no_row_has():
    """A named size becomes one of its own."""
    cfg = ModelConfig("nano/8", image_size=32, vision=CLIP_VISION, text=CLIP_TEXT)

    finer = resize_model(made(cfg, 9, False), patch=4)

    assert finer.cfg.size == "custom/4"
    assert finer.cfg.shape == SIZES["nano"]
    assert finer.cfg.grid == (8, 8)
    finer.towers()


def test_positions_follow_the_grid():
    cfg, context, pad = FLAVOURS["CLIP"]
    model = made(cfg, context, pad)

    larger = resize_model(model, image_size=(96, 64))

    assert larger.cfg.grid == (6, 4)
    assert larger.cfg.size == model.cfg.size
    table, larger_table = model.tensors["vision.positions"], larger.tensors["vision.positions"]
    assert torch.equal(larger_table[1:], resized_grid(table[1:], (4, 4), (6, 4)))
    assert torch.equal(larger_table[0], table[0])
    assert torch.equal(larger.tensors["vision.cls"], model.tensors["vision.cls"])
    larger.towers()

    cfg, context, pad = FLAVOURS["FLIP, pooled mean"]
    finer = resize_model(made(cfg, context, pad), patch=8)
    assert finer.cfg.size == "custom/8"
    assert finer.cfg.grid == (8, 8)
    assert "vision.positions" not in finer.tensors
    assert finer.towers().vision.positions.shape == (64, 128), "computed anew"


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of open_clip's."""
    out = tmp_path_factory.mktemp("theirs") / "clip"
    open_clip.save(made(*FLAVOURS["CLIP"]), out)
    return out


def test_in_out_and_inspected(folder, tmp_path, convert):
    ours, theirs = tmp_path / "mine", tmp_path / "theirs"

    # In, rounded.
    code, out, complaint = convert("glimpse", folder, ours, "--dtype", "bf16")
    assert code == 0, complaint
    assert "read back: 62 tensors" in out
    assert "largest difference" in out
    assert load_model.open_converted(ours).tensors.meta["vision.cls"].dtype == torch.bfloat16

    # Out again.
    code, out, complaint = convert("open_clip", ours, theirs)
    assert code == 0, complaint
    assert out.count("largest difference") == 1, complaint
    source, again = open_clip.load(folder).tensors, open_clip.load(theirs).tensors
    for name in source:
        assert torch.equal(source[name].bfloat16().float(), again[name])

    # Inspected.
    description = convert("inspect", ours)[1]
    assert "ViT-custom/16 (128 x 2 + text 64 x 2)" in description
    assert "tokenizer clip_bpe" in description
    assert "bfloat16" in description
    assert "open_clip" in convert("inspect", folder)[1]
    loose = tmp_path / "loose.safetensors"
    tensor_files.write_safetensors(loose, HELD)
    assert "the tensors belong to no known architecture" in convert("inspect", loose)[1]


@pytest.mark.parametrize(
    "line, complaint",
    [
        (["hf", "nowhere", "OUT"], "nowhere: no such file or folder"),
        (["glimpse", "FOLDER", "FOLDER"], "exists; choose a new folder, or remove this one"),
        (
            ["glimpse", "FOLDER", "OUT", "--given", "heads=3"],
            "--given for open_clip: heads: unknown 'heads'; known: config, mean, std",
        ),
        (
            ["glimpse", "FOLDER", "OUT", "--weights", "teacher"],
            "--weights teacher: .* is a model of open_clip",
        ),
        (
            ["glimpse", "FOLDER", "OUT", "--patch", "10"],
            "model.image_size: 64 is not a multiple of the patch size",
        ),
        (
            ["glimpse", "FOLDER", "OUT", "--tokenizer", "wordpiece(LICENSE)"],
            "data.tokenizer 'wordpiece.LICENSE.'.*; choose the tokenizer with --tokenizer SPEC",
        ),
        (["megatron", "FOLDER", "OUT", "--tp", "3"], "tp"),
        (["glimpse", "EMPTY", "OUT"], "no complete checkpoint in it"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(line, complaint, folder, tmp_path, convert):
    (tmp_path / "empty").mkdir()
    names = {"FOLDER": folder, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}

    code, _, message = convert(*[names.get(word, word) for word in line])

    assert code == 2, message
    assert len(message.strip().splitlines()) == 1, message
    assert re.search(complaint, message), message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.part"))


# --- runs


@pytest.mark.slow
def test_runs_of_any_rank_count_come_out_as_the_file_that_went_in(folder, tmp_path, convert):
    """open_clip's model starts ZeRO-3 runs on 1, 2 and 4 ranks, whose rate is 0, and each run
    becomes open_clip's again; bf16 ones too.
    """
    data = write_dataset(tmp_path / "data")
    assert convert("glimpse", folder, tmp_path / "start")[0] == 0
    settings = dict(
        base="start/config.json",
        init=str(tmp_path / "start"),
        run="",
        method="clip",
        samples=16,
        batch=16,
        data=dict(train=str(data / "train"), workers=0),
        optim=dict(lr="0", weight_decay=0.1, warmup=16),
    )
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    wanted = (folder / open_clip.WEIGHTS[0]).read_bytes()

    for ranks, how in ((1, "cpu"), (2, "cpu_bf16"), (4, "cpu")):
        run, out = tmp_path / f"run{ranks}", tmp_path / f"out{ranks}"
        done = launch(
            ranks,
            "run/pretrain.py",
            "--config",
            str(tmp_path / "train.yaml"),
            "--set",
            f"run={run}",
            f"deepspeed=ds_configs/{how}.json",
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        code, _, complaint = convert("open_clip", run, out)
        assert code == 0, complaint
        assert (out / open_clip.WEIGHTS[0]).read_bytes() == wanted, f"{ranks} ranks, {how}"


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            {"model.vision.activation": "gelu_tanh"},
            (
                "init: .* was trained with model.vision.activation: 'gelu', but this config has"
                " 'gelu_tanh'"
            ),
        ),
        (
            {"model.image_size": 32},
            r"model.grid: \[4, 4\], .* run/convert.py glimpse .* --patch 16 --image-size 32",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(change, complaint, folder, tmp_path):
    portable.save_model(open_clip.load(folder), tmp_path / "start")
    cfg = load_model.read_run_config(tmp_path / "start").model
    for key, value in change.items():
        *inner, last = key.split(".")[1:]
        changes = {last: value}
        for name in inner:
            changes = {name: replace(getattr(cfg, name), **changes)}
        cfg = replace(cfg, **changes)

    with pytest.raises(ValueError, match=complaint):
        initial_weights.find_source(
            "init", str(tmp_path / "start"), initial_weights.check_init_source, cfg, ""
        )
