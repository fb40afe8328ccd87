"""How the blocks of the teacher are dealt out to the ranks of a pipeline, so that a step takes each about as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ppcl.replacements import Interval, LinearFfn, Replacement, TextRun
from ppcl.training.pipeline import balanced_segments

# `distillation.train` of the configuration.
Train = Literal["students", "all"]

# A training step's cost in forwards of one teacher block: a student block takes one forward, and twice that for the
# backward; so does each block of a text run; the maps of an FFN are two products.
STUDENT_COST = 3.0
FFN_COST = 0.25


def segment_of(stage: int, pp: int, blocks: int, plan: Sequence[Replacement], train: Train) -> range:
    """The blocks of pipeline rank `stage` of `pp`: contiguous, balanced by cost, no replacement cut in two.

    `blocks`: how many the teacher has. `train`: see `ppcl.config.schema.Distillation`. Raises `UserError` where the
    plan leaves fewer than `pp` segments.
    """
    costs = [1.0] * blocks
    for replacement in plan:
        for block, cost in training_costs(replacement, train).items():
            costs[block] += cost
    return balanced_segments(costs, pp, [replacement.blocks for replacement in plan])[stage]


def training_costs(replacement: Replacement, train: Train) -> dict[int, float]:
    """By block, what training a replacement adds to a step; empty for one that stays at its closed form."""
    if isinstance(replacement, Interval):
        return {replacement.last: STUDENT_COST}
    if train == "all" and isinstance(replacement, LinearFfn):
        return {replacement.block: FFN_COST}
    if train == "all" and isinstance(replacement, TextRun):
        return dict.fromkeys(replacement.blocks[1:], STUDENT_COST)
    return {}
