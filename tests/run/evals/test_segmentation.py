"""Segmentation agrees with a plain computation, image by image, on any number of ranks.

Intersection over union by hand; windows that cover an image.

    bash run/test.sh tests/run/evals/test_segmentation.py
"""

import io
import math
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


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A set of images of noisy blocks of color, each of another size, and a tokenizer.

    The label maps leave a border open.
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
        rows.append((f"{i}", {"png": png(pixels.astype(np.uint8)), "seg.png": png(labels)}))
    (folder / "test").mkdir()
    write_shard(folder / "test" / "0.tar", rows)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} block\n{c}")
    texts = [f"a {name} block of {name}" for name in CLASSES] * 4
    train_sentencepiece(texts, folder / "tokenizer.model", 300)
    return folder


def model(scenes, pool):
    return untrained_method(scenes / "tokenizer.model", f"model.vision.pool={pool}")


def test_scores_by_hand():
    """Truth 0 0 1 / 1 . 2 and prediction 0 1 1 / 1 2 0, of five classes.

    Intersections are 1, 2, 0 over unions 3, 3, 2; two classes do not occur.
    """
    truth = torch.tensor([[0, 0, 1], [1, IGNORE, 2]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    wanted = dict(
        mean_iou=(1 / 3 + 2 / 3 + 0) / 3,
        mean_accuracy=(1 / 2 + 1 + 0) / 3,
        accuracy=3 / 5,
        chance=1 / 5,
    )

    counts = segmentation.confusion_matrix(truth, prediction, 5)

    assert counts.sum() == 5
    assert counts[0].tolist() == [1, 1, 0, 0, 0]
    assert segmentation.compute_scores(counts) == pytest.approx(wanted)


def test_windows_cover_an_image():
    sliding = WindowGrid(side=32, size=48, stride=12)

    assert sliding.canvas(40, 64) == (48, 77)
    assert sliding.starts(48) == [0, 12, 16]
    assert sliding.starts(32) == [0]
    for shape in SIZES:
        seen = np.zeros(sliding.canvas(*shape), int)
        for top, left in sliding.corners(*shape):
            assert top >= 0 and left >= 0
            seen[top : top + 32, left : left + 32] += 1
        assert seen.min() >= 1


def test_windows_are_cut_from_the_resized_image(scenes):
    images = ClipBenchmarkSet(scenes)
    sliding = WindowGrid(32, 48, 16)
    pre = embed.Preprocess(32, 8, "resize_crop", "bicubic")
    places = sliding.corners(*SIZES[1])

    windows = WindowImages(images, sliding, [3, 1])

    assert windows.image_index == [3] * len(sliding.corners(*SIZES[3])) + [1] * len(places)
    resized = resize(decode(images.image(1)), *sliding.canvas(*SIZES[1]), "bicubic")
    first = windows.image_index.index(1)
    for n, (top, left) in enumerate(places):
        wanted = resized[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(windows.view(first + n, pre), wanted)


def by_hand(parts, scenes, alone):
    """The confusion matrix, computed image by image and window by window."""
    method, _cfg, tokenizer = parts
    images = ClipBenchmarkSet(scenes)
    sliding = WindowGrid(32, 64, 16)

    def text(line):
        ids = torch.tensor(tokenizer(line))
        return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    prompts = [text(f"a {name} block") + text(name) for name in CLASSES]
    classes = torch.stack([F.normalize(embedding, dim=0) for embedding in prompts])

    counts = np.zeros((4, 4))
    for i in range(len(images)):
        # Sums of the similarities at each pixel of the canvas, (4, H, W), and the windows over it.
        pixels = resize(decode(images.image(i)), *sliding.canvas(*SIZES[i]), "bicubic")
        sums = torch.zeros(4, *pixels.shape[:2])
        seen = torch.zeros(pixels.shape[:2])
        for top, left in sliding.corners(*SIZES[i]):
            rows, columns = slice(top, top + 32), slice(left, left + 32)
            window = torch.from_numpy(pixels[rows, columns].copy()).permute(2, 0, 1)
            patches = patchify(window[None], 8)
            tokens = method.towers.vision(
                patches, torch.arange(16)[None], value_attention_only=alone
            )
            embedded = method.towers.embed_image(tokens[0, 1:])
            similar = (embedded @ classes.T).T.view(1, 4, 4, 4)
            sums[:, rows, columns] += F.interpolate(similar, (32, 32), mode="bilinear")[0]
            seen[rows, columns] += 1

        means = F.interpolate((sums / seen)[None], SIZES[i], mode="bilinear")[0]
        prediction = means.argmax(0).numpy()
        truth = images.label_map(i)
        known = truth != IGNORE
        np.add.at(counts, (truth[known], prediction[known]), 1)
    return counts


@pytest.mark.parametrize("pool, alone", [("cls", True), ("mean", False)])
def test_against_a_plain_computation_on_any_ranks(scenes, monkeypatch, tmp_path, pool, alone):
    parts = model(scenes, pool)
    with torch.no_grad():
        wanted = segmentation.compute_scores(torch.from_numpy(by_hand(parts, scenes, alone)))
    assert 0 < wanted["mean_iou"] < 1
    named = {f"segmentation/{scenes.name}/{key}": value for key, value in wanted.items()}

    for world in (1, 2, 3, 8):  # of eight ranks one has no image
        home = tmp_path / f"{world}"
        home.mkdir()
        with ranks(monkeypatch, world, batch=5) as run:

            def evaluated(results_folder=home):
                model = embed.Embedder(*parts, results_folder=home, tag="test")
                return evaluate(model, parse_evaluations([f"segmentation:{scenes}"]))

            results = run(evaluated)

        assert all(result == results[0] for result in results)
        assert results[0] == pytest.approx(named)
        picture = Image.open(next((home / "pictures").iterdir()))
        assert picture.height == len(SIZES) * 148


def test_values_are_of_tokens_that_attend_to_themselves(scenes):
    """A block that mixes no tokens gives a token what it gives when the token comes alone."""
    vision = model(scenes, "cls")[0].towers.vision
    block = vision.blocks[0]
    x = torch.randn(2, 5, vision.cls.shape[0])

    one_by_one = torch.cat([block(token) for token in x.split(1, dim=1)], dim=1)

    torch.testing.assert_close(block(x, value_attention_only=True), one_by_one)
    patches = torch.randn(2, 5, 192)
    places = torch.arange(5).expand(2, -1)
    tokens = vision(patches, places)
    values = vision(patches, places, value_attention_only=True)
    assert not torch.allclose(tokens, values)


def test_bad_input(scenes, tmp_path):
    # Options that are wrong for every model.
    with pytest.raises(ValueError, match="features: 'value'; known: auto"):
        parse_evaluations([f"segmentation(features=value):{scenes}"])
    with pytest.raises(ValueError, match="0 or more"):
        parse_evaluations([f"segmentation(stride=-1):{scenes}"])

    # Options that do not fit this model.
    parts = model(scenes, "cls")
    masked = embed.Embedder(*parts, results_folder=Path("nowhere"), tag="test", mask="random(0.5)")
    with pytest.raises(ValueError, match="--mask, --ensemble: segmentation"):
        evaluate(masked, parse_evaluations([f"segmentation:{scenes}"]))
    plain = embed.Embedder(*parts, results_folder=Path("nowhere"), tag="test")
    with pytest.raises(ValueError, match="size=24.: the tower sees windows of 32"):
        evaluate(plain, parse_evaluations([f"segmentation(size=24):{scenes}"]))

    # A label map with a class beyond the names.
    image = png(np.zeros((8, 8, 3), np.uint8))
    labels = png(np.full((8, 8), 4, np.uint8))
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [("a", {"png": image, "seg.png": labels})])
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / file).write_text((scenes / file).read_text())
    with pytest.raises(ValueError, match="label map of 0.tar a has class 4; only 4 are named"):
        parse_evaluations([f"segmentation:{tmp_path}"])
