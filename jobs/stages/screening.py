"""Screening: every replacement in its closed form, and a short distillation of all shortlisted intervals in one pass.

What is measured after it decides which intervals are distilled to the end; see `jobs.stages.selection`.
"""

from __future__ import annotations

from typing import Any

from jobs.runtime.checkpoints import drop_damaged_checkpoints
from jobs.stage import Stage, StageContext
from jobs.stages.distillation import check_plan, detected_plan, run_distillation, workers
from ppcl.config.schema import Config, Distillation
from ppcl.storage.manifest import CHECKPOINTS

NAME = "screening"


def settings_of(config: Config) -> Distillation:
    """The configuration of distillation, for a short one."""
    given, steps = config.distillation, config.detection.screening_steps
    return given.model_copy(update={"steps": steps, "warmup": min(given.warmup, steps // 10)})


def run(context: StageContext) -> dict[str, Any]:
    """Train all of detection's plan for `detection.screening_steps`; writes `training.json`."""
    notes = drop_damaged_checkpoints(NAME, context.checkpoints)
    return run_distillation(context, NAME, detected_plan(context), settings_of(context.config), None, notes)


STAGE = Stage(
    name=NAME,
    run=run,
    describe=lambda context: (
        f"{len(detected_plan(context))} replacements in closed form, intervals for "
        f"{context.config.detection.screening_steps} steps"
    ),
    depends_on=("calibration", "detection"),
    sections=("distillation", "width"),
    workers=workers,
    enabled=lambda config: config.detection.screens,
    check=check_plan,
    also_reads=lambda context: [context.config.detection.screening_steps],
    resumes_from=CHECKPOINTS,
)
