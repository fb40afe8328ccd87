"""Screening: the closed-form pass, then a short distillation of all intervals of the shortlist, which overlap."""

from __future__ import annotations

from dataclasses import replace

from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.stages import students


def workers(job: JobSize) -> list[WorkerSize]:
    config = job.config
    if not config.detection.screens:
        return []
    distillation = config.distillation.model_copy(update={"steps": config.detection.screening_steps})
    short = replace(job.screened, config=config.model_copy(update={"distillation": distillation}))
    return [students.rank_size(short, "screening", closed_form=True)]
