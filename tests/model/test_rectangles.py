"""Images of H x W: a model of model.image_size [32, 48] sees them upright and undistorted, in
training and evaluation, by every method. What is impossible is refused before it begins.

Run: pytest tests/model/test_rectangles.py
"""

import dataclasses
import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.evals.finetune import LabeledImages, MixupCutmix
from glimpse.data.loader import Batches, plan_views
from glimpse.data.patches import patchify
from glimpse.data.shards import Shards
from glimpse.data.transforms import View, center_view, decode, random_box, random_view, resize
from glimpse.model.methods import build_method
from glimpse.model.towers import ModelConfig, Towers
from glimpse.run.evals import embed, evaluate, parse_evaluations
from glimpse.run.lib import config
from glimpse.run.reports import pictures
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import launch, tiny_run_arguments, untrained_method
from glimpse.tests.helpers.tiny import write_dataset as make_shards
from glimpse.tests.model.test_towers import CLIP, ours, patches_of

H, W, GRID, L = 32, 48, (4, 6), 24
WIDE, CLIPA = "model.image_size=[32, 48]", "model.vision.pool=mean_then_norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("rectangles"))


def ramp(height, width, kind="PNG"):
    """Encode an image whose red is the column and whose green is the row, each from 0 to 255."""
    rows, columns = np.mgrid[:height, :width]
    red = columns * 255 / (width - 1)
    green = rows * 255 / (height - 1)
    blue = rows * 0
    pixels = np.stack([red, green, blue], 2).round().astype(np.uint8)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def span(places):
    """Return (start, length) of the source interval whose pixels show these places, in order."""
    # The outermost pixels are left out: resizing blurs them.
    length = (places[-2] - places[1]) * len(places) / (len(places) - 3)
    start = places[1] + 0.5 - 1.5 * length / len(places)
    return start, length


def seen(image, height, width):
    """Return the box (top, left, height, width) of ramp(height, width) that an image shows, to
    about a pixel.
    """
    left, columns = span(image[..., 0].mean(0) / 255 * (width - 1))
    top, rows = span(image[..., 1].mean(1) / 255 * (height - 1))
    return top, left, rows, columns


# ---- views


@pytest.mark.parametrize(
    "kind, height, width", [("PNG", 150, 200), ("PNG", 200, 150), ("JPEG", 600, 700)]
)
def test_a_random_view_shows_its_box(kind, height, width):
    data = ramp(height, width, kind)
    near = 4 if kind == "JPEG" else 2

    for seed in range(8):
        image, box = random_view(data, (H, W), View(crop=(0.3, 0.9)), np.random.default_rng(seed))

        assert image.shape == (H, W, 3)
        np.testing.assert_allclose(seen(image, height, width), box, atol=near)
        _, _, box_height, box_width = box
        assert 3 / 4 - 0.03 < box_width / box_height / (W / H) < 4 / 3 + 0.03


def test_a_jpeg_is_decoded_at_no_less_than_either_side_asks():
    # Decoded at half its size it would have 40 columns.
    data = ramp(128, 80, "JPEG")
    view = View(crop=(1.0, 1.0), ratio=(80 / 128 / 1.5,) * 2)

    image, box = random_view(data, (H, W), view, np.random.default_rng(0))

    assert box == (0, 0, 128, 80)
    assert np.array_equal(image, resize(decode(data), H, W, "bicubic"))


def test_boxes_are_distorted_as_little_as_a_square_views():
    """Width : height of the box is within `ratio` of the view's, with uniform log ratios and areas
    within `crop`.
    """
    rng = np.random.default_rng(0)
    view = View(crop=(0.2, 0.3), ratio=(3 / 4, 4 / 3))

    boxes = np.array([random_box(3000, 3000, view, rng, W / H) for _ in range(2000)])

    _, _, heights, widths = boxes.T
    relative = np.log(widths / heights / (W / H)) / np.log(4 / 3)
    quantiles = np.quantile(relative, np.linspace(0, 1, 5))
    np.testing.assert_allclose(quantiles, np.linspace(-1, 1, 5), atol=0.08)
    share = heights * widths / 3000**2
    assert share.min() == pytest.approx(0.2, abs=0.002)
    assert share.max() == pytest.approx(0.3, abs=0.002)


@pytest.mark.parametrize(
    "shape, box", [((100, 1000), (0, 400, 100, 200)), ((1000, 100), (455, 0, 89, 100))]
)
def test_the_central_box_of_extreme_images_is_as_wide_or_tall_as_ratio_allows(shape, box):
    view = View(crop=(1.0, 1.0))

    assert random_box(*shape, view, np.random.default_rng(0), W / H) == box


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

    assert image.shape == (H, W, 3)
    assert image.flags.c_contiguous
    np.testing.assert_allclose(seen(image, height, width), box, atol=3)


@pytest.mark.parametrize("how", ["resize_crop", "square"])
def test_two_equal_sides_are_a_square(how):
    for data in (ramp(75, 100), ramp(100, 75), ramp(64, 64)):
        a, a_box = random_view(data, 32, View(), np.random.default_rng(3))
        b, b_box = random_view(data, (32, 32), View(), np.random.default_rng(3))

        assert np.array_equal(center_view(data, (32, 32), how), center_view(data, 32, how))
        assert np.array_equal(a, b)
        assert a_box == b_box


# ---- the tower


def test_a_tower_on_a_grid_that_is_not_square_equals_open_clip():
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=128, head_width=32, patch_size=8, image_size=(H, W))
    text = CLIPTextCfg(context_length=12, vocab_size=100, width=128, heads=4, layers=3)
    reference = Peer(128, vision, text)
    cfg = dataclasses.replace(CLIP, size="nano/8", image_size=(H, W))
    towers = Towers(cfg, 100, 12)
    towers.load_state_dict(ours(reference.state_dict()))
    images = torch.randn(2, 3, H, W)

    embeddings = towers.encode_image(patches_of(images, 8), torch.arange(L).expand(2, -1))
    expected = reference.encode_image(images, normalize=True)

    assert cfg.grid == GRID
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)


# ---- the whole chain


METHODS = [("quickstart", [])]
for method_name in ("clip", "slip", "mae", "maskclip", "aclip"):
    METHODS += [(f"{method_name}_nano", []), (f"{method_name}_nano", [CLIPA])]


@pytest.mark.parametrize("name, more", METHODS)
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
    reader = config.build_reader(cfg)
    loader = Batches(reader, Shards(cfg.data.train), batch=8)
    torch.manual_seed(0)
    method = build_method(cfg, reader.tokenizer.vocab_size)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)

    # Training.
    losses = []
    for start in (0, 8):
        (part,) = loader[start]
        assert all(grid == GRID for *_, grid in reader.views)
        for view in part["views"].values():
            positions = view["positions"]
            assert positions.max() < L
            assert torch.equal(positions, positions.sort(1).values)
        assert pictures.masked_inputs_picture(part, cfg).shape[1] == sum(
            H + 2 for _ in part["views"]
        )
        loss, _ = method.loss(method(part))
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()

    # Pictures of what the model sees.
    samples = [loader.shards[i] for i in range(3)]
    images = [sample.image for sample in samples]
    captions = [sample.caption for sample in samples]
    columns = pictures.build_gallery(method, cfg, reader.tokenizer, images, captions)
    assert all(column.shape == (3, 3, H, W) for column in columns.values())


def test_evaluations_by_hand(data, monkeypatch, tmp_path):
    method, cfg, tokenizer = untrained_method(data / "tokenizer.model", WIDE)
    model = embed.Embedder(method, cfg, tokenizer, results_folder=tmp_path, tag="test")
    samples = Shards([data / "eval" / "shapes" / "test"], require_captions=False)
    encoded = [samples[i].image for i in range(len(samples))]
    views = np.stack([center_view(image, (H, W), cfg.eval_crop) for image in encoded])
    patches = patchify(torch.from_numpy(views).permute(0, 3, 1, 2), 8)
    with torch.no_grad():
        expected = method.towers.encode_image(patches, torch.arange(L).expand(len(patches), -1))
    images = ClipBenchmarkSet(data / "eval" / "shapes")
    evals = parse_evaluations([f"zero_shot:{data}/eval/shapes", f"retrieval:{data}/eval/retrieval"])

    indices, features = model.embed_images(images)
    _, grid_features = model.embed_images(images, "grid")
    with ranks(monkeypatch, 2, batch=5) as run:
        scores, other_scores = run(lambda: evaluate(model, evals))

    torch.testing.assert_close(features[indices.argsort()], expected)
    assert grid_features.shape == (49, 9 * 128)
    assert scores == other_scores
    assert 0 < scores["zero_shot/shapes/top5"] < 1
    assert 0 < scores["retrieval/retrieval/image_to_text_r10"] < 1


def test_fine_tuning_augments_them(data):
    pytest.importorskip("timm")
    options = dict(
        size=(H, W),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop=0.9,
        noise=(4, 2),
        seed=0,
    )
    benchmark = ClipBenchmarkSet(data / "eval" / "shapes")
    indices = [(0, i) for i in range(16)]

    for augment, erase in (("none", 0.0), ("rand-m9-mstd0.5-inc1", 0.5)):
        dataset = LabeledImages(benchmark, 24, **options, augment=augment, erase=erase)
        images, labels, _noise = dataset[indices]
        assert images.shape == (16, 3, H, W)
        assert patchify(images, 8).shape == (16, L, 192)

    mixed, targets = MixupCutmix(24, 0.0, 1.0, 0.1)(images.clone(), labels, 0)
    assert mixed.shape == images.shape
    assert targets.shape == (16, 24)
    assert not torch.equal(mixed, images)


@pytest.mark.slow
def test_a_run_and_its_evaluation(data, tmp_path):
    """Two real steps on two ZeRO-3 ranks, of a size that is not in the table, and an evaluation."""
    run = tmp_path / "run"
    shapes = f"{data}/eval/shapes"
    custom = [
        "model.size=custom/8",
        (
            "model.custom={width: 96, depth: 2, heads: 4, text_width: 64, text_depth: 1,"
            " text_heads: 4, embed: 48, mlp: 2.5}"
        ),
    ]
    arguments = tiny_run_arguments(
        data, run, WIDE, CLIPA, *custom, "samples=32", f"evals=[zero_shot:{shapes}]"
    )

    done = launch(2, "run/pretrain.py", *arguments)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines if "loss" in line] == [16, 32]
    assert 0 <= json.loads((run / "results.jsonl").read_text())["zero_shot/shapes/top5"] <= 1


# ---- what is refused


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.image_size=[32, 47]"], r"model.image_size: (32, 47) is not a multiple"),
        (["model.image_size=[0, 48]"], r"model.image_size: (0, 48) is not a multiple"),
        (["model.image_size=[32]"], "model.image_size: [32]; it must be"),
        (["model.image_size=[32, 48, 3]"], "model.image_size: [32, 48, 3]; it must be"),
        (["model.image_size=32x48"], "model.image_size: '32x48'; it must be"),
    ],
)
def test_a_wrong_size_is_refused(overrides, message):
    with pytest.raises(ValueError) as caught:
        config.load("run/configs/clip_nano.yaml", ["model.size=nano/8", *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teachers_view_of_another_size_is_refused():
    overrides = ["model.size=nano/8", WIDE, "views.teacher.size=16"]
    message = (
        r"views.teacher: size: 16; it is the side of a square, but model.image_size is \[32, 48\]"
    )

    with pytest.raises(ValueError, match=message):
        config.load("run/configs/aclip_nano.yaml", overrides)

    planned = plan_views({"view": View(), "teacher": View(encloses=("view",))}, (H, W), 8)
    assert planned[0][3] == GRID


def test_segmentation_is_refused(data, tmp_path):
    from glimpse.run.evals import segmentation

    method, cfg, tokenizer = untrained_method(data / "tokenizer.model", WIDE)
    model = embed.Embedder(method, cfg, tokenizer, results_folder=tmp_path, tag="test")
    message = r"segmentation needs square windows, and model.image_size is \[32, 48\]"

    with pytest.raises(ValueError, match=message):
        segmentation.check_model(model, segmentation.Options())


def test_it_is_saved_and_loads_back(tmp_path):
    cfg = config.load("run/configs/clip_nano.yaml", ["model.size=nano/8", WIDE])
    config.save(cfg, tmp_path / "config.yaml", {})

    assert config.load(tmp_path / "config.yaml") == cfg
    assert cfg.model == dataclasses.replace(cfg.model, image_size=(32, 48))
    assert ModelConfig(image_size=(224, 448)).grid == (14, 28)
