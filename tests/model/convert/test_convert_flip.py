"""FLIP's checkpoints in and out: the embeddings are those of a plain forward pass written from the
paper's facts, the files those that flax and tensorstore write and read, and both ways give the same
bits.

Run: pytest tests/model/convert/test_convert_flip.py
"""

import math
import sys
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch

from glimpse.model.convert import flip_jax
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel, select_vision_weights
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.tests.model.test_towers import patches_of

# widths, embedding, patch, grid's side, context, vocabulary
D, T, E, P, SIDE, N, VOCAB = 96, 64, 48, 4, 3, 7, 20
DEPTHS, HEADS = (3, 2), (6, 4)
SIZE = Size(D, DEPTHS[0], HEADS[0], T, DEPTHS[1], HEADS[1], E)


def names(tower: str, depth: int) -> dict[str, str]:
    """Return {parameter: its kind} of a transformer in FLIP's tree."""
    kinds = {f"{tower}/Transformer/encoder_norm/{kind}": "norm" for kind in ("scale", "bias")}
    attention = "MultiHeadDotProductAttention_0"
    layers = [f"{attention}/{name}" for name in ("query", "key", "value", "out")]
    layers += ["MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1"]
    for i in range(depth):
        block = f"{tower}/Transformer/encoderblock_{i:02d}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            for kind in ("scale", "bias"):
                kinds[f"{block}/{norm}/{kind}"] = "norm"
        for layer in layers:
            kinds[f"{block}/{layer}/kernel"] = layer
            kinds[f"{block}/{layer}/bias"] = layer
    return kinds


def sincos() -> np.ndarray:
    """Return (1, 1 + L, D) in fp32 throughout: a class token's zeros; then sines and cosines of a
    patch's column, then of its row.
    """
    exponents = np.arange(D // 4, dtype=np.float32) / np.float32(D / 4)
    omega = (1 / 10_000**exponents).astype(np.float32)
    rows = [np.zeros(D)]
    for y in range(SIDE):
        for x in range(SIDE):
            angles = [np.float32(at) * omega for at in (x, y)]
            waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
            rows.append(np.concatenate(waves))
    return np.stack(rows)[None].astype(np.float32)


def tree() -> dict[str, np.ndarray]:
    """Return a small random FLIP, by FLIP's names and in its shapes."""
    rng = np.random.default_rng(0)
    shapes = {
        "img_encoder/embedding/kernel": (P, P, 3, D),
        "img_encoder/embedding/bias": (D,),
        "img_encoder/cls": (1, 1, D),
        "txt_encoder/token_embedding/embedding": (VOCAB, T),
        "txt_encoder/posembed_encoder/pos_embedding": (1, N, T),
        "img_mlp1/kernel": (D, E),
        "txt_mlp1/kernel": (T, E),
    }
    for tower, width, depth in (("img_encoder", D, DEPTHS[0]), ("txt_encoder", T, DEPTHS[1])):
        mlp = {"MlpBlock_0/Dense_0": (width, 4 * width), "MlpBlock_0/Dense_1": (4 * width, width)}
        for name, kind in names(tower, depth).items():
            shape = mlp.get(kind, (width, width))
            shapes[name] = shape if name.endswith("kernel") else shape[-1:]
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = rng.normal(0, 0.2, shape).astype(np.float32)
    arrays["img_encoder/posembed_encoder/pos_embedding"] = sincos()
    arrays["logit_scale"] = np.array([2.5], np.float32)
    return arrays


# ---- FLIP's model, plainly


def norm(x, p, name):
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered**2).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def dense(x, p, name):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def gelu(x):  # flax's default, the approximation
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def transformer(x, p, tower, depth, heads):
    """(B, N, D) -> (B, N, D); each token attends to all."""
    for i in range(depth):
        block = f"{tower}/Transformer/encoderblock_{i:02d}"

        # Attention.
        layer = f"{block}/MultiHeadDotProductAttention_0"
        y = norm(x, p, f"{block}/LayerNorm_0")
        qkv = [dense(y, p, f"{layer}/{name}") for name in ("query", "key", "value")]
        q, k, v = (np.stack(np.split(z, heads, -1), 1) for z in qkv)
        scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        mixed = np.concatenate(np.moveaxis(mixed, 1, 0), -1)
        x = x + dense(mixed, p, f"{layer}/out")

        # MLP.
        y = norm(x, p, f"{block}/LayerNorm_1")
        y = gelu(dense(y, p, f"{block}/MlpBlock_0/Dense_0"))
        x = x + dense(y, p, f"{block}/MlpBlock_0/Dense_1")
    return norm(x, p, f"{tower}/Transformer/encoder_norm")


def flip(p, images, ids):
    """Images (B, H, W, 3), ids (B, N) -> embeddings (B, E) of both."""
    p = {name: array.astype(np.float64) for name, array in p.items()}

    # Images.
    kernel = p["img_encoder/embedding/kernel"]
    patches = []
    for y in range(0, P * SIDE, P):
        for x in range(0, P * SIDE, P):
            pixels = images[:, y : y + P, x : x + P]
            patches.append(np.einsum("bhwc,hwcd->bd", pixels, kernel))
    x = np.stack(patches, 1) + p["img_encoder/embedding/bias"]
    x = x + p["img_encoder/posembed_encoder/pos_embedding"][:, 1:]
    x = np.concatenate([np.repeat(p["img_encoder/cls"], len(x), 0), x], 1)
    image = transformer(x, p, "img_encoder", DEPTHS[0], HEADS[0]).mean(1) @ p["img_mlp1/kernel"]

    # Captions.
    x = p["txt_encoder/token_embedding/embedding"][ids]
    x = x + p["txt_encoder/posembed_encoder/pos_embedding"]
    text = transformer(x, p, "txt_encoder", DEPTHS[1], HEADS[1])[:, 0] @ p["txt_mlp1/kernel"]
    return [z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (image, text)]


def embeddings(model: PortableModel, images, ids):
    towers, side = model.towers(), P * SIDE
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2)
    assert pixels.shape[2:] == (side, side)
    patches = patches_of(pixels, P)
    positions = torch.arange(SIDE**2).expand(len(images), -1)
    tokens, lengths = torch.from_numpy(ids).flatten(), torch.full((len(ids),), N)
    with torch.no_grad():
        image = towers.encode_image(patches, positions)
        text = towers.encode_text(tokens, lengths)
    return image.numpy(), text.numpy()


# ---- the formats


def nested(flat: dict) -> dict:
    """{a/b: x} -> {a: {b: x}}"""
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flat(node: dict, prefix: str = "") -> dict:
    """{a: {b: x}} -> {a/b: x}"""
    leaves = {}
    for key, below in node.items():
        if isinstance(below, dict):
            leaves |= flat(below, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = below
    return leaves


def by_flax(folder, arrays, dtype="float32"):
    """As FLIP's t5x writes what is not partitioned: flax's bytes."""
    serialization = pytest.importorskip("flax.serialization")
    import ml_dtypes

    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {name: array.astype(numpy_type) for name, array in arrays.items()}
    state = {"step": np.int32(7), "param_states": {"logit_scale": {"m": np.zeros(1, np.float32)}}}
    tree = {"version": 3, "optimizer": {"target": nested(arrays), "state": state}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_bytes(serialization.to_bytes(tree))
    return folder


def by_tensorstore(folder, arrays, dtype="float32", bucket=True):
    """As it writes what is partitioned: a zarr of gzipped chunks each, and in the tree what
    tensorstore calls its Spec.
    """
    tensorstore = pytest.importorskip("tensorstore")
    folder.mkdir(parents=True)
    specs = {}
    for name, array in arrays.items():
        path = f"target.{name.replace('/', '.')}"
        chunks = [max(1, n // 2) for n in array.shape]
        metadata = {"compressor": {"id": "gzip"}, "shape": array.shape, "chunks": chunks}
        spec = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": str(folder / path)},
            "metadata": metadata,
        }
        store = tensorstore.open(spec, create=True, open=True).result()
        store.write(array.astype(store.dtype.numpy_dtype)).result()
        spec["metadata"] = metadata | {"shape": list(array.shape)}
        if bucket:
            spec["kvstore"] = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
            spec["path"] = path
        else:
            spec["kvstore"] = {"driver": "file", "path": f"{path}/"}
        specs[name] = spec
    tree = {"version": 3, "optimizer": {"target": nested(specs), "state": {"step": 7}}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))
    return folder


@pytest.mark.parametrize("write", [by_flax, by_tensorstore])
def test_embeddings_of_a_plain_forward_pass(tmp_path, write):
    arrays, rng = tree(), np.random.default_rng(1)
    folder = tmp_path / "flip"
    write(folder / "checkpoint_190", arrays)

    assert flip_jax.recognizes(folder)
    assert flip_jax.recognizes(folder / "checkpoint_190")
    assert not flip_jax.recognizes(tmp_path)

    # All settings are FLIP's, which are the default.
    model = flip_jax.load(folder, *HEADS)
    assert model.cfg == ModelConfig(f"custom/{P}", SIZE, image_size=P * SIDE)
    assert (model.vocab, model.context) == (VOCAB, N)
    assert (model.about.pad_text, model.about.crop) == (True, "square")
    assert model.about.source == {"path": str(folder / "checkpoint_190"), "format": "flip_jax"}

    images, ids = rng.normal(size=(3, P * SIDE, P * SIDE, 3)), rng.integers(0, VOCAB, (3, N))
    for ours, theirs in zip(embeddings(model, images, ids), flip(arrays, images, ids), strict=True):
        far = np.abs(ours - theirs).max()
        print(f"{far:.1e} from a plain forward pass")
        assert far < 2e-6
    assert model.tensors["temperature.logit_scale"].item() == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_flax_reads_what_it_would_have_written(tmp_path, dtype):
    """And back: ours, theirs, ours are the same bits."""
    serialization = pytest.importorskip("flax.serialization")
    arrays = tree()
    model = flip_jax.load(by_flax(tmp_path / "in", arrays), *HEADS)

    assert flip_jax.save(model, tmp_path / "out", dtype) == []

    restored = serialization.msgpack_restore((tmp_path / "out" / "checkpoint").read_bytes())
    assert restored["version"] == 3
    assert restored["optimizer"]["state"] == {"step": 0, "param_states": {}}
    target = flat(restored["optimizer"]["target"])
    assert target.keys() == arrays.keys()
    for name, array in arrays.items():
        written = target[name]
        assert str(written.dtype) == str(dtype).removeprefix("torch.")
        if "img_encoder/posembed" in name:  # the fixed table, which we compute to the last bit
            far = np.abs(written.astype(np.float32) - array).max()
            assert far < (2e-6 if dtype == torch.float32 else 4e-3)
        else:
            assert np.array_equal(written, array.astype(written.dtype))

    back = flip_jax.load(tmp_path / "out", *HEADS)
    assert back.cfg == model.cfg
    for name, tensor in model.tensors.items():
        assert torch.equal(back.tensors[name], tensor.to(dtype))


def test_large_arrays_in_chunks_and_both_forms_in_one(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    arrays = tree()
    unchunked = flip_jax.load(by_flax(tmp_path / "whole", arrays, "bfloat16"), *HEADS)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    chunked = flip_jax.load(by_flax(tmp_path / "chunked", arrays, "bfloat16"), *HEADS)
    folder = by_tensorstore(tmp_path / "beside", arrays, "bfloat16", bucket=False)
    beside = flip_jax.load(folder, *HEADS)

    content = (tmp_path / "chunked" / "checkpoint").read_bytes()
    assert content.count(b"__msgpack_chunked_array__") > 20
    for model in (chunked, beside):
        for name, tensor in unchunked.tensors.items():
            assert torch.equal(model.tensors[name], tensor)
    assert unchunked.tensors["vision.cls"].dtype == torch.bfloat16
    assert unchunked.cfg.vision.positions == "sincos"


def random_pair(cfg: ModelConfig, **about) -> PortableModel:
    tensors = {name: p.detach() for name, p in Towers(cfg, 9, 4).named_parameters()}
    return PortableModel(cfg, 9, 4, LazyTensors.from_dict(tensors), ModelInfo(**about))


def test_sizes_whose_heads_are_known(tmp_path):
    cfg = ModelConfig("nano/8", image_size=16)
    ours = random_pair(cfg, pad_text=True)

    flip_jax.save(ours, tmp_path / "out")
    back = flip_jax.load(tmp_path / "out")
    (note, *_) = flip_jax.save(replace(ours, about=ModelInfo()), tmp_path / "unpadded")

    assert back.cfg == cfg
    for name, tensor in ours.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
    assert "attends the padding" in note


def test_positions_that_were_learned(tmp_path):
    arrays = tree()
    arrays["img_encoder/posembed_encoder/pos_embedding"][0, 1:] += 0.1

    model = flip_jax.load(by_flax(tmp_path / "in", arrays), *HEADS)
    assert model.cfg.vision.positions == "learned"
    assert "learned" in model.about.source["notes"]
    images, ids = np.ones((1, P * SIDE, P * SIDE, 3)), np.ones((1, N), int)
    ours, theirs = embeddings(model, images, ids)[0], flip(arrays, images, ids)[0]
    assert np.abs(ours - theirs).max() < 2e-6

    flip_jax.save(model, tmp_path / "out")
    back = flip_jax.load(tmp_path / "out", *HEADS)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in model.tensors.items())

    tensors = dict(model.tensors) | {"vision.positions": torch.ones(SIDE**2 + 1, D)}
    with pytest.raises(
        ValueError, match="model.vision.positions learned: FLIP's code adds none to the class token"
    ):
        flip_jax.save(replace(model, tensors=LazyTensors.from_dict(tensors)), tmp_path / "no")


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda a: a.pop("img_encoder/cls"),
            "not FLIP's parameters, missing: img_encoder/cls; if it calls",
        ),
        (
            lambda a: a.update(
                {"img_encoder/head/kernel": a.pop("img_mlp1/kernel"), "zz": np.ones(2, np.float32)}
            ),
            (
                "missing: img_mlp1/kernel; unknown: img_encoder/head/kernel, zz; if it calls .*"
                " names at the top of model/convert/flip_jax.py"
            ),
        ),
        (
            lambda a: a.pop("txt_encoder/Transformer/encoderblock_01/MlpBlock_0/Dense_1/bias"),
            "missing: txt_encoder/.*01/MlpBlock_0/Dense_1/bi",
        ),
        (
            lambda a: a.update({"img_mlp1/kernel": np.ones((D + 1, E), np.float32)}),
            r"image_projection.weight is \(48, 97\); .* \(48, 96\)",
        ),
        (
            lambda a: a.update({"img_encoder/embedding/kernel": np.ones((48, D), np.float32)}),
            "embedding/kernel is .* FLIP's has 4 dimensions",
        ),
        (
            lambda a: a.update(
                {"img_encoder/posembed_encoder/pos_embedding": np.ones((1, 9, D), np.float32)}
            ),
            "is for 8 patches; FLIP's are",
        ),
        (
            lambda a: a.update({"logit_scale": np.ones(1, np.int32)}),
            "logit_scale is int32; parameters are floats",
        ),
    ],
)
def test_what_is_missing_unknown_or_misshapen(tmp_path, change, complaint):
    arrays = tree()
    change(arrays)
    folder = tmp_path / "in"
    folder.mkdir()
    leaves = {}
    for name, array in arrays.items():
        content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        leaves[name] = msgpack.ExtType(1, content)
    tree_of_leaves = {"version": 3, "optimizer": {"target": nested(leaves)}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree_of_leaves))

    with pytest.raises(ValueError, match=complaint):
        flip_jax.load(folder, *HEADS)


def test_broken_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no file called checkpoint in it"):
        flip_jax.load(tmp_path)

    # The msgpack file.
    folder = by_tensorstore(tmp_path / "checkpoint_1", tree())
    content = (folder / "checkpoint").read_bytes()
    short = msgpack.ExtType(1, msgpack.packb(([3], "float32", b"\0" * 8)))
    of_short = msgpack.packb({"optimizer": {"target": {"x": short}}})
    of_number = msgpack.packb({"optimizer": {"target": {"logit_scale": 2.5}}})
    for broken, complaint in (
        (content[:500], "checkpoint: truncated or no msgpack file"),
        (b"\x01", "it should hold optimizer.target"),
        (of_short, r"x \(3,\) float32 takes 12 bytes, and has 8"),
        (of_number, "logit_scale is no tensor"),
    ):
        (folder / "checkpoint").write_bytes(broken)
        with pytest.raises(ValueError, match=complaint):
            flip_jax.load(folder)
    (folder / "checkpoint").write_bytes(content)

    # The description of a zarr.
    zarray = folder / "target.img_mlp1.kernel" / ".zarray"
    description = zarray.read_text()
    other_shape = r"img_mlp1/kernel is \(96, 48\), but .*zarray says \[95, 48\]"
    no_shape = "img_mlp1/kernel: .*kernel is incomplete or broken .*zarray, KeyError"
    for broken, complaint in (
        (description.replace("96", "95"), other_shape),
        ("{}", no_shape),
    ):
        zarray.write_text(broken)
        with pytest.raises(ValueError, match=complaint):
            flip_jax.load(folder)
        zarray.write_text(description)

    # A chunk of it, and the library that reads it.
    chunk = folder / "target.img_mlp1.kernel" / "1.1"
    chunk.rename(chunk.with_name("moved"))  # an incomplete download: no zeros in its place
    model = flip_jax.load(folder, *HEADS)
    model.tensors["vision.cls"]
    with pytest.raises(
        ValueError,
        match="img_mlp1/kernel: .*target.img_mlp1.kernel is incomplete or broken .*missing",
    ):
        model.tensors["image_projection.weight"]
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(
        ValueError, match="img_mlp1/kernel lies beside it as zarr: pip install tensorstore"
    ):
        model.tensors["image_projection.weight"]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (
            {"vision": VisionConfig(pool="cls")},
            "model.vision.pool cls: FLIP's code supports only mean_with_cls",
        ),
        (
            {"vision": VisionConfig(pre_norm=True)},
            "model.vision.pre_norm True: FLIP's code supports only False",
        ),
        (
            {"image_size": (16, 24)},
            r"model.image_size \[16, 24\]: FLIP's code supports only square images",
        ),
    ],
)
def test_what_flip_cannot_express(tmp_path, changes, complaint):
    cfg = replace(ModelConfig("nano/8", image_size=16), **changes)
    ours = random_pair(cfg)
    with pytest.raises(ValueError, match=complaint):
        flip_jax.save(ours, tmp_path / "out")

    tower = ModelConfig("nano/8", image_size=cfg.image_size, vision=cfg.vision)
    alone = PortableModel(tower, 0, 0, select_vision_weights(ours.tensors))
    with pytest.raises(ValueError, match="a vision tower alone"):
        flip_jax.save(alone, tmp_path / "out")
