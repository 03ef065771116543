"""Features on disk, and k nearest neighbors from them.

They are the same on any number of ranks, and after an interruption.

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
from glimpse.run.evals import knn, parse_evaluations
from glimpse.run.evals.features import compute_features, train_test_features
from glimpse.run.evals.metrics import accuracies
from glimpse.tests.helpers.threads import ranks

CLASSES, WIDTH = 5, 6


class Table(Images):
    """A set whose image i of a split is row i of a table."""

    def __init__(self, folder, split, tables, numbers):
        self.folder = Path(folder)
        self.split = split
        self.tables = tables
        self.numbers = numbers

    def __len__(self):
        return len(self.tables[self.split])

    def image(self, i):
        raise AssertionError("nothing is decoded here")

    def key(self, i):
        return f"{self.split} {i}"

    def class_names(self):
        return [f"class {c}" for c in range(CLASSES)]

    def label(self, i):
        return int(self.numbers[self.split][i])

    def open_split(self, split):
        return Table(self.folder, split, self.tables, self.numbers)


class Model:
    """An Embedder whose features are the rows of the table; `asked` lists the rows computed."""

    preprocess = "whole"
    mask = "none"
    ensemble = 1
    tag = "step-1-student"
    log = staticmethod(print)

    def __init__(self, home, batch, breaks=None):
        self.results_folder = home
        self.batch = batch
        self.breaks = breaks
        self.asked = []

    def iterate_features(self, images, what, share, turns):
        for turn in range(turns):
            here = share[turn * self.batch : (turn + 1) * self.batch]
            if self.breaks is not None and self.breaks in here:
                raise OSError("the machine went down")
            self.asked += here
            yield torch.tensor(here, dtype=torch.int64), images.tables[images.split][here]


@pytest.fixture
def images(tmp_path):
    """61 train and 47 test images in clusters that overlap.

    Neither number is a multiple of a batch, a chunk or of 3 ranks.
    """
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=rng)
    numbers, tables = {}, {}
    for split, count in (("train", 61), ("test", 47)):
        labels = torch.arange(count) * 7 % CLASSES
        numbers[split] = labels
        tables[split] = centers[labels] + 0.9 * torch.randn(count, WIDTH, generator=rng)
    return Table(tmp_path / "set", "test", tables, numbers)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_and_in_order(tmp_path, images, monkeypatch, world):
    model = Model(tmp_path, 4)
    table = images.tables["test"]

    with ranks(monkeypatch, world, batch=4) as run:
        first = run(lambda: compute_features(model, images, "pooled", labels=True))
        assert sorted(model.asked) == list(range(47))
        again = run(lambda: compute_features(model, images, "pooled", labels=True))
        assert len(model.asked) == 47, "made once"

        for result in first + again:
            assert len(result) == 47
            assert torch.equal(result.all(), table)
            assert torch.equal(result.rows([46, 0, 13, 0]), table[[46, 0, 13, 0]])
            assert result.labels().tolist() == images.numbers["test"].tolist()


def test_no_file_is_kept_open(tmp_path, images, monkeypatch):
    """ImageNet's features are 1,252 files, and a process may often have 1,024 open."""
    with ranks(monkeypatch, 1, batch=4) as run:
        before = len(os.listdir("/proc/self/fd"))
        (result,) = run(lambda: compute_features(Model(tmp_path, 4), images, "pooled", labels=True))
        assert len(result.parts) == 6
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("before, after", [(1, 1), (1, 3), (3, 2)])
def test_broken_off_it_goes_on(tmp_path, images, monkeypatch, before, after):
    """A job that dies at image 20 leaves complete chunks, and not the half of the third."""
    broken = Model(tmp_path, 4, breaks=20)
    with ranks(monkeypatch, before, batch=4) as run, pytest.raises(OSError):
        run(lambda: compute_features(broken, images, "pooled", labels=True))
    files = [path for path in tmp_path.glob("features/*/*/*.npy") if "label" not in path.name]
    chunks = {int(path.name[:5]) for path in files}
    assert 2 not in chunks, "chunks are of 8"
    assert before > 1 or chunks == {0, 1}

    model = Model(tmp_path, 4)
    with ranks(monkeypatch, after, batch=4) as run:
        results = run(lambda: compute_features(model, images, "pooled", labels=True))

    assert sorted(model.asked) == [i for i in range(47) if i // 8 not in chunks]
    assert all(torch.equal(result.all(), images.tables["test"]) for result in results)


def test_features_of_other_weights_sets_or_views_are_others(tmp_path, images, monkeypatch):
    model = Model(tmp_path, 4)
    changes = (
        dict(),
        dict(tag="step-2-student"),
        dict(preprocess="cropped"),
        dict(mask="random(0.5)"),
        dict(ensemble=2),
    )

    folders = []
    with ranks(monkeypatch, 1, batch=4) as run:
        for change in changes:
            vars(model).update(change)
            (result,) = run(lambda: compute_features(model, images, "pooled"))
            folders.append(result.folder)
        for part, what in ((images.open_split("train"), "pooled"), (images, "embedded")):
            (result,) = run(partial(compute_features, model, part, what))
            folders.append(result.folder)

    assert len(set(folders)) == len(folders)


def test_labels_are_added_to_features_made_without(tmp_path, images, monkeypatch):
    with ranks(monkeypatch, 2, batch=4) as run:
        run(lambda: compute_features(Model(tmp_path, 4), images, "pooled"))
        results = run(lambda: compute_features(Model(tmp_path, 4), images, "pooled", labels=True))

    assert results[1].labels().tolist() == images.numbers["test"].tolist()


def test_a_mislabelled_set_is_named(tmp_path, images, monkeypatch):
    images.numbers["train"] = images.numbers["train"].clone()
    images.numbers["train"][[3, 9]] = CLASSES
    with (
        ranks(monkeypatch, 1, batch=4) as run,
        pytest.raises(ValueError, match="train 3 of train is of class 5; classnames.txt names 5"),
    ):
        run(lambda: train_test_features(Model(tmp_path, 4), images, "pooled"))

    # When the set is corrected it goes on.
    images.numbers["train"][[3, 9]] = 0
    with ranks(monkeypatch, 1, batch=4) as run:
        ((train, _),) = run(lambda: train_test_features(Model(tmp_path, 4), images, "pooled"))
    assert train.labels()[[3, 9]].tolist() == [0, 0]


def by_hand(images, k, temperature):
    """Predict each test image's class by sorting all cosines; equal ones by the image's number."""
    train = F.normalize(images.tables["train"].double(), dim=1).numpy()
    test = F.normalize(images.tables["test"].double(), dim=1).numpy()
    labels = images.numbers["train"].numpy()
    predictions = []
    for row in test:
        cosines = train @ row
        near = np.lexsort((np.arange(len(train)), -cosines.round(9)))[:k]
        weights = np.ones(len(near))
        if temperature < np.inf:
            weights = np.exp(cosines[near] / temperature)
        votes = [weights[labels[near] == c].sum() for c in range(CLASSES)]
        predictions.append(int(np.argmax(votes)))
    return np.array(predictions)


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (5, float("inf")), (500, 0.5)]
)
def test_knn(tmp_path, images, monkeypatch, k, temperature):
    """If k is larger than the train split, all of it votes."""
    truth = images.numbers["test"].numpy()
    hits = by_hand(images, k, temperature) == truth
    per_class = [hits[truth == c].mean() for c in range(CLASSES)]
    wanted = dict(top1=hits.mean(), mean_per_class=np.mean(per_class), chance=1 / CLASSES)
    options = knn.Options(k=k, temperature=temperature)

    results = {}  # by world size: those of its ranks
    for world in (1, 2, 3):
        monkeypatch.setattr(knn, "QUERY_BATCH", 5)
        with ranks(monkeypatch, world, batch=4) as run:
            results[world] = run(lambda: knn.evaluate(Model(tmp_path, 4), images, options))

    (alone,) = results[1]
    for world, of_ranks in results.items():
        assert of_ranks == [alone] * world, "not one bit differs"
    assert alone == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < alone["top1"] < 1


@pytest.mark.parametrize("value, cosine", [(1.0, 1.0), (float("nan"), -1.0)])
def test_equal_neighbours_come_in_order_of_their_numbers(
    tmp_path, images, monkeypatch, value, cosine
):
    """Every image alike, or nan: the first k vote."""
    for table in images.tables.values():
        table.fill_(value)

    with ranks(monkeypatch, 1, batch=4) as run:
        ((train, test),) = run(lambda: train_test_features(Model(tmp_path, 4), images, "pooled"))
        (blocks,) = run(lambda: knn.nearest_neighbors(train, [test.all()], 9))
    ((cosines, numbers),) = blocks

    assert numbers.tolist() == [list(range(9))] * 47
    assert cosines.unique().tolist() == [cosine]


def test_a_tied_vote_goes_to_the_lower_class():
    labels = torch.tensor([[3, 1, 1, 3, 0]])

    votes = knn.count_votes(torch.ones(1, 5), labels, CLASSES, 0.07)

    assert int(votes.argmax()) == 1


def test_accuracies_of_a_class_that_does_not_occur(monkeypatch):
    """Classes of 4 and 1 images, a third without.

    3 of 5 are right, and (3/4 + 0/1) / 2 is the mean per class.
    """
    scores = F.one_hot(torch.tensor([0, 0, 0, 2, 2]), 3).float()
    labels = torch.tensor([0, 0, 0, 0, 1])

    with ranks(monkeypatch, 1, batch=4) as run:
        (results,) = run(lambda: accuracies(scores, labels))

    assert results == dict(top1=0.6, mean_per_class=0.375, chance=1 / 3)


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
        parse_evaluations([f"knn({options}):{tmp_path}"])


def test_a_set_without_a_train_split_is_refused_at_the_start(images):
    def no_train(split):
        raise ValueError(f"it needs {split}")

    test_only = SimpleNamespace(
        class_names=images.class_names, label=images.label, open_split=no_train
    )

    with pytest.raises(ValueError, match="it needs train"):
        knn.check_set(test_only, knn.Options())
