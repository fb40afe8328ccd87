"""The rows of the ablation over seeds: means with Student's t intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ppcl.ablation.run import ROWS


def interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """The mean, and both ends of its t interval; the mean three times where there is one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def summary(seeds: Mapping[int, Mapping[str, Any]], confidence: float) -> list[dict[str, Any]]:
    """One dict a row, in order; `velocity_error` and `R` (in %, None without a checker) as mean, low and high."""
    rows = []
    for row in ROWS:
        made = [seed[row.name] for seed in seeds.values() if row.name in seed]
        if not made:  # the measured choice, of a detection by similarity
            continue
        drops = [m["R"] for m in made if m.get("R") is not None]
        rows.append(
            {
                "name": row.name,
                "label": row.label,
                "group": row.group,
                "paper": row.paper,
                "share": float(np.mean([m["share"] for m in made])),
                "velocity_error": interval([m["velocity_error"] for m in made], confidence),
                "R": interval(drops, confidence) if drops else None,
                "plans": [",".join(m["plan"]) for m in made],
            }
        )
    return rows
