"""Write a self-contained HTML page that compares groups of runs, with plots (PNG) and tables (CSV).

    groups = {"baseline": [read_result(run), ...], "larger model": [...]}
    write_report(Path("report.html"), groups, galleries)

The runs of a group differ only in their seed (run/study/results.py). The first group is the
baseline for the others. Results that were not measured are marked as absent, with the reason.
"""

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from torch import Tensor

from glimpse.run.lib.config import RunConfig, tuples_to_lists
from glimpse.run.reports import plots
from glimpse.run.reports.markup import (
    encode_image,
    escape,
    gallery_table,
    html_document,
    html_table,
    plot_grid,
    slug,
)
from glimpse.run.reports.pictures import tile_gallery
from glimpse.run.study.results import RunResult, difference_interval, mean_interval
from glimpse.run.train.log import format_count, format_duration

Groups = dict[str, list[RunResult]]
# (columns, captions of the rows) from `build_gallery` in run/reports/pictures.py
Gallery = tuple[dict[str, Tensor], list[str]]

# {evaluation: the metrics that tables and plots show}; suites show all of their metrics.
MAIN_METRICS = {
    "zero_shot": ("top1", "map", "pm_10", "roc_auc"),
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "knn": ("top1",),
    "linear_probe": ("top1",),
    "finetune": ("top1",),
    "segmentation": ("mean_iou",),
    "captioning": ("cider",),
    "vqa": ("accuracy",),
}
METRIC_WORDS = {
    "zero_shot": "zero-shot",
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "roc_auc": "ROC AUC",
    "image_to_text_r1": "image-to-text R@1",
    "text_to_image_r1": "text-to-image R@1",
    "mean_iou": "mean IoU",
    "retrieval": "",
    "cider": "CIDEr",
    "vqa": "VQA",
}
METRICS_PER_TABLE = 4
PICTURE_LEGEND = (
    "Gray patches are hidden. Attention is the attention of the class token, bright where it is"
    " high. Similarity is the cosine similarity of each patch embedding and the caption embedding."
)


def write_report(
    out: Path,
    groups: Groups,
    galleries: dict[str, Gallery | str] | None = None,
    title: str = "Comparison of runs",
    metric: str = "",
) -> list[Path]:
    """Write the page, and next to it OUT-PLOT.png, OUT-curves.csv and OUT-runs.csv.

    Return all paths, the page first.

    galleries: {label: a gallery, or the reason why there is none}.
    metric: the metric to show first; it is shown even if MAIN_METRICS leaves it out.
    """
    plots.check_matplotlib()
    galleries = galleries or {}
    metrics = select_metrics(groups, metric)
    figures = build_plots(groups, metrics)
    files = {
        out: build_page(groups, metrics, figures, galleries, title).encode(),
        sibling_path(out, "curves.csv"): curves_csv(groups),
        sibling_path(out, "runs.csv"): runs_csv(groups),
    }
    for name, figure in figures.items():
        files[sibling_path(out, f"{slug(name)}.png")] = plots.render_png(figure)
    for label, gallery in galleries.items():
        if not isinstance(gallery, str):
            columns, _captions = gallery
            picture = encode_image(tile_gallery(columns), "png")
            files[sibling_path(out, f"masks_{slug(label)}.png")] = picture
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


def build_page(
    groups: Groups,
    metrics: list[str],
    figures: dict[str, plots.Figure],
    galleries: dict[str, Gallery | str],
    title: str,
) -> str:
    """Return the page as HTML."""
    body = [f"<h1>{escape(title)}</h1><p>{escape(summarize_runs(groups))}</p>"]

    # Results: the tables, and two plots for each metric.
    body += ["<h2>Results</h2>", results_table(groups, metrics)]
    by_samples = "By samples seen in training."
    if longer_schedules(groups):
        by_samples += " Dashed: a longer schedule, with x scaled to the length of the first run."
    by_time = "After training, by training time. Gray lines join schedules of one recipe."
    for metric in metrics:
        captions = {f"{metric} by samples": by_samples, f"{metric} by time": by_time}
        body.append(plot_grid(figures, captions))

    # Cost.
    captions = {
        "speed": "Training throughput.",
        "memory": "Peak memory of rank 0.",
        "loss": "Training loss by samples seen.",
    }
    body += ["<h2>Cost</h2>", cost_table(groups), plot_grid(figures, captions)]

    # Pictures.
    if galleries:
        note = "The model is that of the first run with a checkpoint in each group."
        body.append(f"<h2>Masks, attention and similarity</h2><p>{PICTURE_LEGEND} {note}</p>")
    for label, gallery in galleries.items():
        body.append(f"<h3>{escape(label)}</h3>")
        if isinstance(gallery, str):
            body.append(f'<p class="absent">absent: {escape(gallery)}</p>')
        else:
            body.append(gallery_table(*gallery))

    # Details of each run.
    body.append("<h2>Runs</h2>")
    baseline = baseline_config(groups)
    for label, group in groups.items():
        body += [run_details(label, result, baseline) for result in group]
    return html_document(title, "".join(body))


def summarize_runs(groups: Groups) -> str:
    """Return the introduction of the page: numbers of runs, and how to read the intervals."""
    runs = [result for group in groups.values() for result in group]
    complete = sum(result.state == "complete" for result in runs)
    text = (
        f"Groups: {len(groups)}. Runs: {len(runs)}, {complete} of them complete. The runs of a"
        " group differ only in their seed. [low, high] and shaded bands are 95 % bootstrap"
        " intervals of the mean over n seeds; with two or three seeds they are the range of the"
        " values."
    )
    if len(groups) > 1:
        baseline = next(iter(groups))
        text += f" The second line of a cell is the difference to the group {baseline}."
    return text


def select_metrics(groups: Groups, first: str = "") -> list[str]:
    """Return the metrics to show, of those that any run has.

    `first` comes first, then suites, then the evaluations in the order of MAIN_METRICS.
    """
    measured_metrics: dict[str, None] = {}  # in the order of the runs
    for group in groups.values():
        for result in group:
            measured_metrics |= dict.fromkeys(result.curve)

    kinds = list(MAIN_METRICS)
    ranks = {}
    for name in measured_metrics:
        bare = name.removeprefix("teacher/").partition(" (")[0]
        kind = re.split(r"[(/]", bare)[0]
        metric = bare.rpartition("/")[2]
        if name == first:
            ranks[name] = -2
        elif kind == "suite" and metric != "chance":
            ranks[name] = -1
        elif metric in MAIN_METRICS.get(kind, ()):
            ranks[name] = kinds.index(kind)
    return sorted(ranks, key=ranks.get)


def metric_label(name: str) -> tuple[str, str]:
    """Return (metric, evaluation set) as text: ("zero-shot top-1 (%)", "shapes, teacher")."""
    bare, _, run_options = name.partition(" (")
    kind, evaluation_set, metric = bare.removeprefix("teacher/").split("/")
    kind, _, kind_options = kind.partition("(")
    kind_words = METRIC_WORDS.get(kind, kind.replace("_", " "))
    metric_words = METRIC_WORDS.get(metric, metric.replace("_", " "))
    label = f"{kind_words} {metric_words} (%)".lstrip()

    details = [evaluation_set.replace("_", " ")]
    if bare.startswith("teacher/"):
        details.append("teacher")
    details += [text.removesuffix(")") for text in (kind_options, run_options) if text]
    return label, ", ".join(details)


def final_values(group: list[RunResult], metric: str) -> list[float]:
    return [result.final[metric] for result in group if metric in result.final]


def missing_reason(group: list[RunResult]) -> str:
    """Describe why a group lacks results."""
    reasons = []
    for result in group:
        if not result.reason:
            continue
        name = f"{result.run.name}: " if len(group) > 1 else ""
        prefix = "failed: " if result.state == "failed" else ""
        reasons.append(f"{name}{prefix}{result.reason}")
    if reasons:
        return "; ".join(reasons)
    return "not evaluated" if group else "not run"


def results_table(groups: Groups, metrics: list[str]) -> str:
    """Return tables with a row per group.

    A cell has the mean of a metric, its interval, the number of seeds, and the difference to the
    first group.
    """
    if not metrics:
        return '<p class="absent">absent: no run was evaluated</p>'
    elements = []
    for start in range(0, len(metrics), METRICS_PER_TABLE):
        elements.append(results_subtable(groups, metrics[start : start + METRICS_PER_TABLE]))

    # Incomplete runs of groups that have other results.
    notes = []
    for label, group in groups.items():
        is_incomplete = any(result.reason for result in group)
        if is_incomplete and any(result.final for result in group):
            notes.append(f"<li>{escape(label)}: {escape(missing_reason(group))}</li>")
    if notes:
        elements.append(f"<p>Not included:</p><ul>{''.join(notes)}</ul>")
    return "".join(elements)


def results_subtable(groups: Groups, metrics: list[str]) -> str:
    """Return one table, with the metrics as columns."""
    baseline = next(iter(groups.values()))
    rows = []
    for label, group in groups.items():
        if not any(final_values(group, metric) for metric in metrics):
            rows.append((label, [absent_row(group, len(metrics))]))
            continue
        cells = [result_cell(group, baseline, metric) for metric in metrics]
        rows.append((label, cells))
    heads = []
    for metric in metrics:
        label, details = metric_label(metric)
        heads.append(f"{details}: {label}")
    return html_table(heads, rows)


def result_cell(group: list[RunResult], baseline: list[RunResult], metric: str) -> str:
    """Return the <td> of a metric, with the difference to the baseline in a second line."""
    values = final_values(group, metric)
    baseline_values = final_values(baseline, metric)
    if not values:
        return '<td class="absent">absent: not evaluated</td>'
    mean = format_interval(mean_interval(values), 100)
    cell = f"{mean} <small>n = {len(values)}</small>"
    if baseline_values and group is not baseline:
        change = format_interval(difference_interval(values, baseline_values), 100, "+.1f")
        cell += f'<small class="to">{change}</small>'
    return f"<td>{cell}</td>"


def absent_row(group: list[RunResult], columns: int) -> str:
    """Return one <td> over all columns, with the reason why a group has no values."""
    reason = escape(missing_reason(group))
    return f'<td class="absent" colspan="{columns}"><div>absent: {reason}</div></td>'


def cost_table(groups: Groups) -> str:
    """Return a table of samples, time, throughput, MFU and memory, with a row per group."""
    heads = ["runs", "samples seen", "training time", "samples/s", "MFU", "peak memory, GiB"]
    formatters = {
        "seconds": format_duration,
        "samples_per_s": format_count,
        "mfu": lambda mfu: f"{mfu:.0%}",
        "memory_gib": lambda gib: f"{gib:.2f}",
    }
    rows = []
    for label, group in groups.items():
        samples = [f"{result.samples:,}" for result in group if result.samples]
        if not samples:
            rows.append((label, [absent_row(group, len(heads))]))
            continue
        samples_text = "; ".join(dict.fromkeys(samples))
        cells = [f"<td>{len(group)}</td><td>{samples_text}</td>"]
        cells += [cost_cell(group, key, formatter) for key, formatter in formatters.items()]
        rows.append((label, cells))
    return html_table(heads, rows)


def cost_cell(group: list[RunResult], key: str, formatter: Callable[[float], str]) -> str:
    """Return the <td> of a cost: mean and interval, each formatted by `formatter`."""
    point = cost_point(group, key)
    if point is None:
        return '<td class="absent">unknown</td>'
    _, mean, low, high = point
    bounds = "" if math.isnan(low) else f" [{formatter(low)}, {formatter(high)}]"
    return f"<td>{formatter(mean)}{bounds}</td>"


def format_interval(
    interval: tuple[float, float, float], factor: float, number_format: str = ".1f"
) -> str:
    """Format (mean, low, high), multiplied by `factor`, as `MEAN [LOW, HIGH]`."""
    mean, low, high = (factor * value for value in interval)
    bounds = "" if math.isnan(low) else f" [{low:{number_format}}, {high:{number_format}}]"
    return f"{mean:{number_format}}{bounds}"


def has_chance_level(name: str) -> bool:
    """Return True if the metric `chance` is the chance level of this metric: for top-1 only."""
    return name.rpartition("/")[2].split(" ")[0] == "top1"


def build_plots(groups: Groups, metrics: list[str]) -> dict[str, plots.Figure]:
    """Return {name: plot} of these metrics and of cost, without plots that have no data."""
    figures: dict[str, plots.Figure | None] = {}
    for metric in metrics:
        figures[f"{metric} by samples"] = plot_by_samples(groups, metric)
        figures[f"{metric} by time"] = plot_by_time(groups, metric)
    figures["speed"] = cost_plot(groups, "samples_per_s", "samples per second")
    figures["memory"] = cost_plot(groups, "memory_gib", "peak memory (GiB)")
    figures["loss"] = loss_plot(groups)
    return {name: figure for name, figure in figures.items() if figure is not None}


def plot_by_samples(groups: Groups, metric: str) -> plots.Figure | None:
    """Return the curves of a metric by samples seen; None if no run has the metric."""
    label, details = metric_label(metric)
    lines = {}
    for group_label, group in groups.items():
        points = metric_points(group, metric)
        if points:
            lines[group_label] = points
    if not lines:
        return None
    schedules = longer_schedules(groups)
    scaled = {name: factor for name, factor in schedules.items() if name in lines}
    level = chance_level(groups, metric)
    return plots.plot_curves(
        details, lines, "samples seen", label, list(groups), scaled, level=level
    )


def chance_level(groups: Groups, metric: str) -> float | None:
    """Return the chance level of a metric, or None if no run has recorded it."""
    if not has_chance_level(metric):
        return None
    key = f"{metric.rpartition('/')[0]}/chance"
    for group in groups.values():
        for result in group:
            points = result.curve.get(key)
            if points:
                return points[0][1]
    return None


def plot_by_time(groups: Groups, metric: str) -> plots.Figure | None:
    """Return a plot of the final metric by training time; None if no run has both."""
    label, details = metric_label(metric)
    unit, unit_seconds = time_unit(groups)
    points: dict[str, tuple[plots.Point, plots.Point]] = {}
    by_recipe: dict[str, list[str]] = {}  # {config without its schedule: labels of groups}
    for group_label, group in groups.items():
        timed = [result for result in group if metric in result.final and result.seconds]
        if timed:
            mean = (0.0, *mean_interval(final_values(timed, metric)))
            points[group_label] = (cost_point(timed, "seconds", unit_seconds), mean)
            recipe = repr(without_schedule(timed[0].config))
            by_recipe.setdefault(recipe, []).append(group_label)
    if not points:
        return None
    chains = [labels for labels in by_recipe.values() if len(labels) > 1]
    x = f"training time ({unit})"
    return plots.plot_trade_off(details, points, chains, x, label, list(groups))


def time_unit(groups: Groups) -> tuple[str, int]:
    """Return the unit for training times, and its length in seconds."""
    longest = 0.0
    for group in groups.values():
        for result in group:
            longest = max(longest, result.seconds or 0.0)
    return ("hours", 3600) if longest >= 3600 else ("minutes", 60)


def cost_plot(groups: Groups, key: str, x: str) -> plots.Figure | None:
    """Return a bar plot of a cost; None if no run has it."""
    points = {label: cost_point(group, key) for label, group in groups.items()}
    if not any(points.values()):
        return None
    return plots.plot_bars(points, x, list(groups))


def loss_plot(groups: Groups) -> plots.Figure | None:
    """Return the curves of the training loss; None if no run has recorded it."""
    lines = {}
    for label, group in groups.items():
        points = mean_points([result.losses for result in group])
        if points:
            lines[label] = points
    if not lines:
        return None
    return plots.plot_curves("", lines, "samples seen", "loss", list(groups), is_fraction=False)


def cost_point(group: list[RunResult], key: str, divisor: float = 1) -> plots.Point | None:
    """Return the mean and interval of a cost, divided by `divisor`; None if it is unknown.

    Training time is that of complete runs only.
    """
    costs = []
    for result in group:
        value = getattr(result, key)
        if value is not None and (key != "seconds" or result.state == "complete"):
            costs.append(value / divisor)
    return (0.0, *mean_interval(costs)) if costs else None


def metric_points(group: list[RunResult], metric: str) -> list[plots.Point]:
    return mean_points([result.curve.get(metric, []) for result in group])


def mean_points(curves: list[list[tuple[int, float]]]) -> list[plots.Point]:
    """Return (samples, mean, low, high) for every number of samples at which a run was measured."""
    by_samples: dict[int, list[float]] = {}
    for points in curves:
        for samples, value in points:
            by_samples.setdefault(samples, []).append(value)
    return [(samples, *mean_interval(by_samples[samples])) for samples in sorted(by_samples)]


def baseline_config(groups: Groups) -> RunConfig | None:
    """Return the config with which others are compared: that of the first run that has one."""
    for group in groups.values():
        for result in group:
            if result.config:
                return result.config
    return None


def longer_schedules(groups: Groups) -> dict[str, float]:
    """Return {label: factor} for groups with the baseline's recipe and a longer schedule.

    The factor is the length of the baseline's schedule relative to that of the group.
    """
    baseline = baseline_config(groups)
    factors = {}
    for label, group in groups.items():
        cfg = group[0].config if group else None
        if cfg is None or without_schedule(cfg) != without_schedule(baseline):
            continue
        if cfg.samples > baseline.samples:
            factors[label] = baseline.samples / cfg.samples
    return factors


def without_schedule(cfg: RunConfig) -> RunConfig:
    """Return the config without the settings that a longer schedule changes."""
    return replace(
        cfg,
        run="",
        seed=0,
        samples=cfg.batch,
        optim=replace(cfg.optim, warmup=0),
        log_every=1,
        eval_every=0,
        save_every=0,
    )


def run_details(label: str, result: RunResult, baseline: RunConfig | None) -> str:
    """Return a <details> element with a run's state, command, provenance and config."""
    name = result.run.name if label in str(result.run) else f"{label}: {result.run.name}"
    head = f"{escape(name)}, {result.state}"
    if result.reason:
        head += f' <span class="absent">({escape(result.reason)})</span>'
    if result.config is None:
        return f"<details class='run'><summary>{head}</summary></details>"

    # The keys that differ from the baseline's config.
    tree = tuples_to_lists(asdict(result.config))
    baseline_keys = flatten(tuples_to_lists(asdict(baseline)))
    run_keys = flatten(tree)
    changes = []
    for key, value in run_keys.items():
        if key != "run" and baseline_keys.get(key) != value:
            changes.append(f"{key}: {value}")
    changes += [f"{key}: none" for key in baseline_keys if key not in run_keys]

    commands = escape("\n".join(result.commands)) or "no command recorded"
    provenance = ", ".join(f"{key} {value}" for key, value in result.provenance.items())
    differences = escape("; ".join(changes)) or "nothing"
    config = escape(yaml.safe_dump(tree, sort_keys=False))
    return (
        f'<details class="run"><summary>{head}</summary>'
        f"<pre>{commands}</pre>"
        f"<p>{escape(provenance)}</p>"
        f"<p>Differences from the first run: {differences}.</p>"
        f"<details><summary>full config</summary><pre>{config}</pre></details>"
        "</details>"
    )


def flatten(tree: dict, prefix: str = "") -> dict:
    """Return {"a.b": value} for nested mappings."""
    keys = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            keys |= flatten(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys


def curves_csv(groups: Groups) -> bytes:
    """Return a CSV table with a row per measurement."""
    rows = []
    for label, group in groups.items():
        for result in group:
            if result.config is None:
                continue
            run = (label, result.run, result.config.seed)
            curves = {"loss": result.losses, **result.curve}
            for metric, points in curves.items():
                rows += [(*run, metric, samples, value) for samples, value in points]
    return format_csv(("group", "run", "seed", "metric", "samples", "value"), rows)


def runs_csv(groups: Groups) -> bytes:
    """Return a CSV table with a row per run; unknown values are empty."""
    keys = ("state", "reason", "samples", "seconds", "samples_per_s", "mfu", "memory_gib")
    rows = []
    for label, group in groups.items():
        for result in group:
            seed = result.config.seed if result.config else None
            values = [getattr(result, key) for key in keys]
            rows.append((label, result.run, seed, *values, result.provenance.get("commit")))
    return format_csv(("group", "run", "seed", *keys, "commit"), rows)


def format_csv(head: tuple[str, ...], rows: list[tuple]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue().encode()


def sibling_path(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}")
