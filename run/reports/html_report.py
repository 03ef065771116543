"""Groups of runs as one page to look at, without network, and as PNG and CSV beside it.

    write(Path("report.html"), {"baseline": [read(run), ...], "model scaling": [...]}, galleries)

The runs of a group differ in their seed alone (run/study/results.py), and the first group is what
the
others are compared with. What was
not measured is told as absent, with the reason.
"""

import csv
import io
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from torch import Tensor

from glimpse.run.lib.config import Run, plain
from glimpse.run.reports import plots
from glimpse.run.reports.markup import (
    document,
    encoded,
    escape,
    gallery_table,
    shown,
    slug,
    table,
)
from glimpse.run.reports.pictures import sheet
from glimpse.run.study.results import Result, difference, interval
from glimpse.run.train.log import clock, short

Groups = dict[str, list[Result]]
# what run/reports/pictures.py `gallery` made, and the captions of its rows
Gallery = tuple[dict[str, Tensor], list[str]]

# The metrics of a set that a table has room for; of a suite all.
MAIN = {
    "zero_shot": ("top1", "map", "pm_10", "roc_auc"),
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "knn": ("top1",),
    "linear_probe": ("top1",),
    "finetune": ("top1",),
    "segmentation": ("mean_iou",),
    "captioning": ("cider",),
    "vqa": ("accuracy",),
}
WORDS = {
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
ABREAST = 4  # metrics in a table
KEY = (
    "Grey patches are hidden. Attention: of the class token, bright where it looks. "
    "Resemblance: of each patch's embedding to the caption's."
)


def write(
    out: Path,
    groups: Groups,
    galleries: dict[str, Gallery | str] | None = None,
    title: str = "Runs compared",
    metric: str = "",
) -> list[Path]:
    """Write the page, and beside it OUT-PLOT.png, OUT-curves.csv and OUT-runs.csv; returns all
    paths, the page first.

    galleries: {label: what masks keep and towers look at, or why there is no picture}; metric: what
    stands first, whatever its kind.
    """
    names = metrics(groups, metric)
    figures = drawn(groups, names)
    files = {
        out: page(groups, names, figures, galleries or {}, title).encode(),
        beside(out, "curves.csv"): curves_csv(groups),
        beside(out, "runs.csv"): runs_csv(groups),
    }
    files |= {
        beside(out, f"{slug(name)}.png"): plots.png(figure) for name, figure in figures.items()
    }
    files |= {
        beside(out, f"masks_{slug(label)}.png"): encoded(sheet(found[0]), "png")
        for label, found in (galleries or {}).items()
        if not isinstance(found, str)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


def page(
    groups: Groups,
    names: list[str],
    figures: dict[str, plots.Figure],
    galleries: dict[str, Gallery | str],
    title: str,
) -> str:
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(headline(groups))}</p><h2>Results</h2>",
        results_table(groups, names),
    ]
    for name in names:
        body.append(
            shown(
                figures,
                {
                    f"{name} by samples": (
                        "By samples seen in training."
                        + " Dashed: the longer schedule, rescaled along x." * bool(longer(groups))
                    ),
                    f"{name} by time": (
                        "After training, by the time that training took. Grey: one recipe, trained"
                        " for longer."
                    ),
                },
            )
        )
    body.append(
        "<h2>Cost</h2>"
        + cost_table(groups)
        + shown(
            figures,
            {
                "speed": "Training throughput.",
                "memory": "Peak memory of rank 0.",
                "loss": "Loss by samples seen.",
            },
        )
    )
    if galleries:
        body.append(f"<h2>What masks keep and towers look at</h2><p>{KEY} Of the first seed.</p>")
        body += [
            f"<h3>{escape(label)}</h3>"
            + (
                f'<p class="absent">absent: {escape(found)}</p>'
                if isinstance(found, str)
                else gallery_table(*found)
            )
            for label, found in galleries.items()
        ]
    body.append(
        "<h2>Runs</h2>"
        + "".join(
            run_details(label, one, first(groups))
            for label, group in groups.items()
            for one in group
        )
    )
    return document(title, "".join(body))


def headline(groups: Groups) -> str:
    runs = [one for group in groups.values() for one in group]
    whole = sum(one.state == "complete" for one in runs)
    compared = f" A second line is the difference to {next(iter(groups))}." * (len(groups) > 1)
    return (
        f"Groups: {len(groups)}. Runs: {len(runs)}, {whole} of them complete; those of a group"
        " differ in their seed alone. [low, high] and bands: 95 % bootstrap intervals of the mean"
        f" over n seeds; of two or three seeds that is their range.{compared}"
    )


def metrics(groups: Groups, before: str = "") -> list[str]:
    """The metrics for tables and plots that some run has, `before` and zero-shot first."""
    found = dict.fromkeys(name for group in groups.values() for one in group for name in one.curve)
    kinds = list(MAIN)
    chosen = {}
    for name in found:
        bare = name.removeprefix("teacher/").partition(" (")[0]
        kind, metric = re.split(r"[(/]", bare)[0], bare.rpartition("/")[2]
        if name == before or kind == "suite" and metric != "chance" or metric in MAIN.get(kind, ()):
            chosen[name] = -2 if name == before else kinds.index(kind) if kind in MAIN else -1
    return sorted(chosen, key=chosen.get)


def spoken(name: str) -> tuple[str, str]:
    """What a metric measures, and of what: ("zero-shot top-1 (%)", "shapes, teacher")."""
    bare, _, asked = name.partition(" (")
    kind, of, metric = bare.removeprefix("teacher/").split("/")
    kind, _, options = kind.partition("(")
    how = ["teacher"] * bare.startswith("teacher/") + [
        each.removesuffix(")") for each in (options, asked) if each
    ]
    what = (
        f"{WORDS.get(kind, kind.replace('_', ' '))}"
        f" {WORDS.get(metric, metric.replace('_', ' '))} (%)"
    )
    return what.lstrip(), ", ".join([of.replace("_", " "), *how])


def values(group: list[Result], metric: str) -> list[float]:
    return [one.final[metric] for one in group if metric in one.final]


def why(group: list[Result]) -> str:
    """Why a group lacks results."""
    reasons = [
        f"{one.run.name}: " * (len(group) > 1) + "failed: " * (one.state == "failed") + one.reason
        for one in group
        if one.reason
    ]
    return "; ".join(reasons) or ("not evaluated" if group else "not run")


def results_table(groups: Groups, names: list[str]) -> str:
    """A row a group: of each metric mean, interval and number of seeds, and the difference to the
    first group.
    """
    if not names:
        return '<p class="absent">absent: no run was evaluated</p>'
    lost = [
        f"<li>{escape(label)}: {escape(why(group))}</li>"
        for label, group in groups.items()
        if any(one.reason for one in group) and any(one.final for one in group)
    ]
    tables = [
        some_results(groups, names[at : at + ABREAST]) for at in range(0, len(names), ABREAST)
    ]
    return "".join(tables) + f"<p>Left out:</p><ul>{''.join(lost)}</ul>" * bool(lost)


def some_results(groups: Groups, names: list[str]) -> str:
    """Of as many metrics as a page has room for."""
    rows, (base, *_) = [], groups.values()
    for label, group in groups.items():
        if not any(values(group, name) for name in names):
            rows.append(
                (
                    label,
                    [
                        f'<td class="absent" colspan="{len(names)}"><div>absent:'
                        f" {escape(why(group))}</div></td>"
                    ],
                )
            )
            continue
        cells = []
        for name in names:
            mine, theirs = values(group, name), values(base, name)
            if not mine:
                cells.append('<td class="absent">absent: not evaluated</td>')
                continue
            cell = f"{told(interval(mine), 100)} <small>n = {len(mine)}</small>"
            if theirs and group is not base:
                change = told(difference(mine, theirs), 100, "+.1f")
                cell += f'<small class="to">{change}</small>'
            cells.append(f"<td>{cell}</td>")
        rows.append((label, cells))
    return table(["{1}: {0}".format(*spoken(name)) for name in names], rows)


def cost_table(groups: Groups) -> str:
    rows = []
    for label, group in groups.items():
        if not any(one.samples for one in group):
            rows.append(
                (
                    label,
                    [
                        '<td class="absent" colspan="6"><div>absent:'
                        f" {escape(why(group))}</div></td>"
                    ],
                )
            )
            continue
        cells = []
        for key, form in (
            ("seconds", lambda s: clock(s)),
            ("samples_per_s", short),
            ("mfu", lambda share: f"{share:.0%}"),
            ("memory_gib", lambda gib: f"{gib:.2f}"),
        ):
            point = spread(group, key)
            if point is None:
                cells.append('<td class="absent">not known</td>')
                continue
            _, middle, low, high = point
            interval = "" if math.isnan(low) else f" [{form(low)}, {form(high)}]"
            cells.append(f"<td>{form(middle)}{interval}</td>")
        seen = "; ".join(dict.fromkeys(f"{one.samples:,}" for one in group if one.samples))
        rows.append((label, [f"<td>{len(group)}</td><td>{seen}</td>", *cells]))
    return table(
        ["runs", "samples seen", "training time", "samples/s", "MFU", "peak memory, GiB"], rows
    )


def told(found: tuple[float, float, float], by: float, form: str = ".1f") -> str:
    mean, low, high = (by * value for value in found)
    return f"{mean:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def of_first(name: str) -> bool:
    """Is this metric the one that `chance` is of?"""
    return name.rpartition("/")[2].split(" ")[0] == "top1"


def drawn(groups: Groups, names: list[str]) -> dict[str, plots.Figure]:
    """{name: plot} of what there is to draw of these metrics, and of cost."""
    labels, found = list(groups), {}
    longest = max(
        (one.seconds for group in groups.values() for one in group if one.seconds), default=0
    )
    unit, per = ("hours", 3600) if longest >= 3600 else ("minutes", 60)
    for name in names:
        what, where = spoken(name)
        if lines := {
            label: points for label, group in groups.items() if (points := line(group, name))
        }:
            key = f"{name.rpartition('/')[0]}/chance"
            chance = [
                points[0][1]
                for group in groups.values()
                for one in group
                if (points := one.curve.get(key)) and of_first(name)
            ]
            scaled = {label: factor for label, factor in longer(groups).items() if label in lines}
            found[f"{name} by samples"] = plots.curves(
                where, lines, "samples seen", what, labels, scaled, level=next(iter(chance), None)
            )
        ended = {
            label: [one for one in group if name in one.final and one.seconds]
            for label, group in groups.items()
        }
        if ended := {label: group for label, group in ended.items() if group}:
            points = {
                label: (spread(group, "seconds", per), (0.0, *interval(values(group, name))))
                for label, group in ended.items()
            }
            recipes: dict[str, list[str]] = {}
            for label, group in ended.items():
                recipes.setdefault(repr(recipe(group[0].config)), []).append(label)
            found[f"{name} by time"] = plots.trade_off(
                where,
                points,
                [chain for chain in recipes.values() if len(chain) > 1],
                f"training time ({unit})",
                what,
                labels,
            )
    for name, key, what in (
        ("speed", "samples_per_s", "samples a second"),
        ("memory", "memory_gib", "peak memory (GiB)"),
    ):
        if any(spread(group, key) for group in groups.values()):
            found[name] = plots.bars(
                {label: spread(group, key) for label, group in groups.items()}, what, labels
            )
    if losses := {
        label: points
        for label, group in groups.items()
        if (points := mean_line([one.losses for one in group]))
    }:
        found["loss"] = plots.curves("", losses, "samples seen", "loss", labels, share=False)
    return found


def spread(group: list[Result], key: str, per: float = 1) -> plots.Point | None:
    """A cost of a group; its time is that of whole runs."""
    found = [
        getattr(one, key) / per
        for one in group
        if getattr(one, key) is not None and (key != "seconds" or one.state == "complete")
    ]
    return (0.0, *interval(found)) if found else None


def line(group: list[Result], metric: str) -> list[plots.Point]:
    return mean_line([one.curve.get(metric, []) for one in group])


def mean_line(runs: list[list[tuple[int, float]]]) -> list[plots.Point]:
    """(samples, mean, low, high) at all places where some run was measured."""
    at: dict[int, list[float]] = {}
    for points in runs:
        for samples, value in points:
            at.setdefault(samples, []).append(value)
    return [(samples, *interval(found)) for samples, found in sorted(at.items())]


def first(groups: Groups) -> Run | None:
    """The config that others are compared with."""
    return next((one.config for group in groups.values() for one in group if one.config), None)


def longer(groups: Groups) -> dict[str, float]:
    """{label: factor} of the groups that are the first one's recipe with a longer schedule."""
    base = first(groups)
    cfgs = {label: group[0].config for label, group in groups.items() if group and group[0].config}
    return {
        label: base.samples / cfg.samples
        for label, cfg in cfgs.items()
        if recipe(cfg) == recipe(base) and cfg.samples > base.samples
    }


def recipe(cfg: Run) -> Run:
    """A config without what a longer schedule changes."""
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


def run_details(label: str, one: Result, base: Run | None) -> str:
    name = one.run.name if label in str(one.run) else f"{label}: {one.run.name}"
    head = f"{escape(name)}, {one.state}" + (
        f' <span class="absent">({escape(one.reason)})</span>' if one.reason else ""
    )
    if one.config is None:
        return f"<details class='run'><summary>{head}</summary></details>"
    whole = plain(asdict(one.config))
    there, mine = flat(plain(asdict(base))), flat(whole)
    changed = [
        f"{key}: {value}" for key, value in mine.items() if key != "run" and there.get(key) != value
    ]
    changed += [f"{key}: none" for key in there if key not in mine]
    parts = [
        f"<pre>{escape(chr(10).join(one.commands)) or 'no command recorded'}</pre>",
        "<p>"
        + escape(", ".join(f"{key} {value}" for key, value in one.provenance.items()))
        + "</p>",
        f"<p>Unlike the first: {escape('; '.join(changed)) or 'nothing'}.</p>",
        "<details><summary>whole config</summary>"
        f"<pre>{escape(yaml.safe_dump(whole, sort_keys=False))}</pre></details>",
    ]
    return f'<details class="run"><summary>{head}</summary>{"".join(parts)}</details>'


def flat(tree: dict, before: str = "") -> dict:
    """{'a.b': value} of nested mappings."""
    found = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
        )
    return found


def curves_csv(groups: Groups) -> bytes:
    rows = [
        (label, one.run, one.config.seed, metric, samples, value)
        for label, group in groups.items()
        for one in group
        if one.config
        for metric, points in {"loss": one.losses, **one.curve}.items()
        for samples, value in points
    ]
    return table_csv(("group", "run", "seed", "metric", "samples", "value"), rows)


def runs_csv(groups: Groups) -> bytes:
    """A row a run; what is not known is empty."""
    keys = ("state", "reason", "samples", "seconds", "samples_per_s", "mfu", "memory_gib")
    rows = [
        (
            label,
            one.run,
            one.config and one.config.seed,
            *(getattr(one, key) for key in keys),
            one.provenance.get("commit"),
        )
        for label, group in groups.items()
        for one in group
    ]
    return table_csv(("group", "run", "seed", *keys, "commit"), rows)


def table_csv(head: tuple[str, ...], rows: list[tuple]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue().encode()


def beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}")
