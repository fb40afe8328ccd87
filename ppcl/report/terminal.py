"""The tables for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from ppcl.config.location import LocationLike
from ppcl.report import numbers
from ppcl.report.benchmarks import label
from ppcl.report.summary import summary_rows
from ppcl.storage.results import read_results


def summary_table(root: LocationLike) -> Table:
    """The variants of the job in `root`, see `summary_rows`."""
    table = Table(title="Variants", title_justify="left")
    table.add_column("variant")
    for heading in ("blocks", "parameters", "share", "seconds per step", "velocity error", "checker score", "R"):
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


def benchmark_tables(records: Iterable[dict[str, Any]]) -> Iterator[Table]:
    """A table for each benchmark, see `Benchmark.record`."""
    for record in records:
        better = "" if record["higher_is_better"] else ", smaller is better"
        table = Table(title=f"{label(record)}, {record['prompts']} prompts{better}", title_justify="left")
        table.add_column("variant")
        for heading in ("score", "difference to the teacher", "R"):
            table.add_column(heading, justify="right")
        for name, row in record["variants"].items():
            table.add_row(
                Text(name),
                _plain_interval(row["score"], row["low"], row["high"]),
                _plain_interval(row.get("difference"), row.get("difference_low"), row.get("difference_high")),
                _with_interval(row["R"], row["R_low"], row["R_high"], scale=1),
            )
        yield table


def _plain_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return numbers.MISSING
    return f"{numbers.significant(value)} ({numbers.significant(low)} to {numbers.significant(high)})"


def next_steps(root: LocationLike, place: str) -> list[str]:
    """Commands for the result in `root`, which is at `place` for the user; the variant is the smallest one."""
    smallest = summary_rows(root)[-1]["variant"]
    return [
        f'generate an image: ppcl generate {shlex.quote(place)} "a photo of a red circle" '
        f"--variant {shlex.quote(smallest)}",
        f"serve the variants: ppcl serve {shlex.quote(place)}",
        f"take one elsewhere: ppcl export {shlex.quote(place)} --variant {shlex.quote(smallest)} --to FOLDER",
    ]


def ablation_table(root: LocationLike) -> Table:
    """The rows of the ablation in `root`, the means over seeds with their intervals, beside the paper's scores."""
    made = read_results(root).stage("ablation")
    title = (
        f"Ablation: {made['removed']} of {made['blocks']} blocks removed, {made['steps']} steps, {made['seeds']} seeds"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("row")
    for heading in ("parameters", "velocity error", "R", "paper's score"):
        table.add_column(heading, justify="right")
    group = None
    for row in made["rows"]:
        if group not in (None, row["group"]):
            table.add_section()
        group = row["group"]
        table.add_row(
            Text(row["label"]),
            numbers.percent(row["share"]),
            numbers.mean_between(row["velocity_error"]),
            _relative_drop(row["R"]),
            numbers.significant(row["paper"]),
        )
    return table


def _relative_drop(interval: list[float] | None) -> str:
    """R with its interval, %: the mean, the low end, the high end."""
    if not interval:
        return numbers.MISSING
    mean, low, high = interval
    return _with_interval(mean, low, high, scale=1)


def _with_interval(value: float | None, low: float | None, high: float | None, scale: float = 100) -> str:
    interval = numbers.between(low, high, scale=scale)
    return numbers.percent(value, scale=scale) + (f" ({interval})" if interval else "")
