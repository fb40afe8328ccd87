"""The summary table's data: one row a variant, the teacher first."""

from __future__ import annotations

import math
from typing import Any

from ppcl.config.location import LocationLike
from ppcl.report.benchmarks import benchmark_records, label
from ppcl.search.variants import TEACHER
from ppcl.storage.results import Results, read_results


def summary_rows(root: LocationLike) -> list[dict[str, Any]]:
    """One dict a variant, the teacher first, then from large to small; `None` marks values that were not measured.

    Keys: `variant`, `blocks` (that run), `parameters`, `share` (of the teacher's parameters), `budget`, `plan` (the
    replacements that are on, as text), `fine_tuned` (whether it uses fine-tuned replacements), `seconds_per_step`,
    `speed_up` (times faster than the teacher), `velocity_error`, `psnr` (dB), `ssim`, `world`, `world_low`,
    `world_high` (checker score, the share of correct images, and its interval), `R`, `R_low`, `R_high` (relative
    drop, %), `scores` (by benchmark, see `Benchmark.record`).
    """
    return rows_of(read_results(root))


def rows_of(results: Results) -> list[dict[str, Any]]:
    made, measured = results.stage("variants"), results.stage("evaluation").get("variants", {})
    plans = {**made.get("variants", {})}
    if made.get("teacher"):
        plans[TEACHER] = {"share": 1.0, "plan": [], **plans.get(TEACHER, {}), **made["teacher"]}
    names = dict.fromkeys([*plans, *measured])
    rows = [_row(name, plans.get(name, {}), measured.get(name, {}), measured.get(TEACHER, {})) for name in names]
    for row in rows:
        found = {label(record): record["variants"].get(row["variant"]) for record in benchmark_records(results)}
        row["scores"] = {name: score for name, score in found.items() if score is not None}
    return sorted(rows, key=lambda row: (row["variant"] != TEACHER, -(row["parameters"] or 0)))


def _row(name: str, plan: dict[str, Any], measured: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    seconds, reference = finite(measured.get("seconds_per_step")), finite(teacher.get("seconds_per_step"))
    overall = (measured.get("world") or {}).get("overall", {})
    return {
        "variant": name,
        "blocks": plan.get("blocks"),
        "parameters": plan.get("parameters"),
        "share": finite(plan.get("share")),
        "budget": finite(plan.get("budget")),
        "plan": list(plan.get("plan", [])),
        "fine_tuned": measured.get("fine_tuned"),
        "seconds_per_step": seconds,
        "speed_up": reference / seconds if seconds and reference else None,
        "velocity_error": finite(measured.get("velocity_error")),
        "psnr": finite(measured.get("psnr")),
        "ssim": finite(measured.get("ssim")),
        "world": finite(overall.get("score")),
        "world_low": finite(overall.get("low")),
        "world_high": finite(overall.get("high")),
        "R": finite(measured.get("R")),
        "R_low": finite(measured.get("R_low")),
        "R_high": finite(measured.get("R_high")),
    }


def finite(value: Any) -> float | None:
    """A number that can be drawn and compared, else `None`: JSON from Python may hold NaN and Infinity."""
    return float(value) if value is not None and math.isfinite(value) else None
