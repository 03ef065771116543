"""Groups of runs as one HTML page, which needs no network, and as PNG and CSV beside it.

    write(Path("report.html"), {"baseline": [read(run), ...], "model scaling": [...]}, galleries)

The runs of a group differ in their seed alone (run/study/results.py), and the first group is the
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

from glimpse.run.lib.config import RunConfig, plain
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
from glimpse.run.train.log import clock, short

Groups = dict[str, list[RunResult]]
# the columns of run/reports/pictures.py `gallery`, and the captions of its rows
Gallery = tuple[dict[str, Tensor], list[str]]

# The metrics of a set that a table has room for; a suite shows all of its metrics.
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
METRICS_PER_TABLE = 4  # metrics in a table
PICTURE_LEGEND = (
    "Grey patches are hidden. Attention: of the class token, bright where it looks. "
    "Resemblance: of each patch's embedding to the caption's."
)


def write_report(
    out: Path,
    groups: Groups,
    galleries: dict[str, Gallery | str] | None = None,
    title: str = "Runs compared",
    metric: str = "",
) -> list[Path]:
    """Write the page, and beside it OUT-PLOT.png, OUT-curves.csv and OUT-runs.csv.

    Return all paths, the page first.

    galleries: {label: the columns and captions of a gallery, or the reason why there is none};
    metric: the one that comes first, whatever its kind.
    """
    galleries = galleries or {}
    names = select_metrics(groups, metric)
    figures = build_plots(groups, names)
    files = {
        out: build_page(groups, names, figures, galleries, title).encode(),
        sibling_path(out, "curves.csv"): curves_csv(groups),
        sibling_path(out, "runs.csv"): runs_csv(groups),
    }
    for name, figure in figures.items():
        files[sibling_path(out, f"{slug(name)}.png")] = plots.render_png(figure)
    for label, gallery in galleries.items():
        if not isinstance(gallery, str):
            columns, _captions = gallery
            files[sibling_path(out, f"masks_{slug(label)}.png")] = encode_image(
                tile_gallery(columns), "png"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


def build_page(
    groups: Groups,
    names: list[str],
    figures: dict[str, plots.Figure],
    galleries: dict[str, Gallery | str],
    title: str,
) -> str:
    """Return the page as HTML; names: the metrics in it."""
    body = [f"<h1>{escape(title)}</h1><p>{escape(summarize_runs(groups))}</p>"]

    # Results: the table, and two plots a metric.
    body += ["<h2>Results</h2>", results_table(groups, names)]
    by_samples = "By samples seen in training."
    if longer_schedules(groups):
        by_samples += " Dashed: the longer schedule, rescaled along x."
    by_time = (
        "After training, by the time that training took. Grey: one recipe, trained for longer."
    )
    for name in names:
        captions = {f"{name} by samples": by_samples, f"{name} by time": by_time}
        body.append(plot_grid(figures, captions))

    # Cost.
    captions = {
        "speed": "Training throughput.",
        "memory": "Peak memory of rank 0.",
        "loss": "Loss by samples seen.",
    }
    body += ["<h2>Cost</h2>", cost_table(groups), plot_grid(figures, captions)]

    # Pictures.
    if galleries:
        body.append(
            f"<h2>What masks keep and towers look at</h2><p>{PICTURE_LEGEND} Of the first seed.</p>"
        )
    for label, gallery in galleries.items():
        body.append(f"<h3>{escape(label)}</h3>")
        if isinstance(gallery, str):
            body.append(f'<p class="absent">absent: {escape(gallery)}</p>')
        else:
            body.append(gallery_table(*gallery))

    # Each run.
    body.append("<h2>Runs</h2>")
    base = baseline_config(groups)
    for label, group in groups.items():
        body += [run_details(label, result, base) for result in group]
    return html_document(title, "".join(body))


def summarize_runs(groups: Groups) -> str:
    runs = [result for group in groups.values() for result in group]
    complete = sum(result.state == "complete" for result in runs)
    text = (
        f"Groups: {len(groups)}. Runs: {len(runs)}, {complete} of them complete; those of a group"
        " differ in their seed alone. [low, high] and bands: 95 % bootstrap intervals of the mean"
        " over n seeds; of two or three seeds that is their range."
    )
    if len(groups) > 1:
        text += f" A second line is the difference to {next(iter(groups))}."
    return text


def select_metrics(groups: Groups, before: str = "") -> list[str]:
    """Return the metrics for tables and plots that some run has, `before` and zero-shot first."""
    measured: dict[str, None] = {}  # in the order of the runs
    for group in groups.values():
        for result in group:
            measured |= dict.fromkeys(result.curve)

    kinds = list(MAIN_METRICS)
    ranks = {}
    for name in measured:
        bare = name.removeprefix("teacher/").partition(" (")[0]
        kind = re.split(r"[(/]", bare)[0]
        metric = bare.rpartition("/")[2]
        if name == before:
            ranks[name] = -2
        elif kind == "suite" and metric != "chance":
            ranks[name] = -1
        elif metric in MAIN_METRICS.get(kind, ()):
            ranks[name] = kinds.index(kind)
    return sorted(ranks, key=ranks.get)


def metric_label(name: str) -> tuple[str, str]:
    """Return a metric and its set as text: ("zero-shot top-1 (%)", "shapes, teacher")."""
    bare, _, asked = name.partition(" (")
    kind, of, metric = bare.removeprefix("teacher/").split("/")
    kind, _, options = kind.partition("(")
    kind_words = METRIC_WORDS.get(kind, kind.replace("_", " "))
    metric_words = METRIC_WORDS.get(metric, metric.replace("_", " "))
    what = f"{kind_words} {metric_words} (%)".lstrip()

    where = [of.replace("_", " ")]
    if bare.startswith("teacher/"):
        where.append("teacher")
    where += [text.removesuffix(")") for text in (options, asked) if text]
    return what, ", ".join(where)


def final_values(group: list[RunResult], metric: str) -> list[float]:
    return [result.final[metric] for result in group if metric in result.final]


def missing_reason(group: list[RunResult]) -> str:
    """Describe why a group lacks results."""
    reasons = []
    for result in group:
        if not result.reason:
            continue
        name = f"{result.run.name}: " if len(group) > 1 else ""
        failed = "failed: " if result.state == "failed" else ""
        reasons.append(f"{name}{failed}{result.reason}")
    if reasons:
        return "; ".join(reasons)
    return "not evaluated" if group else "not run"


def results_table(groups: Groups, names: list[str]) -> str:
    """Return a table with a row a group.

    A cell has a metric's mean, interval and number of seeds, and the difference to the first group.
    """
    if not names:
        return '<p class="absent">absent: no run was evaluated</p>'
    parts = []
    for at in range(0, len(names), METRICS_PER_TABLE):
        parts.append(results_subtable(groups, names[at : at + METRICS_PER_TABLE]))

    # The runs without results in groups that have some.
    left_out = []
    for label, group in groups.items():
        incomplete = any(result.reason for result in group)
        if incomplete and any(result.final for result in group):
            left_out.append(f"<li>{escape(label)}: {escape(missing_reason(group))}</li>")
    if left_out:
        parts.append(f"<p>Left out:</p><ul>{''.join(left_out)}</ul>")
    return "".join(parts)


def results_subtable(groups: Groups, names: list[str]) -> str:
    """Return a table of as many metrics as fit beside each other."""
    base = next(iter(groups.values()))
    rows = []
    for label, group in groups.items():
        if not any(final_values(group, name) for name in names):
            rows.append((label, [absent_row(group, len(names))]))
            continue
        cells = [result_cell(group, base, name) for name in names]
        rows.append((label, cells))
    heads = []
    for name in names:
        what, where = metric_label(name)
        heads.append(f"{where}: {what}")
    return html_table(heads, rows)


def result_cell(group: list[RunResult], base: list[RunResult], metric: str) -> str:
    """Return the <td> of a metric, with the difference to `base` in a second line."""
    group_values = final_values(group, metric)
    base_values = final_values(base, metric)
    if not group_values:
        return '<td class="absent">absent: not evaluated</td>'
    cell = f"{format_interval(mean_interval(group_values), 100)} <small>n = {len(group_values)}</small>"
    if base_values and group is not base:
        change = format_interval(difference_interval(group_values, base_values), 100, "+.1f")
        cell += f'<small class="to">{change}</small>'
    return f"<td>{cell}</td>"


def absent_row(group: list[RunResult], columns: int) -> str:
    """Return one <td> over all columns, with the reason why a group has no values."""
    reason = escape(missing_reason(group))
    return f'<td class="absent" colspan="{columns}"><div>absent: {reason}</div></td>'


def cost_table(groups: Groups) -> str:
    heads = ["runs", "samples seen", "training time", "samples/s", "MFU", "peak memory, GiB"]
    forms = {
        "seconds": clock,
        "samples_per_s": short,
        "mfu": lambda share: f"{share:.0%}",
        "memory_gib": lambda gib: f"{gib:.2f}",
    }
    rows = []
    for label, group in groups.items():
        samples = [f"{result.samples:,}" for result in group if result.samples]
        if not samples:
            rows.append((label, [absent_row(group, len(heads))]))
            continue
        seen = "; ".join(dict.fromkeys(samples))
        cells = [f"<td>{len(group)}</td><td>{seen}</td>"]
        cells += [cost_cell(group, key, form) for key, form in forms.items()]
        rows.append((label, cells))
    return html_table(heads, rows)


def cost_cell(group: list[RunResult], key: str, form: Callable[[float], str]) -> str:
    """Return the <td> of a cost; form(value) -> text."""
    point = cost_point(group, key)
    if point is None:
        return '<td class="absent">not known</td>'
    _, mean, low, high = point
    bounds = "" if math.isnan(low) else f" [{form(low)}, {form(high)}]"
    return f"<td>{form(mean)}{bounds}</td>"


def format_interval(found: tuple[float, float, float], by: float, form: str = ".1f") -> str:
    """Return mean and interval as text, multiplied by `by`."""
    mean, low, high = (by * value for value in found)
    bounds = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
    return f"{mean:{form}}{bounds}"


def has_chance_level(name: str) -> bool:
    """Return True if `chance` is the level of guessing of this metric."""
    return name.rpartition("/")[2].split(" ")[0] == "top1"


def build_plots(groups: Groups, names: list[str]) -> dict[str, plots.Figure]:
    """Return {name: plot} of these metrics and of cost; a plot without any data is left out."""
    figures: dict[str, plots.Figure | None] = {}
    for name in names:
        figures[f"{name} by samples"] = plot_by_samples(groups, name)
        figures[f"{name} by time"] = plot_by_time(groups, name)
    figures["speed"] = cost_plot(groups, "samples_per_s", "samples a second")
    figures["memory"] = cost_plot(groups, "memory_gib", "peak memory (GiB)")
    figures["loss"] = loss_plot(groups)
    return {name: figure for name, figure in figures.items() if figure is not None}


def plot_by_samples(groups: Groups, metric: str) -> plots.Figure | None:
    """Return the curves of a metric by samples seen, None if no run has it."""
    what, where = metric_label(metric)
    lines = {label: metric_points(group, metric) for label, group in groups.items()}
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return None
    scaled = {label: factor for label, factor in longer_schedules(groups).items() if label in lines}
    level = chance_level(groups, metric)
    return plots.plot_curves(where, lines, "samples seen", what, list(groups), scaled, level=level)


def chance_level(groups: Groups, metric: str) -> float | None:
    """Return the level of guessing of a metric, if some run has it."""
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
    """Return a metric after training by training time, None if no run has both."""
    what, where = metric_label(metric)
    unit, per = time_unit(groups)
    points: dict[str, tuple[plots.Point, plots.Point]] = {}
    by_recipe: dict[str, list[str]] = {}  # {recipe: labels}
    for label, group in groups.items():
        ended = [result for result in group if metric in result.final and result.seconds]
        if ended:
            mean = (0.0, *mean_interval(final_values(ended, metric)))
            points[label] = (cost_point(ended, "seconds", per), mean)
            by_recipe.setdefault(repr(without_schedule(ended[0].config)), []).append(label)
    if not points:
        return None
    chains = [labels for labels in by_recipe.values() if len(labels) > 1]
    x = f"training time ({unit})"
    return plots.plot_trade_off(where, points, chains, x, what, list(groups))


def time_unit(groups: Groups) -> tuple[str, int]:
    """Return the unit for training times, and its length in seconds."""
    longest = 0.0
    for group in groups.values():
        for result in group:
            longest = max(longest, result.seconds or 0.0)
    return ("hours", 3600) if longest >= 3600 else ("minutes", 60)


def cost_plot(groups: Groups, key: str, what: str) -> plots.Figure | None:
    """Return bars of a cost, None if no run has it."""
    points = {label: cost_point(group, key) for label, group in groups.items()}
    if not any(points.values()):
        return None
    return plots.plot_bars(points, what, list(groups))


def loss_plot(groups: Groups) -> plots.Figure | None:
    lines = {}
    for label, group in groups.items():
        points = mean_points([result.losses for result in group])
        if points:
            lines[label] = points
    if not lines:
        return None
    return plots.plot_curves("", lines, "samples seen", "loss", list(groups), share=False)


def cost_point(group: list[RunResult], key: str, per: float = 1) -> plots.Point | None:
    """Return a cost of a group, divided by `per`; the time is that of complete runs."""
    costs = []
    for result in group:
        value = getattr(result, key)
        if value is not None and (key != "seconds" or result.state == "complete"):
            costs.append(value / per)
    return (0.0, *mean_interval(costs)) if costs else None


def metric_points(group: list[RunResult], metric: str) -> list[plots.Point]:
    return mean_points([result.curve.get(metric, []) for result in group])


def mean_points(runs: list[list[tuple[int, float]]]) -> list[plots.Point]:
    """Return (samples, mean, low, high) at all places where some run was measured."""
    at: dict[int, list[float]] = {}
    for points in runs:
        for samples, value in points:
            at.setdefault(samples, []).append(value)
    return [(samples, *mean_interval(at[samples])) for samples in sorted(at)]


def baseline_config(groups: Groups) -> RunConfig | None:
    """Return the config that others are compared with."""
    for group in groups.values():
        for result in group:
            if result.config:
                return result.config
    return None


def longer_schedules(groups: Groups) -> dict[str, float]:
    """Return {label: factor} of the groups that are the first recipe with a longer schedule."""
    base = baseline_config(groups)
    factors = {}
    for label, group in groups.items():
        cfg = group[0].config if group else None
        if cfg and without_schedule(cfg) == without_schedule(base) and cfg.samples > base.samples:
            factors[label] = base.samples / cfg.samples
    return factors


def without_schedule(cfg: RunConfig) -> RunConfig:
    """Return a config without the settings that a longer schedule changes."""
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


def run_details(label: str, one: RunResult, base: RunConfig | None) -> str:
    """Return a run's state, command, provenance and config, the last three folded."""
    name = one.run.name if label in str(one.run) else f"{label}: {one.run.name}"
    head = f"{escape(name)}, {one.state}"
    if one.reason:
        head += f' <span class="absent">({escape(one.reason)})</span>'
    if one.config is None:
        return f"<details class='run'><summary>{head}</summary></details>"

    # The keys that differ from the first config.
    tree = plain(asdict(one.config))
    base_keys = flatten(plain(asdict(base)))
    run_keys = flatten(tree)
    changed = []
    for key, value in run_keys.items():
        if key != "run" and base_keys.get(key) != value:
            changed.append(f"{key}: {value}")
    changed += [f"{key}: none" for key in base_keys if key not in run_keys]

    commands = escape("\n".join(one.commands)) or "no command recorded"
    provenance = ", ".join(f"{key} {value}" for key, value in one.provenance.items())
    differences = escape("; ".join(changed)) or "nothing"
    config = escape(yaml.safe_dump(tree, sort_keys=False))
    return (
        f'<details class="run"><summary>{head}</summary>'
        f"<pre>{commands}</pre>"
        f"<p>{escape(provenance)}</p>"
        f"<p>Unlike the first: {differences}.</p>"
        f"<details><summary>whole config</summary><pre>{config}</pre></details>"
        "</details>"
    )


def flatten(tree: dict, before: str = "") -> dict:
    """Return {'a.b': value} of nested mappings."""
    keys = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            keys |= flatten(value, f"{before}{key}.")
        else:
            keys[f"{before}{key}"] = value
    return keys


def curves_csv(groups: Groups) -> bytes:
    """Return a row a measurement."""
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
    """Return a row a run; unknown values are empty."""
    keys = ("state", "reason", "samples", "seconds", "samples_per_s", "mfu", "memory_gib")
    rows = []
    for label, group in groups.items():
        for result in group:
            seed = result.config.seed if result.config else None
            known = [getattr(result, key) for key in keys]
            rows.append((label, result.run, seed, *known, result.provenance.get("commit")))
    return format_csv(("group", "run", "seed", *keys, "commit"), rows)


def format_csv(head: tuple[str, ...], rows: list[tuple]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue().encode()


def sibling_path(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}")
