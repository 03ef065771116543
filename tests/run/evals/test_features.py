"""Features kept on disk, and what asks them for neighbours: the same on any ranks, gone on with
where a job was broken off.

    bash run/test.sh tests/run/evals/test_features.py
The model is a table of vectors, so that every number can be worked out by hand; ranks are threads.
"""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.run.evals import knn, parse
from glimpse.run.evals.features import features, splits
from glimpse.run.evals.metrics import accuracies
from glimpse.tests.helpers.threads import ranks

CLASSES, WIDTH = 5, 6


class Table(Images):
    """A set whose image i of a split is row i of a table."""

    def __init__(self, folder, split, tables, numbers):
        self.folder, self.split, self.tables, self.numbers = Path(folder), split, tables, numbers

    def __len__(self):
        return len(self.tables[self.split])

    def image(self, i):
        raise AssertionError("nothing is decoded here")

    def key(self, i):
        return f"{self.split} {i}"

    def classes(self):
        return [f"class {c}" for c in range(CLASSES)]

    def label(self, i):
        return int(self.numbers[self.split][i])

    def other(self, split):
        return Table(self.folder, split, self.tables, self.numbers)


class Model:
    """Stands for an Embedder: gives the rows of the table, and remembers which it was asked for."""

    pre, mask, ensemble, tag, say = "whole", "none", 1, "step-1-student", staticmethod(print)

    def __init__(self, home, batch, breaks=None):
        self.home, self.batch, self.breaks, self.asked = home, batch, breaks, []

    def passed(self, images, what, mine, turns):
        for turn in range(turns):
            here = mine[turn * self.batch : (turn + 1) * self.batch]
            if self.breaks is not None and self.breaks in here:
                raise OSError("the machine went down")
            self.asked += here
            yield torch.tensor(here, dtype=torch.int64), images.tables[images.split][here]


@pytest.fixture
def images(tmp_path):
    """61 train and 47 test images in clusters that overlap; neither a multiple of a batch, a chunk
    or of 3 ranks.
    """
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=rng)
    numbers = {split: torch.arange(n) * 7 % CLASSES for split, n in (("train", 61), ("test", 47))}
    tables = {
        split: centres[c] + 0.9 * torch.randn(len(c), WIDTH, generator=rng)
        for split, c in numbers.items()
    }
    return Table(tmp_path / "set", "test", tables, numbers)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_and_in_order(tmp_path, images, monkeypatch, world):
    model = Model(tmp_path, 4)
    with ranks(monkeypatch, world, batch=4) as run:
        found = run(lambda: features(model, images, "pooled", labels=True))
        assert sorted(model.asked) == list(range(47))
        again = run(lambda: features(model, images, "pooled", labels=True))
        assert len(model.asked) == 47, "made once"
        for f in found + again:
            assert len(f) == 47 and torch.equal(f.all(), images.tables["test"])
            assert torch.equal(f.rows([46, 0, 13, 0]), images.tables["test"][[46, 0, 13, 0]])
            assert f.labels().tolist() == images.numbers["test"].tolist()


def test_no_file_is_kept_open(tmp_path, images, monkeypatch):
    """ImageNet's features are 1,252 files, and a process may often have 1,024 open."""
    with ranks(monkeypatch, 1, batch=4) as run:
        before = len(os.listdir("/proc/self/fd"))
        (found,) = run(lambda: features(Model(tmp_path, 4), images, "pooled", labels=True))
        assert len(found.parts) == 6 and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("before, after", [(1, 1), (1, 3), (3, 2)])
def test_broken_off_it_goes_on(tmp_path, images, monkeypatch, before, after):
    """A job that dies at image 20: whole chunks are kept, of whichever ranks had come so far, and
    not the half of the third.
    """
    with ranks(monkeypatch, before, batch=4) as run, pytest.raises(OSError):
        run(lambda: features(Model(tmp_path, 4, breaks=20), images, "pooled", labels=True))
    kept = {int(p.name[:5]) for p in tmp_path.glob("features/*/*/*.npy") if "label" not in p.name}
    assert 2 not in kept and (before > 1 or kept == {0, 1}), "chunks are of 8"
    model = Model(tmp_path, 4)
    with ranks(monkeypatch, after, batch=4) as run:
        found = run(lambda: features(model, images, "pooled", labels=True))
    assert sorted(model.asked) == [i for i in range(47) if i // 8 not in kept]
    assert all(torch.equal(f.all(), images.tables["test"]) for f in found)


def test_features_of_other_weights_sets_or_views_are_others(tmp_path, images, monkeypatch):
    model, seen = Model(tmp_path, 4), []
    with ranks(monkeypatch, 1, batch=4) as run:
        for change in (
            dict(),
            dict(tag="step-2-student"),
            dict(pre="cropped"),
            dict(mask="random(0.5)"),
            dict(ensemble=2),
        ):
            vars(model).update(change)
            seen.append(run(lambda: features(model, images, "pooled"))[0].folder)
        for part, what in ((images.other("train"), "pooled"), (images, "embedded")):
            seen.append(run(partial(features, model, part, what))[0].folder)
    assert len(set(seen)) == len(seen)


def test_labels_are_added_to_features_made_without(tmp_path, images, monkeypatch):
    with ranks(monkeypatch, 2, batch=4) as run:
        run(lambda: features(Model(tmp_path, 4), images, "pooled"))
        found = run(lambda: features(Model(tmp_path, 4), images, "pooled", labels=True))
    assert found[1].labels().tolist() == images.numbers["test"].tolist()


def test_a_mislabelled_set_is_named(tmp_path, images, monkeypatch):
    images.numbers["train"] = images.numbers["train"].clone()
    images.numbers["train"][[3, 9]] = CLASSES
    with (
        ranks(monkeypatch, 1, batch=4) as run,
        pytest.raises(ValueError, match="train 3 of train is of class 5; classnames.txt names 5"),
    ):
        run(lambda: splits(Model(tmp_path, 4), images, "pooled"))
    images.numbers["train"][[3, 9]] = 0
    with ranks(monkeypatch, 1, batch=4) as run:  # mended, it goes on
        ((train, _),) = run(lambda: splits(Model(tmp_path, 4), images, "pooled"))
    assert train.labels()[[3, 9]].tolist() == [0, 0]


def by_hand(images, k, temperature):
    """Each test image's class, by sorting all cosines; equal ones by the train image's number."""
    train, test = (F.normalize(images.tables[s].double(), dim=1).numpy() for s in ("train", "test"))
    labels, found = images.numbers["train"].numpy(), []
    for row in test:
        cosines = train @ row
        near = np.lexsort((np.arange(len(train)), -cosines.round(9)))[:k]
        weights = (
            np.exp(cosines[near] / temperature) if temperature < np.inf else np.ones(len(near))
        )
        found.append(int(np.argmax([weights[labels[near] == c].sum() for c in range(CLASSES)])))
    return np.array(found)


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (5, float("inf")), (500, 0.5)]
)
def test_knn(tmp_path, images, monkeypatch, k, temperature):
    """k beyond the train split: all of it votes."""
    truth = images.numbers["test"].numpy()
    hits = by_hand(images, k, temperature) == truth
    wanted = dict(
        top1=hits.mean(),
        mean_per_class=np.mean([hits[truth == c].mean() for c in range(CLASSES)]),
        chance=1 / CLASSES,
    )
    alone = None
    for world in (1, 2, 3):
        monkeypatch.setattr(knn, "QUERIES", 5)
        with ranks(monkeypatch, world, batch=4) as run:
            found = run(
                lambda: knn.evaluate(
                    Model(tmp_path, 4), images, knn.Options(k=k, temperature=temperature)
                )
            )
        alone = alone or found[0]
        assert found == [alone] * world, "not one bit differs"
    assert alone == pytest.approx(wanted, abs=1e-12) and 0.2 < alone["top1"] < 1


@pytest.mark.parametrize("value, cosine", [(1.0, 1.0), (float("nan"), -1.0)])
def test_equal_neighbours_come_in_order_of_their_numbers(
    tmp_path, images, monkeypatch, value, cosine
):
    """Every image alike, or nan: the first k vote."""
    images.tables = {s: torch.full_like(t, value) for s, t in images.tables.items()}
    with ranks(monkeypatch, 1, batch=4) as run:
        ((train, test),) = run(lambda: splits(Model(tmp_path, 4), images, "pooled"))
        (((cosines, numbers),),) = run(lambda: knn.neighbours(train, [test.all()], 9))
    assert numbers.tolist() == [list(range(9))] * 47 and cosines.unique().tolist() == [cosine]


def test_a_tied_vote_goes_to_the_lower_class():
    assert (
        int(knn.vote(torch.ones(1, 5), torch.tensor([[3, 1, 1, 3, 0]]), CLASSES, 0.07).argmax())
        == 1
    )


def test_accuracies_of_a_class_that_does_not_occur(monkeypatch):
    """Classes of 4 and 1 images, a third without: 3 of 5 are right, and (3/4 + 0/1) / 2 is the mean
    per class.
    """
    with ranks(monkeypatch, 1, batch=4) as run:
        (found,) = run(
            lambda: accuracies(
                F.one_hot(torch.tensor([0, 0, 0, 2, 2]), 3).float(), torch.tensor([0, 0, 0, 0, 1])
            )
        )
    assert found == dict(top1=0.6, mean_per_class=0.375, chance=1 / 3)


@pytest.mark.parametrize(
    "options, words",
    [
        ("k=0", "at least 1"),
        ("temperature=0", "above 0"),
        ("temperature=nan", "above 0"),
        ("features=tokens", "known: embedded, grid"),
        ("n=3", "known: features, k, temperature"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse([f"knn({options}):{tmp_path}"])


def test_a_set_without_a_train_split_is_refused_at_the_start(images):
    def no_train(split):
        raise ValueError(f"it needs {split}")

    with pytest.raises(ValueError, match="it needs train"):
        knn.check(
            SimpleNamespace(classes=images.classes, label=images.label, other=no_train),
            knn.Options(),
        )
