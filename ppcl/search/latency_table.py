"""The measured latency of a step, what each replacement saves of it, and the speed that is predicted of a plan."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppcl.replacements import Replacement, enclosing

# The standard error of a median of normal values, over that of their mean.
_MEDIAN = 1.2533


class Speedup(NamedTuple):
    """How many times the teacher's speed a plan was measured at. `spread`: the standard error of `value`."""

    value: float
    spread: float = 0.0

    @classmethod
    def of(cls, teacher: Sequence[float], plan: Sequence[float]) -> Speedup:
        """From the seconds of rounds in each of which both ran, so that a drift of the machine's speed cancels."""
        ratios = [a / b for a, b in zip(teacher, plan, strict=True)]
        value = statistics.median(ratios)
        # From the median deviation: one round that was disturbed says nothing of the others.
        deviation = 1.4826 * statistics.median(abs(ratio - value) for ratio in ratios)
        return cls(value, _MEDIAN * deviation / len(ratios) ** 0.5)

    def meets(self, target: float | None) -> bool:
        """Whether the plan is as fast as asked, as far as was measured."""
        return target is None or self.value + self.spread >= target


@dataclass(frozen=True)
class LatencyTable:
    """Latency of one forward of the teacher, and what each replacement saves of it, in microseconds.

    `total`: the teacher's. `blocks`: the numbers of its blocks. `alone`: saved by a replacement on the teacher.
    `inside`: saved by an FFN within a text run, where its text part is gone.
    """

    total: int
    blocks: range
    alone: Mapping[Replacement, int]
    inside: Mapping[Replacement, int]

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int:
        """Microseconds fewer with a replacement on; modulations count as much in low rank as in full."""
        if within is not None and replacement.first != within.first and replacement in self.inside:
            return self.inside[replacement]
        return self.alone[replacement]

    def speedup(self, plan: Iterable[Replacement]) -> float:
        """How many times faster than the teacher a step is with a plan on, if savings add up."""
        plan = list(plan)
        saved = sum(self.saved(replacement, enclosing(replacement, plan)) for replacement in plan)
        return self.total / max(1, self.total - saved)
