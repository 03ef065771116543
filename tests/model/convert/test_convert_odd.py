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
from glimpse.model.lazy_tensors import Tensors
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
    portable.save(made(*FLAVOURS["FLIP, pooled mean"]), root / "glimpse")
    timm.save(made(*FLAVOURS["FLIP, pooled mean"]), root / "timm")
    return root


def stored(change):
    def damage(folder):
        tensors = load_file(folder / "open_clip_model.safetensors")
        save_file(
            {name: change(tensor) for name, tensor in tensors.items()},
            folder / "open_clip_model.safetensors",
        )

    return damage


def said(name, change):
    """The json at that name changed."""

    def damage(folder):
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return damage


def file(name, content):
    def damage(folder):
        (folder / name).write_text(content)

    return damage


HF, INDEX = file("config.json", '{"model_type": "clip"}'), "model.safetensors.index.json"
ODD = {  # what of `good`, what happens to it, the complaint
    "no json": ("open_clip", file(open_clip.CONFIG, "{x"), "open_clip_config.json: no json"),
    "a list": ("open_clip", file(open_clip.CONFIG, "[]"), "open_clip_config.json: holds a list"),
    "no keys": (
        "open_clip",
        file(open_clip.CONFIG, "{}"),
        "damaged, or not what its format says (KeyError: 'vision_cfg')",
    ),
    "no heads": (
        "open_clip",
        said(open_clip.CONFIG, lambda t: t["model_cfg"]["vision_cfg"].update(head_width=0)),
        "ZeroDivisionError",
    ),
    "int8": ("open_clip", stored(lambda x: x.to(torch.int8)), "is torch.int8; weights are floats"),
    "complex": (
        "open_clip",
        stored(lambda x: x.to(torch.complex64)),
        "is stored as C64; save it as float32",
    ),
    "another's glimpse.safetensors": (
        "open_clip",
        lambda folder: save_file({"a": torch.ones(2)}, folder / "glimpse.safetensors"),
        "glimpse.safetensors: not what a conversion wrote; remove it",
    ),
    "no model": (
        "glimpse",
        said("config.json", lambda t: t.pop("model")),
        "config.json: model missing; convert the model again",
    ),
    "another kernel": (
        "open_clip",
        said(open_clip.CONFIG, lambda t: t["preprocess_cfg"].update(interpolation="lanczos")),
        "interpolation 'lanczos': images are resized by bicubic or bilinear here",
    ),
    "another way to a square": (
        "open_clip",
        said(open_clip.CONFIG, lambda t: t["preprocess_cfg"].update(resize_mode="longest")),
        "preprocess_cfg.resize_mode 'longest': ours are shortest or squash; write one of them",
    ),
    "two numbers": (
        "open_clip",
        said(open_clip.CONFIG, lambda t: t["preprocess_cfg"].update(mean=[0.5, 0.5])),
        "three numbers each",
    ),
    "no architecture": (
        "timm",
        said("config.json", lambda t: t.update(pretrained_cfg=3)),
        "damaged, or not what its format says",
    ),
    "an index of nothing": (
        None,
        lambda folder: (HF(folder), file(INDEX, "{}")(folder)),
        "no index: it should hold weight_map",
    ),
    "an index that leaves": (
        None,
        lambda folder: (
            HF(folder),
            file(INDEX, '{"weight_map": {"a": "../a.safetensors"}}')(folder),
        ),
        "no index: it should hold weight_map, {tensor: name of a file beside it}",
    ),
    "a width in words": (
        None,
        file("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": "x"}}'),
        "TypeError",
    ),
    "another's manifest": (None, file("manifest.json", "[]"), "no whole checkpoint in it"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_damaged_folder(what, good, tmp_path, convert):
    kind, damage, complaint = ODD[what]
    folder = tmp_path / "odd"
    shutil.copytree(good / kind, folder) if kind else folder.mkdir()
    damage(folder)
    for line in (["inspect", folder], ["glimpse", folder, tmp_path / "out"]):
        code, _, told = convert(*line)
        assert (
            code == 2 and len(told.splitlines()) == 1 and complaint in told and str(folder) in told
        ), told
    assert sorted(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([torch.ones(2)], "no tensors in it"),
        ({1: torch.ones(2)}, "no tensors in it"),
        ("root:x:0:0:root:/root", "truncated or no file of tensors"),
        ({"w": torch.ones(2)}, "tensors of no architecture that is known here"),
    ],
)
def test_a_file_that_is_no_model(content, complaint, tmp_path, convert):
    path = tmp_path / "x.pt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    code, _, told = convert("glimpse", path, tmp_path / "out")
    assert (
        code == 2 and told.startswith(f"error: {path}: {complaint}") and len(told.splitlines()) == 1
    )


def test_other_models_are_told_by_name(tmp_path, convert):
    file("config.json", '{"model_type": "bert"}')(tmp_path)
    assert (
        "of no architecture that is known here: it says bert"
        in convert("glimpse", tmp_path, tmp_path / "out")[2]
    )
    save_file({"embeddings": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    code, told, _ = convert("inspect", tmp_path)
    assert code == 0 and "embeddings  (3, 2) float32" in told and "it says bert" in told


def test_values_that_are_no_numbers(good, tmp_path, convert):
    shutil.copytree(good / "open_clip", tmp_path / "odd")
    stored(lambda x: x * float("nan"))(tmp_path / "odd")
    assert (
        "holds values that are no numbers"
        in convert("glimpse", tmp_path / "odd", tmp_path / "out")[2]
    )
    model = made(*FLAVOURS["CLIP"])
    endless = {name: model.tensors[name].clone() for name in model.tensors}
    # equal to itself, and the largest of differences of which one is nan may be small
    endless["text.norm.weight"][0] = float("inf")
    portable.save(replace(model, tensors=Tensors.held(endless)), tmp_path / "endless")
    for format in ("open_clip", "hf"):
        code, _, told = convert(
            format, tmp_path / "endless", tmp_path / format, "--tokenizer", "clip_bpe"
        )
        assert (
            code == 2
            and "text.norm.weight holds values that are no numbers" in told
            and not (tmp_path / format).exists()
        ), told


def test_what_was_assumed_is_told_where_embeddings_differ(good, tmp_path, convert):
    """A folder of timm's that leaves its heads unsaid, under a name that does not tell them
    either.
    """
    shutil.copytree(good / "timm", tmp_path / "odd")
    said(
        "config.json",
        lambda tree: tree["model_args"].pop("num_heads") and tree.update(architecture="test_vit"),
    )(tmp_path / "odd")
    assert (
        "assumed, as nothing says it: heads 2;" in timm.load(tmp_path / "odd").about.source["notes"]
    )
    timm.save(made(*FLAVOURS["SLIP, A-CLIP"]), tmp_path / "named")
    said("config.json", lambda tree: tree["model_args"].pop("num_heads"))(tmp_path / "named")
    named = timm.load(tmp_path / "named")
    assert named.cfg.shape.heads == 3 and "notes" not in named.about.source, (
        "vit_tiny_patch16_224 says it"
    )
    code, _, told = convert("glimpse", good / "timm", tmp_path / "out", "--given", "heads=4")
    assert code == 2 and "it gives other embeddings" in told, told
    said("config.json", lambda tree: tree["pretrained_cfg"].update(mean=None))(tmp_path / "named")
    code, _, told = convert("glimpse", tmp_path / "named", tmp_path / "out", "--given", "heads=4")
    assert code == 2 and re.search(
        r"it gives other embeddings.*assumed, as nothing says it: mean \[0.485,", told
    ), told


def test_nan_is_no_small_difference(good, tmp_path, convert, monkeypatch):
    monkeypatch.setattr(
        "glimpse.run.verify.proofs.differences", lambda *_: {"images": 1e-7, "captions": float("nan")}
    )
    assert (
        "it gives other embeddings" in convert("open_clip", good / "open_clip", tmp_path / "out")[2]
    )


def test_what_files_do_not_tell_is_given(good, tmp_path, convert):
    """Each is run beside its own library, too."""
    weights = load_file(good / "open_clip" / open_clip.WEIGHTS[0])
    torch.save(
        {"state_dict": weights, "ema": {"visual.proj": torch.ones(1)}}, tmp_path / "epoch_1.pt"
    )
    (tmp_path / "sizes.json").write_text(
        json.dumps(json.loads((good / "open_clip" / open_clip.CONFIG).read_text())["model_cfg"])
    )
    line = (
        "glimpse",
        tmp_path / "epoch_1.pt",
        tmp_path / "half",
        "--given",
        f"config={tmp_path / 'sizes.json'}",
        "std=[0.5,0.5,0.5]",
    )
    code, told, complaint = convert(*line)
    assert (
        code == 0 and "does not say it: mean [0.48145466, 0.4578275, 0.40821073]; --given" in told
    ), complaint
    assert (
        json.loads((tmp_path / "half/config.json").read_text())["model"]["vision"]["std"]
        == [0.5] * 3
    )
    given = f"config={good / 'open_clip' / open_clip.CONFIG}"
    code, told, complaint = convert(
        "glimpse", tmp_path / "epoch_1.pt", tmp_path / "a", "--given", given
    )
    assert (
        code == 0
        and "epoch_1.pt run in its own library" in told
        and "epoch_1.pt: left out: ema" in told
    ), complaint
    told = convert("inspect", tmp_path / "epoch_1.pt", "--given", given)[1]
    assert "format        open_clip" in told and "\nnotes         left out: ema" in told
    code, told, _ = convert("inspect", tmp_path / "epoch_1.pt")
    assert code == 0 and "epoch_1.pt: 62 tensors" in told and "add --given config=NAME" in told
    code, told, complaint = convert("glimpse", tmp_path / "half", tmp_path / "again")
    assert code == 0 and "assumed" not in told, "it was told, and cannot be given there"
    code, told, complaint = convert(
        "glimpse",
        good / "timm" / "model.safetensors",
        tmp_path / "b",
        "--given",
        "heads=2",
        "pool=mean",
    )
    assert code == 0 and "model.safetensors run in its own library" in told, complaint
    for pair, why in (
        ("heads", "no value"),
        ("heads=[", "no value"),
        ("heads=x", "heads: 'x'; it must be of type int"),
        ("depth=2", "unknown 'depth'; known"),
        ("eps=0", "model.vision.eps 0.0: it must be above 0"),
        ("image_size=0", "of an image of 0 x 0; say its height"),
        ("mean=0.5", "model.vision.mean (0.5,), std"),
        ("image_size=[64]", "image_size: [64]; it must be"),
    ):
        code, _, told = convert(
            "glimpse", good / "timm" / "model.safetensors", tmp_path / "c", "--given", pair
        )
        assert code == 2 and why in told and len(told.splitlines()) == 1, told


def test_why_a_file_cannot_be_read_is_told_whatever_is_given(good, tmp_path, convert):
    whole = (good / "open_clip" / open_clip.WEIGHTS[0]).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"w": torch.ones(2), "path": tmp_path}, tmp_path / "more.pt")
    for name, why in (("cut.safetensors", "truncated"), ("more.pt", "refused (pathlib")):
        code, _, told = convert(
            "glimpse", tmp_path / name, tmp_path / "out", "--given", "config=ViT-B-32"
        )
        assert code == 2 and told.startswith(f"error: {tmp_path / name}: {why}"), told


def test_a_file_is_known_by_its_beginning_too(good, tmp_path, convert):
    """Caches of hubs name files by their hash."""
    shutil.copy(good / "open_clip" / open_clip.WEIGHTS[0], tmp_path / "3f2a")
    code, told, complaint = convert(
        "inspect", tmp_path / "3f2a", "--given", f"config={good / 'open_clip' / open_clip.CONFIG}"
    )
    assert code == 0 and "format        open_clip" in told, complaint


def test_what_torch_says_of_every_file_is_left_out(tmp_path, convert):
    torch.save({"a": torch.ones(1000), "b": "x" * 500}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    for begin, why in (
        (160, "truncated or no file of tensors (Unsupported operand 0)"),
        (100, "refused (torch._utils._rebuild)"),
    ):
        cut = content[:begin] + bytes(40) + content[begin + 40 :]
        (tmp_path / "x.pt").write_bytes(cut)
        code, _, told = convert("glimpse", tmp_path / "x.pt", tmp_path / "out")
        assert (
            code == 2
            and told.startswith(f"error: {tmp_path / 'x.pt'}: {why}")
            and len(told.splitlines()) == 1
        ), told


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
    assert (
        torch_dist.Plain(
            io.BytesIO(pickle.dumps(Odd(kind, "TORCH_PRESERVE_FORMAT"), protocol))
        ).load()
        is kind.TORCH_PRESERVE_FORMAT
    )
    with pytest.raises(pickle.UnpicklingError, match="getattr of"):
        torch_dist.Plain(io.BytesIO(pickle.dumps(Odd(kind, "mro"), protocol))).load()
    torch.save({"stage": Odd(ZeroStageEnum, "weights")}, tmp_path / "shard.pt")
    assert zero_reader.structure(tmp_path / "shard.pt") == {"stage": ZeroStageEnum.weights}
    torch.save({"stage": Odd(ZeroStageEnum, "mro")}, tmp_path / "shard.pt")
    with pytest.raises(ValueError, match="shard.pt: truncated or no checkpoint .getattr of"):
        zero_reader.structure(tmp_path / "shard.pt")


def test_an_older_library_is_no_error(good, tmp_path, convert, monkeypatch):
    monkeypatch.setattr("glimpse.model.convert.common.metadata.version", lambda package: "2.30.0")
    code, told, complaint = convert("open_clip", good / "open_clip", tmp_path / "out")
    assert code == 0, complaint
    assert (
        "not run beside another library: open-clip-torch 2.30.0 is installed, 3.0 or newer" in told
    )
    monkeypatch.undo()
    with pytest.raises(ImportError, match="^no-such-package is not installed$"):
        common.newer("no-such-package", "1.0")


def test_openais_state_dict(tmp_path, convert):
    open_clip.save(made(*FLAVOURS["OpenAI"]), tmp_path / "state")
    numbers = dict(
        input_resolution=torch.tensor(64),
        context_length=torch.tensor(77),
        vocab_size=torch.tensor(49408),
    )
    torch.save(
        {**load_file(tmp_path / "state" / open_clip.WEIGHTS[0]), **numbers}, tmp_path / "openai.pt"
    )
    code, told, complaint = convert("glimpse", tmp_path / "openai.pt", tmp_path / "out")
    assert code == 0 and "openai.pt run in its own library" in told, complaint
    code, _, told = convert(
        "glimpse", tmp_path / "openai.pt", tmp_path / "gelu", "--given", "config=ViT-B-32"
    )
    assert (
        code == 2
        and "--given config=ViT-B-32: " in told
        and "is OpenAI's, which tells everything itself; leave it out" in told
    )
    torch.save(
        {
            "visual.conv1.weight": torch.ones(4, 3, 3, 3),
            "visual.bn1.weight": torch.ones(4),
            **numbers,
        },
        tmp_path / "RN50.pt",
    )
    assert (
        "RN50.pt: a ResNet; Glimpse's towers are vision"
        in convert("glimpse", tmp_path / "RN50.pt", tmp_path / "resnet")[2]
    )


@pytest.mark.parametrize("format", ["open_clip", "timm", "megatron"])
@pytest.mark.parametrize("flavour", ["FLIP, pooled mean", "FLIP, learned"])
def test_bf16_in_and_out(format, flavour, tmp_path, convert):
    """Positions and biases are added up in fp32 and stay so, or the other library would not give
    our embeddings.
    """
    portable.save(made(*FLAVOURS[flavour]), tmp_path / "source", torch.bfloat16)
    code, told, complaint = convert(
        format, tmp_path / "source", tmp_path / "out", "--dtype", "bf16"
    )
    assert code == 0 and ("run in its own library" in told or format == "megatron"), complaint


def test_nothing_that_a_user_has_is_touched(good, tmp_path, convert):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("x")
    assert convert("glimpse", good / "open_clip", tmp_path / "out", "--image-size", "0")[0] == 2
    assert convert("glimpse", good / "open_clip", f"{tmp_path}/out/")[0] == 0
    assert (tmp_path / "out.part" / "mine").exists() and len(list(tmp_path.iterdir())) == 2


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
            tmp_path / "checkpoint", Tensors(meta, lambda name: torch.zeros(1)), torch.float32
        )
    assert not list(tmp_path.iterdir())


# MiB of a tensor in the test below: beside it all else is little, and half of it is more than what
# malloc keeps for later
LARGE = 66
# what is written of three such tensors: as many times one of them may be held
SPLIT = "[Rule((n,), (n + 'q', n + 'k', n + 'v'), thirds, fused) for n in source]"
TURNED = "[Rule((n,), (n,), transposed, transposed) for n in source]"
WRITERS = {
    "files.write(out, source)": 1.2,
    f"files.write(out, exported({SPLIT}, source))": 1.2,
    "t5x.write(out, source, torch.float32)": 1.2,
    "files.write(out, source, torch.bfloat16)": 1.7,
    f"files.write(out, exported({TURNED}, source))": 2.2,
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
from glimpse.model.convert.rules import Rule, Tensors, exported, fused, thirds, transposed
shape, out = (3 * 2**10, {LARGE} * 2**18 // (3 * 2**10)), Path({str(tmp_path / "x")!r})
meta = {{f"w{{i}}": torch.empty(shape, device="meta") for i in range(3)}}
source = Tensors(meta, lambda name: torch.ones(shape))
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
