"""Detection: rows of CKA tables, as tasks."""

from __future__ import annotations

from ppcl.sizing.job import JobSize, WorkerSize

_SINGLE, _DOUBLE = 4, 8


def workers(job: JobSize) -> list[WorkerSize]:
    settings, probes, model = job.config.detection, job.config.probes, job.model
    n, d, blocks = min(settings.tokens, probes.tokens_per_sample * job.validation), model.width, len(model.blocks)
    # A task has two rows: their surrogates, the teacher's tokens, a probe, and a representation of each.
    task = _SINGLE * (3 * n * d + d * d) + 3 * _DOUBLE * n * min(n, d)
    tables = 2 * (2 if settings.compare_standardized else 1) + job.config.width.text
    multiplications = tables * blocks**2 / 2 * n * d * (d + min(n, d))
    rate = job.device.sums * job.device.utilisation
    return [
        WorkerSize(
            stage="detection",
            worker="task",
            count=1,
            device={"tokens and kernels": task},
            seconds=None if job.cpu else 2 * multiplications / rate,
        )
    ]
