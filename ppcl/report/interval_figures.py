"""The figures of measured detection: sensitivities, the best plans, and how certain their boundaries are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

from ppcl.report import numbers
from ppcl.report.figures import (
    COLOUR_MAP,
    ON_MAP,
    BlockPair,
    Drawing,
    Series,
    colour_bar,
    interval_name,
    map_axes,
    plain_log,
    span_borders,
)
from ppcl.report.svg import COLOURS, canvas, inline

BEST_PLANS = Series("Best plans of all measured intervals", "mark", "", "o")
ALGORITHM = Series("Algorithm 1’s intervals, cheapest first", "soft", "5 3", "s")

# By number of removed blocks, the sum of a plan's sensitivities.
Front = Sequence[tuple[int, float]]

_MAP_COLOURS = f"{COLOUR_MAP}_r"  # bright is good, as in the maps of CKA
_RING = "black"  # inside a white one: it is seen on every colour of the map


def sensitivity_map(
    sensitivity: Mapping[BlockPair, float],
    block_ranges: Sequence[BlockPair],
    distilled: Sequence[BlockPair],
    algorithm: Sequence[BlockPair],
) -> Drawing | None:
    """The sensitivity of every interval by its first block (rows) and its last one (columns), in logarithmic colours.

    A square marks each interval of `distilled`, a ring each of `algorithm`. What was not measured is blank.
    """
    # The colours are logarithmic.
    measured = {pair: value for pair, value in sensitivity.items() if value > 0}
    if not measured:
        return None
    blocks, low, high = block_ranges[-1][1], min(measured.values()), max(measured.values())
    decades = np.full((blocks, blocks), np.nan)
    for pair, value in measured.items():
        decades[pair] = np.log10(value)
    bottom, top = np.log10(low) - 0.01, np.log10(high) + 0.01
    with canvas(560, 510) as figure:
        axes, bar = map_axes(figure, 560, 510, side=450)
        axes.imshow(decades, cmap=_MAP_COLOURS, vmin=bottom, vmax=top, interpolation="none")
        cell = 450 / blocks
        for first, last in distilled:
            _outline(axes, first, last, min(2.0, cell / 5))
        for first, last in algorithm:
            _ring(axes, first, last, min(14.0, cell / 2))
        span_borders(axes, list(block_ranges), -0.5)
        axes.set(xlabel="last block", ylabel="first block")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(16, integer=True))
        colour_bar(bar, _MAP_COLOURS, bottom, top)
        _powers_of_ten(bar.yaxis, low, high)
        label = (
            f"Heat map of sensitivity by first and last block: {len(measured)} intervals, from "
            f"{numbers.significant(low)} to {numbers.significant(high)}. Squares: {_names(distilled)}. "
            f"Rings: {_names(algorithm)}."
        )
        return Drawing(inline(figure, "sensitivity", label), "")


def _outline(axes: Axes, first: int, last: int, width: float) -> None:
    for colour, stroke in (("white", 1.8 * width), (ON_MAP, width)):
        axes.add_patch(
            Rectangle((last - 0.5, first - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=stroke, zorder=3)
        )


def _ring(axes: Axes, first: int, last: int, size: float) -> None:
    for colour, stroke in (("white", 3.0), (_RING, 1.4)):
        axes.plot([last], [first], "o", markersize=size, markerfacecolor="none", color=colour, markeredgewidth=stroke)


def _powers_of_ten(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on an axis of decimal logarithms."""
    between = (1,) if high / low >= 1000 else (1, 2, 5) if high / low >= 10 else range(1, 10)
    ticks = LogLocator(subs=between).tick_values(low, high)
    axis.set_major_locator(FixedLocator([float(np.log10(tick)) for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:g}"))


def _names(intervals: Sequence[BlockPair]) -> str:
    return ", ".join(map(interval_name, intervals)) or "none"


def plan_fronts(best: Front, algorithm: Front) -> Drawing | None:
    """The summed sensitivity of the best plan by number of removed blocks, and that of Algorithm 1's intervals."""
    fronts = {BEST_PLANS: best, ALGORITHM: algorithm}
    # The axis is logarithmic.
    drawn = {look: [point for point in front if point[1] > 0] for look, front in fronts.items()}
    drawn = {look: front for look, front in drawn.items() if front}
    if BEST_PLANS not in drawn:
        return None
    with canvas(640, 300) as figure:
        axes = figure.add_subplot()
        for look, front in drawn.items():
            axes.plot(*zip(*front), marker=look.marker, markersize=5, **look.line)
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.grid(axis="y")
        axes.set(xlabel="removed blocks", ylabel="summed sensitivity")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        told = ". ".join(
            f"{look.label}: " + "; ".join(f"{removed}: {numbers.significant(total)}" for removed, total in front)
            for look, front in drawn.items()
        )
        label = f"Summed sensitivity by number of removed blocks. {told}."
        return Drawing(inline(figure, "plan-fronts", label), "", list(drawn))


def recurrence_dots(recurrence: Mapping[int, Mapping[int, float]], block_ranges: Sequence[BlockPair]) -> Drawing | None:
    """The share of resamples that have each boundary of a plan too, by number of blocks to remove; as a slice of a dot.

    At the right the mean of each row.
    """
    rows = {removed: shares for removed, shares in sorted(recurrence.items()) if shares}
    if not rows:
        return None
    blocks = block_ranges[-1][1]
    size = min(14.0, 0.85 * 530 / (blocks + 1))
    told = []
    with canvas(640, max(24 * len(rows) + 52, 150)) as figure:
        axes = figure.add_subplot()
        for y, (removed, shares) in enumerate(rows.items()):
            axes.axhline(y, color=COLOURS["rule"], linewidth=0.8, zorder=0)
            for boundary, share in shares.items():
                _share_dot(axes, boundary, y, share, size)
            mean = numbers.percent(sum(shares.values()) / len(shares), 0)
            at = ("axes fraction", "data")
            axes.annotate(mean, (1, y), (6, 0), at, "offset points", va="center", color=COLOURS["ink"])
            each = ", ".join(f"{boundary}: {numbers.percent(share, 0)}" for boundary, share in shares.items())
            told.append(f"{removed} removed, {mean} on average: {each}")
        span_borders(axes, list(block_ranges), 0)
        axes.set(xlim=(-0.7, blocks + 0.7), ylim=(len(rows) - 0.5, -0.5))
        axes.set(xlabel="boundary before block", ylabel="blocks to remove")
        ticks = range(0, blocks + 1, 1 if blocks <= 24 else 5)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks(range(len(rows)), [str(removed) for removed in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        label = f"Share of the resamples that have each boundary too, by number of blocks to remove. {'; '.join(told)}."
        return Drawing(inline(figure, "recurrence", label), "")


def _share_dot(axes: Axes, x: float, y: float, share: float, size: float) -> None:
    """A ring of which that share is filled, from the top clockwise."""
    mark = COLOURS["mark"]
    axes.plot([x], [y], "o", color=mark, markersize=size, markerfacecolor=COLOURS["paper"])
    if share > 0:
        part = Path.wedge(90 - 360 * share, 90)
        axes.plot([x], [y], marker=part, color=mark, markersize=size, markeredgewidth=0)
