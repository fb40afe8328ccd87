"""The measured latency of a step, what each replacement saves of it, and the speed that is predicted of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ppcl.replacements.plan import Ffn, Replacement, TextRun


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

    def saved(self, replacement: Replacement, within: TextRun | None = None, folded: bool = False) -> int:
        """Microseconds fewer with a replacement on; modulations count as much in low rank as in full."""
        if within is not None and replacement.first != within.first and replacement in self.inside:
            return self.inside[replacement]
        return self.alone[replacement]

    def speedup(self, plan: Iterable[Replacement]) -> float:
        """How many times faster than the teacher a step is with a plan on, if savings add up."""
        plan = list(plan)
        runs = [replacement for replacement in plan if isinstance(replacement, TextRun)]
        saved = sum(self.saved(replacement, _run_around(replacement, runs)) for replacement in plan)
        return self.total / max(1, self.total - saved)


def _run_around(replacement: Replacement, runs: Iterable[TextRun]) -> TextRun | None:
    """The text run that an FFN lies in."""
    if not isinstance(replacement, Ffn):
        return None
    return next((run for run in runs if replacement.block in run.blocks), None)
