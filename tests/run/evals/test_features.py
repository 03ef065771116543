"""Features on disk, and k nearest neighbors from them.

Both are the same on any number of ranks, and after an interruption.

    bash run/test.sh tests/run/evals/test_features.py

The model is a table of vectors, so that all results can be computed by hand. Ranks are threads.
"""

import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.run.evals import knn, parse_evaluations
from glimpse.run.evals.features import compute_features, train_test_features
from glimpse.run.evals.metrics import accuracies
from glimpse.tests.helpers.table_model import CLASSES, WIDTH, TableImages, TableModel
from glimpse.tests.helpers.threads import ranks


@pytest.fixture
def images(tmp_path):
    """A set of 61 train and 47 test images in clusters that overlap.

    Neither number is a multiple of a batch, of a chunk, or of 3 ranks.
    """
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=rng)
    all_labels, tables = {}, {}
    for split, count in (("train", 61), ("test", 47)):
        labels = torch.arange(count) * 7 % CLASSES
        all_labels[split] = labels
        tables[split] = centers[labels] + 0.9 * torch.randn(count, WIDTH, generator=rng)
    return TableImages(tmp_path / "set", "test", tables, all_labels)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_once_and_in_order(tmp_path, images, monkeypatch, world):
    model = TableModel(tmp_path, 4)
    table = images.tables["test"]

    with ranks(monkeypatch, world, batch=4) as run:
        first = run(lambda: compute_features(model, images, "pooled", labels=True))
        assert sorted(model.computed) == list(range(47))
        second = run(lambda: compute_features(model, images, "pooled", labels=True))
        assert len(model.computed) == 47, "computed once"

        for features in first + second:
            assert len(features) == 47
            assert torch.equal(features.all_rows(), table)
            assert torch.equal(features.rows([46, 0, 13, 0]), table[[46, 0, 13, 0]])
            assert features.labels().tolist() == images.all_labels["test"].tolist()


def test_no_file_is_kept_open(tmp_path, images, monkeypatch):
    """ImageNet's features are 1,252 files, and a process may often open only 1,024."""
    model = TableModel(tmp_path, 4)

    with ranks(monkeypatch, 1, batch=4) as run:
        open_before = len(os.listdir("/proc/self/fd"))
        (features,) = run(lambda: compute_features(model, images, "pooled", labels=True))
        open_after = len(os.listdir("/proc/self/fd"))

    assert len(features.chunks) == 6
    assert open_after == open_before


@pytest.mark.parametrize("before, after", [(1, 1), (1, 3), (3, 2)])
def test_an_interrupted_job_can_be_resumed(tmp_path, images, monkeypatch, before, after):
    """A job that fails at image 20 leaves complete chunks, and no part of the third chunk."""
    failing_model = TableModel(tmp_path, 4, failing_row=20)
    with ranks(monkeypatch, before, batch=4) as run, pytest.raises(OSError):
        run(lambda: compute_features(failing_model, images, "pooled", labels=True))
    files = [path for path in tmp_path.glob("features/*/*/*.npy") if "label" not in path.name]
    chunks = {int(path.name[:5]) for path in files}
    assert 2 not in chunks, "chunks have 8 images"
    assert before > 1 or chunks == {0, 1}

    model = TableModel(tmp_path, 4)
    with ranks(monkeypatch, after, batch=4) as run:
        results = run(lambda: compute_features(model, images, "pooled", labels=True))

    assert sorted(model.computed) == [i for i in range(47) if i // 8 not in chunks]
    for features in results:
        assert torch.equal(features.all_rows(), images.tables["test"])


def test_features_of_other_weights_sets_or_views_are_others(tmp_path, images, monkeypatch):
    model = TableModel(tmp_path, 4)
    changes = (
        dict(),
        dict(tag="step-2-student"),
        dict(preprocess="crop"),
        dict(mask="random(0.5)"),
        dict(ensemble=2),
    )

    folders = []
    with ranks(monkeypatch, 1, batch=4) as run:
        for change in changes:
            vars(model).update(change)
            (features,) = run(lambda: compute_features(model, images, "pooled"))
            folders.append(features.folder)
        for split, kind in ((images.open_split("train"), "pooled"), (images, "embedded")):
            (features,) = run(partial(compute_features, model, split, kind))
            folders.append(features.folder)

    assert len(set(folders)) == len(folders)


def test_labels_are_added_to_features_made_without(tmp_path, images, monkeypatch):
    with ranks(monkeypatch, 2, batch=4) as run:
        run(lambda: compute_features(TableModel(tmp_path, 4), images, "pooled"))
        results = run(
            lambda: compute_features(TableModel(tmp_path, 4), images, "pooled", labels=True)
        )

    assert results[1].labels().tolist() == images.all_labels["test"].tolist()


def test_a_mislabeled_set_is_reported(tmp_path, images, monkeypatch):
    images.all_labels["train"] = images.all_labels["train"].clone()
    images.all_labels["train"][[3, 9]] = CLASSES
    with (
        ranks(monkeypatch, 1, batch=4) as run,
        pytest.raises(ValueError, match="train 3 of train is of class 5; classnames.txt names 5"),
    ):
        run(lambda: train_test_features(TableModel(tmp_path, 4), images, "pooled"))

    # When the set is corrected it goes on.
    images.all_labels["train"][[3, 9]] = 0
    with ranks(monkeypatch, 1, batch=4) as run:
        ((train, _),) = run(lambda: train_test_features(TableModel(tmp_path, 4), images, "pooled"))
    assert train.labels()[[3, 9]].tolist() == [0, 0]


def predict_by_sorting(images, k, temperature):
    """Predict each test image's class from all cosines, sorted; equal ones by the train index."""
    train = F.normalize(images.tables["train"].double(), dim=1).numpy()
    test = F.normalize(images.tables["test"].double(), dim=1).numpy()
    labels = images.all_labels["train"].numpy()
    predictions = []
    for row in test:
        cosines = train @ row
        nearest = np.lexsort((np.arange(len(train)), -cosines.round(9)))[:k]
        weights = np.ones(len(nearest))
        if temperature < np.inf:
            weights = np.exp(cosines[nearest] / temperature)
        votes = [weights[labels[nearest] == c].sum() for c in range(CLASSES)]
        predictions.append(int(np.argmax(votes)))
    return np.array(predictions)


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (5, float("inf")), (500, 0.5)]
)
def test_knn(tmp_path, images, monkeypatch, k, temperature):
    """If k is larger than the train split, all its images vote."""
    truth = images.all_labels["test"].numpy()
    hits = predict_by_sorting(images, k, temperature) == truth
    per_class = [hits[truth == c].mean() for c in range(CLASSES)]
    expected = dict(top1=hits.mean(), mean_per_class=np.mean(per_class), chance=1 / CLASSES)
    options = knn.Options(k=k, temperature=temperature)

    monkeypatch.setattr(knn, "QUERY_BATCH", 5)
    results = {}  # {world size: results of its ranks}
    for world in (1, 2, 3):
        with ranks(monkeypatch, world, batch=4) as run:
            results[world] = run(lambda: knn.evaluate(TableModel(tmp_path, 4), images, options))

    (single_rank,) = results[1]
    for world, rank_results in results.items():
        assert rank_results == [single_rank] * world, "bitwise equal"
    assert single_rank == pytest.approx(expected, abs=1e-12)
    assert 0.2 < single_rank["top1"] < 1


@pytest.mark.parametrize("value, cosine", [(1.0, 1.0), (float("nan"), -1.0)])
def test_equal_neighbors_come_in_order_of_their_numbers(
    tmp_path, images, monkeypatch, value, cosine
):
    """If all features are equal, or nan, the first k images vote."""
    for table in images.tables.values():
        table.fill_(value)

    with ranks(monkeypatch, 1, batch=4) as run:
        ((train, test),) = run(
            lambda: train_test_features(TableModel(tmp_path, 4), images, "pooled")
        )
        (batches,) = run(lambda: knn.nearest_neighbors(train, [test.all_rows()], 9))
    ((cosines, indices),) = batches

    assert indices.tolist() == [list(range(9))] * 47
    assert cosines.unique().tolist() == [cosine]


def test_a_tied_vote_goes_to_the_lower_class():
    labels = torch.tensor([[3, 1, 1, 3, 0]])

    votes = knn.count_votes(torch.ones(1, 5), labels, CLASSES, 0.07)

    assert int(votes.argmax()) == 1


def test_accuracies_of_a_class_that_does_not_occur(monkeypatch):
    """Two classes have 4 images and 1, a third has none.

    3 of 5 images are right, and the mean per class is (3/4 + 0/1) / 2.
    """
    scores = F.one_hot(torch.tensor([0, 0, 0, 2, 2]), 3).float()
    labels = torch.tensor([0, 0, 0, 0, 1])

    with ranks(monkeypatch, 1, batch=4) as run:
        (results,) = run(lambda: accuracies(scores, labels))

    assert results == dict(top1=0.6, mean_per_class=0.375, chance=1 / 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ("k=0", "at least 1"),
        ("temperature=0", "above 0"),
        ("temperature=nan", "above 0"),
        ("features=tokens", "known: embedded, grid"),
        ("n=3", "known: features, k, temperature"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_evaluations([f"knn({options}):{tmp_path}"])


def test_a_set_without_a_train_split_is_refused_at_the_start(images):
    def no_train(split):
        raise ValueError(f"it needs {split}")

    test_only = SimpleNamespace(
        class_names=images.class_names, label=images.label, open_split=no_train
    )

    with pytest.raises(ValueError, match="it needs train"):
        knn.check_set(test_only, knn.Options())
