"""What is no model, damaged, oddly stored or half told: run/convert.py ends in one line that says
why, and leaves what a user has alone.

    bash run/test.sh tests/model/convert/test_convert_odd.py
"""

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata

from glimpse.model import portable
from glimpse.model.convert import common, open_clip, t5x, timm, torch_dist
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.run.train import zero_reader
from glimpse.tests.helpers.tiny import ROOT, environment
from glimpse.tests.model.convert.test_convert_open_clip import FLAVOURS, made


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder each: of open_clip's, of Glimpse's own, of a tower of timm's with a bias and fixed
    positions.
    """
    root = tmp_path_factory.mktemp("good")
    open_clip.save(made(*FLAVOURS["CLIP"]), root / "open_clip")
    portable.save_model(made(*FLAVOURS["FLIP, pooled mean"]), root / "glimpse")
    timm.save(made(*FLAVOURS["FLIP, pooled mean"]), root / "timm")
    return root


def stored(change):
    """Return a function that changes every tensor in a folder of open_clip's."""

    def damage(folder):
        path = folder / "open_clip_model.safetensors"
        tensors = load_file(path)
        save_file({name: change(tensor) for name, tensor in tensors.items()}, path)

    return damage


def said(name, change):
    """Return a function that changes the json of that name in a folder."""

    def damage(folder):
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return damage


def put(name, *keys, value):
    """Return a function that sets a value at a path of keys in a json file."""

    def change(tree):
        *parents, last = keys
        for key in parents:
            tree = tree[key]
        tree[last] = value

    return said(name, change)


def file(name, content):
    """Return a function that writes a file into a folder."""

    def damage(folder):
        (folder / name).write_text(content)

    return damage


def index(content):
    """Return a function that writes a config of Hugging Face's and an index of shards."""

    def damage(folder):
        file("config.json", '{"model_type": "clip"}')(folder)
        file("model.safetensors.index.json", content)(folder)

    return damage


def another_models_terms(folder):
    save_file({"a": torch.ones(2)}, folder / "glimpse.safetensors")


without_model = said("config.json", lambda tree: tree.pop("model"))
WIDTH_IN_WORDS = '{"model_type": "clip", "vision_config": {"hidden_size": "x"}}'
ODD = {  # what of `good`, what happens to it, the complaint
    "no json": ("open_clip", file(open_clip.CONFIG, "{x"), "open_clip_config.json: no json"),
    "a list": ("open_clip", file(open_clip.CONFIG, "[]"), "open_clip_config.json: holds a list"),
    "no keys": (
        "open_clip",
        file(open_clip.CONFIG, "{}"),
        "damaged, or does not match its format (KeyError: 'vision_cfg')",
    ),
    "no heads": (
        "open_clip",
        put(open_clip.CONFIG, "model_cfg", "vision_cfg", "head_width", value=0),
        "ZeroDivisionError",
    ),
    "int8": ("open_clip", stored(torch.Tensor.char), "is torch.int8; weights are floats"),
    "complex": ("open_clip", stored(torch.Tensor.cfloat), "is stored as C64; save it as float32"),
    "another's glimpse.safetensors": (
        "open_clip",
        another_models_terms,
        (
            "glimpse.safetensors: not written by run/convert.py, or damaged; without this file the"
            " positions are imported as learned positions: remove it"
        ),
    ),
    "no model": (
        "glimpse",
        without_model,
        "config.json: model missing; convert the model again",
    ),
    "another kernel": (
        "open_clip",
        put(open_clip.CONFIG, "preprocess_cfg", "interpolation", value="lanczos"),
        "interpolation 'lanczos': images are resized by bicubic or bilinear here",
    ),
    "another way to a square": (
        "open_clip",
        put(open_clip.CONFIG, "preprocess_cfg", "resize_mode", value="longest"),
        "preprocess_cfg.resize_mode 'longest': Glimpse supports shortest or squash",
    ),
    "two numbers": (
        "open_clip",
        put(open_clip.CONFIG, "preprocess_cfg", "mean", value=[0.5, 0.5]),
        "three numbers each",
    ),
    "no architecture": (
        "timm",
        put("config.json", "pretrained_cfg", value=3),
        "damaged, or does not match its format",
    ),
    "an index of nothing": (None, index("{}"), "no index: it should hold weight_map"),
    "an index that leaves": (
        None,
        index('{"weight_map": {"a": "../a.safetensors"}}'),
        "no index: it should hold weight_map, {tensor: name of a file beside it}",
    ),
    "a width in words": (None, file("config.json", WIDTH_IN_WORDS), "TypeError"),
    "another's manifest": (None, file("manifest.json", "[]"), "no complete checkpoint in it"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_damaged_folder(what, good, tmp_path, convert):
    kind, damage, complaint = ODD[what]
    folder = tmp_path / "odd"
    if kind:
        shutil.copytree(good / kind, folder)
    else:
        folder.mkdir()
    damage(folder)

    for line in (["inspect", folder], ["glimpse", folder, tmp_path / "out"]):
        code, _, message = convert(*line)
        assert code == 2, message
        assert len(message.splitlines()) == 1, message
        assert complaint in message, message
        assert str(folder) in message, message
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([torch.ones(2)], "no tensors in it"),
        ({1: torch.ones(2)}, "no tensors in it"),
        ("root:x:0:0:root:/root", "truncated or no file of tensors"),
        ({"w": torch.ones(2)}, "the tensors belong to no known architecture"),
    ],
)
def test_a_file_that_is_no_model(content, complaint, tmp_path, convert):
    path = tmp_path / "x.pt"
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)

    code, _, message = convert("glimpse", path, tmp_path / "out")

    assert code == 2
    assert message.startswith(f"error: {path}: {complaint}")
    assert len(message.splitlines()) == 1


def test_other_models_are_told_by_name(tmp_path, convert):
    file("config.json", '{"model_type": "bert"}')(tmp_path)

    _, _, message = convert("glimpse", tmp_path, tmp_path / "out")
    assert "config.json: unknown architecture bert" in message

    save_file({"embeddings": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    code, out, _ = convert("inspect", tmp_path)
    assert code == 0
    assert "embeddings  (3, 2) float32" in out
    assert "unknown architecture bert" in out


def test_values_that_are_no_numbers(good, tmp_path, convert):
    shutil.copytree(good / "open_clip", tmp_path / "odd")
    stored(lambda x: x * float("nan"))(tmp_path / "odd")
    _, _, message = convert("glimpse", tmp_path / "odd", tmp_path / "out")
    assert "contains nan or infinity, or values too large for" in message

    # Infinity is equal to itself, and the largest of differences of which one is nan may be small.
    model = made(*FLAVOURS["CLIP"])
    endless = {name: model.tensors[name].clone() for name in model.tensors}
    endless["text.norm.weight"][0] = float("inf")
    source = tmp_path / "endless"
    portable.save_model(replace(model, tensors=LazyTensors.from_dict(endless)), source)
    for kind in ("open_clip", "hf"):
        code, _, message = convert(kind, source, tmp_path / kind, "--tokenizer", "clip_bpe")
        assert code == 2, message
        assert "text.norm.weight contains nan or infinity, or values too large for" in message, (
            message
        )
        assert not (tmp_path / kind).exists(), message


def test_what_was_assumed_is_told_where_embeddings_differ(good, tmp_path, convert):
    """A folder of timm's that leaves its heads unsaid, under a name that does not tell them
    either.
    """
    shutil.copytree(good / "timm", tmp_path / "odd")
    without_heads = said("config.json", lambda tree: tree["model_args"].pop("num_heads"))
    without_heads(tmp_path / "odd")
    put("config.json", "architecture", value="test_vit")(tmp_path / "odd")
    notes = timm.load(tmp_path / "odd").about.source["notes"]
    assert "assumed, as nothing says it: heads 2;" in notes

    # A name of timm's determines them.
    folder, out = tmp_path / "named", tmp_path / "out"
    timm.save(made(*FLAVOURS["SLIP, A-CLIP"]), folder)
    without_heads(folder)
    named = timm.load(folder)
    assert named.cfg.shape.heads == 3, "vit_tiny_patch16_224 says it"
    assert "notes" not in named.about.source, "vit_tiny_patch16_224 says it"

    # Other heads than the model's are noticed.
    code, _, message = convert("glimpse", good / "timm", out, "--given", "heads=4")
    assert code == 2, message
    assert "its reference library computes other embeddings" in message, message
    put("config.json", "pretrained_cfg", "mean", value=None)(folder)
    code, _, message = convert("glimpse", folder, out, "--given", "heads=4")
    assert code == 2, message
    pattern = (
        r"its reference library computes other embeddings.*assumed, as nothing says it: mean"
        r" \[0.485,"
    )
    assert re.search(pattern, message), message


def test_nan_is_no_small_difference(good, tmp_path, convert, monkeypatch):
    monkeypatch.setattr(
        "glimpse.run.verify.proofs.embedding_differences",
        lambda *_: {"images": 1e-7, "captions": float("nan")},
    )

    _, _, message = convert("open_clip", good / "open_clip", tmp_path / "out")

    assert "its reference library computes other embeddings" in message


def test_what_files_do_not_tell_is_given(good, tmp_path, convert):
    """Each is run beside its own library, too."""
    # A file of weights with a named config, of open_clip's.
    config, epoch = good / "open_clip" / open_clip.CONFIG, tmp_path / "epoch_1.pt"
    weights = load_file(good / "open_clip" / open_clip.WEIGHTS[0])
    torch.save({"state_dict": weights, "ema": {"visual.proj": torch.ones(1)}}, epoch)
    sizes, half = tmp_path / "sizes.json", tmp_path / "half"
    sizes.write_text(json.dumps(json.loads(config.read_text())["model_cfg"]))
    given = ("--given", f"config={sizes}", "std=[0.5,0.5,0.5]")
    code, out, complaint = convert("glimpse", epoch, half, *given)
    assert code == 0, complaint
    note = "does not say it: mean [0.48145466, 0.4578275, 0.40821073]; --given"
    assert note in out, complaint
    assert json.loads((half / "config.json").read_text())["model"]["vision"]["std"] == [0.5] * 3

    given = ("--given", f"config={config}")
    code, out, complaint = convert("glimpse", epoch, tmp_path / "a", *given)
    assert code == 0, complaint
    assert "epoch_1.pt compared with its reference library" in out, complaint
    assert "epoch_1.pt: left out: ema" in out, complaint

    # The same file inspected.
    _, out, _ = convert("inspect", epoch, *given)
    assert "format        open_clip" in out
    assert "\nnotes         left out: ema" in out
    code, out, _ = convert("inspect", epoch)
    assert code == 0
    assert "epoch_1.pt: 62 tensors" in out
    assert "add --given config=NAME" in out

    # A converted model has everything.
    code, out, _ = convert("glimpse", half, tmp_path / "again")
    assert code == 0, "it was told, and cannot be given there"
    assert "assumed" not in out, "it was told, and cannot be given there"

    # A file of weights of timm's.
    tower = good / "timm" / "model.safetensors"
    code, out, complaint = convert(
        "glimpse", tower, tmp_path / "b", "--given", "heads=2", "pool=mean"
    )
    assert code == 0, complaint
    assert "model.safetensors compared with its reference library" in out, complaint
    for pair, why in (
        ("heads", "no value"),
        ("heads=[", "no value"),
        ("heads=x", "heads: 'x'; it must be of type int"),
        ("depth=2", "unknown 'depth'; known"),
        ("eps=0", "model.vision.eps: 0.0 is not positive"),
        ("image_size=0", "of an image of 0 x 0; say its height"),
        ("mean=0.5", "model.vision.mean (0.5,), model.vision.std"),
        ("image_size=[64]", "image_size: [64]; it must be"),
    ):
        code, _, message = convert("glimpse", tower, tmp_path / "c", "--given", pair)
        assert code == 2, message
        assert why in message, message
        assert len(message.splitlines()) == 1, message


def test_why_a_file_cannot_be_read_is_told_whatever_is_given(good, tmp_path, convert):
    content = (good / "open_clip" / open_clip.WEIGHTS[0]).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    torch.save({"w": torch.ones(2), "path": tmp_path}, tmp_path / "more.pt")

    for name, why in (("cut.safetensors", "truncated"), ("more.pt", "refused (pathlib")):
        path = tmp_path / name
        code, _, message = convert("glimpse", path, tmp_path / "out", "--given", "config=ViT-B-32")
        assert code == 2, message
        assert message.startswith(f"error: {path}: {why}"), message


def test_a_file_is_known_by_its_beginning_too(good, tmp_path, convert):
    """Caches of hubs name files by their hash."""
    shutil.copy(good / "open_clip" / open_clip.WEIGHTS[0], tmp_path / "3f2a")
    config = good / "open_clip" / open_clip.CONFIG

    code, out, complaint = convert("inspect", tmp_path / "3f2a", "--given", f"config={config}")

    assert code == 0, complaint
    assert "format        open_clip" in out, complaint


def test_what_torch_says_of_every_file_is_left_out(tmp_path, convert):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000), "b": "x" * 500}, path)
    content = path.read_bytes()

    for begin, why in (
        (160, "truncated or no file of tensors (Unsupported operand 0)"),
        (100, "refused (torch._utils._rebuild)"),
    ):
        path.write_bytes(content[:begin] + bytes(40) + content[begin + 40 :])
        code, _, message = convert("glimpse", path, tmp_path / "out")
        assert code == 2, message
        assert message.startswith(f"error: {path}: {why}"), message
        assert len(message.splitlines()) == 1, message


class Odd:
    """Pickled as getattr(kind, name)."""

    def __init__(self, kind, name):
        self.what = kind, name

    def __reduce__(self):
        return getattr, self.what


@pytest.mark.parametrize("protocol", [2, 4])
def test_members_of_enums_as_older_pythons_pickle_them(protocol, tmp_path):
    """By getattr, which is let in for that and for nothing else, in checkpoints of runs and in
    megatron-core's.
    """
    kind = metadata._MEM_FORMAT_ENCODING
    member = pickle.dumps(Odd(kind, "TORCH_PRESERVE_FORMAT"), protocol)
    no_member = pickle.dumps(Odd(kind, "mro"), protocol)
    assert torch_dist.CheckpointUnpickler(io.BytesIO(member)).load() is kind.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError, match="getattr of"):
        torch_dist.CheckpointUnpickler(io.BytesIO(no_member)).load()

    torch.save({"stage": Odd(ZeroStageEnum, "weights")}, tmp_path / "shard.pt")
    assert zero_reader.read_structure(tmp_path / "shard.pt") == {"stage": ZeroStageEnum.weights}
    torch.save({"stage": Odd(ZeroStageEnum, "mro")}, tmp_path / "shard.pt")
    with pytest.raises(ValueError, match="shard.pt: truncated, or not a checkpoint .getattr of"):
        zero_reader.read_structure(tmp_path / "shard.pt")


def test_an_older_library_is_no_error(good, tmp_path, convert, monkeypatch):
    monkeypatch.setattr("glimpse.model.convert.common.metadata.version", lambda package: "2.30.0")

    code, out, complaint = convert("open_clip", good / "open_clip", tmp_path / "out")

    assert code == 0, complaint
    note = (
        "not compared with the reference library: open-clip-torch 2.30.0 is installed; version 3.0"
        " or newer is needed"
    )
    assert note in out
    monkeypatch.undo()
    with pytest.raises(ImportError, match="^no-such-package is not installed$"):
        common.require_version("no-such-package", "1.0")


def test_openais_state_dict(tmp_path, convert):
    open_clip.save(made(*FLAVOURS["OpenAI"]), tmp_path / "state")
    numbers = dict(
        input_resolution=torch.tensor(64),
        context_length=torch.tensor(77),
        vocab_size=torch.tensor(49408),
    )
    weights, path = load_file(tmp_path / "state" / open_clip.WEIGHTS[0]), tmp_path / "openai.pt"
    torch.save({**weights, **numbers}, path)

    code, out, complaint = convert("glimpse", path, tmp_path / "out")
    assert code == 0, complaint
    assert "openai.pt compared with its reference library" in out, complaint

    code, _, message = convert("glimpse", path, tmp_path / "gelu", "--given", "config=ViT-B-32")
    assert code == 2
    assert "--given config=ViT-B-32: " in message
    assert "is OpenAI's, which tells everything itself; leave it out" in message

    resnet = {"visual.conv1.weight": torch.ones(4, 3, 3, 3), "visual.bn1.weight": torch.ones(4)}
    torch.save({**resnet, **numbers}, tmp_path / "RN50.pt")
    _, _, message = convert("glimpse", tmp_path / "RN50.pt", tmp_path / "resnet")
    assert "RN50.pt: a ResNet; Glimpse's towers are vision" in message


@pytest.mark.parametrize("kind", ["open_clip", "timm", "megatron"])
@pytest.mark.parametrize("flavour", ["FLIP, pooled mean", "FLIP, learned"])
def test_bf16_in_and_out(kind, flavour, tmp_path, convert):
    """Positions and biases are added up in fp32 and stay so, or the other library would not give
    our embeddings.
    """
    portable.save_model(made(*FLAVOURS[flavour]), tmp_path / "source", torch.bfloat16)

    code, out, complaint = convert(kind, tmp_path / "source", tmp_path / "out", "--dtype", "bf16")

    assert code == 0, complaint
    assert "compared with its reference library" in out or kind == "megatron", complaint


def test_nothing_that_a_user_has_is_touched(good, tmp_path, convert):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("x")
    assert convert("glimpse", good / "open_clip", tmp_path / "out", "--image-size", "0")[0] == 2
    assert convert("glimpse", good / "open_clip", f"{tmp_path}/out/")[0] == 0
    assert (tmp_path / "out.part" / "mine").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_tensor_that_is_too_large_for_flips_file(tmp_path):
    meta = {
        "small": torch.empty(1, device="meta"),
        "a/large": torch.empty(2**20, 2**10, device="meta"),
    }
    with pytest.raises(
        ValueError,
        match=r"a/large \(1048576, 1024\) takes 4,294,967,296 bytes as float32: .*--dtype bf16",
    ):
        t5x.write(
            tmp_path / "checkpoint", LazyTensors(meta, lambda name: torch.zeros(1)), torch.float32
        )
    assert not list(tmp_path.iterdir())


# MiB of a tensor in the test below: beside it all else is little, and half of it is more than what
# malloc keeps for later
LARGE = 66
# what is written of three such tensors: as many times one of them may be held
SPLIT = "[Rule((n,), (n + 'q', n + 'k', n + 'v'), split_qkv, fuse_qkv) for n in source]"
TURNED = "[Rule((n,), (n,), transpose, transpose) for n in source]"
WRITERS = {
    "files.write_safetensors(out, source)": 1.2,
    f"files.write_safetensors(out, export_tensors({SPLIT}, source))": 1.2,
    "t5x.write(out, source, torch.float32)": 1.2,
    "files.write_safetensors(out, source, torch.bfloat16)": 1.7,
    f"files.write_safetensors(out, export_tensors({TURNED}, source))": 2.2,
}


def test_files_are_written_a_tensor_at_a_time(tmp_path):
    """By one process, whose peak so far is looked at after each: its own, for getrusage's begins at
    that of the process that started it.
    """
    program = f"""
import re
from pathlib import Path
import psutil
import torch
from glimpse.model import tensor_files as files
from glimpse.model.convert import t5x
from glimpse.model.convert.rules import (
    LazyTensors, Rule, export_tensors, fuse_qkv, split_qkv, transpose
)
shape, out = (3 * 2**10, {LARGE} * 2**18 // (3 * 2**10)), Path({str(tmp_path / "x")!r})
meta = {{f"w{{i}}": torch.empty(shape, device="meta") for i in range(3)}}
source = LazyTensors(meta, lambda name: torch.ones(shape))
before = psutil.Process().memory_info().rss
for writer in {list(WRITERS)!r}:
    eval(writer)
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 2**10
    print((peak - before) / 2**20)"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for grown, (writer, most) in zip(map(float, done.stdout.split()), WRITERS.items(), strict=True):
        print(f"{grown / LARGE:.2f} tensors: {writer}")
        assert grown < most * LARGE, writer
