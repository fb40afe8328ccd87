"""The measured latency of a step, what each replacement saves of it, and the speed that is predicted of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ppcl.replacements import Replacement, enclosing


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
