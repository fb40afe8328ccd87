"""Selection: evaluators measure what was screened as they measure the replacements that variants are chosen from."""

from __future__ import annotations

from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.stages import variants


def workers(job: JobSize) -> list[WorkerSize]:
    return [variants.evaluator_size(job.screened, "selection")] if job.config.detection.screens else []
