"""The page of runs: its tables, plots and files say what the runs' records say, what is absent is
told; and a real browser shows it.

Run: pytest tests/run/reports/test_report.py
    (-m slow: trains a tiny run, and looks at the page on a
                                          phone and in print)
"""

import csv
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from glimpse.model import portable
from glimpse.run.report import compare
from glimpse.run.reports import html_report, plots
from glimpse.run.study.results import by_seed, read
from glimpse.run.train import load_model
from glimpse.tests.helpers.browser import opened
from glimpse.tests.helpers.tiny import ROOT, environment, recorded, settings, shards

TOP1, R1 = "zero_shot/shapes/top1", "retrieval/shapes/image_to_text_r1"
EVALUATIONS = ("evals=[zero_shot:x/shapes]",)


def study(folder):
    """Three groups of two seeds: one whole, one whole and trained twice as long, one cut off; and a
    run that was never begun.
    """
    for seed in (0, 1):
        set_seed = (f"seed={seed}", *EVALUATIONS)
        recorded(
            folder / f"base-{seed}",
            (None, 50, 50, 50),
            {
                200: {TOP1: 0.1 + 0.1 * seed, "zero_shot/shapes/chance": 0.04},
                400: {TOP1: 0.3 + 0.1 * seed, R1: 0.5},
            },
            *set_seed,
        )
        recorded(
            folder / f"long-{seed}",
            (None, *[100] * 7),
            {400: {TOP1: 0.2}, 800: {TOP1: 0.5 + 0.2 * seed}},
            *set_seed,
        )
        recorded(
            folder / f"cut-{seed}",
            (None, 25),
            {200: {TOP1: 0.9}},
            "samples=400",
            "optim.lr=1",
            *set_seed,
        )
    runs = [read(folder / f"{name}-{seed}") for name in ("base", "long", "cut") for seed in (0, 1)]
    return by_seed([*runs, read(folder / "wide", "exit code 1: out of memory")])


class Reader(HTMLParser):
    """The rows of tables and all ids of a page, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.ids, self.fetched, self.cell, self.unclosed = [], [], [], False, []
        self.feed(text)

    def handle_starttag(self, tag, given):
        given = dict(given)
        self.ids += [given["id"]] if "id" in given else []
        self.fetched += [
            value
            for key, value in given.items()
            if key in ("src", "href", "xlink:href")
            and value[:5] != "data:" != value
            and not value.startswith("#")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, text):
        if self.cell:
            self.rows[-1][-1] += text


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    groups = study(folder)
    pictures = {
        "image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        "attention": torch.full((2, 3, 16, 16), 200, dtype=torch.uint8),
    }
    galleries = {"base": (pictures, ["a <b> & c", "d"]), "cut": "no whole checkpoint"}
    return groups, html_report.write(folder / "out/report.html", groups, galleries)


def test_tables(made):
    page = Reader(made[1][0].read_text())
    results, cost = ({row[0]: row[1:] for row in page.rows[a : a + 5]} for a in (0, 5))
    assert results[""] == ["shapes: zero-shot top-1 (%)", "shapes: image-to-text R@1 (%)"]
    assert results["base"] == ["35.0 [30.0, 40.0] n = 2", "50.0 [50.0, 50.0] n = 2"]
    assert results["long"] == [
        "60.0 [50.0, 70.0] n = 2+25.0 [+10.0, +40.0]",
        "absent: not evaluated",
    ]
    assert results["cut"] == [
        "absent: cut-0: trained on 200 of 400 samples; cut-1: trained on 200 of 400 samples"
    ]
    assert results["wide"] == ["absent: failed: exit code 1: out of memory"]
    assert (
        cost["base"][:4] == ["2", "400", "0:08 [0:08, 0:08]", "50 [50, 50]"]
        and cost["long"][2] == "0:08 [0:08, 0:08]"
    )
    assert cost["cut"][:4] == [
        "2",
        "200",
        "not known",
        "25 [25, 25]",
    ], "the time of half a run is not the time of a run"
    assert cost["wide"] == ["absent: failed: exit code 1: out of memory"]
    assert not re.search(
        r"\b0\.0\b|nan|None", "".join(map("".join, (*results.values(), *cost.values())))
    ), "nothing absent as a number"


def test_page_needs_nothing_else(made):
    text = made[1][0].read_text()
    page = Reader(text)
    assert page.fetched == [] and not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert len(page.ids) == len(set(page.ids)), "ids of several plots do not meet"
    assert (
        "a &lt;b&gt; &amp; c" in text
        and text.count("data:image/png;base64,") == 4
        and "absent: no whole checkpoint" in text
    )
    assert (
        text.count("--config quickstart.yaml") == 6
        and "Unlike the first: samples: 800." in text
        and "whole config" in text
    )


def across(text, of):
    """Where the points of the line of that id lie from left to right in the page; None where there
    is no such line.
    """
    found = re.search(rf'<g id="{re.escape(of)}">\s*<path d="([^"]*)"', text)
    return found and [float(x) for x in re.findall(r"[ML] ([\d.]+)", found[1])]


def vertices(text, of):
    return (found := across(text, of)) and len(found)


def test_plots(made):
    """Each curve has a vertex for each evaluation; the longer schedule is drawn again, rescaled;
    nothing is drawn of what is not there.
    """
    text, curve, time = (
        made[1][0].read_text(),
        "zero_shot_shapes_top1_by_samples",
        "zero_shot_shapes_top1_by_time",
    )
    assert [
        vertices(text, f"{curve}-line-{label}") for label in ("base", "long", "cut", "wide")
    ] == [2, 2, 1, None]
    assert (
        f'id="{curve}-scaled-long"' in text
        and text.count("-scaled-") == 1
        and f'id="{curve}-chance"' in text
    )
    assert across(text, f"{curve}-scaled-long") == across(text, f"{curve}-line-base"), (
        "400 and 800 at the half"
    )
    assert (
        "long, x scaled by 0.5" in text and "samples seen" in text and "zero-shot top-1 (%)" in text
    )
    assert [f'id="{time}-line-{label}"' in text for label in ("base", "long", "cut", "wide")] == [
        True,
        True,
        False,
        False,
    ]
    assert "training time (minutes)" in text
    assert [f'id="speed-line-{label}"' in text for label in ("base", "cut", "wide")] == [
        True,
        True,
        False,
    ] and ">absent</text>" in text
    assert [vertices(text, f"loss-line-{label}") for label in ("base", "long", "cut")] == [4, 8, 2]


def test_chance_is_that_of_top1(tmp_path):
    top5 = TOP1.replace("top1", "top5")
    run = recorded(
        tmp_path / "run",
        (50, 50),
        {200: {TOP1: 0.1, top5: 0.3, "zero_shot/shapes/chance": 0.04}},
        *EVALUATIONS,
    )
    figures = html_report.drawn({"run": [read(run)]}, [TOP1, top5])
    levels = [
        [line.get_gid() for line in figures[f"{name} by samples"].axes[0].lines].count("chance")
        for name in (TOP1, top5)
    ]
    assert levels == [1, 0]


def test_files_beside_it(made):
    groups, (page, *others) = made
    names = {path.name for path in others}
    assert (
        names
        >= {
            "report-curves.csv",
            "report-runs.csv",
            "report-loss.png",
            "report-zero_shot_shapes_top1_by_samples.png",
            "report-masks_base.png",
        }
        and "report-masks_cut.png" not in names
    )
    for path in others:
        assert path.parent == page.parent
        if path.suffix == ".png":
            assert Image.open(path).width > 800 or "masks" in path.name
    assert Image.open(page.with_name("report-masks_base.png")).getextrema()[0] == (
        0,
        255,
    ), "black, grey and white lines between"
    points = [
        (row["group"], row["seed"], row["samples"], row["value"])
        for row in rows_of(page.with_name("report-curves.csv"))
        if row["metric"] == TOP1
    ]
    assert points[:3] == [
        ("base", "0", "200", "0.1"),
        ("base", "0", "400", "0.3"),
        ("base", "1", "200", "0.2"),
    ]
    assert {group for group, *_ in points} == {"base", "long", "cut"}
    runs = {
        row["run"].rpartition("/")[2]: row for row in rows_of(page.with_name("report-runs.csv"))
    }
    assert (runs["base-0"]["state"], runs["base-0"]["seconds"], runs["base-0"]["commit"]) == (
        "complete",
        "8.0",
        "0123456789ab",
    )
    assert (
        runs["cut-1"]["state"] == "partial"
        and runs["wide"]["state"] == "failed"
        and runs["wide"]["group"] == "wide"
    )
    assert runs["wide"]["seconds"] == runs["wide"]["memory_gib"] == runs["wide"]["seed"] == "", (
        "not known is empty"
    )


def test_the_same_plot_again(made):
    groups, (page, *_) = made
    assert (
        plots.svg(html_report.drawn(groups, html_report.metrics(groups))["loss"], "loss")
        in page.read_text()
    )


def test_a_grids_own_metric_stands_first(tmp_path):
    """Also one that the page has no room for otherwise."""
    run = read(
        recorded(
            tmp_path / "run",
            (None, 50),
            {200: {TOP1: 0.1, "zero_shot/shapes/top5": 0.3}},
            *EVALUATIONS,
        )
    )
    assert html_report.metrics({"a": [run]}) == [TOP1] and html_report.metrics(
        {"a": [run]}, "zero_shot/shapes/top5"
    ) == ["zero_shot/shapes/top5", TOP1]
    text = html_report.write(tmp_path / "page.html", {"a": [run]}, metric="zero_shot/shapes/top5")[
        0
    ].read_text()
    assert text.index("zero-shot top-5 (%)") < text.index("zero-shot top-1 (%)")


def test_what_scaling_leaves_beside_runs_is_no_run(tmp_path, monkeypatch, capsys):
    run = recorded(tmp_path / "run", (None, 50), {200: {TOP1: 0.1}}, *EVALUATIONS)
    (tmp_path / "run.lock").touch()
    line = [
        "run/report.py",
        run,
        tmp_path / "run.lock",
        "--count",
        "0",
        "--out",
        tmp_path / "a.html",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    compare()
    assert (
        "run.lock" not in capsys.readouterr().out
        and "absent: not run" not in (tmp_path / "a.html").read_text()
    )
    monkeypatch.setattr(sys, "argv", ["run/report.py", str(tmp_path / "run.lock")])
    with pytest.raises(ValueError, match="run.lock: no run folder"):
        compare()


def test_runs_without_results(tmp_path):
    """Nothing evaluated, nothing measured: the page says so."""
    runs = [
        read(recorded(tmp_path / name, (None,), {}, "evals=[]", f"optim.lr={lr}"))
        for name, lr in (("$a$", 1), ("b", 2))
    ]
    page, *_ = html_report.write(
        tmp_path / "report.html", by_seed([*runs, read(tmp_path / "nowhere")])
    )
    text = page.read_text()
    assert (
        "absent: no run was evaluated" in text
        and "absent: not run: there is no" in text
        and "$a$" in text
    )
    assert 'id="speed' not in text and 'id="loss-line-b"' in text


@pytest.mark.parametrize(
    "name, said",
    [
        (TOP1, ("zero-shot top-1 (%)", "shapes")),
        (f"teacher/{TOP1} (ensemble 2)", ("zero-shot top-1 (%)", "shapes, teacher, ensemble 2")),
        ("segmentation(side=96)/my_set/mean_iou", ("segmentation mean IoU (%)", "my set, side=96")),
        (R1, ("image-to-text R@1 (%)", "shapes")),
    ],
)
def test_names_of_metrics(name, said):
    assert html_report.spoken(name) == said


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """run/report.py of a run that was trained and of the study, on a phone, on a desk and in
    print.
    """
    data = shards(tmp_path / "data")
    trained = settings(
        data,
        tmp_path / "trained",
        "samples=64",
        "eval_every=32",
        f"evals=[zero_shot:{data}/eval/shapes]",
    )
    study(tmp_path / "study")
    for command in (
        ["run/pretrain.py", *trained],
        ["run/report.py", "masks", "--run", str(tmp_path / "trained"), "--count", "2"],
        [
            "run/report.py",
            *(
                str(tmp_path / "study" / name)
                for name in ("base-0", "base-1", "long-0", "long-1", "cut-0", "no")
            ),
            str(tmp_path / "trained"),
            "--out",
            str(tmp_path / "report.html"),
            "--count",
            "2",
        ],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "trained/report/masks.html").read_text().count("data:image/png") == 2 * 8
    assert ", after 64 samples. " in (tmp_path / "trained/report/masks.html").read_text()
    assert Image.open(tmp_path / "trained/report/masks.png").width == 8 * 34
    pair = load_model.portable(load_model.find(tmp_path / "trained"))
    # which saw nobody knows what
    portable.save(
        replace(pair, about=replace(pair.about, source={"path": "elsewhere"})), tmp_path / "pair"
    )
    masks = [
        sys.executable,
        "run/report.py",
        "masks",
        "--run",
        str(tmp_path / "pair"),
        "--images",
        str(data / "train"),
        "--count",
        "2",
    ]
    came_in = subprocess.run(
        masks, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert (
        came_in.returncode == 0
        and " samples. " not in (tmp_path / "pair/report/masks.html").read_text()
    ), came_in.stderr
    assert "no absent (not run: there is no" in done.stdout and "trained complete" in done.stdout
    with opened() as browser:
        for width in (390, 1200):
            page, said, asked = browser.new_page(viewport=dict(width=width, height=844)), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(f"file://{tmp_path}/report.html")
            assert said == [] and {url.partition(":")[0] for url in asked} <= {"file", "data"}
            assert [url for url in asked if url.startswith("file")] == [
                f"file://{tmp_path}/report.html"
            ]
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                "a page that has to be pushed sideways"
            )
            look(page, width)
        page.emulate_media(media="print")
        page.set_viewport_size(dict(width=720, height=1000))
        assert page.locator("details.run pre").first.is_visible(), (
            "commands are printed, though they are folded on a screen"
        )
        assert not page.locator("details.run details pre").first.is_visible(), (
            "whole configs are not"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 720
        assert page.pdf(format="A4").startswith(b"%PDF")


def look(page, width):
    """The plots are there, with lines to be seen and words to be read; so are the pictures."""
    plots = page.locator("figure svg")
    assert plots.count() == page.locator("figure").count() >= 7
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert (
            300 < box["width"] <= width
            and box["height"] > 100
            and 0 <= box["x"]
            and box["x"] + box["width"] <= width
        )
    curve = "zero_shot_shapes_top1_by_samples-line"
    for of, steps in (
        (f"{curve}-study/base", 1),
        (f"{curve}-trained", 1),
        ("loss-line-study/long", 7),
    ):
        line = page.locator(f'[id="{of}"] path').first
        assert (
            len(re.findall("L", line.get_attribute("d"))) == steps
            and line.evaluate("path => path.getTotalLength()") > 5
        )
        colour, box, around = line.evaluate(
            """path => [getComputedStyle(path).stroke, ...[path, path.ownerSVGElement].map(each => {
            const {x, y, width, height} = each.getBoundingClientRect();
            return [x, y, x + width, y + height] })]"""
        )
        assert (
            colour not in ("none", "rgb(255, 255, 255)")
            and around[0] <= box[0] < box[2] <= around[2]
            and around[1] <= box[1] <= box[3]
        )
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('figure svg text')].map(text =>
        parseFloat(getComputedStyle(text).fontSize) *
        Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"""
    )
    assert smallest >= 8, f"words of {smallest} pixels"
    loaded = page.evaluate(
        "[...document.images].map(image => image.complete && image.naturalWidth)"
    )
    assert len(loaded) == 2 * 8 and all(loaded)
