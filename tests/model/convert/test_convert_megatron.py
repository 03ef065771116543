"""megatron-core's checkpoints: bit for bit there and back, and megatron-core's own modules, loaded
from one, give our embeddings.

    bash run/test.sh tests/model/convert/test_convert_megatron.py
The slow cases are what two jobs on CPU found, one of one rank and one of two tensor-parallel ranks
(tests/workers/megatron_worker.py).
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from glimpse.data.patches import patchify
from glimpse.model.convert import megatron, torch_dist
from glimpse.model.convert.positions import TERMS_FILE
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import PortableModel
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.tests.helpers.tiny import ROOT

VOCAB = 321
TINY = dict(size="custom/8", custom=Size(64, 3, 4, 32, 2, 2, 24, mlp=3.0), image_size=(16, 32))
CLIP = ModelConfig(
    **TINY,
    init="clip",
    vision=VisionConfig("learned", "cls", True, False, activation="quick_gelu", eps=1e-5),
    text=TextConfig(True, "eot", "quick_gelu", 1e-5),
)
FLIP = ModelConfig(**TINY)
MODELS = {
    "clip": (CLIP, 77),
    "flip": (FLIP, 32),
    # a bias where CLIPViTModel's clip has none
    "folded": (replace(FLIP, vision=replace(FLIP.vision, pre_norm=True)), 32),
    # none where its internvit has one
    "bare": (replace(CLIP, vision=replace(CLIP.vision, pre_norm=False, pool="mean")), 32),
}


def model(flavour, vision_only=False):
    cfg, context = MODELS[flavour]
    torch.manual_seed(0)
    towers = Towers(cfg, VOCAB, context)
    tensors = {}
    for name, parameter in towers.named_parameters():
        is_vector = parameter.dim() == 1
        scale = 0.5 if is_vector else parameter.shape[-1] ** -0.5
        tensors[name] = torch.randn_like(parameter) * scale
    if not vision_only:
        return PortableModel(cfg, VOCAB, context, LazyTensors.from_dict(tensors))
    tower = {name: t for name, t in tensors.items() if name.startswith("vision.")}
    return PortableModel(cfg, 0, 0, LazyTensors.from_dict(tower))


def equal(a, b, dtype=torch.float32):
    assert (a.cfg, a.vocab, a.context) == (b.cfg, b.vocab, b.context)
    assert a.tensors.keys() == b.tensors.keys()
    wanted = {name: tensor.to(dtype) for name, tensor in b.tensors.items()}
    return all(torch.equal(a.tensors[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("flavour", MODELS)
def test_there_and_back(tmp_path, flavour, tp):
    ours = model(flavour)
    folder, spec = tmp_path / "out", "te" if flavour == "clip" else "local"

    megatron.save(ours, folder, tp=tp, spec=spec)

    assert megatron.recognizes(folder)
    assert not megatron.recognizes(tmp_path)
    pieces = {path.name for path in folder.glob("*.distcp")}
    assert pieces == {f"__{rank}_0.distcp" for rank in range(tp)}
    assert (folder / TERMS_FILE).exists() == (flavour == "folded")
    assert equal(megatron.load(folder), ours)


def test_a_vision_tower_alone_in_bf16(tmp_path):
    ours = model("flip", vision_only=True)
    # the text tower's heads are not in the way
    megatron.save(ours, tmp_path / "out", torch.bfloat16, tp=4)
    assert equal(megatron.load(tmp_path / "out"), ours, torch.bfloat16)


def test_where_each_rank_finds_its_piece(tmp_path):
    """Column-parallel layers and the vocabulary are split by outputs, row-parallel ones by inputs,
    the rest is rank 0's.
    """
    ours = model("clip")
    megatron.save(ours, tmp_path / "out", tp=2)
    folder = torch_dist.DistCheckpoint(tmp_path / "out")

    def last_piece(key):
        """Return (offset, file) of the last rank's piece."""
        pieces = []
        for at, where in folder.index.storage_data.items():
            if at.fqn == key:
                pieces.append((tuple(at.offset), where.relative_path))
        return pieces[-1]

    layers, words = "vision_model.decoder.layers", "text_model.embedding.word_embeddings.weight"
    qkv, out = f"{layers}.self_attention.linear_qkv", f"{layers}.self_attention.linear_proj"
    assert last_piece(f"{qkv}.weight") == ((2, 96, 0), "__1_0.distcp")
    assert last_piece(f"{out}.weight") == ((2, 0, 32), "__1_0.distcp")
    assert last_piece(f"{layers}.mlp.linear_fc2.bias") == ((2, 0), "__0_0.distcp")
    # 321 in multiples of 2 x 128: 512
    assert last_piece(words) == ((256, 0), "__1_0.distcp")

    table = folder.read(words)
    assert table.shape == (512, 32)
    assert torch.equal(table[:VOCAB], ours.tensors["text.token.weight"])
    assert not table[VOCAB:].any()
    our_bias = ours.tensors["vision.blocks.2.attn.qkv.bias"].view(3, 4, 16)
    foreign_bias = folder.read(f"{qkv}.bias", 2).view(4, 3, 16)
    assert torch.equal(foreign_bias[3, 1], our_bias[1, 3]), "k of the last head"


def test_trained_elsewhere_positions_and_bias_count(tmp_path):
    """Positions that were fixed and a bias that was none may have been trained; so may a checkpoint
    beside which the bias is kept.
    """
    for flavour in ("flip", "bare", "folded"):
        ours = model(flavour)
        folder = tmp_path / flavour
        megatron.save(ours, folder)
        foreign = megatron.unstack_layers(torch_dist.DistCheckpoint(folder))
        trained = {}
        for name in foreign:
            changes = "position" in name or name.endswith("conv1.bias")
            trained[name] = foreign[name] + (1e-3 if changes else 0)
        places = {name: megatron.find_place(ours.cfg, name) for name in trained}
        torch_dist.write(folder, LazyTensors.from_dict(trained), places, {}, {}, 1, torch.float32)

        again = megatron.load(folder)

        assert again.cfg.vision.positions == "learned"
        assert again.cfg.vision.patch_bias == (flavour != "folded")
        positions = trained["vision_model.position_embeddings.weight"]
        assert torch.equal(again.tensors["vision.positions"], positions)
        if flavour != "folded":
            bias = trained["vision_model.conv1.bias"]
            assert torch.equal(again.tensors["vision.patch.bias"], bias)


@pytest.fixture
def written(tmp_path):
    megatron.save(model("clip"), tmp_path / "out", tp=2)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(tp=4),
            (
                r"tp 4: the 2 heads of model.size 'custom/8' \(text_heads\) cannot be split evenly"
                r" over 4 ranks; choose a divisor of 2"
            ),
        ),
        (dict(tp=3), r"tp 3: the 4 heads"),
        (dict(tp=0), "tp 0"),
        (dict(spec="apex"), "spec 'apex': unknown; known: local, te"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        megatron.save(model("clip"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_missing_file_is_named(written):
    part = written / "__1_0.distcp"
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    message = r"__1_0.distcp: .* bytes, its .metadata says .*; missing or truncated: fetch it again"
    with pytest.raises(ValueError, match=message):
        megatron.load(written)
    part.write_bytes(content[:-2000] + bytes(2000))
    tensors = megatron.load(written).tensors
    with pytest.raises(
        ValueError, match=r"out: text_model.decoder.* cannot be read \(.*\); fetch the folder again"
    ):
        dict(tensors)
    part.unlink()
    with pytest.raises(ValueError, match="__1_0.distcp: 0 bytes"):
        megatron.load(written)
    (written / ".metadata").write_bytes((written / ".metadata").read_bytes()[:5000])
    with pytest.raises(ValueError, match="metadata: truncated or damaged|metadata: refused"):
        megatron.load(written)


def test_a_missing_tensor_or_another_architecture_is_named(written):
    index = torch_dist.DistCheckpoint(written).index
    qkv = "vision_model.decoder.layers.self_attention.linear_qkv.weight"
    chunks = index.state_dict_metadata[qkv].chunks
    half = chunks.pop()
    (written / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        ValueError, match=f"the pieces of {qkv} do not make it up; a rank's part is missing"
    ):
        tensors = megatron.load(written).tensors
        tensors["vision.blocks.2.attn.qkv.weight"]
    chunks.append(half)
    entry = index.state_dict_metadata.pop(qkv)
    (written / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        ValueError,
        match="out: vision_model.decoder.layers.0.self_attention.linear_qkv.weight is missing",
    ):
        megatron.load(written)
    index.state_dict_metadata[qkv] = entry
    (written / ".metadata").write_bytes(pickle.dumps(index))
    tree = json.loads((written / "config.json").read_text())
    for key, value, message in (
        ("depth", 2, "unexpected tensor vision_model.decoder.layers.2"),
        ("width", 32, r"out: vision.cls is \(64,\); its architecture makes it \(32,\)"),
        ("depths", 2, "config.json: not what a conversion to megatron wrote"),
    ):
        other = copy.deepcopy(tree)
        other["model"]["custom"][key] = value
        (written / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message):
            megatron.load(written)
    (written / "config.json").unlink()
    message = (
        "config.json: missing; megatron-core keeps no architecture, so add --given config=PATH"
    )
    with pytest.raises(ValueError, match=message):
        megatron.load(written)


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"cposix\nsystem\n(S'true'\ntR.", r"refused \(posix.system\)"),
        (
            b"ctorch.distributed.checkpoint.filesystem\nos.system\n.",
            r"refused \(torch.*os.system\)",
        ),
        (
            b"ctorch.distributed.checkpoint.filesystem\nFileSystem\n.",
            r"refused \(torch.*FileSystem\)",
        ),
        (b"ctorch\nload\n.", r"refused \(torch.load\)"),
        (pickle.dumps({}), "holds a dict"),
    ],
)
def test_an_index_that_would_run_code_is_refused(written, pickled, message):
    (written / ".metadata").write_bytes(pickled)
    with pytest.raises(ValueError, match=f"metadata: {message}"):
        megatron.load(written)


def test_an_index_of_an_older_megatron_is_read(written):
    index = pickle.dumps(torch_dist.DistCheckpoint(written).index, protocol=2)
    foreign = index.replace(
        b"torch.distributed.checkpoint.metadata\nMetadata\n",
        b"megatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert foreign != index
    (written / ".metadata").write_bytes(foreign)
    assert equal(megatron.load(written), model("clip"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A folder with what jobs of one and of two ranks found in the same checkpoints, and saved."""
    folder = tmp_path_factory.mktemp("megatron")
    for flavour, (cfg, context) in MODELS.items():
        for tp in (1, 2):
            megatron.save(model(flavour), folder / "cases" / f"{flavour}-{tp}", tp=tp)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([context, 5, 1] if cfg.text.causal else [context] * 3)
        images = torch.randn(3, 3, 16, 32, generator=generator)
        ids = torch.randint(VOCAB, (3, context), generator=generator)
        inputs = {"images": images, "lengths": lengths, "ids": ids}
        torch.save(inputs, folder / f"inputs-{flavour}.pt")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # megatron-core would compile gelu
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, ROOT / "tests/workers/megatron_worker.py", folder]
    ranks = []
    for world in (1, 2):
        for rank in range(world):
            line = [*command, str(rank), str(world)]
            ranks.append(subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("flavour", MODELS)
def test_megatrons_own_modules_give_our_embeddings(jobs, flavour, world):
    """Whatever number of ranks the checkpoint was written for."""
    cfg, _ = MODELS[flavour]
    results = torch.load(jobs / f"found{world}.pt")
    inputs = torch.load(jobs / f"inputs-{flavour}.pt")
    towers, lengths = model(flavour).towers(), inputs["lengths"]
    ids = torch.cat([row[:length] for row, length in zip(inputs["ids"], lengths)])
    patches = patchify(inputs["images"], cfg.patch_size)
    with torch.no_grad():
        image = towers.encode_image(patches, torch.arange(patches.shape[1]).expand(3, -1))
        text = towers.encode_text(ids, lengths)
        scale = towers.temperature.logit_scale.exp()

    for tp in (1, 2):
        foreign = results[f"{flavour}-{tp}"]
        for name, ours in (("image", image), ("text", text), ("scale", scale)):
            apart = float((foreign[name] - ours).abs().max())
            print(f"{flavour} written for {tp}, loaded by {world}: {name} {apart:.1e} apart")
            assert apart < 1e-5
    assert (image[0] - image[1]).abs().max() > 1e-2
    assert (text[0] - text[1]).abs().max() > 1e-2


@pytest.mark.slow
def test_what_a_job_of_two_ranks_saves_is_read(jobs, tmp_path):
    for case in ("clip-2", "bare-1"):
        ours = model(case.partition("-")[0])
        config = jobs / "cases" / case / "config.json"
        for name in (case, f"{case}-apart"):
            assert equal(megatron.load(jobs / "saved" / name, config=str(config)), ours)
            saved = shutil.copytree(jobs / "saved" / name, tmp_path / name)
            shutil.copy(config, saved)
            assert equal(megatron.load(saved), ours)
