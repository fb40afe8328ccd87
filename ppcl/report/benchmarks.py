"""The benchmarks of a result: what its job's scorers gave, and what was given for it from elsewhere."""

from __future__ import annotations

from typing import Any

from ppcl.report import numbers
from ppcl.search.variants import TEACHER
from ppcl.storage.results import Results


def benchmark_records(results: Results) -> list[dict[str, Any]]:
    """Records as `Benchmark.record` makes them, the job's own first."""
    own = results.stage("scores").get("benchmarks", [])
    return [*own, *(given["benchmark"] for given in results.given_scores)]


def label(record: dict[str, Any]) -> str:
    """The scorer, and the suite where that says something, such as `clip on geneval`."""
    return record["scorer"] if record["suite"] == "prompts" else f"{record['scorer']} on {record['suite']}"


def benchmark_table(results: Results) -> dict[str, Any] | None:
    """The data of the report's table: one column a benchmark, one row a variant, the teacher first. None without any.

    A cell has `score`, `interval` and `drop` as text.
    """
    records = benchmark_records(results)
    if not records:
        return None
    names = dict.fromkeys(name for record in records for name in record["variants"])
    ordered = sorted(names, key=lambda name: name != TEACHER)
    means = results.stage("scores").get("mean_drop", {})
    return {
        "columns": [{"label": label(r), "prompts": r["prompts"], "lower": not r["higher_is_better"]} for r in records],
        "rows": [
            {
                "variant": name,
                "cells": [_cell(record["variants"].get(name), name == TEACHER) for record in records],
                "mean": _drop(means.get(name)) if name != TEACHER else None,
            }
            for name in ordered
        ],
        "has_means": len(results.stage("scores").get("benchmarks", [])) > 1,
    }


def _cell(row: dict[str, Any] | None, is_teacher: bool) -> dict[str, Any] | None:
    if row is None:
        return None
    interval = f"{_with_minus(row['low'])} to {_with_minus(row['high'])}"
    return {
        "score": numbers.significant(row["score"]),
        "interval": interval,
        "drop": None if is_teacher else _drop(row),
    }


def _drop(row: dict[str, Any] | None) -> str | None:
    """R with its interval as text, or else the difference to the teacher's score; None where there is neither."""
    if row is None or (row["R"] is None and "difference" not in row):
        return None
    if row["R"] is None:
        mean, low, high = (_with_minus(row[f"difference{end}"]) for end in ("", "_low", "_high"))
        return f"{mean} ({low} to {high})"
    between = numbers.between(row["R_low"], row["R_high"], scale=1)
    return numbers.percent(row["R"], scale=1) + (f" ({between})" if between else "")


def _with_minus(value: float) -> str:
    return numbers.significant(value).replace("-", "\u2212")
