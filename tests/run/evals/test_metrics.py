"""Metrics of zero-shot classification on small cases computed by hand, on any number of ranks.

Also prompts, and the checks of sets.

    bash run/test.sh tests/run/evals/test_metrics.py
"""

import io
import json

import numpy as np
import pytest
import torch

from glimpse.data.evals import prompts
from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.run.evals import parse_evaluations, zero_shot
from glimpse.run.evals.metrics import (
    average_precision,
    count_hits,
    gather_by_index,
    mean_average_precision,
    mean_per_class,
    perturbation_accuracy,
    roc_auc,
    top1,
    top5,
)
from glimpse.run.lib import distributed
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import write_evaluation_set

# Six classes, five images. The class of each is 1st, 2nd, 1st, 6th and 1st among its scores.
SCORES = torch.tensor(
    [
        [9, 1, 2, 3, 4, 5],
        [8, 7, 1, 2, 3, 4],
        [1, 9, 2, 3, 4, 5],
        [1, 9, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 9.0],
    ]
)
LABELS = torch.tensor([0, 1, 1, 0, 5])


def run_on_shares(monkeypatch, world, work):
    """Return the result of work(share), where the ranks have shares of the five images.

    Asserts that the result is the same on all ranks.
    """
    images = list(range(5))
    with ranks(monkeypatch, world, 4) as run:
        results = run(lambda: work(images[distributed.rank() :: world]))
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_counts(monkeypatch, world):
    """top1 is 3/5 and top5 4/5; the mean over classes that have images is 2/3.

    In class 0 one of two images is right, in class 1 one of two, in class 5 one of one.
    """

    def work(share):
        counts = count_hits(SCORES[share], LABELS[share])
        return top1(counts), top5(counts), mean_per_class(counts)

    result = run_on_shares(monkeypatch, world, work)

    assert result == (0.6, 0.8, pytest.approx(2 / 3, abs=1e-15))


def test_fewer_classes_than_five(monkeypatch):
    def work(share):
        return top5(count_hits(SCORES[share][:, :2], LABELS[share].clamp(max=1)))

    assert run_on_shares(monkeypatch, 2, work) == 1.0


def test_every_image_has_its_place(monkeypatch):
    def work(share):
        indices = torch.tensor(share)
        return gather_by_index(indices, indices * 2.0, 5).tolist()

    assert run_on_shares(monkeypatch, 3, work) == [0, 2, 4, 6, 8]


def test_roc_auc():
    """Positives score 0.9, 0.4, 0.4, negatives 0.5, 0.4, 0.1.

    Of the nine pairs five are in order and two are equal, so the area is 6/9.
    """
    scores = torch.tensor([0.9, 0.4, 0.4, 0.5, 0.4, 0.1])
    positive = torch.tensor([True, True, True, False, False, False])
    assert roc_auc(scores, positive) == pytest.approx(6 / 9, abs=1e-15)
    assert roc_auc(-scores, positive) == pytest.approx(3 / 9, abs=1e-15)
    assert roc_auc(torch.full((6,), torch.nan), positive) == 0.5

    # 200 scores with ties, compared with the mean over all pairs.
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (200,), generator=rng) / 7
    positive = torch.rand(200, generator=rng) < 0.3
    pairs = scores[positive][:, None] - scores[~positive][None]
    in_order = (pairs > 0).double() + (pairs == 0).double() / 2
    assert roc_auc(scores, positive) == pytest.approx(float(in_order.mean()), abs=1e-12)


def test_eleven_points():
    """For right, wrong, right, wrong, wrong it is (6 + 10/3) / 11.

    The precision is 1 up to a recall of 1/2 (six points), and 2/3 above (five points).
    """
    scores = torch.tensor([5.0, 4, 3, 2, 1])
    positive = torch.tensor([True, False, True, False, False])
    assert average_precision(scores, positive) == pytest.approx((6 + 5 * 2 / 3) / 11, abs=1e-15)

    # Every second of twenty is right: recalls are tenths, precision k / (2k - 1) at the k-th.
    falling_scores = torch.arange(20, 0, -1.0)
    every_second = torch.arange(20) % 2 == 0
    precision = {k: k / (2 * k - 1) for k in range(1, 11)}
    best = []
    for step in range(11):
        best.append(max(precision[k] for k in range(max(step, 1), 11)))
    assert average_precision(falling_scores, every_second) == pytest.approx(
        np.mean(best), abs=1e-15
    )

    # A class without images does not count.
    mean = mean_average_precision(
        torch.stack([scores, scores, scores], 1),
        torch.stack([positive, ~positive, positive & False], 1),
    )
    both = average_precision(scores, positive) + average_precision(scores, ~positive)
    assert mean == pytest.approx(both / 2, abs=1e-15)


def test_perturbations():
    """Four anchors: all frames right; one wrong 10 away; one wrong 11 away; the anchor wrong.

    PM-0 is 3/4, PM-10 2/4.
    """
    frames = [
        ("a", 0, 1),
        ("a", -3, 1),
        ("b", 0, 1),
        ("b", -10, 0),
        ("c", 0, 1),
        ("c", 11, 0),
        ("c", 1, 1),
        ("d", 2, 1),
        ("d", 0, 0),
    ]
    anchors, offsets, hits = zip(*frames)
    is_right = torch.tensor(hits) > 0
    offsets = torch.tensor(offsets)

    accuracies = {
        k: perturbation_accuracy(is_right, list(anchors), offsets, k) for k in (0, 10, 11)
    }

    assert accuracies == {0: 0.75, 10: 0.5, 11: 0.25}


def npy_row(*values):
    """Return the files of a sample with several classes."""
    out = io.BytesIO()
    np.save(out, np.array(values))
    return {"npy": out.getvalue()}


def frame_row(anchor, offset, *labels):
    """Return the files of a video frame's sample."""
    return {"json": json.dumps(dict(anchor=anchor, offset=offset, labels=labels)).encode()}


def test_templates_that_come_with_the_code():
    seven = prompts.load_templates("7")
    eighty = prompts.load_templates(80)
    eighty_five = prompts.load_templates(85)

    assert len(set(seven)) == 7
    assert len(set(eighty)) == 80
    assert len(set(eighty_five)) == 85
    assert seven[0] == "itap of a {c}."
    assert set(seven) < set(eighty)
    assert eighty_five[:80] == eighty
    assert all("scene" in template for template in eighty_five[80:])


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one {}\n\ntwo {c}s\n")
    assert prompts.load_templates(file) == ["one {c}", "two {c}s"]

    file.write_text("one {c}\nthree\n")
    with pytest.raises(ValueError, match="'three' has no {c}"):
        prompts.load_templates(file)
    with pytest.raises(ValueError, match="'81'; known: 7, 80, 85, or a file"):
        prompts.load_templates("81")


def test_names_of_a_class_and_a_subset(tmp_path):
    names = "happy;smiling\nsad; depressed\nbored\nangry"
    folder = write_evaluation_set(
        tmp_path / "set", [{"cls": b"3"}, {"cls": b"1"}], names, "a {c}\n{c}!"
    )
    subset = folder / "class_subset.txt"

    all_classes = ClipBenchmarkSet(folder)
    assert all_classes.prompts()[0] == ["a happy", "happy!", "a smiling", "smiling!"]
    assert all_classes.class_names() == ["happy", "sad", "bored", "angry"]

    subset.write_text("1\n3\n")
    small = ClipBenchmarkSet(folder)
    assert small.class_names() == ["sad", "angry"]
    assert [small.label(0), small.label(1)] == [1, 0]
    assert [len(p) for p in small.prompts("7")] == [14, 7]

    subset.write_text("1\n2\n")
    with pytest.raises(
        ValueError, match="0.tar 000 is of class 3, which is not in class_subset.txt"
    ):
        parse_evaluations([f"zero_shot:{folder}"])
    message = "class_subset.txt: it must list class numbers from 0 to 3"
    for wrong in ("1\n1", "4", "x"):
        subset.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            parse_evaluations([f"zero_shot:{folder}"])


class FixedModel:
    """An Embedder in which image i has the embedding `embeddings`[i], and each text an axis.

    share: the images of this rank.
    """

    def __init__(self, embeddings, share):
        self.embeddings = torch.tensor(embeddings)
        self.share = torch.tensor(share, dtype=torch.int64)

    def embed_texts(self, texts):
        return torch.eye(len(texts))

    def embed_images(self, _benchmark):
        return self.share, self.embeddings[self.share]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_metric_of_a_set(monkeypatch, tmp_path, world):
    """Five images whose nearest classes are ape, bee, bee, cat and ape."""
    images = [[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.1, 0.7, 0.3], [0.3, 0.1, 0.6], [0.5, 0.4, 0.1]]
    two_classes = [[row[0], row[1]] for row in images]

    def results(metric, rows, images=images, names="ape\nbee\ncat"):
        folder = write_evaluation_set(tmp_path / f"{metric}{len(names)}", rows, names, "{c}")
        (spec,) = parse_evaluations([f"zero_shot(metric={metric}):{folder}"])

        def work(share):
            return zero_shot.evaluate(FixedModel(images, share), spec.images, spec.options)

        return run_on_shares(monkeypatch, world, work)

    # All images but the third are right.
    labels = [{"cls": b"%d" % label} for label in (0, 1, 0, 2, 0)]
    third = pytest.approx(1 / 3)
    assert results("top1", labels) == dict(top1=0.8, top5=1.0, chance=third)
    per_class = results("mean_per_class", labels)["mean_per_class"]
    assert per_class == pytest.approx((2 / 3 + 1 + 1) / 3, abs=1e-15)
    assert results("top1_top5", labels)["top1_top5"] == 0.9

    # The score of bee minus that of ape is -0.7, 0.7, 0.6, -0.2, -0.1. The second, fourth and fifth
    # image are bees: of six pairs 2 + 1 + 1 are in order.
    labels = [{"cls": b"%d" % label} for label in (0, 1, 0, 1, 1)]
    area = results("roc_auc", labels, two_classes, "ape\nbee")["roc_auc"]
    assert area == pytest.approx(4 / 6, abs=1e-15)

    # The two images that are nearest to ape are apes: 1. The second nearest to bee is one: 1/2. No
    # image is a cat, so it does not count.
    present = [
        npy_row(1, 0, 0),
        npy_row(0, 0, 0),
        npy_row(0, 1, 0),
        npy_row(0, 0, 0),
        npy_row(1, 0, 0),
    ]
    assert results("map", present) == dict(map=pytest.approx((1 + 1 / 2) / 2, abs=1e-15))

    # Both frames of anchor v are right, the second with one of its two classes. A frame of anchor w
    # is wrong.
    frames = [
        frame_row("v", 0, 0),
        frame_row("v", 4, 2, 1),
        frame_row("w", 0, 1),
        frame_row("w", -10, 1),
        frame_row("w", 12, 2),
    ]
    assert results("pm", frames) == dict(pm_0=1.0, pm_10=0.5, chance=third)


def test_what_does_not_fit_is_reported_at_the_start(tmp_path):
    def check_refused(spec, message):
        with pytest.raises(ValueError, match=message):
            parse_evaluations([spec])

    plain = write_evaluation_set(tmp_path / "plain", [{"cls": b"0"}, {"cls": b"3"}])
    check_refused(
        f"zero_shot:{plain}", "plain: 0.tar 001 is of class 3; classnames.txt names 3, from 0"
    )
    check_refused(f"zero_shot(metric=top2):{plain}", "zero_shot.metric: unknown 'top2'; known: map")
    check_refused(
        f"zero_shot(metric=roc_auc):{plain}", "roc_auc needs two classes; classnames.txt names 3"
    )
    check_refused(f"zero_shot(metric=map):{plain}", "has no npy")
    one_class = write_evaluation_set(tmp_path / "one_class", [{"cls": b"1"}], names="ape\nbee")
    check_refused(
        f"zero_shot(metric=roc_auc):{one_class}", "are of 1 classes; roc_auc needs at least 2"
    )
    check_refused(f"zero_shot(templates=81):{plain}", "templates: unknown '81'")
    named = write_evaluation_set(tmp_path / "words", [{"cls": b"ape"}])
    check_refused(f"zero_shot:{named}", "the class of 0.tar 000 is 'ape'; it must be a number")
    gap = write_evaluation_set(tmp_path / "gap", [{"cls": b"1"}], names="ape\n\nbee")
    check_refused(f"zero_shot:{gap}", "line 2 is empty")
    several = write_evaluation_set(tmp_path / "several", [npy_row(0, 1)])
    check_refused(f"zero_shot(metric=map):{several}", "lists 2 classes; classnames.txt names 3")
    frames = write_evaluation_set(
        tmp_path / "frames", [frame_row("v1", 0, 1), frame_row("v2", 1, 1)]
    )
    check_refused(
        f"zero_shot(metric=pm):{frames}", "frames of the anchor 'v2', but not the anchor itself"
    )
    bare = write_evaluation_set(tmp_path / "bare", [{"cls": b"1"}])
    (bare / "zeroshot_classification_templates.txt").unlink()
    check_refused(
        f"zero_shot:{bare}",
        "bare: no templates; it needs zeroshot_classification_templates.txt,"
        " or give templates=7, 80 or a file",
    )
    (evaluation,) = parse_evaluations([f"zero_shot(templates=7):{bare}"])
    assert evaluation.label == "zero_shot(templates=7)/bare"
