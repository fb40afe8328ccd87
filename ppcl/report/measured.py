"""The data of the report's section on measured detection: what was measured, what was chosen, and how certain it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from scipy.stats import spearmanr

from ppcl.replacements import Interval, Plan, Replacement, parse_replacement
from ppcl.report.figures import BlockPair, interval_name
from ppcl.report.interval_figures import plan_fronts, recurrence_dots, sensitivity_map
from ppcl.report.summary import finite
from ppcl.storage.results import Results

CLOSED_FORM, SCREENED, FINAL = "in closed form", "after screening", "final"

# With two intervals every rank correlation is 1 or -1.
_LEAST_INTERVALS = 3

Sensitivity = dict[Replacement, float]


def sensitivities(results: Results) -> dict[str, Sensitivity]:
    """The sensitivity of every replacement, at each of the three times that it is measured."""
    return {
        CLOSED_FORM: _parsed(results.stage("detection").get("measured", {}).get("sensitivity", {})),
        SCREENED: _parsed(results.stage("selection").get("sensitivity", {})),
        FINAL: _parsed(results.stage("variants").get("damage", {})),
    }


def measured_detection(results: Results) -> dict[str, Any] | None:
    """The data of the section; None where intervals were chosen by similarity alone."""
    detection = results.stage("detection")
    measured = detection.get("measured")
    if not measured:
        return None
    times = sensitivities(results)
    closed_form = {(i.first, i.last): value for i, value in times[CLOSED_FORM].items()}
    plans = {int(count): Plan(plan) for count, plan in measured["plans"].items()}
    shortlist, algorithm = _pairs(detection["intervals"]), _pairs(detection["first_difference"])
    selected = results.stage("selection").get("plan")
    distilled = shortlist if selected is None else _pairs(_intervals(selected))
    ranges = _pairs(detection["spans"])
    longest = max((last - first + 1 for first, last in closed_form), default=0)
    return {
        "samples": measured["samples"],
        "measured": len(closed_form),
        "longest": longest,
        "shortlist": shortlist,
        "distilled": None if selected is None else distilled,
        "algorithm_not_measured": [interval_name(pair) for pair in algorithm if pair not in closed_form],
        "map": sensitivity_map(closed_form, ranges, distilled, algorithm),
        "fronts": plan_fronts(best_front(plans.values(), times[CLOSED_FORM]), cheapest_first(algorithm, closed_form)),
        "recurrence": recurrence_dots(_recurrence(measured), ranges),
        "correlations": rank_correlations(times),
    }


def best_front(plans: Iterable[Plan], sensitivity: Sensitivity) -> list[tuple[int, float]]:
    """The number of blocks that each plan removes and the sum of its sensitivities, in this order."""
    points = {
        (sum(replacement.removed for replacement in plan), sum(sensitivity[replacement] for replacement in plan))
        for plan in plans
        if all(replacement in sensitivity for replacement in plan)
    }
    return sorted(points)


def cheapest_first(intervals: Iterable[BlockPair], sensitivity: Mapping[BlockPair, float]) -> list[tuple[int, float]]:
    """The same for intervals that are taken one after another, the least sensitive first; without unmeasured ones."""
    points, removed, total = [], 0, 0.0
    for first, last in sorted((pair for pair in intervals if pair in sensitivity), key=sensitivity.__getitem__):
        removed, total = removed + last - first, total + sensitivity[first, last]
        points.append((removed, total))
    return points


def rank_correlations(times: Mapping[str, Sensitivity]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of the intervals' sensitivities at each two times, over those that both have.

    `value` is None where they are too few, or all the same.
    """
    rows = []
    for a, b in combinations(times, 2):
        both = [one for one in times[a] if isinstance(one, Interval) and one in times[b]]
        if not both:
            continue
        pairs = [[times[time][one] for one in both] for time in (a, b)]
        varied = all(len(set(values)) > 1 for values in pairs)
        value = finite(spearmanr(*pairs).statistic) if len(both) >= _LEAST_INTERVALS and varied else None
        rows.append({"first": a, "second": b, "intervals": len(both), "value": value})
    return rows


def _parsed(sensitivity: Mapping[str, Any]) -> Sensitivity:
    """By replacement, without what is not finite."""
    values = {parse_replacement(text): finite(value) for text, value in sensitivity.items()}
    return {replacement: value for replacement, value in values.items() if value is not None}


def _intervals(plan: Iterable[str]) -> list[list[int]]:
    """The first and the last block of each interval of a plan."""
    return [[one.first, one.last] for one in map(parse_replacement, plan) if isinstance(one, Interval)]


def _pairs(lists: Iterable[list[int]]) -> list[BlockPair]:
    return sorted((first, last) for first, last in lists)


def _recurrence(measured: Mapping[str, Any]) -> dict[int, dict[int, float]]:
    """JSON's keys are texts."""
    return {
        int(count): {int(boundary): share for boundary, share in shares.items()}
        for count, shares in measured["recurrence"].items()
    }
