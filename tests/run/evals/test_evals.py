"""Evaluations return the numbers of a simple computation, on any number of ranks.

They are the same during training and from the checkpoint.

    bash run/test.sh tests/run/evals/test_evals.py

Fast tests run ranks as threads of this process; the slow test launches them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.patches import patchify
from glimpse.data.shards import Shards, write_shard
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import View, center_view
from glimpse.run.evals import embed, evaluate, parse_evaluations, retrieval
from glimpse.run.lib import config
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import (
    NAMES,
    launch,
    picture,
    tiny_run_arguments,
    untrained_method,
    write_dataset,
)

# Not multiples of the batch of 64, or of 3 ranks. The last captions are all on one rank.
PICTURES, CAPTIONED = 150, 131


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write the small data set and two more sets: `many` with classes, `pairs` with captions."""
    folder = write_dataset(tmp_path_factory.mktemp("evals"))
    sets = folder / "eval"
    rng = np.random.default_rng(1)
    many, pairs = [], []
    for i in range(PICTURES):
        image = picture(NAMES[i % 24], rng, "webp")
        many.append((f"{i:04d}", {"webp": image, "cls": b"%d" % (i % 24)}))
    for i in range(CAPTIONED):
        image = picture(NAMES[i % 24], rng, "jpg")
        pairs.append((f"{i:04d}", {"jpg": image, "txt": caption_lines(i).encode()}))

    write_two_shards(sets / "many" / "test", many)
    write_two_shards(sets / "many" / "train", many[29:])
    write_two_shards(sets / "pairs" / "test", pairs)
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (sets / "many" / file).write_text((sets / "shapes" / file).read_text())
    train_sentencepiece(
        [caption_lines(i) for i in range(CAPTIONED)], folder / "tokenizer.model", 320
    )
    return folder


def write_two_shards(folder, rows):
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows[:70])
    write_shard(folder / "1.tar", rows[70:])


def caption_lines(i):
    """Return one to three different captions of picture i, one per line."""
    words = ("a", "the", "one")[: 1 + i % 3]
    return "\n".join(f"{word} {NAMES[i % 24]} number {i}" for word in words) + "\n\n"


@pytest.fixture(scope="module")
def model(data):
    return untrained_method(data / "tokenizer.model", "eval_crop=resize_crop")


def build_embedder(model, **settings):
    return embed.Embedder(*model, results_folder=Path("nowhere"), tag="test", **settings)


def evaluate_specs(model, specs, **settings):
    return evaluate(build_embedder(model, **settings), parse_evaluations(specs))


def embed_one_by_one(method, cfg, tokenizer, folder, views=lambda i: [range(16)]):
    """Embed the images of a set one by one.

    views(i): the positions of the patches in each view of image i.
    Returns the embeddings (N, E), each the mean over the image's views; a function that embeds a
    text; and the samples.
    """
    shards = Shards([folder / "test"], require_captions=False)
    samples = [shards[i] for i in range(len(shards))]
    embeddings = []
    for i, sample in enumerate(samples):
        image = torch.from_numpy(center_view(sample.image, 32)).permute(2, 0, 1)
        (patches,) = patchify(image[None], cfg.model.patch_size)
        outputs = []
        for view in views(i):
            positions = torch.tensor(view)
            with torch.no_grad():
                output = method.towers.encode_image(patches[None, positions], positions[None])
            outputs.append(output[0])
        mean = torch.stack(outputs).mean(0)
        embeddings.append(torch.nn.functional.normalize(mean, dim=0))

    def embed_text(line):
        ids = torch.tensor(tokenizer(line))
        with torch.no_grad():
            return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    return torch.stack(embeddings), embed_text, samples


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_zero_shot(data, model, monkeypatch, world):
    # 49 pictures of 24 classes.
    folder = data / "eval" / "shapes"
    images, embed_text, samples = embed_one_by_one(*model, folder)
    labels = [int(sample.files["cls"]) for sample in samples]
    assert len(set(labels)) == 24
    prompts = [embed_text(f"a {name}") + embed_text(f"the {name}") for name in NAMES]
    classes = torch.stack(prompts) / 2
    scores = images @ (classes / classes.norm(dim=1, keepdim=True)).T
    label_scores = scores[range(49), labels]
    better_classes = (scores > label_scores[:, None]).sum(1)
    expected = {
        "zero_shot/shapes/top1": float((better_classes < 1).double().mean()),
        "zero_shot/shapes/top5": float((better_classes < 5).double().mean()),
        "zero_shot/shapes/chance": 1 / 24,
    }

    with ranks(monkeypatch, world, batch=4) as run:
        results = run(lambda: evaluate_specs(model, [f"zero_shot:{folder}"]))

    assert results == [expected] * world
    assert 0 < expected["zero_shot/shapes/top5"] < 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_retrieval(data, model, monkeypatch, world):
    """Images have one to three captions."""
    folder = data / "eval" / "pairs"
    images, embed_text, samples = embed_one_by_one(*model, folder)
    captions, image_of_caption = [], []
    for i, sample in enumerate(samples):
        lines = [line for line in sample.files["txt"].decode().split("\n") if line]
        captions += lines
        image_of_caption += [i] * len(lines)
    scores = images @ torch.stack([embed_text(line) for line in captions]).T  # (131, 261)
    expected = {}
    for k in (1, 5, 10):
        hits = []
        for i in range(len(samples)):
            nearest = scores[i].topk(k).indices.tolist()
            hits.append(any(image_of_caption[c] == i for c in nearest))
        expected[f"retrieval/pairs/image_to_text_r{k}"] = np.mean(hits)
        hits = []
        for c in range(len(captions)):
            nearest = scores[:, c].topk(k).indices.tolist()
            hits.append(image_of_caption[c] in nearest)
        expected[f"retrieval/pairs/text_to_image_r{k}"] = np.mean(hits)

    with ranks(monkeypatch, world, batch=16) as run:
        results = run(lambda: evaluate_specs(model, [f"retrieval:{folder}"]))

    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(expected, abs=1e-12)
    assert 0 < results[0]["retrieval/pairs/text_to_image_r10"] < 1


def view_positions(i, mask, ensemble):
    """Return the patches in each view of image i, which depend only on its index."""
    order = np.random.default_rng((0, i)).random(16, dtype=np.float32).argsort()
    if ensemble > 1:
        return [sorted(view.tolist()) for view in np.array_split(order, ensemble)]
    if mask == "random(0.5)":
        return [sorted(order[8:].tolist())]
    return [range(16)]


@pytest.mark.parametrize(
    "mask, ensemble", [("none", 1), ("random(0.5)", 1), ("none", 2), ("none", 3)]
)
def test_images_seen_in_part(data, model, monkeypatch, mask, ensemble):
    """Embeddings of half of the patches, or the mean over views that show each patch once.

    They are the same on any number of ranks.
    """
    folder = data / "eval" / "shapes"
    expected, _, _ = embed_one_by_one(*model, folder, lambda i: view_positions(i, mask, ensemble))

    def embed_images():
        embedder = build_embedder(model, mask=mask, ensemble=ensemble)
        return embedder.embed_images(ClipBenchmarkSet(folder))

    for world, batch in ((1, 64), (3, 4)):
        with ranks(monkeypatch, world, batch) as run:
            results = run(embed_images)

        indices, embeddings = (torch.cat(shares) for shares in zip(*results))
        assert sorted(indices.tolist()) == list(range(49))
        torch.testing.assert_close(embeddings, expected[indices])


def test_evaluations_of_images_seen_in_part(data, model, monkeypatch):
    spec = f"retrieval:{data}/eval/retrieval"

    def results(world, **settings):
        with ranks(monkeypatch, world, batch=5) as run:
            return run(lambda: evaluate_specs(model, [spec], **settings))

    (plain,) = results(1)

    assert results(1, mask="none", ensemble=1) == [plain]
    for settings in (dict(mask="random(0.5)"), dict(ensemble=2)):
        (single_rank,) = results(1, **settings)
        assert single_rank != plain
        assert results(3, **settings) == [single_rank] * 3


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_finds_nothing(monkeypatch, value):
    """Equal similarities, and nan, must not count as hits."""
    embeddings = torch.full((12, 4), value)
    ids = torch.arange(12)

    with ranks(monkeypatch, 1, 4) as run:
        (recalls,) = run(lambda: retrieval.compute_recalls("x", embeddings, ids, embeddings, ids))

    assert recalls == {"x_r1": 0, "x_r5": 0, "x_r10": 0}


@pytest.mark.parametrize("world", [1, 3])
def test_similarities_come_in_tiles(monkeypatch, world):
    """The recalls are those of the whole matrix, of which only one tile exists at a time.

    There are five captions per image, and some images and captions twice.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(90, 16, generator=rng), dim=1)
    noise = 0.5 * torch.randn(450, 16, generator=rng)
    texts = torch.nn.functional.normalize(images.repeat_interleave(5, 0) + noise, dim=1)
    images[7] = images[60]
    texts[100:104] = texts[300:304]
    texts[440] = texts[2]
    image_ids = torch.arange(90)
    text_ids = image_ids.repeat_interleave(5)

    match = image_ids[:, None] == text_ids
    expected = recalls_of_matrix("i", images @ texts.T, match)
    expected |= recalls_of_matrix("t", texts @ images.T, match.T)
    assert len(set(expected.values())) > 4

    monkeypatch.setattr(retrieval, "TILE", 32)
    sizes = []

    class SizeRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    def compute_recalls():
        with SizeRecorder():
            recalls = retrieval.compute_recalls("i", images, image_ids, texts, text_ids)
            return recalls | retrieval.compute_recalls("t", texts, text_ids, images, image_ids)

    with ranks(monkeypatch, world, 4) as run:
        results = run(compute_recalls)

    assert results == [expected] * world
    assert max(sizes) <= max(texts.numel(), 7 * 32) < 90 * 450


def recalls_of_matrix(name, scores, match):
    """Return R@K from the whole matrices of scores and matches (queries, targets)."""
    scores = scores.double().round(decimals=6)  # so that equal embeddings have equal scores
    best = scores.masked_fill(~match, -2).amax(1, keepdim=True)
    nearer = ((scores >= best) & ~match).sum(1)
    recalls = {}
    for k in (1, 5, 10):
        recalls[f"{name}_r{k}"] = float((nearer < k).double().mean())
    return recalls


def test_what_a_set_lacks_is_reported_at_the_start(data, tmp_path):
    shapes, pairs = f"{data}/eval/shapes", f"{data}/eval/pairs"
    for specs, message in (
        ([f"zero_shot:{pairs}"], "pairs: no templates; it needs zeroshot"),
        ([f"retrieval:{shapes}"], "no caption"),
        (["zero_shot"], "write zero_shot:FOLDER"),
        ([f"retrieval:{pairs}", f"retrieval:{pairs}/../pairs"], "a second set is called 'pairs'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_evaluations(specs)

    # An image that cannot be read is reported when its batch is loaded.
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [("a", {"png": b"x", "cls": b"0"})])
    preprocess = embed.Preprocess(32, 8, "square", "bicubic")
    batches = ClipBenchmarkSet(tmp_path).batches(preprocess, 4, [0], 1, 0)
    with pytest.raises(
        ValueError, match=f"evals: {tmp_path}: 0.tar a of test: cannot read the image"
    ):
        next(batches)


def test_evaluating_leaves_the_method_as_it_was(data, model, monkeypatch):
    method, _cfg, _tokenizer = model
    method.train()

    with ranks(monkeypatch, 1, 64) as run:
        run(lambda: evaluate_specs(model, [f"zero_shot:{data}/eval/shapes"]))

    assert method.training
    assert all(p.grad is None for p in method.parameters())


def test_the_interpolation_is_that_of_the_views_in_training(model):
    method, cfg, tokenizer = model
    views = {"image": View((0.5, 1.0), interpolation="bilinear")}
    bilinear = SimpleNamespace(**{**vars(cfg), "views": views})

    embedder = build_embedder((method, bilinear, tokenizer))

    assert embedder.preprocess == embed.Preprocess(32, 8, "resize_crop", "bilinear")


@pytest.mark.parametrize(
    "name, crop, interpolation, mean",
    [
        ("flip_l16", "square", "bicubic", 0.485),
        ("glip_b16", "resize_crop", "bicubic", 0.48145466),
        ("slip_b16", "resize_crop", "bilinear", 0.485),
        ("aclip_b16", "resize_crop", "bilinear", 0.485),
        ("maskclip_b16", "resize_crop", "bilinear", 0.485),
    ],
)
def test_each_paper_s_preprocessing(model, name, crop, interpolation, mean):
    """Crop, interpolation, and the mean of OpenAI or ImageNet, as in docs/methods.md.

    FLIP takes the central square; the others resize the short side first.
    """
    method, _, tokenizer = model
    cfg = config.load(f"run/configs/{name}.yaml")

    preprocess = build_embedder((method, cfg, tokenizer)).preprocess

    assert preprocess == embed.Preprocess(224, 16, crop, interpolation)
    assert cfg.model.vision.mean[0] == mean


@pytest.mark.slow
def test_the_same_numbers_on_any_ranks_during_training_and_after(data, tmp_path):
    """Train and evaluate under ZeRO-3 on 2 ranks, then evaluate with run/evaluate.py on 1 and 3.

    Both student and moving average are evaluated.
    """
    run = tmp_path / "run"
    many = data / "eval/many"
    evals = (
        f"zero_shot:{many}",
        f"zero_shot:{data}/eval/shapes",
        f"retrieval:{data}/eval/pairs",
        f"retrieval:{data}/eval/retrieval",
        f"knn:{many}",
        f"'knn(features=embedded, k=3):{many}'",
        f"'linear_probe(weight_decay=10):{many}'",
        f"'linear_probe(optimizer=lars, epochs=9):{many}'",
    )
    options = (
        f"evals=[{', '.join(evals)}]",
        "method=maskclip",
        "views.image.mask=random(0.75)",
        "options.momentum=[0.5,0.9]",
        "samples=480",
        "optim.lr=1e-3",
    )

    result = launch(2, "run/pretrain.py", *tiny_run_arguments(data, run, *options))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for world in (1, 3):
        result = launch(world, "run/evaluate.py", "--run", str(run))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    # The results of the training.
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    student, teacher = rows[:2]
    assert student["weights"] == "student"
    assert teacher["weights"] == "teacher"
    assert student["zero_shot/many/top1"] > 0.05
    assert student != {**teacher, "weights": "student"}, "the moving average is a different model"
    assert student["knn/many/top1"] < 1
    assert student["knn(features=embedded, k=3)/many/top1"] > 0.5, "most images are in both splits"
    assert not list(run.glob("features/training-*/*")), "features of replaced weights are deleted"

    # The results of run/evaluate.py. The gradients of probes are sums of shares, which are rounded,
    # so the predictions of one or two of 150 images may differ.
    for row, training_row in zip(rows[2:], [student, teacher] * 2, strict=True):
        expected = {**training_row, "mask": "none", "ensemble": 1}
        probe_keys = [key for key in expected if key.startswith("linear_probe")]
        probe_keys = [key for key in probe_keys if not key.endswith("chance")]
        assert len(probe_keys) == 4
        for key in probe_keys:
            assert row.pop(key) == pytest.approx(expected.pop(key), abs=0.02)
        assert row == expected
