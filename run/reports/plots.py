"""Plots of groups of runs, as SVG for a page and as PNG: Matplotlib's only door.

    figure = curves("seen concepts", {"flip": [(3200, 0.10, 0.09, 0.11), ...]}, "samples seen",
        "zero-shot top-1 (%)")
    svg(figure, "curves")        text that a page can hold beside others; png(figure) bytes

A point is (x, mean, low, high); low and high are nan where one run gives no interval. Shares are
drawn in per cent. A group's line has the id NAME-line-LABEL in the SVG, with _ for spaces. Colours
and marks follow the order of groups, the same in all plots.
"""

import io
import math
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Point = tuple[float, float, float, float]
# Okabe and Ito's, told apart by all eyes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "osD^vPX"
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
# inches: of a plot that is read on a phone's width; of a line of its legend
WIDE, HIGH, LEGEND = 4.3, 2.9, 0.2


def curves(
    title: str,
    lines: dict[str, list[Point]],
    x: str,
    y: str,
    colours: list[str],
    scaled: dict[str, float] | None = None,
    share: bool = True,
    level: float | None = None,
) -> Figure:
    """Means with a band from low to high.

    colours: labels of all groups, in their order. scaled: groups to draw a second time, dashed,
    with x multiplied so (FLIP, figure 4c). level: a dotted line across, of chance.
    """
    figure, axes = blank(title, x, y, len(lines) + len(scaled or ()) + (level is not None))
    for label, points in lines.items():
        colour, mark = look(label, colours)
        xs, means, lows, highs = columns(points, 100 if share else 1)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
        # a loss has a point a record: marks only where they can be told apart
        axes.plot(
            xs,
            means,
            color=colour,
            marker=mark if len(xs) <= 40 else None,
            label=label,
            gid=named("line", label),
        )
        if factor := (scaled or {}).get(label):
            axes.plot(
                [factor * at for at in xs],
                means,
                color=colour,
                linestyle="--",
                linewidth=1.2,
                gid=named("scaled", label),
                label=f"{label}, x scaled by {factor:.3g}",
            )
    if level is not None:
        axes.axhline(
            100 * level, color="#888888", linestyle=":", linewidth=1, label="chance", gid="chance"
        )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    return finished(figure)


def trade_off(
    title: str,
    points: dict[str, tuple[Point, Point]],
    chains: list[list[str]],
    x: str,
    y: str,
    colours: list[str],
) -> Figure:
    """A mark a group with intervals in x and y: {label: ((.., x, low, high), (.., y, low, high))}.

    chains: groups that a line joins, as one recipe trained for longer and longer (FLIP, figure 1).
    """
    figure, axes = blank(title, x, y, len(points))
    for chain in chains:
        joined = sorted((points[label][0][1], 100 * points[label][1][1]) for label in chain)
        axes.plot(*zip(*joined), color="#999999", linewidth=1, zorder=1)
    for label, (across, up) in points.items():
        colour, mark = look(label, colours)
        axes.errorbar(
            across[1],
            100 * up[1],
            xerr=arms(across),
            yerr=arms(up, 100),
            fmt="none",
            ecolor=colour,
            capsize=2,
            elinewidth=1,
        )
        axes.plot(
            across[1],
            100 * up[1],
            color=colour,
            marker=mark,
            markersize=6,
            linestyle="none",
            label=label,
            gid=named("line", label),
        )
    axes.margins(0.12)
    axes.set_xlim(left=0)
    return finished(figure)


def bars(values: dict[str, Point | None], x: str, colours: list[str]) -> Figure:
    """A bar a group, with its interval; a group without a value has no bar and says so."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDE, 0.7 + 0.28 * len(values)), layout="constrained")
        axes = figure.subplots()
    for row, (label, point) in enumerate(values.items()):
        if point is None:
            axes.annotate(
                "absent",
                (0, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                color="#888888",
                style="italic",
            )
            continue
        axes.barh(
            row,
            point[1],
            xerr=arms(point),
            color=look(label, colours)[0],
            height=0.6,
            error_kw=dict(elinewidth=1, capsize=2),
            gid=named("line", label),
        )
        axes.annotate(
            f" {point[1]:.3g}",
            (point[3] if point[3] == point[3] else point[1], row),
            (2, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set(xlabel=x, yticks=range(len(values)), yticklabels=list(values))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def blank(title: str, x: str, y: str, named: int):
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDE, HIGH + LEGEND * math.ceil(named / 2)), layout="constrained")
        axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes


def finished(figure: Figure) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def look(label: str, colours: list[str]) -> tuple[str, str]:
    """A group's colour and mark."""
    at = colours.index(label)
    return COLOURS[at % len(COLOURS)], MARKS[(at + at // len(COLOURS)) % len(MARKS)]


def named(kind: str, label: str) -> str:
    """An id, which holds no spaces."""
    return f"{kind}-" + re.sub(r"\s", "_", label)


def columns(points: list[Point], by: float) -> list[list[float]]:
    xs, *rest = zip(*points)
    return [list(xs), *([by * value for value in column] for column in rest)]


def arms(point: Point, by: float = 1) -> list[list[float]] | None:
    """What error bars are told: the distances from the mean to low and high."""
    _, mean, low, high = point
    return None if math.isnan(low) else [[by * (mean - low)], [by * (high - mean)]]


def png(figure: Figure) -> bytes:
    return saved(figure, format="png", dpi=200, metadata={"Software": None})


def svg(figure: Figure, name: str) -> str:
    """As an element of a page.

    Ids begin with `name`, so that those of several plots do not meet.
    """
    text = saved(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(
        r'<svg (.*?)width="[\d.]+pt" ',
        r"<svg \1",
        re.sub(r' height="[\d.]+pt"', "", text, count=1),
        count=1,
    )


def saved(figure: Figure, **how) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, **how)
    return out.getvalue()
