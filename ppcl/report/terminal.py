"""The summary table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from ppcl.report import numbers
from ppcl.report.summary import summary_rows


def summary_table(root: Path) -> Table:
    """The variants of the job in `root`, see `summary_rows`."""
    table = Table(title="Variants", title_justify="left")
    table.add_column("variant")
    for heading in ("blocks", "parameters", "share", "seconds a step", "velocity error", "world score", "R"):
        table.add_column(heading, justify="right")
    for row in summary_rows(root):
        table.add_row(
            Text(row["variant"]),  # not markup: a name may hold square brackets
            numbers.MISSING if row["blocks"] is None else str(row["blocks"]),
            numbers.count(row["parameters"]),
            numbers.percent(row["share"]),
            numbers.significant(row["seconds_per_step"]),
            numbers.significant(row["velocity_error"]),
            _with_interval(row["world"], row["world_low"], row["world_high"]),
            _with_interval(row["R"], row["R_low"], row["R_high"], scale=1),
        )
    return table


def _with_interval(value: float | None, low: float | None, high: float | None, scale: float = 100) -> str:
    interval = numbers.between(low, high, scale=scale)
    return numbers.percent(value, scale=scale) + (f" ({interval})" if interval else "")
