"""Segmentation: intersection over union by hand, windows that cover an image, a plain computation
image by image, on any number of ranks.

    bash run/test.sh tests/run/evals/test_segmentation.py
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import IGNORE, Benchmark
from glimpse.data.evals.sliding_windows import Sliding, Windows
from glimpse.data.patches import patchify
from glimpse.data.shards import write_shard
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import decode, resize
from glimpse.run.evals import embed, evaluate, parse, segmentation
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import untrained

CLASSES = ("red", "green", "blue", "black")
SIZES = ((40, 40), (40, 64), (90, 50), (33, 70), (40, 41), (32, 32), (50, 40))


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A set of noisy blocks of colour, each of its own size, with label maps that leave a border
    open; and a tokenizer.
    """
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    rows = []
    for i, (height, width) in enumerate(SIZES):
        seen = np.repeat(
            np.repeat(rng.integers(0, 3, (-(-height // 16), -(-width // 16))), 16, 0), 16, 1
        )[:height, :width].astype(np.uint8)
        pixels = np.eye(3)[seen] * 200 + rng.uniform(0, 55, (height, width, 3))
        seen[:2] = IGNORE
        rows.append((f"{i}", {"png": png(pixels.astype(np.uint8)), "seg.png": png(seen)}))
    (folder / "test").mkdir()
    write_shard(folder / "test" / "0.tar", rows)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} block\n{c}")
    train_sentencepiece(
        [f"a {name} block of {name}" for name in CLASSES] * 4, folder / "tokenizer.model", 300
    )
    return folder


def model(scenes, pool):
    return untrained(scenes / "tokenizer.model", f"model.vision.pool={pool}")


def test_scores_by_hand():
    """Truth 0 0 1 / 1 . 2, found 0 1 1 / 1 2 0, of five classes: intersections 1, 2, 0 over unions
    3, 3, 2; two classes do not occur.
    """
    truth, found = torch.tensor([[0, 0, 1], [1, IGNORE, 2]]), torch.tensor([[0, 1, 1], [1, 2, 0]])
    counts = segmentation.confusion(truth, found, 5)
    assert counts.sum() == 5 and counts[0].tolist() == [1, 1, 0, 0, 0]
    assert segmentation.scores(counts) == pytest.approx(
        dict(
            mean_iou=(1 / 3 + 2 / 3 + 0) / 3,
            mean_accuracy=(1 / 2 + 1 + 0) / 3,
            accuracy=3 / 5,
            chance=1 / 5,
        )
    )


def test_windows_cover_an_image():
    sliding = Sliding(side=32, size=48, stride=12)
    assert (
        sliding.canvas(40, 64) == (48, 77)
        and sliding.starts(48) == [0, 12, 16]
        and sliding.starts(32) == [0]
    )
    for shape in SIZES:
        seen = np.zeros(sliding.canvas(*shape), int)
        for top, left in sliding.places(*shape):
            assert top >= 0 and left >= 0
            seen[top : top + 32, left : left + 32] += 1
        assert seen.min() >= 1


def test_windows_are_cut_from_the_resized_image(scenes):
    images, sliding = Benchmark(scenes), Sliding(32, 48, 16)
    windows = Windows(images, sliding, [3, 1])
    pre = embed.Preprocess(32, 8, "resize_crop", "bicubic")
    assert windows.owner == [3] * len(sliding.places(*SIZES[3])) + [1] * len(
        sliding.places(*SIZES[1])
    )
    whole = resize(decode(images.image(1)), *sliding.canvas(*SIZES[1]), "bicubic")
    first = windows.owner.index(1)
    for n, (top, left) in enumerate(sliding.places(*SIZES[1])):
        np.testing.assert_array_equal(
            windows.view(first + n, pre), whole[top : top + 32, left : left + 32]
        )


def by_hand(parts, scenes, alone):
    """The confusion matrix from image by image, window by window."""
    method, cfg, tokenizer = parts
    counts, images, sliding = np.zeros((4, 4)), Benchmark(scenes), Sliding(32, 64, 16)

    def text(line):
        ids = torch.tensor(tokenizer(line))
        return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    classes = torch.stack(
        [F.normalize(text(f"a {name} block") + text(name), dim=0) for name in CLASSES]
    )
    for i in range(len(images)):
        whole = resize(decode(images.image(i)), *sliding.canvas(*SIZES[i]), "bicubic")
        sums, seen = torch.zeros(4, *whole.shape[:2]), torch.zeros(whole.shape[:2])
        for top, left in sliding.places(*SIZES[i]):
            window = torch.from_numpy(whole[top : top + 32, left : left + 32].copy()).permute(
                2, 0, 1
            )[None]
            tokens = method.towers.vision(patchify(window, 8), torch.arange(16)[None], alone=alone)[
                :, 1:
            ]
            similar = (method.towers.embed_image(tokens[0]) @ classes.T).T.view(1, 4, 4, 4)
            sums[:, top : top + 32, left : left + 32] += F.interpolate(
                similar, (32, 32), mode="bilinear"
            )[0]
            seen[top : top + 32, left : left + 32] += 1
        found = F.interpolate((sums / seen)[None], SIZES[i], mode="bilinear")[0].argmax(0).numpy()
        truth = images.label_map(i)
        np.add.at(counts, (truth[truth != IGNORE], found[truth != IGNORE]), 1)
    return counts


@pytest.mark.parametrize("pool, alone", [("cls", True), ("mean", False)])
def test_against_a_plain_computation_on_any_ranks(scenes, monkeypatch, tmp_path, pool, alone):
    parts = model(scenes, pool)
    with torch.no_grad():
        wanted = segmentation.scores(torch.from_numpy(by_hand(parts, scenes, alone)))
    for world in (1, 2, 3, 8):  # of eight ranks one has no image
        home = tmp_path / f"{world}"
        home.mkdir()
        with ranks(monkeypatch, world, batch=5) as run:

            def evaluated(home=home):
                model = embed.Embedder(*parts, home=home, tag="test")
                return evaluate(model, parse([f"segmentation:{scenes}"]))

            found = run(evaluated)
        assert all(f == found[0] for f in found)
        assert found[0] == pytest.approx(
            {f"segmentation/{scenes.name}/{key}": value for key, value in wanted.items()}
        )
        made = Image.open(next((home / "pictures").iterdir()))
        assert made.height == len(SIZES) * 148
    assert 0 < wanted["mean_iou"] < 1


def test_values_are_of_tokens_that_attend_to_themselves(scenes):
    """A block that mixes no tokens gives a token what it gives when the token comes alone."""
    vision = model(scenes, "cls")[0].towers.vision
    x = torch.randn(2, 5, vision.cls.shape[0])
    block = vision.blocks[0]
    one_by_one = torch.cat([block(x[:, n : n + 1]) for n in range(5)], dim=1)
    torch.testing.assert_close(block(x, alone=True), one_by_one)
    patches, places = torch.randn(2, 5, 192), torch.arange(5).expand(2, -1)
    assert not torch.allclose(vision(patches, places), vision(patches, places, alone=True))


def test_bad_input(scenes, tmp_path):
    for spec, words in (
        ("segmentation(features=value)", "features: 'value'; known: auto"),
        ("segmentation(stride=-1)", "0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            parse([f"{spec}:{scenes}"])
    parts = model(scenes, "cls")
    for how, spec, words in (
        (dict(mask="random(0.5)"), "segmentation", "--mask, --ensemble: segmentation"),
        (dict(), "segmentation(size=24)", "size=24.: the tower sees windows of 32"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(
                embed.Embedder(*parts, home=Path("nowhere"), tag="test", **how),
                parse([f"{spec}:{scenes}"]),
            )
    (tmp_path / "test").mkdir()
    rows = [
        (
            "a",
            {
                "png": png(np.zeros((8, 8, 3), np.uint8)),
                "seg.png": png(np.full((8, 8), 4, np.uint8)),
            },
        )
    ]
    write_shard(tmp_path / "test" / "0.tar", rows)
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / file).write_text((scenes / file).read_text())
    with pytest.raises(ValueError, match="label map of 0.tar a has class 4; only 4 are named"):
        parse([f"segmentation:{tmp_path}"])
