"""The report's figures: each function draws one thing and returns a `Drawing`.

Blocks count from 0. Each figure is small enough to be read on a phone at its own size; wide ones scroll there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ppcl.replacements import Interval, LinearFfn, Plan, PrunedFfn, PrunedHeads, Replacement, TextRun
from ppcl.report import numbers
from ppcl.report.summary import finite
from ppcl.report.svg import COLOURS, SERIES, canvas, inline
from ppcl.search.variants import TEACHER

COLOUR_MAP = "viridis"  # even steps for every kind of colour vision
ON_MAP = "#c4104f"  # of outlines on a heat map, whose colours are the same in light and dark mode
CURVE_POINTS = 300  # more cannot be told apart at this size
LONGEST_LABEL = 16

_DASHES = ("", "5 3", "1.5 2.5")
_MARKERS = "osD^v"

# The first and the last block of an interval, or the first block of a list and the first behind it.
BlockPair = tuple[int, int]
Table = list[list[float | None]]


@dataclass(frozen=True)
class Series:
    """How one variant or replacement is drawn, in every figure alike."""

    label: str
    role: str
    dash: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """matplotlib's arguments."""
        style = (0, tuple(float(v) for v in self.dash.split())) if self.dash else "-"
        return {"color": COLOURS[self.role], "linestyle": style}


@dataclass(frozen=True)
class Drawing:
    """A figure for the page; its legend is set as text beside it, so that it wraps and stays legible."""

    svg: Markup
    title: str
    legend: list[Series] = field(default_factory=list)


def series_of(names: Sequence[str]) -> dict[str, Series]:
    """A look for each name: the teacher in ink, the others by hue, then by dash and marker."""
    others = [name for name in names if name != TEACHER]
    looks = {
        name: Series(name, f"series-{i % SERIES}", _DASHES[i // SERIES % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(others)
    }
    return {TEACHER: Series(TEACHER, "ink", "", "o"), **looks}


def interval_name(interval: Sequence[int]) -> str:
    return f"{interval[0]} to {interval[1]}"


def _bar(axes: Axes, run: Replacement, bottom: float, height: float) -> None:
    """A bar over the blocks of a run."""
    corner, width = (run.first + 0.08, bottom), run.last - run.first + 0.84
    axes.add_patch(Rectangle(corner, width, height, color=COLOURS["mark"], linewidth=0))


def _dot(axes: Axes, ffn: Replacement, row: int, inner: str) -> None:
    """A dot in the cell of a block."""
    axes.plot([ffn.first + 0.5], [row - 0.06], "o", color=COLOURS["mark"], markersize=5, markerfacecolor=inner)


def _dash(axes: Axes, heads: Replacement, row: int) -> None:
    """A dash at the top of a block's cell, beside which a dot has room."""
    axes.add_patch(Rectangle((heads.first + 0.24, row - 0.27), 0.52, 0.07, color=COLOURS["mark"], linewidth=0))


_BLOCK_MARKS: dict[type[Replacement], Callable[[Axes, Replacement, int], None]] = {
    Interval: lambda axes, interval, row: _bar(axes, interval, row - 0.32, 0.64),
    TextRun: lambda axes, run, row: _bar(axes, run, row + 0.2, 0.12),
    LinearFfn: lambda axes, ffn, row: _dot(axes, ffn, row, COLOURS["mark"]),
    PrunedFfn: lambda axes, ffn, row: _dot(axes, ffn, row, "none"),
    PrunedHeads: _dash,
}


def block_map(rows: list[dict[str, Any]], blocks: int, block_ranges: list[BlockPair]) -> Drawing:
    """Which blocks each variant runs: teacher blocks as cells, an interval's one student as a bar over its blocks.

    A line under cells is a text run, a dot in a cell a replaced FFN, a dash at its top an attention with fewer heads.
    """
    height = 26 * len(rows) + 48
    with canvas(640, height) as figure:
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            plan = Plan(row["plan"])
            replaced = {block for replacement in plan if replacement.removed for block in replacement.blocks}
            for block in sorted(set(range(blocks)) - replaced):
                axes.add_patch(Rectangle((block + 0.08, y - 0.32), 0.84, 0.64, color=COLOURS["faint"], linewidth=0))
            for replacement in plan:
                # Low-rank modulations are in every block: nothing to tell blocks apart by.
                if mark := _BLOCK_MARKS.get(type(replacement)):
                    mark(axes, replacement, y)
        span_borders(axes, block_ranges, 0)
        axes.set(xlim=(0, blocks), ylim=(len(rows) - 0.5, -0.5), xlabel="block")
        ticks = np.arange(0, blocks, 1 if blocks <= 24 else 5)
        axes.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
        axes.set_yticks(range(len(rows)), [_short(row["variant"]) for row in rows], color=COLOURS["ink"])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        told = "; ".join(f"{row['variant']}: " + (", ".join(row["plan"]) or "nothing replaced") for row in rows)
        return Drawing(inline(figure, "blocks", f"What is replaced, by variant. {told}."), "")


SURROGATE = ("linear up to block k", "block u kept")
SAME_STREAM = ("behind block s", "behind block r")


def heat_map(
    name: str,
    title: str,
    table: Table,
    intervals: list[BlockPair],
    block_ranges: list[BlockPair],
    low: float,
    axis_names: tuple[str, str] = SURROGATE,
) -> Drawing:
    """CKA by row and column, such as of the surrogate that keeps block `u` and is linear up to `k`, with intervals."""
    values = np.array([[np.nan if v is None else v for v in row] for row in table], dtype=float)
    blocks = len(values)
    with canvas(350, 294) as figure:
        axes, bar = map_axes(figure, 350, 294, side=244)
        axes.imshow(values, cmap=COLOUR_MAP, vmin=low, vmax=1, interpolation="none")
        for first, last in intervals:
            corners = _staircase(first, last)
            axes.add_patch(Polygon(corners, fill=False, edgecolor="white", linewidth=3.2, joinstyle="miter"))
            axes.add_patch(Polygon(corners, fill=False, edgecolor=ON_MAP, linewidth=1.8, joinstyle="miter"))
        span_borders(axes, block_ranges, -0.5)
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[:].set_visible(False)
        colour_bar(bar, COLOUR_MAP, low, 1)
        upper = values[np.triu_indices(blocks, 1)]
        told = f"from {np.nanmin(upper):.3f} to {np.nanmax(upper):.3f}" if np.isfinite(upper).any() else "no values"
        marked = ", ".join(interval_name(pair) for pair in intervals) or "none"
        label = f"Heat map of CKA, {title}: {blocks} by {blocks} blocks, {told}. Intervals outlined: {marked}."
        return Drawing(inline(figure, name, label), title)


def map_axes(figure: Figure, width: int, height: int, side: int) -> tuple[Axes, Axes]:
    """Axes of a heat map with sides of `side` pixels, and of the bar of its colours, on a canvas of that size.

    The automatic layout cannot hold a bar to a square.
    """
    left, bottom = 44, 42
    figure.set_layout_engine("none")
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    bar = figure.add_axes(((left + side + 8) / width, bottom / height, 12 / width, side / height))
    return axes, bar


def colour_bar(bar: Axes, colour_map: str, low: float, high: float) -> None:
    """Which colour stands for which value from `low` to `high`."""
    colours = np.linspace(high, low, 64)[:, None]
    bar.imshow(colours, cmap=colour_map, extent=(0, 1, low, high), aspect="auto", interpolation="none")
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_major_locator(MaxNLocator(5))
    bar.spines[:].set_visible(False)


def _staircase(first: int, last: int) -> list[tuple[float, float]]:
    """The outline of the cells `first ≤ u ≤ k ≤ last`, as (k, u) corners."""
    corners = [(first - 0.5, first - 0.5), (last + 0.5, first - 0.5), (last + 0.5, last + 0.5)]
    for block in range(last, first, -1):
        corners += [(block - 0.5, block + 0.5), (block - 0.5, block - 0.5)]
    return [*corners, (first - 0.5, first + 0.5)]


def delta_curves(table: Table, intervals: list[BlockPair], block_ranges: list[BlockPair]) -> Drawing:
    """The similarity each further block costs: the intervals' curves over all others, with the rise that ends each."""
    blocks = len(table)
    with canvas(640, 300) as figure:
        axes = figure.add_subplot()
        shown: list[float] = []
        for u, row in enumerate(table):
            axes.plot(range(u + 1, blocks), [_nan(v) for v in row[u + 1 :]], color=COLOURS["faint"], linewidth=0.9)
        for first, last in intervals:
            axes.axvspan(first - 0.46, last + 0.46, color=COLOURS["mark"], alpha=0.1, linewidth=0)
            curve = [_nan(v) for v in table[first]]
            axes.plot(
                range(first + 1, last + 1), curve[first + 1 : last + 1], color=COLOURS["mark"], marker="o", markersize=4
            )
            if last + 1 < blocks:
                axes.plot(
                    [last, last + 1],
                    curve[last : last + 2],
                    color=COLOURS["mark"],
                    linestyle=(0, (2, 2)),
                    linewidth=1.4,
                )
            shown += curve[first + 1 : last + 2]
        span_borders(axes, block_ranges, -0.5)
        seen = [v for v in shown if np.isfinite(v)]
        if seen:
            # Curves of other starts may leave the frame: the intervals' own are what is to be read.
            margin = 0.12 * (max(seen) - min(seen)) or 0.01
            axes.set_ylim(min(seen) - margin, max(seen) + margin)
        axes.axhline(0, color=COLOURS["rule"], linewidth=0.8, zorder=0)
        axes.set(xlim=(-0.5, blocks - 0.5), xlabel="block k", ylabel="Δ(u, k)")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        marked = ", ".join(interval_name(pair) for pair in intervals) or "none"
        label = f"Curves of the similarity each further block costs, from every start. Intervals: {marked}."
        return Drawing(inline(figure, "delta", label), "")


def loss_curves(trained: dict[str, Any]) -> Drawing:
    """The distillation loss of each replacement over the steps, on a logarithmic scale."""
    looks = series_of(list(trained))
    curves = {name: told["curve"] for name, told in trained.items()}
    with canvas(640, 300) as figure:
        axes = figure.add_subplot()
        for name, curve in curves.items():
            steps, losses = _thinned([(point["step"], _nan(point["loss"])) for point in curve])
            look = looks[name].line | ({"marker": "o"} if len(steps) == 1 else {})
            axes.plot(steps, losses, linewidth=1.5, **look)
        if any((finite(point["loss"]) or 0) > 0 for curve in curves.values() for point in curve):
            axes.set_yscale("log")
            plain_log(axes.yaxis)
        axes.grid(axis="y")
        axes.set(xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ends = "; ".join(
            f"{name}: {numbers.significant(finite(curve[-1]['loss']))}" for name, curve in curves.items() if curve
        )
        label = f"Distillation loss by step, by replacement. Last values: {ends}."
        return Drawing(inline(figure, "loss", label), "", [looks[name] for name in curves])


def before_and_after(plans: list[dict[str, Any]]) -> Drawing | None:
    """The velocity error of each measured plan before fine-tuning (across) and after (up); below the line is better."""
    pairs = ((finite(row["before"]), finite(row["after"])) for row in plans)
    # The axes are logarithmic.
    points = [(b, a) for b, a in pairs if b is not None and a is not None and b > 0 and a > 0]
    if not points:
        return None
    with canvas(350, 300) as figure:
        axes = figure.add_subplot()
        low, high = min(map(min, points)) / 1.4, max(map(max, points)) * 1.4
        axes.plot([low, high], [low, high], color=COLOURS["rule"], linewidth=1)
        axes.plot(*zip(*points), "o", color=COLOURS["mark"], markersize=4.5, markeredgewidth=0, alpha=0.8)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            plain_log(axis)
        axes.set(xlabel="velocity error before", ylabel="velocity error after")
        better = sum(a < b for b, a in points)
        label = (
            f"Velocity error of {len(points)} plans before and after fine-tuning; {better} of them are better after it."
        )
        return Drawing(inline(figure, "before-after", label), "")


def ablation_bars(rows: list[dict[str, Any]]) -> Drawing:
    """The velocity error of every row of the ablation, with its interval of confidence; smaller is better."""
    with canvas(640, 30 * len(rows) + 60) as figure:
        axes = figure.add_subplot()
        roles = {
            group: role for group, role in zip(dict.fromkeys(row["group"] for row in rows), ("mark", "soft", "ink"))
        }
        for y, row in enumerate(rows):
            mean, low, high = row["velocity_error"]
            axes.plot([max(low, mean / 10), high], [y, y], color=COLOURS[roles[row["group"]]], linewidth=2)
            axes.plot([mean], [y], "o", color=COLOURS[roles[row["group"]]], markersize=6, markeredgewidth=0)
        axes.set(xscale="log", ylim=(len(rows) - 0.5, -0.5), xlabel="velocity error")
        plain_log(axes.xaxis)
        axes.set_yticks(range(len(rows)), [row["label"].strip() for row in rows], color=COLOURS["ink"])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        told = "; ".join(f"{row['label'].strip()}: {numbers.mean_between(row['velocity_error'])}" for row in rows)
        return Drawing(inline(figure, "ablation", f"Velocity error by row of the ablation. {told}."), "")


def velocity_curves(measured: dict[str, Any], looks: dict[str, Series]) -> Drawing | None:
    """Velocity error by timestep, the noise at the left as in sampling. The teacher's own is zero and not drawn."""
    names = [name for name in looks if name != TEACHER and measured.get(name, {}).get("velocity_by_timestep")]
    if not names:
        return None
    with canvas(640, 320) as figure:
        axes = figure.add_subplot()
        for name in names:
            points = sorted((p["timestep"], _nan(p["error"])) for p in measured[name]["velocity_by_timestep"])
            axes.plot(*zip(*points), marker=looks[name].marker, markersize=4.5, **looks[name].line)
        axes.grid(axis="y")
        axes.set_ylim(bottom=0)
        axes.invert_xaxis()
        axes.set(xlabel="timestep, as the share of noise (sampling goes from left to right)", ylabel="velocity error")
        told = "; ".join(
            f"{name}: {numbers.significant(finite(measured[name].get('velocity_error')))} on average" for name in names
        )
        legend = [looks[name] for name in names]
        return Drawing(inline(figure, "velocity", f"Velocity error by timestep. {told}."), "", legend)


def size_scatter(rows: list[dict[str, Any]], looks: dict[str, Series], key: str, title: str) -> Drawing | None:
    """Quality against size; `key` is `R` (in %, with its interval of confidence) or `velocity_error`."""
    drawn = [row for row in rows if row["share"] is not None and row[key] is not None]
    if not any(row["variant"] != TEACHER for row in drawn):
        return None
    with canvas(350, 270) as figure:
        axes = figure.add_subplot()
        for row in drawn:
            look = looks[row["variant"]]
            x, y = 100 * row["share"], row[key]
            low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=COLOURS[look.role], linewidth=1.4)
            axes.plot(
                [x],
                [y],
                look.marker,
                color=COLOURS[look.role],
                markersize=8.5,
                markeredgecolor=COLOURS["paper"],
                markeredgewidth=0.7,
                clip_on=False,
            )
        axes.grid()
        axes.margins(0.12)
        if key != "R":
            axes.set_ylim(bottom=0)
        axes.set(
            xlabel="share of the teacher's parameters, %",
            ylabel="R, % (lower is better)" if key == "R" else title.lower(),
        )
        told = "; ".join(
            f"{row['variant']}: {100 * row['share']:.1f} %, {numbers.significant(row[key])}" for row in drawn
        )
        label = f"{title} against the share of the teacher's parameters. {told}."
        return Drawing(inline(figure, f"size-{key}", label), title, [looks[row["variant"]] for row in drawn])


def category_scores(measured: dict[str, Any], looks: dict[str, Series]) -> list[Drawing]:
    """Checker score with its interval of confidence, one small figure a category, one line a variant."""
    worlds = {name: measured[name]["world"] for name in looks if (measured.get(name) or {}).get("world")}
    categories = dict.fromkeys(category for world in worlds.values() for category in world["categories"])
    return [_category(index, category, worlds, looks) for index, category in enumerate(categories)]


def _category(index: int, category: str, worlds: dict[str, Any], looks: dict[str, Series]) -> Drawing:
    title = category.replace("_", " ")
    told = []
    with canvas(330, 24 * len(worlds) + 34) as figure:
        axes = figure.add_subplot()
        for y, (name, world) in enumerate(worlds.items()):
            scores = {key: finite(value) for key, value in world["categories"].get(category, {}).items()}
            share, low, high = (scores.get(key) for key in ("score", "low", "high"))
            if share is None:
                continue
            score, colour = 100 * share, COLOURS[looks[name].role]
            if low is not None and high is not None:
                axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2)
            axes.plot([score], [y], looks[name].marker, color=colour, markersize=7, markeredgewidth=0, clip_on=False)
            axes.annotate(
                f"{score:.0f}",
                (1, y),
                (8, 0),
                ("axes fraction", "data"),
                "offset points",
                va="center",
                color=COLOURS["ink"],
            )
            told.append(f"{name} {score:.0f} %")
        axes.set(xlim=(0, 100), ylim=(len(worlds) - 0.5, -0.5))
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_yticks(range(len(worlds)), [_short(name) for name in worlds])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        return Drawing(inline(figure, f"category-{index}", f"Checker score, {title}: {', '.join(told)}."), title)


def span_borders(axes: Axes, block_ranges: list[BlockPair], offset: float) -> None:
    """Dashed lines where one block list ends and the next begins."""
    for start, _ in block_ranges[1:]:
        axes.axvline(start + offset, color=COLOURS["soft"], linewidth=1, linestyle=(0, (4, 3)))


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _thinned(points: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """At most `CURVE_POINTS` points, each the mean of its neighbours."""
    array = np.array(points, dtype=float).reshape(-1, 2)
    together = -(-len(array) // CURVE_POINTS) or 1
    means = np.array([array[i : i + together].mean(axis=0) for i in range(0, len(array), together)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _short(name: str) -> str:
    name = "".join(letter for letter in name if letter.isprintable())
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _nan(value: float | None) -> float:
    number = finite(value)
    return float("nan") if number is None else number
