"""Evaluations give the numbers of a plain computation, on any number of ranks.

The same ones come during training and from the checkpoint.

    bash run/test.sh tests/run/evals/test_evals.py
Fast cases run ranks as threads of this process; the slow one launches them.
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
from glimpse.tests.helpers.tiny import NAMES, launch, picture, tiny_run_arguments, untrained_method
from glimpse.tests.helpers.tiny import write_dataset as make_shards

# No multiple of 64 (a round) or of 3 ranks; the last captions are on one rank alone.
PICTURES, CAPTIONED = 150, 131


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The small data set with two more sets, `many` with classes and `pairs` with captions."""
    folder = make_shards(tmp_path_factory.mktemp("evals"))
    sets = folder / "eval"
    rng = np.random.default_rng(1)
    many, pairs = [], []
    for i in range(PICTURES):
        image = picture(NAMES[i % 24], rng, "webp")
        many.append((f"{i:04d}", {"webp": image, "cls": b"%d" % (i % 24)}))
    for i in range(CAPTIONED):
        image = picture(NAMES[i % 24], rng, "jpg")
        pairs.append((f"{i:04d}", {"jpg": image, "txt": texts(i).encode()}))

    two_shards(sets / "many" / "test", many)
    two_shards(sets / "many" / "train", many[29:])
    two_shards(sets / "pairs" / "test", pairs)
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (sets / "many" / file).write_text((sets / "shapes" / file).read_text())
    train_sentencepiece([texts(i) for i in range(CAPTIONED)], folder / "tokenizer.model", 320)
    return folder


def two_shards(folder, rows):
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows[:70])
    write_shard(folder / "1.tar", rows[70:])


def texts(i):
    """One to three captions, a line each, all of them different."""
    words = ("a", "the", "one")[: 1 + i % 3]
    return "\n".join(f"{word} {NAMES[i % 24]} number {i}" for word in words) + "\n\n"


@pytest.fixture(scope="module")
def model(data):
    return untrained_method(data / "tokenizer.model", "eval_crop=resize_crop")


def embedder(model, **how):
    return embed.Embedder(*model, results_folder=Path("nowhere"), tag="test", **how)


def evaluated(model, evals, **how):
    return evaluate(embedder(model, **how), evals)


def by_hand(method, cfg, tokenizer, folder, views=lambda i: [range(16)]):
    """Embed images one by one.

    Return the embeddings (N, E), each the mean of those of the patches in each of views(i); a
    function that embeds a text; and the samples.
    """
    shards = Shards([folder / "test"], require_captions=False)
    samples = [shards[i] for i in range(len(shards))]
    embeddings = []
    for i, sample in enumerate(samples):
        image = torch.from_numpy(center_view(sample.image, 32)).permute(2, 0, 1)
        (patches,) = patchify(image[None], cfg.model.patch_size)
        outputs = []
        for view in views(i):
            keep = torch.tensor(view)
            with torch.no_grad():
                output = method.towers.encode_image(patches[None, keep], keep[None])
            outputs.append(output[0])
        mean = torch.stack(outputs).mean(0)
        embeddings.append(torch.nn.functional.normalize(mean, dim=0))

    def text(line):
        ids = torch.tensor(tokenizer(line))
        with torch.no_grad():
            return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    return torch.stack(embeddings), text, samples


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_zero_shot(data, model, monkeypatch, world):
    images, text, samples = by_hand(*model, data / "eval" / "shapes")  # 49 pictures, 24 classes
    labels = [int(sample.files["cls"]) for sample in samples]
    assert len(set(labels)) == 24
    classes = torch.stack([(text(f"a {name}") + text(f"the {name}")) / 2 for name in NAMES])
    scores = images @ (classes / classes.norm(dim=1, keepdim=True)).T
    of_label = scores[range(49), labels]
    rank = (scores > of_label[:, None]).sum(1)  # of each image's class, from 0
    wanted = {
        "zero_shot/shapes/top1": float((rank < 1).double().mean()),
        "zero_shot/shapes/top5": float((rank < 5).double().mean()),
        "zero_shot/shapes/chance": 1 / 24,
    }

    with ranks(monkeypatch, world, batch=4) as run:
        results = run(
            lambda: evaluated(model, parse_evaluations([f"zero_shot:{data}/eval/shapes"]))
        )

    assert all(result == results[0] for result in results), "every rank knows"
    assert results[0] == wanted
    assert 0 < results[0]["zero_shot/shapes/top5"] < 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_retrieval(data, model, monkeypatch, world):
    """One to three captions an image."""
    images, text, samples = by_hand(*model, data / "eval" / "pairs")
    captions, owner = [], []  # each caption, and the number of its image
    for i, sample in enumerate(samples):
        lines = [line for line in sample.files["txt"].decode().split("\n") if line]
        captions += lines
        owner += [i] * len(lines)
    scores = images @ torch.stack([text(line) for line in captions]).T  # (131, 261)
    wanted = {}
    for k in (1, 5, 10):
        hits = []
        for i in range(len(samples)):
            nearest = scores[i].topk(k).indices.tolist()
            hits.append(any(owner[c] == i for c in nearest))
        wanted[f"retrieval/pairs/image_to_text_r{k}"] = np.mean(hits)
        hits = []
        for c in range(len(captions)):
            nearest = scores[:, c].topk(k).indices.tolist()
            hits.append(owner[c] in nearest)
        wanted[f"retrieval/pairs/text_to_image_r{k}"] = np.mean(hits)

    with ranks(monkeypatch, world, batch=16) as run:
        results = run(lambda: evaluated(model, parse_evaluations([f"retrieval:{data}/eval/pairs"])))

    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(wanted, abs=1e-12)
    assert 0 < results[0]["retrieval/pairs/text_to_image_r10"] < 1


def shown(i, mask, ensemble):
    """The patches of each view of image i, which follow from its number alone."""
    order = np.random.default_rng((0, i)).random(16, dtype=np.float32).argsort()
    if ensemble > 1:
        return [sorted(part.tolist()) for part in np.array_split(order, ensemble)]
    if mask == "random(0.5)":
        return [sorted(order[8:].tolist())]
    return [range(16)]


@pytest.mark.parametrize(
    "mask, ensemble", [("none", 1), ("random(0.5)", 1), ("none", 2), ("none", 3)]
)
def test_images_seen_in_part(data, model, monkeypatch, mask, ensemble):
    """Half of an image's patches, or the mean of views that together show each patch once.

    The result is the same on any rank.
    """
    folder = data / "eval" / "shapes"
    wanted, _, _ = by_hand(*model, folder, lambda i: shown(i, mask, ensemble))

    def work():
        return embedder(model, mask=mask, ensemble=ensemble).embed_images(ClipBenchmarkSet(folder))

    for world, batch in ((1, 64), (3, 4)):
        with ranks(monkeypatch, world, batch) as run:
            results = run(work)

        indices, embeddings = (torch.cat(parts) for parts in zip(*results))
        assert sorted(indices.tolist()) == list(range(49))
        torch.testing.assert_close(embeddings, wanted[indices])


def test_evaluations_of_images_seen_in_part(data, model, monkeypatch):
    spec = f"retrieval:{data}/eval/retrieval"

    def results(world, **how):
        with ranks(monkeypatch, world, batch=5) as run:
            return run(lambda: evaluated(model, parse_evaluations([spec]), **how))

    (plain,) = results(1)

    assert results(1, mask="none", ensemble=1) == [plain]
    for how in (dict(mask="random(0.5)"), dict(ensemble=2)):
        (alone,) = results(1, **how)
        assert alone != plain
        assert results(3, **how) == [alone] * 3


@pytest.mark.parametrize("what", ["alike", "nan"])
def test_a_collapsed_model_finds_nothing(monkeypatch, what):
    """Equal similarities, or none that can be compared, must not count as hits."""
    value = 0.5 if what == "alike" else float("nan")
    same = torch.full((12, 4), value)
    ids = torch.arange(12)

    with ranks(monkeypatch, 1, 4) as run:
        (recalls,) = run(lambda: retrieval.compute_recalls("x", same, ids, same, ids))

    assert recalls == {"x_r1": 0, "x_r5": 0, "x_r10": 0}


@pytest.mark.parametrize("world", [1, 3])
def test_similarities_come_in_tiles(monkeypatch, world):
    """The recalls are those of the whole matrix, of which only a tile is ever held.

    Five captions an image, some images and captions twice.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(90, 16, generator=rng), dim=1)
    noise = 0.5 * torch.randn(450, 16, generator=rng)
    texts = torch.nn.functional.normalize(images.repeat_interleave(5, 0) + noise, dim=1)
    images[7] = images[60]
    texts[100:104] = texts[300:304]
    texts[440] = texts[2]
    every = torch.arange(90)
    owner = every.repeat_interleave(5)

    match = every[:, None] == owner
    wanted = recalls_of("i", images @ texts.T, match) | recalls_of("t", texts @ images.T, match.T)
    assert len(set(wanted.values())) > 4

    monkeypatch.setattr(retrieval, "TILE", 32)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    def work():
        with Watch():
            recalls = retrieval.compute_recalls("i", images, every, texts, owner)
            return recalls | retrieval.compute_recalls("t", texts, owner, images, every)

    with ranks(monkeypatch, world, 4) as run:
        results = run(work)

    assert results == [wanted] * world
    assert max(sizes) <= max(texts.numel(), 7 * 32) < 90 * 450


def recalls_of(name, scores, match):
    """R@K from the whole matrix of scores and matches (queries, targets)."""
    scores = scores.double().round(decimals=6)  # equal embeddings have equal scores
    best = scores.masked_fill(~match, -2).amax(1, keepdim=True)
    nearer = ((scores >= best) & ~match).sum(1)
    recalls = {}
    for k in (1, 5, 10):
        recalls[f"{name}_r{k}"] = float((nearer < k).double().mean())
    return recalls


def test_what_a_set_lacks_is_said_at_the_start(data, tmp_path):
    shapes, pairs = f"{data}/eval/shapes", f"{data}/eval/pairs"
    for specs, words in (
        ([f"zero_shot:{pairs}"], "pairs: no templates; it needs zeroshot"),
        ([f"retrieval:{shapes}"], "no caption"),
        (["zero_shot"], "write zero_shot:FOLDER"),
        ([f"retrieval:{pairs}", f"retrieval:{pairs}/../pairs"], "a second set is called 'pairs'"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_evaluations(specs)

    # An image that cannot be read is reported when its round is.
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [("a", {"png": b"x", "cls": b"0"})])
    pre = embed.Preprocess(32, 8, "square", "bicubic")
    rounds = ClipBenchmarkSet(tmp_path).rounds(pre, 4, [0], 1, 0)
    with pytest.raises(
        ValueError, match=f"evals: {tmp_path}: 0.tar a of test: cannot read the image"
    ):
        next(rounds)


def test_evaluating_leaves_the_method_as_it_was(data, model, monkeypatch):
    method, cfg, tokenizer = model
    method.train()

    with ranks(monkeypatch, 1, 64) as run:
        run(lambda: evaluated(model, parse_evaluations([f"zero_shot:{data}/eval/shapes"])))

    assert method.training
    assert all(p.grad is None for p in method.parameters())

    # The interpolation is that of the views in training.
    views = {"image": View((0.5, 1.0), interpolation="bilinear")}
    bilinear = SimpleNamespace(**{**vars(cfg), "views": views})
    pre = embedder((method, bilinear, tokenizer)).preprocess
    assert pre == embed.Preprocess(32, 8, "resize_crop", "bilinear")


@pytest.mark.parametrize(
    "name, how, interpolation, mean",
    [
        ("flip_l16", "square", "bicubic", 0.485),
        ("glip_b16", "resize_crop", "bicubic", 0.48145466),
        ("slip_b16", "resize_crop", "bilinear", 0.485),
        ("aclip_b16", "resize_crop", "bilinear", 0.485),
        ("maskclip_b16", "resize_crop", "bilinear", 0.485),
    ],
)
def test_each_paper_s_preprocessing(model, name, how, interpolation, mean):
    """docs/methods.md: the crop, the interpolation, and the statistics of OpenAI or ImageNet.

    FLIP takes the central square, the others resize the short side first; SLIP is bilinear.
    """
    method, _, tokenizer = model
    cfg = config.load(f"run/configs/{name}.yaml")

    pre = embedder((method, cfg, tokenizer)).preprocess

    assert pre == embed.Preprocess(224, 16, how, interpolation)
    assert cfg.model.vision.mean[0] == mean


@pytest.mark.slow
def test_the_same_numbers_on_any_ranks_during_training_and_after(data, tmp_path):
    """Trained and evaluated under ZeRO-3 on 2 ranks, then run/evaluate.py on 1 and 3.

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

    done = launch(2, "run/pretrain.py", *tiny_run_arguments(data, run, *options))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for world in (1, 3):
        done = launch(world, "run/evaluate.py", "--run", str(run))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    # The results of the training.
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    student, teacher = rows[:2]
    assert student["weights"] == "student"
    assert teacher["weights"] == "teacher"
    assert student["zero_shot/many/top1"] > 0.05
    assert student != {**teacher, "weights": "student"}, "the average is another model"
    assert student["knn/many/top1"] < 1
    assert student["knn(features=embedded, k=3)/many/top1"] > 0.5, "most images are in both splits"
    assert not list(run.glob("features/training-*/*")), (
        "features of weights that are gone are not kept"
    )

    # Those of run/evaluate.py. The probes are fitted on shares, whose sums are rounded: an image in
    # 150 or two may differ.
    for row, trained in zip(rows[2:], [student, teacher] * 2, strict=True):
        wanted = {**trained, "mask": "none", "ensemble": 1}
        probed = [key for key in wanted if key.startswith("linear_probe")]
        probed = [key for key in probed if not key.endswith("chance")]
        assert len(probed) == 4
        for key in probed:
            assert row.pop(key) == pytest.approx(wanted.pop(key), abs=0.02)
        assert row == wanted
