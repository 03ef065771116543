"""Suites: the table is that of the papers; what lies in a folder is evaluated, what is missing or
broken is named.

    bash run/test.sh tests/data/evals/test_suites.py
"""

import json
import re

import numpy as np
import pytest
import torch

from glimpse.data.evals import suites as table
from glimpse.run.evals import evaluate, parse
from glimpse.run.evals.metrics import MAIN, METRICS
from glimpse.run.evals.suites import Options, Suite, averages, look
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import NAMES, ROOT, evaluation_set, launch, picture, settings
from glimpse.tests.helpers.tiny import shards as make_shards

TEN = "\n".join(NAMES[:10])


def test_the_suites_are_those_of_the_papers():
    counts = {
        suite: {name: len(sets) for name, sets in groups.items()}
        for suite, groups in table.SUITES.items()
    }
    assert counts == {
        "slip": {"average": 26},
        "aclip": {"average": 26},
        "flip": {"average": 25},
        "maskclip": {"average": 25},
        "glip": {"object": 14, "other": 11, "average": 25},
        "robustness": {"average": 6, "": 2},
    }
    assert all(name in table.SETS for suite in table.SUITES for name in table.members(suite))
    assert {row.name for row in table.SETS.values()} == {
        name for suite in table.SUITES for name in table.members(suite)
    }
    assert set(table.SUITES["slip"]["average"]) - set(table.SUITES["flip"]["average"]) == {
        "cub",
        "fer2013",
        "imagenet",
    }
    assert set(table.SUITES["flip"]["average"]) - set(table.SUITES["slip"]["average"]) == {
        "birdsnap",
        "voc2007",
    }
    by = {
        metric: {row.name for row in table.SETS.values() if row.metric == metric}
        for metric in METRICS
    }
    assert by["mean_per_class"] == {"aircraft", "pets", "caltech101", "flowers"} and by[
        "roc_auc"
    ] == {"hateful_memes"}
    assert (
        by["top1_top5"] == {"kinetics700"}
        and by["map"] == {"voc2007"}
        and by["pm"] == {"imagenet_vid", "ytbb"}
    )
    assert sum(map(len, by.values())) == len(table.SETS) and MAIN["pm"] == "pm_10"


def test_the_table_of_the_documentation_is_this_one():
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs/evaluating.md").read_text().splitlines()
        if line.count("|") == 10
    ]
    told = {row[0]: row[1:] for row in cells if row[0] in table.SETS}
    for row in table.SETS.values():
        inside = [
            "x" if row.name in table.members(suite) else ""
            for suite in ("slip", "maskclip", "flip")
        ]
        group = next(
            (name for name in ("object", "other") if row.name in table.SUITES["glip"][name]), ""
        )
        robust = next(
            (
                word
                for name, word in (("average", "in the average"), ("", "x"))
                if row.name in table.SUITES["robustness"][name]
            ),
            "",
        )
        assert told[row.name] == [
            str(row.classes),
            row.metric,
            " or ".join(row.folders),
            *inside,
            group,
            robust,
        ]


@pytest.mark.parametrize("folder", ["dtd", "wds_dtd", "vtab-dtd", "wds_vtab-dtd", "vtab/dtd"])
def test_a_set_by_any_of_its_names(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    assert table.found(tmp_path, table.SETS["dtd"]) == tmp_path / folder
    assert table.found(tmp_path, table.SETS["mnist"]) is None


def rows(classes, count=30):
    rng = np.random.default_rng(classes)
    return [
        {"png": picture(NAMES[i % classes], rng), "cls": b"%d" % (i % classes)}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sets that are whole, one that is not but can be evaluated, five that are not, one that
    is in no suite.
    """
    folder = tmp_path_factory.mktemp("sets")
    evaluation_set(folder / "wds_mnist", rows(10), TEN)
    evaluation_set(folder / "wds_vtab-eurosat", rows(10), TEN)
    evaluation_set(
        folder / "wds_vtab-caltech101", rows(10)[1:3], "\n".join(str(i) for i in range(102))
    )
    evaluation_set(folder / "hateful_memes", rows(2), "\n".join(NAMES[:2]))
    cut = evaluation_set(folder / "wds_vtab-cifar10", rows(10), TEN) / "test" / "0.tar"
    cut.write_bytes(cut.read_bytes()[:20000])
    evaluation_set(folder / "wds_stl10", [*rows(10), {"cls": b"10"}], TEN)  # counted from one
    evaluation_set(folder / "wds_fer2013", rows(6), "\n".join(NAMES[:6]))
    (
        evaluation_set(folder / "wds_renderedsst2", rows(2), "\n".join(NAMES[:2]))
        / "zeroshot_classification_templates.txt"
    ).unlink()
    evaluation_set(
        folder / "wds_gtsrb",
        [{"png": b"no image", "cls": b"0"}],
        "\n".join(str(i) for i in range(43)),
    )
    evaluation_set(folder / "shapes", rows(10), TEN)
    return folder


FAULTS = (
    "cifar10: .*wds_vtab-cifar10/test/0.tar: truncated or no tar",
    "fer2013: .*6 classes; fer2013 has 7",
    "stl10: .*wds_stl10: 0.tar 030 is of class 10; classnames.txt names 10, from 0",
    "gtsrb: .*0.tar 000: cannot read the image",
    "sst2: .*no templates",
)


def test_what_is_there_what_is_missing_what_is_broken(data):
    suite = look("aclip", str(data), Options())
    assert (
        list(suite.sets) == ["caltech101", "mnist", "eurosat", "hateful_memes"]
        and suite.sets["hateful_memes"][1].metric == "roc_auc"
    )
    assert len(suite.missing) == 17 and {"imagenet", "food101"} < set(suite.missing)
    assert len(suite.faults) == 5
    for fault in FAULTS:
        assert len([line for line in suite.faults if re.match(fault, line)]) == 1, fault
    said = str(suite).splitlines()
    assert (
        said[0].startswith("suite:aclip: 4 of 26 sets in ")
        and said[1].startswith("  missing: food101, ")
        and len(said) == 8
    )
    assert re.match(
        "  in doubt: caltech101: .*100 of its 102 classes have no image, e.g. 0; is it whole",
        said[-1],
    )
    assert "sst2" in look("aclip", str(data), Options(templates="7")).sets, (
        "with templates from elsewhere it can be evaluated"
    )


def test_what_cannot_be_a_suite(data, tmp_path):
    for spec, folder, words in (
        ("suite:aclop", data, "did you mean 'aclip'"),
        ("suite:flip", "", "--data DIR, or eval_data"),
        ("suite:flip", tmp_path, "no set to evaluate.*called e.g. food101 or wds_food101"),
        ("suite:aclip(templates=7)", data, "unknown"),
        ("suite(templates=8):aclip", data, "^templates: '8'"),
        ("suite(metric=map):aclip", data, "metric"),
    ):
        with pytest.raises(ValueError, match=words):
            parse([spec], data=str(folder))
    with pytest.raises(ValueError, match="mend or remove\n  cifar10: "):
        parse(["suite:aclip"], data=str(data), training=True)


def test_averages():
    """Over what is there, under a name that says over how many."""
    suite = Suite("glip", None, "zero_shot", dict.fromkeys(["mnist", "aircraft", "pcam"]))
    results = {
        "zero_shot/mnist/top1": 0.5,
        "zero_shot/aircraft/top1": 0.9,
        "zero_shot/aircraft/mean_per_class": 0.1,
        "zero_shot/pcam/top1": 0.6,
    }
    assert averages(suite, results) == {
        "object_of_2": 0.3,
        "other_of_1": 0.6,
        "average_of_3": pytest.approx(0.4),
    }
    sets = table.SUITES["glip"]["other"]
    whole = Suite("glip", None, "zero_shot", dict.fromkeys(sets))
    found = averages(
        whole,
        {
            f"zero_shot/{name}/{MAIN[table.SETS[name].metric]}": i / 10
            for i, name in enumerate(sets)
        },
    )
    assert found == {"other": pytest.approx(0.5), "average_of_11": pytest.approx(0.5)}
    videos = Suite("robustness", None, "zero_shot", {"ytbb": None})
    assert averages(videos, {"zero_shot/ytbb/pm_10": 0.5}) == {}


def test_two_suites_share_their_sets(data, monkeypatch):
    """Each set is evaluated once, and both have their averages; every image is white, so what is
    nearest is known: class 0.
    """
    evals = parse(
        ["suite:aclip", "suite:maskclip", f"zero_shot:{data}/shapes"], data=str(data), templates="7"
    )
    labels = [e.label for e in evals]
    sets = ["caltech101", "mnist", "eurosat", "hateful_memes", "sst2"]
    assert labels == [
        *(f"zero_shot/{name}" for name in sets),
        "suite/aclip",
        "suite/maskclip",
        "zero_shot/shapes",
    ]
    assert all(e.options.templates == "7" for e in evals if e.kind == "zero_shot")

    class Model:
        towers = torch.nn.Identity()
        texts = staticmethod(lambda texts: torch.eye(2)[[0] * 7 + [1] * (len(texts) - 7)])
        images = staticmethod(
            lambda images: (torch.arange(len(images)), torch.eye(2)[[0] * len(images)])
        )

    with ranks(monkeypatch, 1, 4) as run:
        (found,) = run(lambda: evaluate(Model, evals))
    assert found["zero_shot/mnist/top1"] == 0.1 and found["zero_shot/hateful_memes/roc_auc"] == 0.5
    assert found["suite/aclip/average_of_5"] == pytest.approx((0.1 + 0.1 + 0.5 + 0.5) / 5)
    assert found["suite/maskclip/average_of_4"] == pytest.approx((0.1 + 0.1 + 0.5) / 4)


@pytest.mark.slow
def test_a_suite_from_the_command_line(data, tmp_path):
    """Two ranks train and evaluate what is whole; then run/evaluate.py names the broken ones, and
    tells by its status.
    """
    tiny, run = make_shards(tmp_path / "data"), tmp_path / "run"
    good = tmp_path / "good"
    good.mkdir()
    for name in ("wds_vtab-caltech101", "wds_mnist", "wds_vtab-eurosat", "hateful_memes"):
        (good / name).symlink_to(data / name)
    done = launch(
        2,
        "run/pretrain.py",
        *settings(tiny, run, "evals=[suite:aclip]", f"eval_data={good}", "samples=32"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = launch(2, "run/evaluate.py", "--run", str(run), "--data", str(data))
    assert done.returncode != 0
    for fault in FAULTS:
        assert (
            len(re.findall(fault, done.stdout)) == 1 and len(re.findall(fault, done.stderr)) == 1
        ), fault
    assert (
        "missing: food101" in done.stdout
        and "5 of the sets could not be evaluated; all others are" in done.stderr
    )
    trained, after = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert (
        after == {**trained, "mask": "none", "ensemble": 1} and "suite/aclip/average_of_4" in after
    )
    broken = [*rows(10, 2), {"png": b"no picture", "cls": b"0"}]
    evaluation_set(tmp_path / "broken", broken, TEN)
    done = launch(
        1,
        "run/evaluate.py",
        "--run",
        str(run),
        "--evals",
        f"zero_shot:{data}/wds_mnist",
        f"zero_shot:{tmp_path}/broken",
    )
    assert done.returncode == 2 and "cannot read the image" in done.stderr
    kept = json.loads((run / "results.jsonl").read_text().splitlines()[2])
    assert "zero_shot/wds_mnist/top1" in kept and not any("broken" in name for name in kept), (
        "what was done before is kept"
    )
