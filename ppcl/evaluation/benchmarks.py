"""A benchmark is one scorer on one suite of prompts. Variants are compared with the teacher, prompt by prompt.

All intervals are percentile bootstrap intervals over prompts, drawn within each category. Drawing is paired: a drawn
prompt counts for the variant and for the teacher, and for every scorer of the same suite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppcl.evaluation.scoring import drawn_means, interval
from ppcl.search.variants import TEACHER

# By category, `(n,)` scores, one a prompt.
Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """`variants`: by name, the scores of the same prompts in the same order, the teacher's among them if there are any.

    `higher_is_better`: false for distances.
    """

    scorer: str
    suite: str
    variants: Mapping[str, Scores]
    higher_is_better: bool = True

    def drawn(self, variant: str, seed: int) -> tuple[float, np.ndarray]:
        """The mean over categories of their means, and that of every resample, `(2000,)`."""
        scores = self.variants[variant]
        means = [float(np.mean(values)) for values in scores.values()]
        return float(np.mean(means)), np.mean(list(drawn_means(scores, seed).values()), axis=0)

    def drop(self, variant: str, seed: int) -> tuple[float, np.ndarray] | None:
        """How much worse a variant is than the teacher, in % of the teacher's mean, and that of every resample.

        None without the teacher's scores, and where their mean is not certain to be above 0: a share of it would mean
        nothing then.
        """
        if TEACHER not in self.variants:
            return None
        (mean, drawn), (teacher, teachers) = self.drawn(variant, seed), self.drawn(TEACHER, seed)
        if teacher <= 0 or teachers.min() <= 0:
            return None
        sign = 100 if self.higher_is_better else -100
        return sign * (teacher - mean) / teacher, sign * (teachers - drawn) / teachers

    def record(self, confidence: float, seed: int) -> dict[str, Any]:
        """What is kept of it and shown: by variant its mean, the difference to the teacher's, and R, with intervals."""
        count = sum(map(len, next(iter(self.variants.values())).values()))
        rows = {name: self._row(name, confidence, seed) for name in self.variants}
        shared = {"scorer": self.scorer, "suite": self.suite, "higher_is_better": self.higher_is_better}
        return shared | {"prompts": count, "variants": rows}

    def _row(self, variant: str, confidence: float, seed: int) -> dict[str, float | None]:
        mean, drawn = self.drawn(variant, seed)
        row: dict[str, float | None] = {"score": mean, **_ends("", drawn, confidence)}
        if TEACHER in self.variants:
            teacher, teachers = self.drawn(TEACHER, seed)
            row |= {"difference": mean - teacher} | _ends("difference_", drawn - teachers, confidence)
        return row | _drop(self.drop(variant, seed), confidence)


def mean_drops(benchmarks: Sequence[Benchmark], confidence: float, seed: int) -> dict[str, dict[str, float | None]]:
    """By variant, R of PPCL's tables: the mean over benchmarks of the relative drops, in %.

    Over the benchmarks in which drops mean something and that score the variant; `benchmarks` of the row says how many.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for variant in dict.fromkeys(name for benchmark in benchmarks for name in benchmark.variants):
        found = [b.drop(variant, seed) for b in benchmarks if variant in b.variants]
        drops = [drop for drop in found if drop is not None]
        if drops:
            mean = float(np.mean([drop for drop, _ in drops])), np.mean([drawn for _, drawn in drops], axis=0)
            rows[variant] = _drop(mean, confidence) | {"benchmarks": len(drops)}
    return rows


def _drop(drop: tuple[float, np.ndarray] | None, confidence: float) -> dict[str, float | None]:
    if drop is None:
        return {"R": None, "R_low": None, "R_high": None}
    return {"R": drop[0]} | _ends("R_", drop[1], confidence)


def _ends(prefix: str, drawn: np.ndarray, confidence: float) -> dict[str, float | None]:
    low, high = interval(drawn, confidence)
    return {f"{prefix}low": low, f"{prefix}high": high}
