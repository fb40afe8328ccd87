"""Scores with their uncertainty, and R, the average relative drop over the benchmarks.

A score of several categories has a percentile bootstrap interval over images. A score of one category has Wilson's
interval (1927): often all of its few images are correct, so all resamples are, and the bootstrap interval has no width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest

_RESAMPLES = 2000

# Whether each image shows its caption: category to `(N,)` of 0 and 1.
Correctness = Mapping[str, np.ndarray]


def resamples(counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Images drawn with replacement within each category: category to `(2000, N)` indices."""
    rng = np.random.default_rng(seed)
    return {category: rng.integers(0, n, size=(_RESAMPLES, n)) for category, n in counts.items()}


def checker_scores(passes: Correctness, confidence: float, seed: int) -> dict[str, Any]:
    """The share of images that pass, by category, and their mean over the categories, as GenEval's overall score.

    Each with an interval of that confidence.
    """
    drawn = drawn_means(passes, seed)
    low, high = interval(np.mean(list(drawn.values()), axis=0), confidence)
    return {
        "overall": {"score": float(np.mean([p.mean() for p in passes.values()])), "low": low, "high": high},
        "categories": {category: _category(p, confidence) for category, p in passes.items()},
    }


def relative_drop(passes: Correctness, teachers: Correctness, confidence: float, seed: int) -> dict[str, float | None]:
    """R of PPCL's tables, in %: the mean over categories of (teacher - variant) / teacher.

    The bootstrap is paired: a drawn image counts for both. Categories in which the teacher has no correct image are
    left out; R is None where that is all of them.
    """
    drawn_variant, drawn_teacher = drawn_means(passes, seed), drawn_means(teachers, seed)
    drops, drawn = [], []
    for category, p in passes.items():
        teacher = teachers[category].mean()
        if teacher > 0:
            drops.append(100 * float((teacher - p.mean()) / teacher))
            with np.errstate(divide="ignore", invalid="ignore"):
                drop = 100 * (drawn_teacher[category] - drawn_variant[category]) / drawn_teacher[category]
            drawn.append(np.where(drawn_teacher[category] > 0, drop, np.nan))
    if not drops:
        return {"R": None, "R_low": None, "R_high": None}
    rows = np.stack(drawn)
    rows = rows[:, ~np.isnan(rows).all(axis=0)]
    low, high = interval(np.nanmean(rows, axis=0), confidence)
    return {"R": float(np.mean(drops)), "R_low": low, "R_high": high}


def drawn_means(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The mean of every resample, `(2000,)` a category; the same images are drawn for the same seed."""
    drawn = resamples({category: len(values) for category, values in scores.items()}, seed)
    return {category: np.asarray(v, np.float64)[drawn[category]].mean(axis=1) for category, v in scores.items()}


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The ends of a percentile interval."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _category(passed: np.ndarray, confidence: float) -> dict[str, float]:
    ends = binomtest(int(passed.sum()), len(passed)).proportion_ci(confidence, method="wilson")
    return {"score": float(passed.mean()), "low": float(ends.low), "high": float(ends.high)}
