"""Suites: the table agrees with the papers; missing and broken sets are reported.

bash run/test.sh tests/data/evals/test_suites.py
"""

import json
import re

import numpy as np
import pytest
import torch

from glimpse.data.evals import suites as table
from glimpse.run.evals import evaluate, parse_evaluations
from glimpse.run.evals.metrics import MAIN_METRIC, METRICS
from glimpse.run.evals.suites import Options, Suite, average_metrics, find_suite
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import (
    NAMES,
    ROOT,
    launch,
    picture,
    tiny_run_arguments,
    write_evaluation_set,
)
from glimpse.tests.helpers.tiny import write_dataset as make_shards

TEN = "\n".join(NAMES[:10])


def test_the_suites_are_those_of_the_papers():
    counts = {}
    for suite, groups in table.SUITES.items():
        counts[suite] = {name: len(sets) for name, sets in groups.items()}
    assert counts == {
        "slip": {"average": 26},
        "aclip": {"average": 26},
        "flip": {"average": 25},
        "maskclip": {"average": 25},
        "glip": {"object": 14, "other": 11, "average": 25},
        "robustness": {"average": 6, "": 2},
    }

    members = {name for suite in table.SUITES for name in table.suite_members(suite)}
    assert members <= table.SETS.keys()
    assert {row.name for row in table.SETS.values()} == members
    slip = set(table.SUITES["slip"]["average"])
    flip = set(table.SUITES["flip"]["average"])
    assert slip - flip == {"cub", "fer2013", "imagenet"}
    assert flip - slip == {"birdsnap", "voc2007"}

    by_metric = {metric: set() for metric in METRICS}
    for row in table.SETS.values():
        by_metric[row.metric].add(row.name)
    assert by_metric["mean_per_class"] == {"aircraft", "pets", "caltech101", "flowers"}
    assert by_metric["roc_auc"] == {"hateful_memes"}
    assert by_metric["top1_top5"] == {"kinetics700"}
    assert by_metric["map"] == {"voc2007"}
    assert by_metric["pm"] == {"imagenet_vid", "ytbb"}
    assert sum(map(len, by_metric.values())) == len(table.SETS)
    assert MAIN_METRIC["pm"] == "pm_10"


def test_the_table_of_the_documentation_is_this_one():
    documented = {}
    for line in (ROOT / "docs/evaluating.md").read_text().splitlines():
        if line.count("|") == 10:
            name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
            documented[name] = cells
    glip, robustness = table.SUITES["glip"], table.SUITES["robustness"]

    for name, row in table.SETS.items():
        cells = [str(row.classes), row.metric, " or ".join(row.folders)]
        for suite in ("slip", "maskclip", "flip"):
            cells.append("x" if name in table.suite_members(suite) else "")
        groups = [group for group in ("object", "other") if name in glip[group]]
        cells.append(groups[0] if groups else "")
        if name in robustness["average"]:
            cells.append("in the average")
        else:
            cells.append("x" if name in robustness[""] else "")
        assert documented[name] == cells


@pytest.mark.parametrize("folder", ["dtd", "wds_dtd", "vtab-dtd", "wds_vtab-dtd", "vtab/dtd"])
def test_a_set_by_any_of_its_names(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)

    assert table.find_set_folder(tmp_path, table.SETS["dtd"]) == tmp_path / folder
    assert table.find_set_folder(tmp_path, table.SETS["mnist"]) is None


def make_samples(classes, count=30):
    """Make images with the classes 0, 1, ... in turn."""
    rng = np.random.default_rng(classes)
    samples = []
    for i in range(count):
        label = i % classes
        samples.append({"png": picture(NAMES[label], rng), "cls": b"%d" % label})
    return samples


def number_names(classes):
    """Return class names that are numbers, one per line."""
    return "\n".join(str(i) for i in range(classes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Complete, incomplete and broken sets of a suite, and one that is in no suite."""
    folder = tmp_path_factory.mktemp("sets")
    two = "\n".join(NAMES[:2])

    # Three complete sets, and one that lacks images of most classes but can be evaluated.
    write_evaluation_set(folder / "wds_mnist", make_samples(10), TEN)
    write_evaluation_set(folder / "wds_vtab-eurosat", make_samples(10), TEN)
    write_evaluation_set(folder / "hateful_memes", make_samples(2), two)
    write_evaluation_set(folder / "wds_vtab-caltech101", make_samples(10)[1:3], number_names(102))

    # Five broken sets: truncated, classes numbered from 1, too few classes, no templates, and an
    # unreadable image.
    truncated = (
        write_evaluation_set(folder / "wds_vtab-cifar10", make_samples(10), TEN) / "test" / "0.tar"
    )
    truncated.write_bytes(truncated.read_bytes()[:20000])
    write_evaluation_set(folder / "wds_stl10", [*make_samples(10), {"cls": b"10"}], TEN)
    write_evaluation_set(folder / "wds_fer2013", make_samples(6), "\n".join(NAMES[:6]))
    sst2 = write_evaluation_set(folder / "wds_renderedsst2", make_samples(2), two)
    (sst2 / "zeroshot_classification_templates.txt").unlink()
    no_image = {"png": b"no image", "cls": b"0"}
    write_evaluation_set(folder / "wds_gtsrb", [no_image], number_names(43))

    write_evaluation_set(folder / "shapes", make_samples(10), TEN)
    return folder


FAULTS = (
    "cifar10: .*wds_vtab-cifar10/test/0.tar: truncated or not a tar",
    "fer2013: .*6 classes; fer2013 has 7",
    "stl10: .*wds_stl10: 0.tar 030 is of class 10; classnames.txt names 10, from 0",
    "gtsrb: .*0.tar 000: cannot read the image",
    "sst2: .*no templates",
)


def test_complete_missing_and_broken_sets(data):
    suite = find_suite("aclip", str(data), Options())

    assert list(suite.sets) == ["caltech101", "mnist", "eurosat", "hateful_memes"]
    assert suite.sets["hateful_memes"][1].metric == "roc_auc"
    assert len(suite.missing) == 17
    assert {"imagenet", "food101"} < set(suite.missing)
    assert len(suite.faults) == 5
    for fault in FAULTS:
        assert len([line for line in suite.faults if re.match(fault, line)]) == 1, fault

    lines = str(suite).splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("suite:aclip: 4 of 26 sets in ")
    assert lines[1].startswith("  missing: food101, ")
    doubt = "  in doubt: caltech101: .*100 of its 102 classes have no image, e.g. 0; check that"
    assert re.match(doubt, lines[-1])

    with_templates = find_suite("aclip", str(data), Options(templates="7"))
    assert "sst2" in with_templates.sets, "with other templates it can be evaluated"


def test_bad_suites_are_refused(data, tmp_path):
    for spec, folder, message in (
        ("suite:aclop", data, "did you mean 'aclip'"),
        ("suite:flip", "", "--data DIR, or eval_data"),
        ("suite:flip", tmp_path, "no set to evaluate.*called e.g. food101 or wds_food101"),
        ("suite:aclip(templates=7)", data, "unknown"),
        ("suite(templates=8):aclip", data, "^templates: unknown '8'"),
        ("suite(metric=map):aclip", data, "metric"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_evaluations([spec], data=str(folder))

    with pytest.raises(ValueError, match="repair or remove them\n  cifar10: "):
        parse_evaluations(["suite:aclip"], data=str(data), training=True)


def test_averages():
    """Averages are over the available sets; their names contain the number of sets."""
    suite = Suite("glip", None, "zero_shot", dict.fromkeys(["mnist", "aircraft", "pcam"]))
    results = {
        "zero_shot/mnist/top1": 0.5,
        "zero_shot/aircraft/top1": 0.9,
        "zero_shot/aircraft/mean_per_class": 0.1,
        "zero_shot/pcam/top1": 0.6,
    }
    expected = {"object_of_2": 0.3, "other_of_1": 0.6, "average_of_3": pytest.approx(0.4)}
    assert average_metrics(suite, results) == expected

    # All sets of one average.
    sets = table.SUITES["glip"]["other"]
    suite = Suite("glip", None, "zero_shot", dict.fromkeys(sets))
    results = {}
    for i, name in enumerate(sets):
        metric = MAIN_METRIC[table.SETS[name].metric]
        results[f"zero_shot/{name}/{metric}"] = i / 10
    expected = {"other": pytest.approx(0.5), "average_of_11": pytest.approx(0.5)}
    assert average_metrics(suite, results) == expected

    # A set that belongs to no average.
    videos = Suite("robustness", None, "zero_shot", {"ytbb": None})
    assert average_metrics(videos, {"zero_shot/ytbb/pm_10": 0.5}) == {}


def test_two_suites_share_their_sets(data, monkeypatch):
    """Each set is evaluated once, and both suites report their averages."""
    specs = ["suite:aclip", "suite:maskclip", f"zero_shot:{data}/shapes"]

    evals = parse_evaluations(specs, data=str(data), templates="7")

    assert [e.label for e in evals] == [
        "zero_shot/caltech101",
        "zero_shot/mnist",
        "zero_shot/eurosat",
        "zero_shot/hateful_memes",
        "zero_shot/sst2",
        "suite/aclip",
        "suite/maskclip",
        "zero_shot/shapes",
    ]
    assert all(e.options.templates == "7" for e in evals if e.kind == "zero_shot")

    class Model:
        """A model that embeds all images like class 0, whose prompts are the first seven texts."""

        towers = torch.nn.Identity()

        @staticmethod
        def embed_texts(texts):
            return torch.eye(2)[[0] * 7 + [1] * (len(texts) - 7)]

        @staticmethod
        def embed_images(images):
            return torch.arange(len(images)), torch.eye(2)[[0] * len(images)]

    with ranks(monkeypatch, 1, 4) as run:
        (results,) = run(lambda: evaluate(Model, evals))

    assert results["zero_shot/mnist/top1"] == 0.1
    assert results["zero_shot/hateful_memes/roc_auc"] == 0.5
    assert results["suite/aclip/average_of_5"] == pytest.approx((0.1 + 0.1 + 0.5 + 0.5) / 5)
    assert results["suite/maskclip/average_of_4"] == pytest.approx((0.1 + 0.1 + 0.5) / 4)


@pytest.mark.slow
def test_a_suite_from_the_command_line(data, tmp_path):
    """Two ranks train and evaluate the complete sets; run/evaluate.py reports the broken ones."""
    tiny = make_shards(tmp_path / "data")
    run = tmp_path / "run"
    complete = tmp_path / "good"
    complete.mkdir()
    for name in ("wds_vtab-caltech101", "wds_mnist", "wds_vtab-eurosat", "hateful_memes"):
        (complete / name).symlink_to(data / name)

    # 1. Evaluate the suite after training.
    options = tiny_run_arguments(
        tiny, run, "evals=[suite:aclip]", f"eval_data={complete}", "samples=32"
    )
    result = launch(2, "run/pretrain.py", *options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    # 2. Evaluate it with run/evaluate.py, with the broken sets: the exit status is an error.
    result = launch(2, "run/evaluate.py", "--run", str(run), "--data", str(data))
    assert result.returncode != 0
    for fault in FAULTS:
        assert len(re.findall(fault, result.stdout)) == 1, fault
        assert len(re.findall(fault, result.stderr)) == 1, fault
    assert "missing: food101" in result.stdout
    assert "5 of the sets could not be evaluated; all others were" in result.stderr
    trained, after = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert after == {**trained, "mask": "none", "ensemble": 1}
    assert "suite/aclip/average_of_4" in after

    # 3. A set whose evaluation fails: the results before it are stored.
    broken = [*make_samples(10, 2), {"png": b"no picture", "cls": b"0"}]
    write_evaluation_set(tmp_path / "broken", broken, TEN)
    evals = [f"zero_shot:{data}/wds_mnist", f"zero_shot:{tmp_path}/broken"]
    result = launch(1, "run/evaluate.py", "--run", str(run), "--evals", *evals)
    assert result.returncode == 2
    assert "cannot read the image" in result.stderr
    results = json.loads((run / "results.jsonl").read_text().splitlines()[2])
    assert "zero_shot/wds_mnist/top1" in results, "earlier results are stored"
    assert not any("broken" in name for name in results)
