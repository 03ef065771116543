"""Plots of groups of runs, as SVG for the HTML page and as PNG. Only this module uses Matplotlib.

    figure = plot_curves(
        "seen concepts",
        {"flip": [(3200, 0.10, 0.09, 0.11), ...]},
        "samples seen",
        "zero-shot top-1 (%)",
        colors=["flip"],
    )
    render_svg(figure, "curves")        text for a page with several plots
    render_png(figure)                  bytes

A point is (x, mean, low, high); low and high are nan if there is no interval. Metrics are fractions
and plotted in per cent. In the SVG, the line of a group has the id NAME-line-LABEL, with _ for
spaces. Colors and markers follow the order of the groups and are the same in all plots.
"""

import io
import math
import re
from typing import Any

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ImportError:  # without the extra `plots` only plotting fails; see check_matplotlib
    matplotlib = None
    Axes = Figure = Any

Point = tuple[float, float, float, float]
# The palette of Okabe and Ito, which is safe for color-blind readers.
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
# Size in inches of a plot that fits on a phone, and the height of a line of its legend.
WIDTH = 4.3
HEIGHT = 2.9
LEGEND_LINE = 0.2
MAX_MARKERS = 40  # a line with more points, such as a loss, has no markers


def check_matplotlib() -> None:
    """Raise ValueError if Matplotlib is not installed."""
    if matplotlib is None:
        raise ValueError("plots need Matplotlib; run: pip install 'glimpse-clip[plots]'")


def plot_curves(
    title: str,
    lines: dict[str, list[Point]],
    x: str,
    y: str,
    colors: list[str],
    scaled: dict[str, float] | None = None,
    is_fraction: bool = True,
    level: float | None = None,
) -> Figure:
    """Return a plot of means with a band from low to high.

    lines: {label: points}.
    colors: labels of all groups, in their order.
    scaled: {label: factor} for lines that are plotted a second time, dashed and with x multiplied
        by the factor (FLIP, figure 4c).
    is_fraction: y values are fractions and are plotted in per cent.
    level: chance level, plotted as a dotted horizontal line.
    """
    scaled = scaled or {}
    legend_entries = len(lines) + len(scaled) + (level is not None)
    figure, axes = empty_plot(title, x, y, legend_entries)
    for label, points in lines.items():
        color, marker = group_style(label, colors)
        xs, means, lows, highs = point_columns(points, 100 if is_fraction else 1)
        axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
        line_marker = marker if len(xs) <= MAX_MARKERS else None
        gid = element_id("line", label)
        axes.plot(xs, means, color=color, marker=line_marker, label=label, gid=gid)
        factor = scaled.get(label)
        if factor:
            scaled_xs = [factor * value for value in xs]
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
    """Return a plot with one marker per group, and intervals in x and y.

    points: {label: (cost, metric)}. Both are points, of which only mean, low and high are used; the
        metric is a fraction.
    chains: labels of groups to join by a line, such as one recipe with longer and longer schedules
        (FLIP, figure 1).
    """
    figure, axes = empty_plot(title, x, y, len(points))
    for chain in chains:
        positions = []
        for label in chain:
            (_, mean_x, *_), (_, mean_y, *_) = points[label]
            positions.append((mean_x, 100 * mean_y))
        xs, ys = zip(*sorted(positions))
        axes.plot(xs, ys, color="#999999", linewidth=1, zorder=1)
    for label, (cost, metric) in points.items():
        color, marker = group_style(label, colors)
        x_mean = cost[1]
        y_mean = 100 * metric[1]
        caps = dict(fmt="none", ecolor=color, capsize=2, elinewidth=1)
        axes.errorbar(x_mean, y_mean, xerr=error_bars(cost), yerr=error_bars(metric, 100), **caps)
        style = dict(color=color, marker=marker, markersize=6, linestyle="none")
        axes.plot(x_mean, y_mean, label=label, gid=element_id("line", label), **style)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    return add_legend(figure)


def plot_bars(values: dict[str, Point | None], x: str, colors: list[str]) -> Figure:
    """Return a plot with one bar per group and its interval; a missing value is marked `absent`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.7 + 0.28 * len(values)), layout="constrained")
        axes = figure.subplots()
    text_style = dict(textcoords="offset points", va="center")
    for row, (label, point) in enumerate(values.items()):
        if point is None:
            absent_style = dict(color="#888888", style="italic", **text_style)
            axes.annotate("absent", (0, row), (4, 0), **absent_style)
            continue
        _, mean, _, high = point
        color, _marker = group_style(label, colors)
        axes.barh(
            row,
            mean,
            xerr=error_bars(point),
            color=color,
            height=0.6,
            error_kw=dict(elinewidth=1, capsize=2),
            gid=element_id("line", label),
        )
        # Write the value to the right of the bar and its interval.
        end = mean if math.isnan(high) else high
        axes.annotate(f" {mean:.3g}", (end, row), (2, 0), fontsize=8, **text_style)
    axes.set(xlabel=x, yticks=range(len(values)), yticklabels=list(values))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def empty_plot(title: str, x: str, y: str, legend_entries: int) -> tuple[Figure, Axes]:
    """Return an empty plot with room for a legend in two columns."""
    height = HEIGHT + LEGEND_LINE * math.ceil(legend_entries / 2)
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
    """Return the color and the marker of a group."""
    index = colors.index(label)
    color = COLORS[index % len(COLORS)]
    # When the colors repeat, each is combined with another marker than before.
    marker = MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
    return color, marker


def element_id(kind: str, label: str) -> str:
    """Return an id for an SVG element, with _ for spaces."""
    return f"{kind}-" + re.sub(r"\s", "_", label)


def point_columns(points: list[Point], factor: float) -> list[list[float]]:
    """Return the lists of x, mean, low and high; the last three are multiplied by `factor`."""
    xs, *columns = zip(*points)
    result = [list(xs)]
    for column in columns:
        result.append([factor * value for value in column])
    return result


def error_bars(point: Point, factor: float = 1) -> list[list[float]] | None:
    """Return the distances from the mean to low and high, as matplotlib expects them."""
    _, mean, low, high = point
    if math.isnan(low):
        return None
    return [[factor * (mean - low)], [factor * (high - mean)]]


def render_png(figure: Figure) -> bytes:
    return render_figure(figure, format="png", dpi=200, metadata={"Software": None})


def render_svg(figure: Figure, name: str) -> str:
    """Return the plot as an <svg> element.

    All ids start with `name`, so that the plots of a page do not share ids.
    """
    text = render_figure(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # Remove width and height, because the page sets the size.
    text = re.sub(r' height="[\d.]+pt"', "", text, count=1)
    return re.sub(r'<svg (.*?)width="[\d.]+pt" ', r"<svg \1", text, count=1)


def render_figure(figure: Figure, **options: Any) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, **options)
    return out.getvalue()
