"""Segmentation agrees with a simple computation, image by image, on any number of ranks.

Also intersection over union by hand, and windows that cover an image.

    bash run/test.sh tests/run/evals/test_segmentation.py
"""

import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import IGNORE, ClipBenchmarkSet
from glimpse.data.evals.sliding_windows import WindowGrid, WindowImages
from glimpse.data.patches import patchify
from glimpse.data.shards import write_shard
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import decode, resize
from glimpse.run.evals import embed, evaluate, parse_evaluations, segmentation
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import untrained_method

CLASSES = ("red", "green", "blue", "black")
SIZES = ((40, 40), (40, 64), (90, 50), (33, 70), (40, 41), (32, 32), (50, 40))


def encode_png(image):
    """Return an array (H, W) or (H, W, 3) as a PNG."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Write a set of noisy blocks of color and a tokenizer; the images have different sizes.

    The label maps have no class at the upper border.
    """
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    rows = []
    for i, (height, width) in enumerate(SIZES):
        blocks = rng.integers(0, 3, (math.ceil(height / 16), math.ceil(width / 16)))
        labels = np.repeat(np.repeat(blocks, 16, 0), 16, 1)
        labels = labels[:height, :width].astype(np.uint8)
        pixels = np.eye(3)[labels] * 200 + rng.uniform(0, 55, (height, width, 3))
        labels[:2] = IGNORE
        rows.append(
            (f"{i}", {"png": encode_png(pixels.astype(np.uint8)), "seg.png": encode_png(labels)})
        )
    (folder / "test").mkdir()
    write_shard(folder / "test" / "0.tar", rows)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} block\n{c}")
    texts = [f"a {name} block of {name}" for name in CLASSES] * 4
    train_sentencepiece(texts, folder / "tokenizer.model", 300)
    return folder


def build_model(scenes, pool):
    """Return (method, config, tokenizer)."""
    return untrained_method(scenes / "tokenizer.model", f"model.vision.pool={pool}")


def test_scores_by_hand():
    """The label map is 0 0 1 / 1 . 2, the prediction 0 1 1 / 1 2 0, and there are five classes.

    Intersections are 1, 2, 0, unions 3, 3, 2; two classes do not occur.
    """
    label_map = torch.tensor([[0, 0, 1], [1, IGNORE, 2]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    expected = dict(
        mean_iou=(1 / 3 + 2 / 3 + 0) / 3,
        mean_accuracy=(1 / 2 + 1 + 0) / 3,
        accuracy=3 / 5,
        chance=1 / 5,
    )

    counts = segmentation.confusion_matrix(label_map, prediction, 5)

    assert counts.sum() == 5
    assert counts[0].tolist() == [1, 1, 0, 0, 0]
    assert segmentation.compute_scores(counts) == pytest.approx(expected)


def test_windows_cover_an_image():
    window_grid = WindowGrid(side=32, size=48, stride=12)

    assert window_grid.canvas(40, 64) == (48, 77)
    assert window_grid.starts(48) == [0, 12, 16]
    assert window_grid.starts(32) == [0]
    for shape in SIZES:
        window_counts = np.zeros(window_grid.canvas(*shape), int)
        for top, left in window_grid.corners(*shape):
            assert top >= 0
            assert left >= 0
            window_counts[top : top + 32, left : left + 32] += 1
        assert window_counts.min() >= 1


def test_windows_are_cut_from_the_resized_image(scenes):
    images = ClipBenchmarkSet(scenes)
    window_grid = WindowGrid(32, 48, 16)
    preprocess = embed.Preprocess(32, 8, "resize_crop", "bicubic")
    corners = window_grid.corners(*SIZES[1])

    windows = WindowImages(images, window_grid, [3, 1])

    assert windows.image_index == [3] * len(window_grid.corners(*SIZES[3])) + [1] * len(corners)
    resized = resize(decode(images.image(1)), *window_grid.canvas(*SIZES[1]), "bicubic")
    first = windows.image_index.index(1)
    for n, (top, left) in enumerate(corners):
        expected = resized[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(windows.view(first + n, preprocess), expected)


def compute_confusion(model, scenes, value_attention_only):
    """Return the confusion matrix, computed image by image and window by window."""
    method, _cfg, tokenizer = model
    images = ClipBenchmarkSet(scenes)
    window_grid = WindowGrid(32, 64, 16)

    def embed_text(line):
        ids = torch.tensor(tokenizer(line))
        return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    prompts = [embed_text(f"a {name} block") + embed_text(name) for name in CLASSES]
    classes = torch.stack([F.normalize(embedding, dim=0) for embedding in prompts])

    counts = np.zeros((4, 4))
    for i in range(len(images)):
        # The sum of similarities at each pixel of the canvas, (4, H, W), and its number of windows.
        pixels = resize(decode(images.image(i)), *window_grid.canvas(*SIZES[i]), "bicubic")
        sums = torch.zeros(4, *pixels.shape[:2])
        window_counts = torch.zeros(pixels.shape[:2])
        for top, left in window_grid.corners(*SIZES[i]):
            rows, columns = slice(top, top + 32), slice(left, left + 32)
            window = torch.from_numpy(pixels[rows, columns].copy()).permute(2, 0, 1)
            patches = patchify(window[None], 8)
            tokens = method.towers.vision(
                patches, torch.arange(16)[None], value_attention_only=value_attention_only
            )
            embedded = method.towers.embed_image(tokens[0, 1:])
            similar = (embedded @ classes.T).T.view(1, 4, 4, 4)
            sums[:, rows, columns] += F.interpolate(similar, (32, 32), mode="bilinear")[0]
            window_counts[rows, columns] += 1

        means = F.interpolate((sums / window_counts)[None], SIZES[i], mode="bilinear")[0]
        prediction = means.argmax(0).numpy()
        label_map = images.label_map(i)
        labeled = label_map != IGNORE
        np.add.at(counts, (label_map[labeled], prediction[labeled]), 1)
    return counts


@pytest.mark.parametrize("pool, value_attention_only", [("cls", True), ("mean", False)])
def test_against_a_plain_computation_on_any_ranks(
    scenes, monkeypatch, tmp_path, pool, value_attention_only
):
    model = build_model(scenes, pool)
    with torch.no_grad():
        confusion = compute_confusion(model, scenes, value_attention_only)
    scores = segmentation.compute_scores(torch.from_numpy(confusion))
    expected = {f"segmentation/{scenes.name}/{key}": value for key, value in scores.items()}
    assert 0 < scores["mean_iou"] < 1

    def evaluate_segmentation(results_folder):
        embedder = embed.Embedder(*model, results_folder=results_folder, tag="test")
        return evaluate(embedder, parse_evaluations([f"segmentation:{scenes}"]))

    for world in (1, 2, 3, 8):  # one of eight ranks has no image
        folder = tmp_path / f"{world}"
        folder.mkdir()
        with ranks(monkeypatch, world, batch=5) as run:
            results = run(partial(evaluate_segmentation, folder))

        assert all(result == results[0] for result in results)
        assert results[0] == pytest.approx(expected)
        picture = Image.open(next((folder / "pictures").iterdir()))
        assert picture.height == len(SIZES) * 148


def test_values_are_tokens_that_attend_only_to_themselves(scenes):
    """A block that mixes no tokens has the same output for each token as for the token alone."""
    vision = build_model(scenes, "cls")[0].towers.vision
    block = vision.blocks[0]
    x = torch.randn(2, 5, vision.cls.shape[0])

    one_by_one = torch.cat([block(token) for token in x.split(1, dim=1)], dim=1)

    torch.testing.assert_close(block(x, value_attention_only=True), one_by_one)
    patches = torch.randn(2, 5, 192)
    positions = torch.arange(5).expand(2, -1)
    tokens = vision(patches, positions)
    values = vision(patches, positions, value_attention_only=True)
    assert not torch.allclose(tokens, values)


def test_bad_input(scenes, tmp_path):
    # Options that are wrong for every model.
    with pytest.raises(ValueError, match=r"features=\.\.\.\): unknown 'value'; known: auto"):
        parse_evaluations([f"segmentation(features=value):{scenes}"])
    with pytest.raises(ValueError, match="stride=-1.: it must be 0 or more"):
        parse_evaluations([f"segmentation(stride=-1):{scenes}"])

    # Options that do not fit this model.
    model = build_model(scenes, "cls")
    masked = embed.Embedder(*model, results_folder=Path("nowhere"), tag="test", mask="random(0.5)")
    with pytest.raises(ValueError, match="--mask, --ensemble: segmentation"):
        evaluate(masked, parse_evaluations([f"segmentation:{scenes}"]))
    plain = embed.Embedder(*model, results_folder=Path("nowhere"), tag="test")
    with pytest.raises(ValueError, match="size=24.: the tower sees windows of 32"):
        evaluate(plain, parse_evaluations([f"segmentation(size=24):{scenes}"]))

    # A label map with a class that has no name.
    image = encode_png(np.zeros((8, 8, 3), np.uint8))
    labels = encode_png(np.full((8, 8), 4, np.uint8))
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [("a", {"png": image, "seg.png": labels})])
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / file).write_text((scenes / file).read_text())
    with pytest.raises(ValueError, match="label map of 0.tar a has class 4; only 4 are named"):
        parse_evaluations([f"segmentation:{tmp_path}"])
