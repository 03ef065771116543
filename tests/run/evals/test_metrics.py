"""The metrics of zero-shot classification against tiny cases done by hand, on one rank and spread
over three; prompts and their sets.

    bash run/test.sh tests/run/evals/test_metrics.py
"""

import io
import json

import numpy as np
import pytest
import torch

from glimpse.data.evals import prompts
from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.run.evals import parse, zero_shot
from glimpse.run.evals.metrics import (
    average_precision,
    counted,
    everyone,
    mean_average_precision,
    mean_per_class,
    perturbed,
    roc_auc,
    top1,
    top5,
)
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import evaluation_set

# six classes, five images: the class of each and where it stands among the scores: 1st, 2nd, 1st,
# 6th, 1st
SCORES = torch.tensor(
    [
        [9, 1, 2, 3, 4, 5],
        [8, 7, 1, 2, 3, 4],
        [1, 9, 2, 3, 4, 5],
        [1, 9, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 9.0],
    ]
)
GAP = "ape\n\nbee"
LABELS = torch.tensor([0, 1, 1, 0, 5])


def gathered(monkeypatch, world, work):
    """What each of `world` ranks makes of its share of the five images, all of them the same."""
    shares = [list(range(5))[r::world] for r in range(world)]
    with ranks(monkeypatch, world, 4) as run:
        turn = iter(shares)
        found = run(lambda: work(next(turn)))
    assert all(f == found[0] for f in found)
    return found[0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_counts(monkeypatch, world):
    """top1 3/5, top5 4/5; class 0 has 1 of 2, class 1 1 of 2, class 5 1 of 1: mean per class 2/3,
    the empty classes apart.
    """

    def work(mine):
        counts = counted(SCORES[mine], LABELS[mine])
        return top1(counts), top5(counts), mean_per_class(counts)

    found = gathered(monkeypatch, world, work)
    assert found == (0.6, 0.8, pytest.approx(2 / 3, abs=1e-15))


def test_fewer_classes_than_five(monkeypatch):
    found = gathered(
        monkeypatch, 2, lambda mine: top5(counted(SCORES[mine][:, :2], LABELS[mine].clamp(max=1)))
    )
    assert found == 1.0


def test_every_image_has_its_place(monkeypatch):
    found = gathered(
        monkeypatch,
        3,
        lambda mine: everyone(torch.tensor(mine), torch.tensor(mine) * 2.0, 5).tolist(),
    )
    assert found == [0, 2, 4, 6, 8]


def test_roc_auc():
    """Positives 0.9, 0.4, 0.4; negatives 0.5, 0.4, 0.1: of nine pairs five are in order, two alike,
    two not: 6/9.
    """
    scores = torch.tensor([0.9, 0.4, 0.4, 0.5, 0.4, 0.1])
    positive = torch.tensor([True, True, True, False, False, False])
    assert roc_auc(scores, positive) == pytest.approx(6 / 9, abs=1e-15)
    assert roc_auc(-scores, positive) == pytest.approx(3 / 9, abs=1e-15)
    assert roc_auc(torch.full((6,), torch.nan), positive) == 0.5
    rng = torch.Generator().manual_seed(0)
    scores, positive = (
        torch.randint(0, 30, (200,), generator=rng) / 7,
        torch.rand(200, generator=rng) < 0.3,
    )
    pairs = scores[positive][:, None] - scores[~positive][None]
    assert roc_auc(scores, positive) == pytest.approx(
        float(((pairs > 0).double() + (pairs == 0).double() / 2).mean()), abs=1e-12
    )


def test_eleven_points():
    """Right, wrong, right, wrong, wrong: precision 1 up to recall 1/2 (six points), 2/3 beyond
    (five): (6 + 10/3) / 11.
    """
    scores, positive = (
        torch.tensor([5.0, 4, 3, 2, 1]),
        torch.tensor([True, False, True, False, False]),
    )
    assert average_precision(scores, positive) == pytest.approx((6 + 5 * 2 / 3) / 11, abs=1e-15)
    # ten right among twenty, every second: recalls are tenths, precision k / (2k) or better
    ten = torch.arange(20, 0, -1.0)
    every = torch.arange(20) % 2 == 0
    wanted = np.mean(
        [max((k / (2 * k - 1)) for k in range(max(step, 1), 11)) for step in range(11)]
    )
    assert average_precision(ten, every) == pytest.approx(wanted, abs=1e-15)
    both = mean_average_precision(
        torch.stack([scores, scores, scores], 1),
        torch.stack([positive, ~positive, positive & False], 1),
    )
    assert both == pytest.approx(
        (average_precision(scores, positive) + average_precision(scores, ~positive)) / 2, abs=1e-15
    )


def test_perturbations():
    """Four anchors: all right; wrong 10 away; wrong 11 away; itself wrong.  PM-0 3/4, PM-10 2/4."""
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
    anchors, offsets, right = zip(*frames)
    made = [
        perturbed(torch.tensor(right) > 0, list(anchors), torch.tensor(offsets), k)
        for k in (0, 10, 11)
    ]
    assert made == [0.75, 0.5, 0.25]


def npy(*values):
    out = io.BytesIO()
    np.save(out, np.array(values))
    return {"npy": out.getvalue()}


def frame(anchor, offset, *labels):
    return {"json": json.dumps(dict(anchor=anchor, offset=offset, labels=labels)).encode()}


def test_templates_that_come_with_the_code():
    seven, eighty, more = (prompts.templates(which) for which in ("7", 80, 85))
    assert [len(set(t)) for t in (seven, eighty, more)] == [7, 80, 85] and set(seven) < set(eighty)
    assert (
        seven[0] == "itap of a {c}."
        and more[:80] == eighty
        and all("scene" in t for t in more[80:])
    )


def test_templates_of_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("one {}\n\ntwo {c}s\n")
    assert prompts.templates(tmp_path / "mine.txt") == ["one {c}", "two {c}s"]
    (tmp_path / "mine.txt").write_text("one {c}\nthree\n")
    with pytest.raises(ValueError, match="'three': no {c} in it"):
        prompts.templates(tmp_path / "mine.txt")
    with pytest.raises(ValueError, match="'81'; known: 7, 80, 85, or a file"):
        prompts.templates("81")


def test_names_of_a_class_and_a_subset(tmp_path):
    folder = evaluation_set(
        tmp_path / "set",
        [{"cls": b"3"}, {"cls": b"1"}],
        "happy;smiling\nsad; depressed\nbored\nangry",
        "a {c}\n{c}!",
    )
    assert Benchmark(folder).prompts()[0] == ["a happy", "happy!", "a smiling", "smiling!"]
    assert Benchmark(folder).classes() == ["happy", "sad", "bored", "angry"]
    (folder / "class_subset.txt").write_text("1\n3\n")
    small = Benchmark(folder)
    assert small.classes() == ["sad", "angry"] and [small.label(0), small.label(1)] == [1, 0]
    assert [len(p) for p in small.prompts("7")] == [14, 7]
    (folder / "class_subset.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="0.tar 000 is of class 3, which class_subset.txt has not"):
        parse([f"zero_shot:{folder}"])
    for wrong in ("1\n1", "4", "x"):
        (folder / "class_subset.txt").write_text(wrong)
        with pytest.raises(
            ValueError, match="class_subset.txt: it holds lines of classnames.txt by number, 0 to 3"
        ):
            parse([f"zero_shot:{folder}"])


class Told:
    """In the embedder's place: image i lies where row i of `images` says, the texts one to an
    axis.
    """

    def __init__(self, images, mine):
        self.all, self.mine = torch.tensor(images), torch.tensor(mine, dtype=torch.int64)

    def texts(self, texts):
        return torch.eye(len(texts))

    def images(self, found):
        return self.mine, self.all[self.mine]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_metric_of_a_set(monkeypatch, tmp_path, world):
    """The same five images: nearest to ape, bee, bee, cat, ape, the second nearest always the next
    class round.
    """
    images = [[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.1, 0.7, 0.3], [0.3, 0.1, 0.6], [0.5, 0.4, 0.1]]
    two = [[row[0], row[1]] for row in images]

    def found(metric, rows, images=images, names="ape\nbee\ncat"):
        folder = evaluation_set(tmp_path / f"{metric}{len(names)}", rows, names, "{c}")
        (spec,) = parse([f"zero_shot(metric={metric}):{folder}"])
        return gathered(
            monkeypatch,
            world,
            lambda mine: zero_shot.evaluate(Told(images, mine), spec.images, spec.options),
        )

    labels = [{"cls": b"%d" % label} for label in (0, 1, 0, 2, 0)]  # all but the third are right
    third = pytest.approx(1 / 3)
    assert found("top1", labels) == dict(top1=0.8, top5=1.0, chance=third)
    assert found("mean_per_class", labels)["mean_per_class"] == pytest.approx(
        (2 / 3 + 1 + 1) / 3, abs=1e-15
    )
    assert found("top1_top5", labels)["top1_top5"] == 0.9
    # bee above ape by -0.7, 0.7, 0.6, -0.2, -0.1; it is in the second, fourth and fifth: of six
    # pairs 2 + 1 + 1 are in order
    second = [{"cls": b"%d" % label} for label in (0, 1, 0, 1, 1)]
    assert found("roc_auc", second, two, "ape\nbee")["roc_auc"] == pytest.approx(4 / 6, abs=1e-15)
    # ape lies in the nearest two: 1; bee in the second nearest of five: 1/2; cat in none, and does
    # not count
    present = [npy(1, 0, 0), npy(0, 0, 0), npy(0, 1, 0), npy(0, 0, 0), npy(1, 0, 0)]
    assert found("map", present) == dict(map=pytest.approx((1 + 1 / 2) / 2, abs=1e-15))
    # anchor v: both frames right, the second by either of two classes; w: its neighbour is wrong
    frames = [
        frame("v", 0, 0),
        frame("v", 4, 2, 1),
        frame("w", 0, 1),
        frame("w", -10, 1),
        frame("w", 12, 2),
    ]
    assert found("pm", frames) == dict(pm_0=1.0, pm_10=0.5, chance=third)


def test_what_does_not_fit_is_said_at_the_start(tmp_path):
    def refused(spec, words):
        with pytest.raises(ValueError, match=words):
            parse([spec])

    plain = evaluation_set(tmp_path / "plain", [{"cls": b"0"}, {"cls": b"3"}])
    refused(f"zero_shot:{plain}", "plain: 0.tar 001 is of class 3; classnames.txt names 3, from 0")
    refused(f"zero_shot(metric=top2):{plain}", "zero_shot.metric: unknown 'top2'; known: map")
    refused(f"zero_shot(metric=roc_auc):{plain}", "roc_auc is for two classes; 3 are named")
    refused(f"zero_shot(metric=map):{plain}", "has no npy")
    alone = evaluation_set(tmp_path / "alone", [{"cls": b"1"}], names="ape\nbee")
    refused(f"zero_shot(metric=roc_auc):{alone}", "its images are of 1 classes; roc_auc needs more")
    refused(f"zero_shot(templates=81):{plain}", "templates: '81'")
    refused(
        f"zero_shot:{evaluation_set(tmp_path / 'words', [{'cls': b'ape'}])}",
        "the class of 0.tar 000 is 'ape'; it must be a number",
    )
    refused(
        f"zero_shot:{evaluation_set(tmp_path / 'gap', [{'cls': b'1'}], names=GAP)}",
        "line 2 is empty",
    )
    refused(
        f"zero_shot(metric=map):{evaluation_set(tmp_path / 'several', [npy(0, 1)])}",
        "tells of 2 classes; 3 are named",
    )
    frames = evaluation_set(tmp_path / "frames", [frame("v1", 0, 1), frame("v2", 1, 1)])
    refused(f"zero_shot(metric=pm):{frames}", "of the anchor 'v2', but not itself")
    bare = evaluation_set(tmp_path / "bare", [{"cls": b"1"}])
    (bare / "zeroshot_classification_templates.txt").unlink()
    refused(
        f"zero_shot:{bare}",
        "bare: no templates; it needs zeroshot_classification_templates.txt, or give templates=7,"
        " 80 or a file",
    )
    assert parse([f"zero_shot(templates=7):{bare}"])[0].label == "zero_shot(templates=7)/bare"
