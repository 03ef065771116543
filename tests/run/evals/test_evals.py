"""Evaluations: the numbers are those of a plain computation, on any number of ranks, during
training and from the checkpoint.

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

from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.data.patches import patchify
from glimpse.data.shards import Shards, write_shard
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import View, center_view
from glimpse.run.evals import embed, evaluate, parse, retrieval
from glimpse.run.lib import config
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import NAMES, launch, picture, settings, untrained
from glimpse.tests.helpers.tiny import shards as make_shards

# no multiple of 64 (a round) or of 3 ranks; the last captions are on one rank alone
PICTURES, CAPTIONED = 150, 131


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_shards(tmp_path_factory.mktemp("evals"))
    rng = np.random.default_rng(1)
    many = [
        (f"{i:04d}", {"webp": picture(NAMES[i % 24], rng, "webp"), "cls": b"%d" % (i % 24)})
        for i in range(PICTURES)
    ]
    pairs = [
        (f"{i:04d}", {"jpg": picture(NAMES[i % 24], rng, "jpg"), "txt": texts(i).encode()})
        for i in range(CAPTIONED)
    ]
    for name, split, rows in (
        ("many", "test", many),
        ("many", "train", many[29:]),
        ("pairs", "test", pairs),
    ):
        part = folder / "eval" / name / split
        part.mkdir(parents=True)
        write_shard(part / "0.tar", rows[:70])
        write_shard(part / "1.tar", rows[70:])
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / "eval" / "many" / file).write_text(
            (folder / "eval" / "shapes" / file).read_text()
        )
    train_sentencepiece([texts(i) for i in range(CAPTIONED)], folder / "tokenizer.model", 320)
    return folder


def texts(i):
    """One to three captions, a line each, all of them different."""
    return (
        "\n".join(f"{word} {NAMES[i % 24]} number {i}" for word in ("a", "the", "one")[: 1 + i % 3])
        + "\n\n"
    )


@pytest.fixture(scope="module")
def model(data):
    return untrained(data / "tokenizer.model", "eval_crop=resize_crop")


def embedder(model, **how):
    return embed.Embedder(*model, home=Path("nowhere"), tag="test", **how)


def evaluated(model, evals, **how):
    return evaluate(embedder(model, **how), evals)


def by_hand(method, cfg, tokenizer, folder, views=lambda i: [range(16)]):
    """Image embeddings (N, E) one by one, the mean of those of the patches in each of views(i), and
    a function for a text's.
    """
    pre, samples = cfg.model, Shards([folder / "test"], captions=False)
    images = [
        torch.from_numpy(center_view(samples[i].image, 32)).permute(2, 0, 1)
        for i in range(len(samples))
    ]
    patches = patchify(torch.stack(images), pre.patch)
    with torch.no_grad():
        each = [
            [
                method.towers.encode_image(p[None, keep], keep[None])[0]
                for keep in map(torch.tensor, views(i))
            ]
            for i, p in enumerate(patches)
        ]
    made = [torch.nn.functional.normalize(torch.stack(several).mean(0), dim=0) for several in each]

    def text(line):
        ids = torch.tensor(tokenizer(line))
        with torch.no_grad():
            return method.towers.encode_text(ids, torch.tensor([len(ids)]))[0]

    return torch.stack(made), text, [samples[i] for i in range(len(samples))]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_zero_shot(data, model, monkeypatch, world):
    images, text, samples = by_hand(*model, data / "eval" / "shapes")  # 49 pictures, 24 classes
    classes = torch.stack([(text(f"a {name}") + text(f"the {name}")) / 2 for name in NAMES])
    scores = images @ (classes / classes.norm(dim=1, keepdim=True)).T
    own = scores[range(49), labels := [int(s.parts["cls"]) for s in samples]]
    rank = (scores > own[:, None]).sum(1)
    assert len(set(labels)) == 24
    with ranks(monkeypatch, world, batch=4) as run:
        found = run(lambda: evaluated(model, parse([f"zero_shot:{data}/eval/shapes"])))
    assert all(f == found[0] for f in found), "every rank knows"
    wanted = dict(
        top1=float((rank < 1).double().mean()),
        top5=float((rank < 5).double().mean()),
        chance=1 / 24,
    )
    assert found[0] == {f"zero_shot/shapes/{name}": value for name, value in wanted.items()}
    assert 0 < found[0]["zero_shot/shapes/top5"] < 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_retrieval(data, model, monkeypatch, world):
    """One to three captions an image."""
    images, text, samples = by_hand(*model, data / "eval" / "pairs")
    lines = [
        (i, line)
        for i, s in enumerate(samples)
        for line in s.parts["txt"].decode().split("\n")
        if line
    ]
    scores = images @ torch.stack([text(line) for _, line in lines]).T  # (131, 261)
    owner = [i for i, _ in lines]
    wanted = {}
    for k in (1, 5, 10):
        hits = [
            any(owner[c] == i for c in scores[i].topk(k).indices.tolist())
            for i in range(len(samples))
        ]
        wanted[f"retrieval/pairs/image_to_text_r{k}"] = np.mean(hits)
        hits = [owner[c] in scores[:, c].topk(k).indices.tolist() for c in range(len(lines))]
        wanted[f"retrieval/pairs/text_to_image_r{k}"] = np.mean(hits)
    with ranks(monkeypatch, world, batch=16) as run:
        found = run(lambda: evaluated(model, parse([f"retrieval:{data}/eval/pairs"])))
    assert all(f == found[0] for f in found) and found[0] == pytest.approx(wanted, abs=1e-12)
    assert 0 < found[0]["retrieval/pairs/text_to_image_r10"] < 1


def shown(i, mask, ensemble):
    """Which patches an image is seen by, view by view: what noise of its number, and of nothing
    else, says.
    """
    order = np.random.default_rng((0, i)).random(16, dtype=np.float32).argsort()
    if ensemble > 1:
        return [sorted(part.tolist()) for part in np.array_split(order, ensemble)]
    return [sorted(order[8:].tolist()) if mask == "random(0.5)" else range(16)]


@pytest.mark.parametrize(
    "mask, ensemble", [("none", 1), ("random(0.5)", 1), ("none", 2), ("none", 3)]
)
def test_images_seen_in_part(data, model, monkeypatch, mask, ensemble):
    """Half of an image's patches, or the mean of views that together show each once; the same on
    whichever rank.
    """
    folder = data / "eval" / "shapes"
    wanted, *_ = by_hand(*model, folder, lambda i: shown(i, mask, ensemble))
    for world, batch in ((1, 64), (3, 4)):
        with ranks(monkeypatch, world, batch) as run:
            found = run(
                lambda: embedder(model, mask=mask, ensemble=ensemble).images(Benchmark(folder))
            )
        indices, made = (torch.cat(parts) for parts in zip(*found))
        assert sorted(indices.tolist()) == list(range(49))
        torch.testing.assert_close(made, wanted[indices])


def test_evaluations_of_images_seen_in_part(data, model, monkeypatch):
    def results(world, **how):
        with ranks(monkeypatch, world, batch=5) as run:
            return run(lambda: evaluated(model, parse([f"retrieval:{data}/eval/retrieval"]), **how))

    (plain,) = results(1)
    assert results(1, mask="none", ensemble=1) == [plain]
    for how in (dict(mask="random(0.5)"), dict(ensemble=2)):
        (alone,) = results(1, **how)
        assert alone != plain and results(3, **how) == [alone] * 3


@pytest.mark.parametrize("what", ["alike", "nan"])
def test_a_collapsed_model_finds_nothing(monkeypatch, what):
    """Equal similarities, or none that can be compared, must not count as found."""
    same = torch.ones(12, 4) / 2 if what == "alike" else torch.full((12, 4), float("nan"))
    with ranks(monkeypatch, 1, 4) as run:
        (found,) = run(
            lambda: retrieval.recalls("x", same, torch.arange(12), same, torch.arange(12))
        )
    assert found == {"x_r1": 0, "x_r5": 0, "x_r10": 0}


@pytest.mark.parametrize("world", [1, 3])
def test_similarities_come_in_tiles(monkeypatch, world):
    """Five captions an image, some images and captions twice: as from the whole matrix, of which no
    more than a tile is ever held.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(90, 16, generator=rng), dim=1)
    texts = torch.nn.functional.normalize(
        images.repeat_interleave(5, 0) + 0.5 * torch.randn(450, 16, generator=rng), dim=1
    )
    images[7], texts[100:104], texts[440] = images[60], texts[300:304], texts[2]
    owner, every = torch.arange(90).repeat_interleave(5), torch.arange(90)
    wanted = {}
    for name, scores, match in (
        ("i", images @ texts.T, every[:, None] == owner),
        ("t", texts @ images.T, owner[:, None] == every),
    ):
        scores = scores.double().round(decimals=6)  # what is alike is alike
        best = scores.masked_fill(~match, -2).amax(1, keepdim=True)
        wanted |= {
            f"{name}_r{k}": float((((scores >= best) & ~match).sum(1) < k).double().mean())
            for k in (1, 5, 10)
        }
    assert len(set(wanted.values())) > 4
    monkeypatch.setattr(retrieval, "TILE", 32)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            largest[0] = max(largest[0], made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    def work():
        with Watch():
            found = retrieval.recalls("i", images, every, texts, owner)
            return found | retrieval.recalls("t", texts, owner, images, every)

    with ranks(monkeypatch, world, 4) as run:
        found = run(work)
    assert found == [wanted] * world
    assert largest[0] <= max(texts.numel(), 7 * 32) < 90 * 450


def test_what_a_set_lacks_is_said_at_the_start(data, tmp_path):
    shapes, pairs = f"{data}/eval/shapes", f"{data}/eval/pairs"
    for specs, words in (
        ([f"zero_shot:{pairs}"], "pairs: no templates; it needs zeroshot"),
        ([f"retrieval:{shapes}"], "no caption"),
        (["zero_shot"], "write zero_shot:FOLDER"),
        ([f"retrieval:{pairs}", f"retrieval:{pairs}/../pairs"], "a second set is called 'pairs'"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(specs)
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [("a", {"png": b"x", "cls": b"0"})])
    rounds = Benchmark(tmp_path).rounds(embed.Preprocess(32, 8, "square", "bicubic"), 4, [0], 1, 0)
    with pytest.raises(
        ValueError, match=f"evals: {tmp_path}: 0.tar a of test: cannot read the image"
    ):
        next(rounds)


def test_evaluating_leaves_the_method_as_it_was(data, model, monkeypatch):
    method = model[0].train()
    with ranks(monkeypatch, 1, 64) as run:
        run(lambda: evaluated(model, parse([f"zero_shot:{data}/eval/shapes"])))
    assert method.training and all(p.grad is None for p in method.parameters())
    several = SimpleNamespace(
        **{**vars(model[1]), "views": {"image": View((0.5, 1.0), interpolation="bilinear")}}
    )
    assert embedder((method, several, model[2])).pre == embed.Preprocess(
        32, 8, "resize_crop", "bilinear"
    )


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
    """docs/methods.md: FLIP's central square, the others' short side first; SLIP's bilinear;
    OpenAI's statistics or ImageNet's.
    """
    cfg = config.load(f"run/configs/{name}.yaml")
    assert embedder((model[0], cfg, model[2])).pre == embed.Preprocess(224, 16, how, interpolation)
    assert cfg.model.vision.mean[0] == mean


@pytest.mark.slow
def test_the_same_numbers_on_any_ranks_during_training_and_after(data, tmp_path):
    """Trained and evaluated under ZeRO-3 on 2 ranks, then run/evaluate.py on 1 and 3: student and
    average.
    """
    sets = (
        f"evals=[zero_shot:{data}/eval/many, zero_shot:{data}/eval/shapes,"
        f" retrieval:{data}/eval/pairs, retrieval:{data}/eval/retrieval, knn:{data}/eval/many,"
        f" 'knn(features=embedded, k=3):{data}/eval/many',"
        f" 'linear_probe(weight_decay=10):{data}/eval/many', 'linear_probe(optimizer=lars,"
        f" epochs=9):{data}/eval/many']"
    )
    run, method = (
        tmp_path / "run",
        ("method=maskclip", "views.image.mask=random(0.75)", "options.momentum=[0.5,0.9]"),
    )
    done = launch(
        2, "run/pretrain.py", *settings(data, run, sets, *method, "samples=480", "optim.lr=1e-3")
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for world in (1, 3):
        done = launch(world, "run/evaluate.py", "--run", str(run))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    trained = rows[:2]
    assert [row["weights"] for row in trained] == ["student", "teacher"] and trained[0][
        "zero_shot/many/top1"
    ] > 0.05
    assert trained[0] != {**trained[1], "weights": "student"}, "the average is another model"
    assert (
        trained[0]["knn/many/top1"] < 1
        and trained[0]["knn(features=embedded, k=3)/many/top1"] > 0.5
    ), "most images are in both splits"
    assert not list(run.glob("features/training-*/*")), (
        "features of weights that are gone are not kept"
    )
    for row, wanted in zip(rows[2:], trained * 2, strict=True):
        wanted = {**wanted, "mask": "none", "ensemble": 1}
        probed = [
            key for key in wanted if key.startswith("linear_probe") and not key.endswith("chance")
        ]
        assert len(probed) == 4, (
            "fitted on shares, whose sums are rounded: an image in 150 or two may differ"
        )
        assert [row.pop(key) for key in probed] == pytest.approx(
            [wanted.pop(key) for key in probed], abs=0.02
        )
        assert row == wanted
