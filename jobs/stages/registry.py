"""The stages of a job, dependencies first: the only list of them.

Importing it imports Ray, which reads its environment at that moment: see `jobs.runtime.cluster.connected`.
"""

from __future__ import annotations

from jobs.stage import Stage
from jobs.stages import (
    ablation,
    calibration,
    detection,
    distillation,
    evaluation,
    finetuning,
    probes,
    scores,
    screening,
    selection,
    variants,
)

STAGES: tuple[Stage, ...] = (
    calibration.STAGE,
    probes.STAGE,
    detection.STAGE,
    screening.STAGE,
    selection.STAGE,
    distillation.STAGE,
    variants.STAGE,
    finetuning.STAGE,
    evaluation.STAGE,
    scores.STAGE,
    ablation.STAGE,
)
