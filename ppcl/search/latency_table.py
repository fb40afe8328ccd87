"""What each replacement saves of a step, as measured, and what a plan takes by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ppcl.replacements.plan import Ffn, Replacement, TextRun


@dataclass(frozen=True)
class LatencyTable:
    """Microseconds of one forward of the teacher, and of those the ones an replacement saves: `alone`, and an FFN's `inside` of a
    text run, where its text part is gone. Blocks are `blocks` in number."""

    total: int
    blocks: range
    alone: Mapping[Replacement, int]
    inside: Mapping[Replacement, int]

    def saved(self, replacement: Replacement, within: TextRun | None = None, folded: bool = False) -> int:
        """What folding saves of a replaced part is taken for the same as of the teacher's."""
        if within is not None and replacement.first != within.first and replacement in self.inside:
            return self.inside[replacement]
        return self.alone[replacement]

    def speedup(self, plan: Iterable[Replacement]) -> float:
        """How many times faster than the teacher a step is with a plan on, were savings to add up."""
        plan = list(plan)
        runs = [replacement for replacement in plan if isinstance(replacement, TextRun)]
        left = self.total - sum(
            self.saved(e, next((r for r in runs if isinstance(e, Ffn) and e.block in r.blocks), None)) for e in plan
        )
        return self.total / max(1, left)
