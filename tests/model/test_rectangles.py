"""Images of H x W: a model of model.image_size [32, 48] sees them upright and undistorted, in
training and evaluation, by every method; what cannot be had says so before it begins.

Run: pytest tests/model/test_rectangles.py
"""

import dataclasses
import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.data.evals.finetune import Labelled, Mix
from glimpse.data.loader import Batches, plan
from glimpse.data.patches import patchify
from glimpse.data.shards import Shards
from glimpse.data.transforms import View, center_view, decode, random_box, random_view, resize
from glimpse.model.methods import build_method
from glimpse.model.towers import ModelConfig, Towers
from glimpse.run.evals import embed, evaluate, parse
from glimpse.run.lib import config
from glimpse.run.reports import pictures
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import launch, settings, untrained
from glimpse.tests.helpers.tiny import shards as make_shards
from glimpse.tests.model.test_towers import CLIP, ours, patches_of

H, W, GRID, L = 32, 48, (4, 6), 24
WIDE, CLIPA = "model.image_size=[32, 48]", "model.vision.pool=mean_then_norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("rectangles"))


def ramp(height, width, kind="PNG"):
    """Red is the column and green the row, each from 0 to 255."""
    rows, columns = np.mgrid[:height, :width]
    pixels = (
        np.stack([columns * 255 / (width - 1), rows * 255 / (height - 1), rows * 0], 2)
        .round()
        .astype(np.uint8)
    )
    out = BytesIO()
    Image.fromarray(pixels).save(
        out, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {})
    )
    return out.getvalue()


def seen(image, height, width):
    """Of a view of ramp(height, width): the box (top, left, height, width) that its outer pixels
    show, to about a pixel.
    """
    x, y = image[..., 0].mean(0) / 255 * (width - 1), image[..., 1].mean(1) / 255 * (height - 1)
    rows, columns = ((a[-2] - a[1]) * len(a) / (len(a) - 3) for a in (y, x))
    return y[1] + 0.5 - 1.5 * rows / len(y), x[1] + 0.5 - 1.5 * columns / len(x), rows, columns


# ---- views


@pytest.mark.parametrize(
    "kind, height, width", [("PNG", 150, 200), ("PNG", 200, 150), ("JPEG", 600, 700)]
)
def test_a_random_view_shows_its_box(kind, height, width):
    data = ramp(height, width, kind)
    for seed in range(8):
        image, box = random_view(data, (H, W), View(crop=(0.3, 0.9)), np.random.default_rng(seed))
        assert image.shape == (H, W, 3)
        np.testing.assert_allclose(seen(image, height, width), box, atol=4 if kind == "JPEG" else 2)
        assert 3 / 4 - 0.03 < box[3] / box[2] / (W / H) < 4 / 3 + 0.03


def test_a_jpeg_is_decoded_at_no_less_than_either_side_asks():
    # at a half it would have 40 columns
    data, whole = ramp(128, 80, "JPEG"), View(crop=(1.0, 1.0), ratio=(80 / 128 / 1.5,) * 2)
    image, box = random_view(data, (H, W), whole, np.random.default_rng(0))
    assert box == (0, 0, 128, 80) and np.array_equal(image, resize(decode(data), H, W, "bicubic"))


def test_boxes_are_distorted_as_little_as_a_square_views():
    """width : height of the box is within `ratio` of the view's own; of equally many pixels, at
    equal odds.
    """
    rng, view = np.random.default_rng(0), View(crop=(0.2, 0.3), ratio=(3 / 4, 4 / 3))
    boxes = np.array([random_box(3000, 3000, view, rng, W / H) for _ in range(2000)])
    relative = np.log(boxes[:, 3] / boxes[:, 2] / (W / H)) / np.log(4 / 3)
    np.testing.assert_allclose(
        np.quantile(relative, np.linspace(0, 1, 5)), np.linspace(-1, 1, 5), atol=0.08
    )
    share = boxes[:, 2] * boxes[:, 3] / 3000**2
    assert share.min() == pytest.approx(0.2, abs=0.002) and share.max() == pytest.approx(
        0.3, abs=0.002
    )


@pytest.mark.parametrize(
    "shape, box", [((100, 1000), (0, 400, 100, 200)), ((1000, 100), (455, 0, 89, 100))]
)
def test_the_central_box_of_extreme_images_is_as_wide_or_tall_as_ratio_allows(shape, box):
    assert random_box(*shape, View(crop=(1.0, 1.0)), np.random.default_rng(0), W / H) == box


@pytest.mark.parametrize("how", ["resize_crop", "square"])
@pytest.mark.parametrize(
    "height, width, box",
    [  # the largest in shape 2 : 3, in the middle
        (200, 300, (0, 0, 200, 300)),
        (200, 150, (50, 0, 100, 150)),
        (100, 400, (0, 125, 100, 150)),
        (120, 120, (20, 0, 80, 120)),
        (150, 200, (9, 0, 133, 200)),
    ],
)
def test_the_central_view_covers_h_by_w(height, width, box, how):
    image = center_view(ramp(height, width), (H, W), how)
    assert image.shape == (H, W, 3) and image.flags.c_contiguous
    np.testing.assert_allclose(seen(image, height, width), box, atol=3)


@pytest.mark.parametrize("how", ["resize_crop", "square"])
def test_two_equal_sides_are_a_square(how):
    for data in (ramp(75, 100), ramp(100, 75), ramp(64, 64)):
        assert np.array_equal(center_view(data, (32, 32), how), center_view(data, 32, how))
        (a, box), (b, same) = (
            random_view(data, size, View(), np.random.default_rng(3)) for size in (32, (32, 32))
        )
        assert np.array_equal(a, b) and box == same


# ---- the tower


def test_a_tower_on_a_grid_that_is_not_square_equals_open_clip():
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=128, head_width=32, patch_size=8, image_size=(H, W))
    reference = Peer(
        128, vision, CLIPTextCfg(context_length=12, vocab_size=100, width=128, heads=4, layers=3)
    )
    cfg = dataclasses.replace(CLIP, size="nano/8", image_size=(H, W))
    towers = Towers(cfg, 100, 12)
    towers.load_state_dict(ours(reference.state_dict()))
    images = torch.randn(2, 3, H, W)
    assert cfg.grid == GRID
    found = towers.encode_image(patches_of(images, 8), torch.arange(L).expand(2, -1))
    torch.testing.assert_close(
        found, reference.encode_image(images, normalize=True), atol=1e-5, rtol=1e-5
    )


# ---- the whole chain


@pytest.mark.parametrize(
    "name, more",
    [
        ("quickstart", []),
        *(
            (f"{name}_nano", more)
            for name in ("clip", "slip", "mae", "maskclip", "aclip")
            for more in ([], [CLIPA])
        ),
    ],
)
def test_two_steps_of_every_method(data, name, more):
    cfg = config.load(
        f"run/configs/{name}.yaml",
        [
            f"data.train={data}/train",
            f"data.tokenizer=sentencepiece({data}/tokenizer.model)",
            "model.size=nano/8",
            WIDE,
            "batch=8",
            "data.workers=0",
            *more,
        ],
    )
    reader = config.reader(cfg)
    loader = Batches(reader, Shards(cfg.data.train), batch=8)
    torch.manual_seed(0)
    method = build_method(cfg, reader.tokenizer.vocab_size)
    optimizer, losses = (
        torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01),
        [],
    )
    for start in (0, 8):
        (part,) = loader[start]
        assert all(grid == GRID for *_, grid in reader.views)
        for view in part["views"].values():
            assert view["positions"].max() < L and torch.equal(
                view["positions"], view["positions"].sort(1).values
            )
        assert pictures.masked_inputs(part, cfg).shape[1] == sum(H + 2 for _ in part["views"])
        loss, _ = method.loss(method(part))
        loss.backward()
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    samples = [loader.shards[i] for i in range(3)]
    columns = pictures.gallery(
        method, cfg, reader.tokenizer, [s.image for s in samples], [s.caption for s in samples]
    )
    assert all(column.shape == (3, 3, H, W) for column in columns.values())


def test_evaluations_by_hand(data, monkeypatch, tmp_path):
    method, cfg, tokenizer = untrained(data / "tokenizer.model", WIDE)
    model = embed.Embedder(method, cfg, tokenizer, home=tmp_path, tag="test")
    samples = Shards([data / "eval" / "shapes" / "test"], captions=False)
    whole = np.stack(
        [center_view(samples[i].image, (H, W), cfg.eval_crop) for i in range(len(samples))]
    )
    patches = patchify(torch.from_numpy(whole).permute(0, 3, 1, 2), 8)
    with torch.no_grad():
        wanted = method.towers.encode_image(patches, torch.arange(L).expand(len(patches), -1))
    images = Benchmark(data / "eval" / "shapes")
    indices, found = model.images(images)
    torch.testing.assert_close(found[indices.argsort()], wanted)
    assert model.images(images, "grid")[1].shape == (49, 9 * 128)
    with ranks(monkeypatch, 2, batch=5) as run:
        scores, same = run(
            lambda: evaluate(
                model, parse([f"zero_shot:{data}/eval/shapes", f"retrieval:{data}/eval/retrieval"])
            )
        )
    assert (
        scores == same
        and 0 < scores["zero_shot/shapes/top5"] < 1
        and 0 < scores["retrieval/retrieval/image_to_text_r10"] < 1
    )


def test_fine_tuning_augments_them(data):
    pytest.importorskip("timm")
    how = dict(
        size=(H, W),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop=0.9,
        noise=(4, 2),
        seed=0,
    )
    benchmark = Benchmark(data / "eval" / "shapes")
    for augment, erase in (("none", 0.0), ("rand-m9-mstd0.5-inc1", 0.5)):
        images, labels, noise = Labelled(benchmark, 24, **how, augment=augment, erase=erase)[
            [(0, i) for i in range(16)]
        ]
        assert images.shape == (16, 3, H, W) and patchify(images, 8).shape == (16, L, 192)
    mixed, targets = Mix(24, 0.0, 1.0, 0.1)(images.clone(), labels, 0)
    assert (
        mixed.shape == images.shape and targets.shape == (16, 24) and not torch.equal(mixed, images)
    )


@pytest.mark.slow
def test_a_run_and_its_evaluation(data, tmp_path):
    """Two real steps on two ZeRO-3 ranks, of a size that is no row of the table, too, and what they
    made evaluated.
    """
    run, shapes = tmp_path / "run", f"{data}/eval/shapes"
    own = [
        "model.size=custom/8",
        (
            "model.custom={width: 96, depth: 2, heads: 4, text_width: 64, text_depth: 1,"
            " text_heads: 4, embed: 48, mlp: 2.5}"
        ),
    ]
    done = launch(
        2,
        "run/pretrain.py",
        *settings(data, run, WIDE, CLIPA, *own, "samples=32", f"evals=[zero_shot:{shapes}]"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [
        json.loads(line)["samples"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ] == [16, 32]
    assert 0 <= json.loads((run / "results.jsonl").read_text())["zero_shot/shapes/top5"] <= 1


# ---- what is refused


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.image_size=[32, 47]"], r"model.image_size (32, 47): not a multiple"),
        (["model.image_size=[0, 48]"], r"model.image_size (0, 48): not a multiple"),
        (["model.image_size=[32]"], "model.image_size: [32]; it must be"),
        (["model.image_size=[32, 48, 3]"], "model.image_size: [32, 48, 3]; it must be"),
        (["model.image_size=32x48"], "model.image_size: '32x48'; it must be"),
    ],
)
def test_a_wrong_size_is_refused(overrides, message):
    with pytest.raises(ValueError) as caught:
        config.load("run/configs/clip_nano.yaml", ["model.size=nano/8", *overrides])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_teachers_view_of_another_size_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            r"views.teacher: size: 16; the side of a square, and model.image_size \[32, 48\] is"
            r" none"
        ),
    ):
        config.load(
            "run/configs/aclip_nano.yaml", ["model.size=nano/8", WIDE, "views.teacher.size=16"]
        )
    assert plan({"view": View(), "teacher": View(encloses=("view",))}, (H, W), 8)[0][3] == GRID


def test_segmentation_is_refused(data, tmp_path):
    from glimpse.run.evals import segmentation

    method, cfg, tokenizer = untrained(data / "tokenizer.model", WIDE)
    with pytest.raises(
        ValueError,
        match=r"segmentation lays square windows on an image, and model.image_size is \[32, 48\]",
    ):
        segmentation.fits(
            embed.Embedder(method, cfg, tokenizer, home=tmp_path, tag="test"),
            segmentation.Options(),
        )


def test_it_is_saved_and_loads_back(tmp_path):
    cfg = config.load("run/configs/clip_nano.yaml", ["model.size=nano/8", WIDE])
    config.save(cfg, tmp_path / "config.yaml", {})
    assert config.load(tmp_path / "config.yaml") == cfg and cfg.model == dataclasses.replace(
        cfg.model, image_size=(32, 48)
    )
    assert ModelConfig(image_size=(224, 448)).grid == (14, 28)
