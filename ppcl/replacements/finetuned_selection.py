"""Which plans take the fine-tuned replacements, and which the distilled ones: a result holds both.

Fine-tuning makes the plans better that it was done for and those near them; a replacement that has learnt to make up
for the errors of others may be worse without them. So a plan takes the fine-tuned ones where that was measured to be
better, or where it was for the measured plans most like it. Where one plan was trained in full, with the teacher's
own blocks, nothing of it is for any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.replacements.io import files_in
from ppcl.replacements.registry import parse_replacement
from ppcl.replacements.replacement import Replacement

# Measured plans that are asked about one which was not measured; all of them must be better.
_NEAREST = 2


@dataclass(frozen=True)
class FinetunedSelection:
    """What is known of the fine-tuned replacements.

    `files`: those that were trained, and the blocks that were with one plan. `sensitivity`: the velocity error of each
    replacement alone, before. `ratios`: by measured plan, its velocity error with the fine-tuned ones over that with
    the distilled ones.
    """

    files: Mapping[Replacement, Path]
    sensitivity: Mapping[Replacement, float]
    ratios: Mapping[frozenset[Replacement], float]

    @classmethod
    def read(cls, folder: Path, sensitivity: Mapping[Replacement, float]) -> FinetunedSelection:
        """What a stage of fine-tuning left."""
        rows = json.loads((folder / "finetuning.json").read_text())["plans"]
        return cls(files_in(folder), sensitivity, ratios_of(rows))

    def uses_finetuned(self, plan: Iterable[Replacement]) -> bool:
        """Whether a plan is better with the fine-tuned replacements, as far as is known."""
        plan = frozenset(plan)
        in_full = not all(one.in_plans for one in self.files)
        if plan.isdisjoint(self.files) and not in_full:
            return False
        if plan in self.ratios:
            return self.ratios[plan] < 1
        if in_full:
            return False
        nearest = sorted(self.ratios, key=lambda other: -self._likeness(plan, other))[:_NEAREST]
        return len(nearest) == _NEAREST and all(
            self.ratios[other] < 1 and self._likeness(plan, other) > 0 for other in nearest
        )

    def taken(self, plan: Iterable[Replacement]) -> frozenset[Replacement]:
        """The fine-tuned replacements that are on with a plan: its own, and blocks that were trained with it."""
        plan = frozenset(plan)
        if not self.uses_finetuned(plan):
            return frozenset()
        return frozenset(one for one in self.files if one in plan or not one.in_plans)

    def _likeness(self, one: frozenset[Replacement], other: frozenset[Replacement]) -> float:
        """The share of the sensitivity of what is on in either that is on in both."""
        either, both = (
            sum(self.sensitivity.get(replacement, 0.0) for replacement in some) for some in (one | other, one & other)
        )
        return both / either if either else 0.0


def ratios_of(rows: Iterable[Mapping[str, Any]]) -> dict[frozenset[Replacement], float]:
    """From the rows of `finetuning.json`; a plan without an error has none to lose."""
    return {
        frozenset(map(parse_replacement, row["plan"])): row["after"] / row["before"] if row["before"] else float("inf")
        for row in rows
    }
