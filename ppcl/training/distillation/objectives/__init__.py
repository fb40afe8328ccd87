"""Distillation objectives: one for each replacement of the plan, each on the teacher's own streams alone.

An objective says which boundaries and inner tensors of the teacher it needs, what its closed-form initialisation is
computed from, and what its losses are. Nothing of one objective enters another, so all share one pass over the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ppcl.config.schema import Distillation
from ppcl.replacements import Interval, LinearFfn, PrunedFfn, PrunedHeads, Replacement, TextRun
from ppcl.training.distillation.objectives.base import (
    DistillationObjective,
    Gradient,
    GradientObjective,
    MomentUpdate,
    Solutions,
    TeacherBlocks,
)
from ppcl.training.distillation.objectives.linear_ffn import LinearFfnObjective
from ppcl.training.distillation.objectives.pruned_ffn import PrunedFfnObjective
from ppcl.training.distillation.objectives.pruned_heads import PrunedHeadsObjective
from ppcl.training.distillation.objectives.student import StudentObjective
from ppcl.training.distillation.objectives.text_projectors import TextProjectorsObjective

__all__ = [
    "DistillationObjective",
    "Gradient",
    "GradientObjective",
    "LinearFfnObjective",
    "MomentUpdate",
    "PrunedFfnObjective",
    "PrunedHeadsObjective",
    "Solutions",
    "StudentObjective",
    "TeacherBlocks",
    "TextProjectorsObjective",
    "new_objective",
]

# By kind of replacement. Low-rank modulations have none: they are fitted to the timesteps, not to streams.
OBJECTIVES: Mapping[type[Replacement], Callable[[TeacherBlocks, Any, Distillation], DistillationObjective]] = {
    Interval: StudentObjective,
    TextRun: TextProjectorsObjective,
    LinearFfn: LinearFfnObjective,
    PrunedFfn: PrunedFfnObjective,
    PrunedHeads: PrunedHeadsObjective,
}


def new_objective(teacher: TeacherBlocks, replacement: Replacement, settings: Distillation) -> DistillationObjective:
    """The objective of a replacement, with its module not yet initialised."""
    return OBJECTIVES[type(replacement)](teacher, replacement, settings)
