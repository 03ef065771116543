"""FLIP's checkpoints in and out: the embeddings are those of a plain forward pass written from the
paper's facts, the files those that
flax and tensorstore write and read, and both ways give the same bits.

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
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About, Portable
from glimpse.model.towers import ModelConfig, Size, Towers
from glimpse.model.vision import VisionConfig
from glimpse.tests.model.test_towers import patches_of

# widths, embedding, patch, grid's side, context, vocabulary
D, T, E, P, SIDE, N, VOCAB = 96, 64, 48, 4, 3, 7, 20
DEPTHS, HEADS = (3, 2), (6, 4)
SIZE = Size(D, DEPTHS[0], HEADS[0], T, DEPTHS[1], HEADS[1], E)


def names(tower: str, depth: int) -> dict[str, str]:
    """{parameter: its kind} of a transformer in FLIP's tree."""
    found = {f"{tower}/Transformer/encoder_norm/{kind}": "norm" for kind in ("scale", "bias")}
    for i in range(depth):
        block = f"{tower}/Transformer/encoderblock_{i:02d}"
        found |= {
            f"{block}/LayerNorm_{n}/{kind}": "norm" for n in (0, 1) for kind in ("scale", "bias")
        }
        parts = [
            f"MultiHeadDotProductAttention_0/{part}" for part in ("query", "key", "value", "out")
        ]
        for dense in (*parts, "MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1"):
            found |= {f"{block}/{dense}/kernel": dense, f"{block}/{dense}/bias": dense}
    return found


def sincos() -> np.ndarray:
    """(1, 1 + L, D) in fp32 throughout: a class token's zeros; then sines and cosines of a patch's
    column, then of its row.
    """
    omega = (1 / 10_000 ** (np.arange(D // 4, dtype=np.float32) / np.float32(D / 4))).astype(
        np.float32
    )
    rows = [np.zeros(D)] + [
        np.concatenate([f(np.float32(at) * omega) for at in (x, y) for f in (np.sin, np.cos)])
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    return np.stack(rows)[None].astype(np.float32)


def tree() -> dict[str, np.ndarray]:
    """A small random FLIP, by FLIP's names and in its shapes."""
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
        for name, kind in names(tower, depth).items():
            wide = {
                "MlpBlock_0/Dense_0": (width, 4 * width),
                "MlpBlock_0/Dense_1": (4 * width, width),
            }.get(kind, (width, width))
            shapes[name] = wide if name.endswith("kernel") else wide[-1:]
    found = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {
        "img_encoder/posembed_encoder/pos_embedding": sincos(),
        "logit_scale": np.array([2.5], np.float32),
    }


# ---- FLIP's model, plainly


def norm(x, p, name):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]
        + p[f"{name}/bias"]
    )


def dense(x, p, name):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def gelu(x):  # flax's default, the approximation
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def transformer(x, p, tower, depth, heads):
    """(B, N, D) -> (B, N, D); each token attends to all."""
    for i in range(depth):
        block = f"{tower}/Transformer/encoderblock_{i:02d}"
        y, attention = norm(x, p, f"{block}/LayerNorm_0"), f"{block}/MultiHeadDotProductAttention_0"
        q, k, v = (
            np.stack(np.split(dense(y, p, f"{attention}/{part}"), heads, -1), 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + dense(np.concatenate(np.moveaxis(mixed, 1, 0), -1), p, f"{attention}/out")
        y = norm(x, p, f"{block}/LayerNorm_1")
        x = x + dense(
            gelu(dense(y, p, f"{block}/MlpBlock_0/Dense_0")), p, f"{block}/MlpBlock_0/Dense_1"
        )
    return norm(x, p, f"{tower}/Transformer/encoder_norm")


def flip(p, images, ids):
    """Images (B, H, W, 3), ids (B, N) -> embeddings (B, E) of both."""
    p = {name: array.astype(np.float64) for name, array in p.items()}
    x = (
        np.stack(
            [
                np.einsum(
                    "bhwc,hwcd->bd",
                    images[:, y : y + P, x : x + P],
                    p["img_encoder/embedding/kernel"],
                )
                for y in range(0, P * SIDE, P)
                for x in range(0, P * SIDE, P)
            ],
            1,
        )
        + p["img_encoder/embedding/bias"]
    )
    x = x + p["img_encoder/posembed_encoder/pos_embedding"][:, 1:]
    x = np.concatenate([np.repeat(p["img_encoder/cls"], len(x), 0), x], 1)
    image = transformer(x, p, "img_encoder", DEPTHS[0], HEADS[0]).mean(1) @ p["img_mlp1/kernel"]
    x = (
        p["txt_encoder/token_embedding/embedding"][ids]
        + p["txt_encoder/posembed_encoder/pos_embedding"]
    )
    text = transformer(x, p, "txt_encoder", DEPTHS[1], HEADS[1])[:, 0] @ p["txt_mlp1/kernel"]
    return [z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (image, text)]


def embeddings(model: Portable, images, ids):
    towers, side = model.towers(), P * SIDE
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2)
    assert pixels.shape[2:] == (side, side)
    with torch.no_grad():
        return (
            towers.encode_image(
                patches_of(pixels, P), torch.arange(SIDE**2).expand(len(images), -1)
            ).numpy(),
            towers.encode_text(torch.from_numpy(ids).flatten(), torch.full((len(ids),), N)).numpy(),
        )


# ---- the formats


def nested(flat: dict) -> dict:
    """{a/b: x} -> {a: {b: x}}"""
    found = {}
    for name, leaf in flat.items():
        node = found
        for key in name.split("/")[:-1]:
            node = node.setdefault(key, {})
        node[name.split("/")[-1]] = leaf
    return found


def flat(node: dict, prefix: str = "") -> dict:
    return {
        name: leaf
        for key, below in node.items()
        for name, leaf in (
            flat(below, f"{prefix}{key}/") if isinstance(below, dict) else {f"{prefix}{key}": below}
        ).items()
    }


def by_flax(folder, arrays, dtype="float32"):
    """As FLIP's t5x writes what is not partitioned: flax's bytes."""
    serialization = pytest.importorskip("flax.serialization")
    import ml_dtypes

    arrays = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, array in arrays.items()
    }
    state = {"step": np.int32(7), "param_states": {"logit_scale": {"m": np.zeros(1, np.float32)}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_bytes(
        serialization.to_bytes(
            {"version": 3, "optimizer": {"target": nested(arrays), "state": state}}
        )
    )
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
        metadata = {
            "compressor": {"id": "gzip"},
            "shape": array.shape,
            "chunks": [max(1, n // 2) for n in array.shape],
        }
        spec = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": str(folder / path)},
            "metadata": metadata,
        }
        store = tensorstore.open(spec, create=True, open=True).result()
        store.write(array.astype(store.dtype.numpy_dtype)).result()
        spec["metadata"] = metadata | {"shape": list(array.shape)}
        spec |= (
            {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": path}
            if bucket
            else {"kvstore": {"driver": "file", "path": f"{path}/"}}
        )
        specs[name] = spec
    (folder / "checkpoint").write_bytes(
        msgpack.packb({"version": 3, "optimizer": {"target": nested(specs), "state": {"step": 7}}})
    )
    return folder


@pytest.mark.parametrize("write", [by_flax, by_tensorstore])
def test_embeddings_of_a_plain_forward_pass(tmp_path, write):
    arrays, rng = tree(), np.random.default_rng(1)
    write(tmp_path / "flip" / "checkpoint_190", arrays)
    assert (
        flip_jax.claims(tmp_path / "flip")
        and flip_jax.claims(tmp_path / "flip" / "checkpoint_190")
        and not flip_jax.claims(tmp_path)
    )
    model = flip_jax.load(tmp_path / "flip", *HEADS)
    # all else FLIP's, which is the default
    assert model.cfg == ModelConfig(f"custom/{P}", SIZE, image_size=P * SIDE)
    assert (model.vocab, model.context, model.about.pad_text, model.about.crop) == (
        VOCAB,
        N,
        True,
        "square",
    )
    assert model.about.source == {
        "path": str(tmp_path / "flip" / "checkpoint_190"),
        "format": "flip_jax",
    }
    images, ids = rng.normal(size=(3, P * SIDE, P * SIDE, 3)), rng.integers(0, VOCAB, (3, N))
    for mine, theirs in zip(embeddings(model, images, ids), flip(arrays, images, ids), strict=True):
        print(f"{np.abs(mine - theirs).max():.1e} from a plain forward pass")
        assert np.abs(mine - theirs).max() < 2e-6
    assert model.tensors["temperature.logit_scale"].item() == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_flax_reads_what_it_would_have_written(tmp_path, dtype):
    """And back: ours, theirs, ours are the same bits."""
    serialization = pytest.importorskip("flax.serialization")
    arrays = tree()
    model = flip_jax.load(by_flax(tmp_path / "in", arrays), *HEADS)
    assert flip_jax.save(model, tmp_path / "out", dtype) == []
    found = serialization.msgpack_restore((tmp_path / "out" / "checkpoint").read_bytes())
    assert found["version"] == 3 and found["optimizer"]["state"] == {"step": 0, "param_states": {}}
    found = flat(found["optimizer"]["target"])
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert str(found[name].dtype) == str(dtype).removeprefix("torch.")
        if "img_encoder/posembed" in name:  # the fixed table, which we compute to the last bit
            assert np.abs(found[name].astype(np.float32) - array).max() < (
                2e-6 if dtype == torch.float32 else 4e-3
            )
        else:
            assert np.array_equal(found[name], array.astype(found[name].dtype))
    back = flip_jax.load(tmp_path / "out", *HEADS)
    assert back.cfg == model.cfg and all(
        torch.equal(back.tensors[name], tensor.to(dtype)) for name, tensor in model.tensors.items()
    )


def test_large_arrays_in_chunks_and_both_forms_in_one(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    arrays = tree()
    whole = flip_jax.load(by_flax(tmp_path / "whole", arrays, "bfloat16"), *HEADS)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    chunked = flip_jax.load(by_flax(tmp_path / "chunked", arrays, "bfloat16"), *HEADS)
    assert (tmp_path / "chunked" / "checkpoint").read_bytes().count(
        b"__msgpack_chunked_array__"
    ) > 20
    beside = flip_jax.load(
        by_tensorstore(tmp_path / "beside", arrays, "bfloat16", bucket=False), *HEADS
    )
    for model in (chunked, beside):
        assert all(
            torch.equal(model.tensors[name], tensor) for name, tensor in whole.tensors.items()
        )
    assert (
        whole.tensors["vision.cls"].dtype == torch.bfloat16
        and whole.cfg.vision.positions == "sincos"
    )


def test_sizes_whose_heads_are_known(tmp_path):
    cfg = ModelConfig("nano/8", image_size=16)
    ours = Portable(
        cfg,
        9,
        4,
        Tensors.held({n: p.detach() for n, p in Towers(cfg, 9, 4).named_parameters()}),
        About(pad_text=True),
    )
    flip_jax.save(ours, tmp_path / "out")
    back = flip_jax.load(tmp_path / "out")
    assert back.cfg == cfg and all(
        torch.equal(back.tensors[name], tensor) for name, tensor in ours.tensors.items()
    )
    assert (
        "attends the padding"
        in flip_jax.save(replace(ours, about=About()), tmp_path / "unpadded")[0]
    )


def test_positions_that_were_learned(tmp_path):
    arrays = tree()
    arrays["img_encoder/posembed_encoder/pos_embedding"][0, 1:] += 0.1
    model = flip_jax.load(by_flax(tmp_path / "in", arrays), *HEADS)
    assert model.cfg.vision.positions == "learned" and "learned" in model.about.source["notes"]
    images, ids = np.ones((1, P * SIDE, P * SIDE, 3)), np.ones((1, N), int)
    assert np.abs(embeddings(model, images, ids)[0] - flip(arrays, images, ids)[0]).max() < 2e-6
    flip_jax.save(model, tmp_path / "out")
    back = flip_jax.load(tmp_path / "out", *HEADS)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in model.tensors.items())
    tensors = dict(model.tensors) | {"vision.positions": torch.ones(SIDE**2 + 1, D)}
    with pytest.raises(
        ValueError, match="model.vision.positions learned: FLIP's code adds none to the class token"
    ):
        flip_jax.save(replace(model, tensors=Tensors.held(tensors)), tmp_path / "no")


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
    leaves = {
        name: msgpack.ExtType(1, msgpack.packb((a.shape, a.dtype.name, a.tobytes())))
        for name, a in arrays.items()
    }
    (folder / "checkpoint").write_bytes(
        msgpack.packb({"version": 3, "optimizer": {"target": nested(leaves)}})
    )
    with pytest.raises(ValueError, match=complaint):
        flip_jax.load(folder, *HEADS)


def test_broken_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no file called checkpoint in it"):
        flip_jax.load(tmp_path)
    folder = by_tensorstore(tmp_path / "checkpoint_1", tree())
    whole = (folder / "checkpoint").read_bytes()
    short = msgpack.ExtType(1, msgpack.packb(([3], "float32", b"\0" * 8)))
    for content, complaint in (
        (whole[:500], "checkpoint: truncated or no msgpack file"),
        (b"\x01", "it should hold optimizer.target"),
        (
            msgpack.packb({"optimizer": {"target": {"x": short}}}),
            r"x \(3,\) float32 takes 12 bytes, and has 8",
        ),
        (
            msgpack.packb({"optimizer": {"target": {"logit_scale": 2.5}}}),
            "logit_scale is no tensor",
        ),
    ):
        (folder / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            flip_jax.load(folder)
    (folder / "checkpoint").write_bytes(whole)
    says = folder / "target.img_mlp1.kernel" / ".zarray"
    for content, complaint in (
        (
            says.read_text().replace("96", "95"),
            r"img_mlp1/kernel is \(96, 48\), but .*zarray says \[95, 48\]",
        ),
        ("{}", "img_mlp1/kernel: .*kernel is incomplete or broken .*zarray, KeyError"),
    ):
        before = says.read_text()
        says.write_text(content)
        with pytest.raises(ValueError, match=complaint):
            flip_jax.load(folder)
        says.write_text(before)
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
            "model.vision.pool cls: FLIP's code knows mean_with_cls alone",
        ),
        (
            {"vision": VisionConfig(pre_norm=True)},
            "model.vision.pre_norm True: FLIP's code knows False alone",
        ),
        (
            {"image_size": (16, 24)},
            r"model.image_size \[16, 24\]: FLIP's code knows square images alone",
        ),
    ],
)
def test_what_flip_cannot_express(tmp_path, changes, complaint):
    cfg = replace(ModelConfig("nano/8", image_size=16), **changes)
    ours = Portable(
        cfg, 9, 4, Tensors.held({n: p.detach() for n, p in Towers(cfg, 9, 4).named_parameters()})
    )
    with pytest.raises(ValueError, match=complaint):
        flip_jax.save(ours, tmp_path / "out")
    alone = replace(
        ours,
        cfg=ModelConfig("nano/8", image_size=cfg.image_size, vision=cfg.vision),
        vocab=0,
        context=0,
        tensors=ours.tensors.renamed({n: n for n in ours.tensors if n.startswith("vision.")}),
    )
    with pytest.raises(ValueError, match="a vision tower alone"):
        flip_jax.save(alone, tmp_path / "out")
