"""Plots of groups of runs, as SVG for a page and as PNG; only this module uses Matplotlib.

    figure = curves("seen concepts", {"flip": [(3200, 0.10, 0.09, 0.11), ...]}, "samples seen",
        "zero-shot top-1 (%)")
    svg(figure, "curves")        text for a page that may have other plots; png(figure): bytes

A point is (x, mean, low, high); low and high are nan where one run gives no interval. Shares are
plotted in per cent. A group's line has the id NAME-line-LABEL in the SVG, with _ for spaces. Colors
and marks follow the order of groups, the same in all plots.
"""

import io
import math
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Point = tuple[float, float, float, float]
# Okabe and Ito's, which color-blind people can tell apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "glimpse",
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# inches: width and height of a plot that fits a phone, height of a line of its legend
WIDTH, HEIGHT, LEGEND_LINE = 4.3, 2.9, 0.2


def plot_curves(
    title: str,
    lines: dict[str, list[Point]],
    x: str,
    y: str,
    colors: list[str],
    scaled: dict[str, float] | None = None,
    share: bool = True,
    level: float | None = None,
) -> Figure:
    """Return a plot of means with a band from low to high.

    colors: labels of all groups, in their order. scaled: {group: factor}, to plot a second time,
    dashed, with x multiplied (FLIP, figure 4c). share: values are shares, plotted in per cent.
    level: of chance, a dotted line across.
    """
    scaled = scaled or {}
    legend_entries = len(lines) + len(scaled) + (level is not None)
    figure, axes = empty_plot(title, x, y, legend_entries)
    for label, points in lines.items():
        color, mark = group_style(label, colors)
        xs, means, lows, highs = point_columns(points, 100 if share else 1)
        axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
        # a loss has a point a record, too many for marks
        marker = mark if len(xs) <= 40 else None
        gid = element_id("line", label)
        axes.plot(xs, means, color=color, marker=marker, label=label, gid=gid)
        factor = scaled.get(label)
        if factor:
            scaled_xs = [factor * at for at in xs]
            scaled_label = f"{label}, x scaled by {factor:.3g}"
            dashed = dict(color=color, linestyle="--", linewidth=1.2)
            gid = element_id("scaled", label)
            axes.plot(scaled_xs, means, label=scaled_label, gid=gid, **dashed)
    if level is not None:
        dotted = dict(color="#888888", linestyle=":", linewidth=1)
        axes.axhline(100 * level, label="chance", gid="chance", **dotted)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    return add_legend(figure)


def plot_trade_off(
    title: str,
    points: dict[str, tuple[Point, Point]],
    chains: list[list[str]],
    x: str,
    y: str,
    colors: list[str],
) -> Figure:
    """Return a plot of a mark a group, with intervals in x and y.

    points: {label: ((.., x, low, high), (.., y, low, high))}, y as shares. chains: groups joined by
    a line, as one recipe trained for longer and longer (FLIP, figure 1).
    """
    figure, axes = empty_plot(title, x, y, len(points))
    for chain in chains:
        joined = []
        for label in chain:
            (_, mean_x, *_), (_, mean_y, *_) = points[label]
            joined.append((mean_x, 100 * mean_y))
        xs, ys = zip(*sorted(joined))
        axes.plot(xs, ys, color="#999999", linewidth=1, zorder=1)
    for label, (across, up) in points.items():
        color, mark = group_style(label, colors)
        x_mean = across[1]
        y_mean = 100 * up[1]
        caps = dict(fmt="none", ecolor=color, capsize=2, elinewidth=1)
        axes.errorbar(x_mean, y_mean, xerr=error_bars(across), yerr=error_bars(up, 100), **caps)
        style = dict(color=color, marker=mark, markersize=6, linestyle="none")
        axes.plot(x_mean, y_mean, label=label, gid=element_id("line", label), **style)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    return add_legend(figure)


def plot_bars(values: dict[str, Point | None], x: str, colors: list[str]) -> Figure:
    """Return a bar a group, with its interval; a group without a value is marked as absent."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.7 + 0.28 * len(values)), layout="constrained")
        axes = figure.subplots()
    beside = dict(textcoords="offset points", va="center")
    for row, (label, point) in enumerate(values.items()):
        if point is None:
            axes.annotate("absent", (0, row), (4, 0), color="#888888", style="italic", **beside)
            continue
        _, mean, _, high = point
        color, _mark = group_style(label, colors)
        axes.barh(
            row,
            mean,
            xerr=error_bars(point),
            color=color,
            height=0.6,
            error_kw=dict(elinewidth=1, capsize=2),
            gid=element_id("line", label),
        )
        # the value stands to the right of the bar and its interval
        end = mean if math.isnan(high) else high
        axes.annotate(f" {mean:.3g}", (end, row), (2, 0), fontsize=8, **beside)
    axes.set(xlabel=x, yticks=range(len(values)), yticklabels=list(values))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def empty_plot(title: str, x: str, y: str, named: int) -> tuple[Figure, Axes]:
    """Return an empty plot with room for a legend of `named` entries in two columns."""
    height = HEIGHT + LEGEND_LINE * math.ceil(named / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes


def add_legend(figure: Figure) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def group_style(label: str, colors: list[str]) -> tuple[str, str]:
    """Return a group's color and mark."""
    at = colors.index(label)
    color = COLORS[at % len(COLORS)]
    # when the colors begin again, each has another mark than before
    mark = MARKERS[(at + at // len(COLORS)) % len(MARKERS)]
    return color, mark


def element_id(kind: str, label: str) -> str:
    """Return an id, without spaces."""
    return f"{kind}-" + re.sub(r"\s", "_", label)


def point_columns(points: list[Point], by: float) -> list[list[float]]:
    """Return the lists of x, mean, low and high, the last three multiplied by `by`."""
    xs, *rest = zip(*points)
    result = [list(xs)]
    for column in rest:
        result.append([by * value for value in column])
    return result


def error_bars(point: Point, by: float = 1) -> list[list[float]] | None:
    """Return the lengths of error bars: the distances from the mean to low and high."""
    _, mean, low, high = point
    if math.isnan(low):
        return None
    return [[by * (mean - low)], [by * (high - mean)]]


def render_png(figure: Figure) -> bytes:
    return render_figure(figure, format="png", dpi=200, metadata={"Software": None})


def render_svg(figure: Figure, name: str) -> str:
    """Return the plot as an element of a page.

    Ids begin with `name`, so that no two plots of a page share one.
    """
    text = render_figure(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # the page sets the size
    text = re.sub(r' height="[\d.]+pt"', "", text, count=1)
    return re.sub(r'<svg (.*?)width="[\d.]+pt" ', r"<svg \1", text, count=1)


def render_figure(figure: Figure, **how: Any) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, **how)
    return out.getvalue()
