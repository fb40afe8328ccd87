"""The workers of each stage: a module a stage, each with a function from a job's size to its workers' sizes."""

from __future__ import annotations

from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.stages import (
    calibration,
    detection,
    evaluation,
    finetuning,
    probes,
    screening,
    selection,
    students,
    variants,
)

_STAGES = (calibration, probes, detection, screening, selection, students, variants, finetuning, evaluation)


def worker_sizes(job: JobSize) -> list[WorkerSize]:
    """The workers of all stages that the configuration runs, in the order of the stages."""
    return [worker for stage in _STAGES for worker in stage.workers(job)]


__all__ = ["worker_sizes"]
