"""Test the page of runs: tables, plots and files against the records, and in a real browser.

Run: pytest tests/run/reports/test_report.py
    (-m slow: trains a tiny run, and opens the page at the width of a phone and in print)
"""

import csv
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page

from glimpse.model import portable
from glimpse.run import scaling
from glimpse.run.report import compare_runs
from glimpse.run.reports import html_report, plots
from glimpse.run.study.results import RunResult, group_by_seed, read_result
from glimpse.run.train import load_model
from glimpse.tests.helpers.browser import open_browser
from glimpse.tests.helpers.tiny import (
    ROOT,
    environment,
    tiny_run_arguments,
    write_dataset,
    write_recorded_run,
)

TOP1 = "zero_shot/shapes/top1"
R1 = "retrieval/shapes/image_to_text_r1"
EVALUATIONS = ("evals=[zero_shot:x/shapes]",)


def study(folder: Path) -> dict[str, list[RunResult]]:
    """Return three groups of two seeds, and a run that was never started.

    `base` is complete, `long` is complete and trained twice as long, and `cut` is incomplete.
    """
    for seed in (0, 1):
        options = (f"seed={seed}", *EVALUATIONS)
        base = {
            200: {TOP1: 0.1 + 0.1 * seed, "zero_shot/shapes/chance": 0.04},
            400: {TOP1: 0.3 + 0.1 * seed, R1: 0.5},
        }
        write_recorded_run(folder / f"base-{seed}", (None, 50, 50, 50), base, *options)
        long = {400: {TOP1: 0.2}, 800: {TOP1: 0.5 + 0.2 * seed}}
        write_recorded_run(folder / f"long-{seed}", (None, *[100] * 7), long, *options)
        cut = {200: {TOP1: 0.9}}
        options = ("samples=400", "optim.lr=1", *options)
        write_recorded_run(folder / f"cut-{seed}", (None, 25), cut, *options)
    runs = [
        read_result(folder / f"{name}-{seed}")
        for name in ("base", "long", "cut")
        for seed in (0, 1)
    ]
    return group_by_seed([*runs, read_result(folder / "wide", "exit code 1: out of memory")])


class PageParser(HTMLParser):
    """Collect the rows of tables, all ids of a page, and the URLs that a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            is_url = key in ("src", "href", "xlink:href")
            if is_url and not value.startswith(("data:", "#")):
                self.urls.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return the groups of the study and the paths of its report."""
    folder = tmp_path_factory.mktemp("study")
    groups = study(folder)
    black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    gray = torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)
    pictures = {"image": black, "attention": gray}
    galleries = {"base": (pictures, ["a <b> & c", "d"]), "cut": "no complete checkpoint"}
    return groups, html_report.write_report(folder / "out/report.html", groups, galleries)


def test_tables(report):
    _groups, (path, *_others) = report
    page = PageParser(path.read_text())
    results = {row[0]: row[1:] for row in page.rows[:5]}
    cost = {row[0]: row[1:] for row in page.rows[5:10]}

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

    assert cost["base"][:4] == ["2", "400", "0:08 [0:08, 0:08]", "50 [50, 50]"]
    assert cost["long"][2] == "0:08 [0:08, 0:08]"
    assert cost["cut"][:4] == ["2", "200", "unknown", "25 [25, 25]"], (
        "the time of an incomplete run is not the training time"
    )
    assert cost["wide"] == ["absent: failed: exit code 1: out of memory"]

    text = "".join(map("".join, (*results.values(), *cost.values())))
    assert not re.search(r"\b0\.0\b|nan|None", text), "absent values are not shown as numbers"


def test_page_needs_nothing_else(report):
    _groups, (path, *_others) = report
    text = path.read_text()

    page = PageParser(text)

    assert page.urls == []
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert len(page.ids) == len(set(page.ids)), "plots share no ids"
    assert "a &lt;b&gt; &amp; c" in text
    assert text.count("data:image/png;base64,") == 4
    assert "absent: no complete checkpoint" in text
    assert text.count("--config quickstart.yaml") == 6
    assert "Differences from the first run: samples: 800." in text
    assert "full config" in text


def line_xs(text: str, line_id: str) -> list[float] | None:
    """Return the x values of the points of a line; None if there is no line with this id."""
    match = re.search(rf'<g id="{re.escape(line_id)}">\s*<path d="([^"]*)"', text)
    if match is None:
        return None
    return [float(x) for x in re.findall(r"[ML] ([\d.]+)", match[1])]


def count_points(text: str, line_id: str) -> int | None:
    xs = line_xs(text, line_id)
    return None if xs is None else len(xs)


def test_plots(report):
    """Each curve has a point per evaluation, and the longer schedule a second, rescaled curve.

    Absent results are not plotted.
    """
    _groups, (path, *_others) = report
    curve = "zero_shot_shapes_top1_by_samples"
    time = "zero_shot_shapes_top1_by_time"
    text = path.read_text()

    # By samples.
    for label, count in (("base", 2), ("long", 2), ("cut", 1), ("wide", None)):
        assert count_points(text, f"{curve}-line-{label}") == count, label
    assert f'id="{curve}-scaled-long"' in text
    assert text.count("-scaled-") == 1
    assert f'id="{curve}-chance"' in text
    assert line_xs(text, f"{curve}-scaled-long") == line_xs(text, f"{curve}-line-base"), (
        "half of 400 and 800 samples"
    )
    assert "long, x scaled by 0.5" in text
    assert "samples seen" in text
    assert "zero-shot top-1 (%)" in text

    # By time: complete runs only.
    for label in ("base", "long"):
        assert f'id="{time}-line-{label}"' in text, label
    for label in ("cut", "wide"):
        assert f'id="{time}-line-{label}"' not in text, label
    assert "training time (minutes)" in text

    # Cost and loss.
    for label in ("base", "cut"):
        assert f'id="speed-line-{label}"' in text, label
    assert 'id="speed-line-wide"' not in text
    assert ">absent</text>" in text
    for label, count in (("base", 4), ("long", 8), ("cut", 2)):
        assert count_points(text, f"loss-line-{label}") == count, label


def test_chance_is_that_of_top1(tmp_path):
    top5 = TOP1.replace("top1", "top5")
    results = {TOP1: 0.1, top5: 0.3, "zero_shot/shapes/chance": 0.04}
    run = write_recorded_run(tmp_path / "run", (50, 50), {200: results}, *EVALUATIONS)

    figures = html_report.build_plots({"run": [read_result(run)]}, [TOP1, top5])

    for name, count in ((TOP1, 1), (top5, 0)):
        lines = figures[f"{name} by samples"].axes[0].lines
        ids = [line.get_gid() for line in lines]
        assert ids.count("chance") == count, name


def test_files_beside_it(report):
    _groups, (page, *others) = report

    names = {path.name for path in others}
    assert names >= {
        "report-curves.csv",
        "report-runs.csv",
        "report-loss.png",
        "report-zero_shot_shapes_top1_by_samples.png",
        "report-masks_base.png",
    }
    assert "report-masks_cut.png" not in names
    for path in others:
        assert path.parent == page.parent
        if path.suffix == ".png":
            assert Image.open(path).width > 800 or "masks" in path.name
    masks = Image.open(page.with_name("report-masks_base.png"))
    assert masks.getextrema()[0] == (0, 255), "black, gray and white lines between"


def test_tables_beside_it(report):
    _groups, (page, *_others) = report

    points = []
    for row in read_csv(page.with_name("report-curves.csv")):
        if row["metric"] == TOP1:
            points.append((row["group"], row["seed"], row["samples"], row["value"]))
    assert points[:3] == [
        ("base", "0", "200", "0.1"),
        ("base", "0", "400", "0.3"),
        ("base", "1", "200", "0.2"),
    ]
    assert {group for group, *_ in points} == {"base", "long", "cut"}

    rows = read_csv(page.with_name("report-runs.csv"))
    runs = {row["run"].rpartition("/")[2]: row for row in rows}
    base = runs["base-0"]
    assert base["state"] == "complete"
    assert base["seconds"] == "8.0"
    assert base["commit"] == "0123456789ab"
    assert runs["cut-1"]["state"] == "partial"
    wide = runs["wide"]
    assert wide["state"] == "failed"
    assert wide["group"] == "wide"
    for key in ("seconds", "memory_gib", "seed"):
        assert wide[key] == "", "unknown values are empty"


def test_the_same_plot_again(report):
    groups, (page, *_others) = report

    figures = html_report.build_plots(groups, html_report.select_metrics(groups))

    assert plots.render_svg(figures["loss"], "loss") in page.read_text()


def test_a_grids_metric_is_shown_first(tmp_path):
    """This includes a metric that the page does not show otherwise."""
    top5 = "zero_shot/shapes/top5"
    run = write_recorded_run(
        tmp_path / "run", (None, 50), {200: {TOP1: 0.1, top5: 0.3}}, *EVALUATIONS
    )
    groups = {"a": [read_result(run)]}

    assert html_report.select_metrics(groups) == [TOP1]
    assert html_report.select_metrics(groups, top5) == [top5, TOP1]

    page, *_others = html_report.write_report(tmp_path / "page.html", groups, metric=top5)

    text = page.read_text()
    assert text.index("zero-shot top-5 (%)") < text.index("zero-shot top-1 (%)")


def test_files_of_scaling_next_to_runs_are_skipped(tmp_path, monkeypatch, capsys):
    run = write_recorded_run(tmp_path / "run", (None, 50), {200: {TOP1: 0.1}}, *EVALUATIONS)
    lock = tmp_path / "run.lock"
    lock.touch()
    page = tmp_path / "a.html"
    line = ["run/report.py", run, lock, "--count", "0", "--out", page]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))

    compare_runs()

    assert "run.lock" not in capsys.readouterr().out
    assert "absent: not run" not in page.read_text()

    monkeypatch.setattr(sys, "argv", ["run/report.py", str(lock)])
    with pytest.raises(ValueError, match="run.lock is a file; give run folders"):
        compare_runs()


WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None  # makes an import fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "line, code, error",
    [
        ("run/scaling.py list", 0, ""),
        (
            "run/report.py runs/nowhere",
            2,
            "error: plots need Matplotlib; run: pip install 'glimpse-clip[plots]'\n",
        ),
    ],
)
def test_without_matplotlib_only_plotting_fails(line, code, error):
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, *line.split()],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert process.stderr == error
    assert process.returncode == code


def test_a_grid_is_not_plotted_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plots, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", "run/scaling.py plot --grid flip_table8".split())

    with pytest.raises(ValueError, match=re.escape("pip install 'glimpse-clip[plots]'")):
        scaling.main()


def test_runs_without_results(tmp_path):
    """The page says that no run was evaluated, and has no plots of unknown costs."""
    a = write_recorded_run(tmp_path / "$a$", (None,), {}, "evals=[]", "optim.lr=1")
    b = write_recorded_run(tmp_path / "b", (None,), {}, "evals=[]", "optim.lr=2")
    groups = group_by_seed([read_result(path) for path in (a, b, tmp_path / "nowhere")])

    page, *_others = html_report.write_report(tmp_path / "report.html", groups)

    text = page.read_text()
    assert "absent: no run was evaluated" in text
    assert f"absent: not run: {tmp_path}/nowhere does not exist" in text
    assert "$a$" in text
    assert 'id="speed' not in text
    assert 'id="loss-line-b"' in text


@pytest.mark.parametrize(
    "name, label",
    [
        (TOP1, ("zero-shot top-1 (%)", "shapes")),
        (f"teacher/{TOP1} (ensemble 2)", ("zero-shot top-1 (%)", "shapes, teacher, ensemble 2")),
        ("segmentation(side=96)/my_set/mean_iou", ("segmentation mean IoU (%)", "my set, side=96")),
        (R1, ("image-to-text R@1 (%)", "shapes")),
    ],
)
def test_names_of_metrics(name, label):
    assert html_report.metric_label(name) == label


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Open the pages of a trained run and of the study, at two widths and in print."""
    data = write_dataset(tmp_path / "data")
    trained = tmp_path / "trained"
    study(tmp_path / "study")
    evals = f"evals=[zero_shot:{data}/eval/shapes]"
    succeed(
        "run/pretrain.py", *tiny_run_arguments(data, trained, "samples=64", "eval_every=32", evals)
    )

    # Masks of the run.
    succeed("run/report.py", "masks", "--run", trained, "--count", 2)

    masks = (trained / "report/masks.html").read_text()
    assert masks.count("data:image/png") == 2 * 8
    assert ", after 64 samples. " in masks
    assert Image.open(trained / "report/masks.png").width == 8 * 34

    # Masks of a converted model, whose number of samples is unknown.
    pair = load_model.open_portable(load_model.find_model(trained))
    about = replace(pair.about, source={"path": "elsewhere"})
    portable.save_model(replace(pair, about=about), tmp_path / "pair")
    images = data / "train"
    line = ["--run", tmp_path / "pair", "--images", images, "--count", 2]
    succeed("run/report.py", "masks", *line)

    assert " samples. " not in (tmp_path / "pair/report/masks.html").read_text()

    # The page.
    names = ("base-0", "base-1", "long-0", "long-1", "cut-0", "no")
    runs = [*(tmp_path / "study" / name for name in names), trained]
    report = tmp_path / "report.html"
    output = succeed("run/report.py", *runs, "--out", report, "--count", 2)

    assert f"no absent (not run: {tmp_path}/study/no does not exist)" in output
    assert "trained complete" in output
    with open_browser() as browser:
        for width in (390, 1200):
            page = check_page(browser, report, width)
        page.emulate_media(media="print")
        page.set_viewport_size(dict(width=720, height=1000))
        assert page.locator("details.run pre").first.is_visible(), (
            "commands are visible in print, although they are folded on a screen"
        )
        assert not page.locator("details.run details pre").first.is_visible(), (
            "full configs are not"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 720
        assert page.pdf(format="A4").startswith(b"%PDF")


def succeed(*command: object) -> str:
    """Run a script that must succeed; return its output."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def check_page(browser: Browser, report: Path, width: int) -> Page:
    """Open and return the page; it has no errors, no requests, and fits the window."""
    page = browser.new_page(viewport=dict(width=width, height=844))
    messages = []
    urls = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))

    page.goto(f"file://{report}")

    assert messages == []
    assert {url.partition(":")[0] for url in urls} <= {"file", "data"}
    assert [url for url in urls if url.startswith("file")] == [f"file://{report}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
        "the page scrolls horizontally"
    )
    check_plots(page, width)
    check_pictures(page)
    return page


def check_plots(page: Page, width: int) -> None:
    """Check that plots are in the window, with visible lines and readable text."""
    plots = page.locator("figure svg")
    assert plots.count() >= 7
    assert plots.count() == page.locator("figure").count()
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert 300 < box["width"] <= width
        assert box["height"] > 100
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= width

    # Lines have all segments and a color, and lie inside the plot.
    curve = "zero_shot_shapes_top1_by_samples-line"
    lines = ((f"{curve}-study/base", 1), (f"{curve}-trained", 1), ("loss-line-study/long", 7))
    for line_id, segments in lines:
        line = page.locator(f'[id="{line_id}"] path').first
        assert len(re.findall("L", line.get_attribute("d"))) == segments
        assert line.evaluate("path => path.getTotalLength()") > 5
        color, box, plot_box = line.evaluate(
            """path => [getComputedStyle(path).stroke, ...[path, path.ownerSVGElement].map(each => {
            const {x, y, width, height} = each.getBoundingClientRect();
            return [x, y, x + width, y + height] })]"""
        )
        assert color not in ("none", "rgb(255, 255, 255)")
        assert plot_box[0] <= box[0] < box[2] <= plot_box[2]
        assert plot_box[1] <= box[1] <= box[3]

    # The smallest text is readable.
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('figure svg text')].map(text =>
        parseFloat(getComputedStyle(text).fontSize) *
        Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"""
    )
    assert smallest >= 8, f"text of {smallest} pixels"


def check_pictures(page: Page) -> None:
    """Check that all pictures of the gallery are decoded."""
    widths = page.evaluate(
        "[...document.images].map(image => image.complete && image.naturalWidth)"
    )
    assert len(widths) == 2 * 8
    assert all(widths)
