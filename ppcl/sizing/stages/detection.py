"""Detection: rows of CKA tables, as tasks; then evaluators measure every interval in closed form."""

from __future__ import annotations

from ppcl.detection.surrogates import STARTS, by_start, candidate_intervals
from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.pipeline import Loaded, pipeline_memory
from ppcl.sizing.stages.probes import fit_tokens
from ppcl.sizing.stages.variants import evaluator_activations

_SINGLE, _DOUBLE = 4, 8
_STREAMS = 2


def workers(job: JobSize) -> list[WorkerSize]:
    measured = job.config.detection.method == "measured"
    return [_task(job), _evaluator(job)] if measured else [_task(job)]


def _task(job: JobSize) -> WorkerSize:
    settings, probes, model = job.config.detection, job.config.probes, job.model
    n, d, blocks = min(settings.tokens, probes.tokens_per_sample * job.validation), model.width, len(model.blocks)
    # A task has two rows: their surrogates, the teacher's tokens, a probe, and a representation of each.
    task = _SINGLE * (3 * n * d + d * d) + 3 * _DOUBLE * n * min(n, d)
    tables = 2 * (2 if settings.compare_standardized else 1) + job.config.width.text
    multiplications = tables * blocks**2 / 2 * n * d * (d + min(n, d))
    return WorkerSize(
        stage="detection",
        worker="task",
        count=1,
        device={"tokens and kernels": task},
        seconds=None if job.cpu else 2 * multiplications / (job.device.sums * job.device.utilisation),
    )


def _evaluator(job: JobSize) -> WorkerSize:
    count = job.config.detection.workers
    group = STARTS * _STREAMS * (job.config.detection.max_length - 1) * job.number * job.model.width**2
    # A group is fitted while the one before it is still there.
    activations = max(evaluator_activations(job), group + fit_bytes(job))
    device, host = pipeline_memory(job, Loaded(activations, vae=False, transformer=True))
    measuring = job.compute_seconds(measuring_operations(job))
    fitting = fit_operations(job) / (job.device.sums * job.device.utilisation)
    return WorkerSize(
        stage="detection",
        worker="evaluator",
        count=count,
        device=device | {"surrogates": group},
        host=host,
        seconds=None if job.cpu else (measuring + fitting) / count,
    )


def fit_bytes(job: JobSize) -> int:
    """The most bytes that fitting the surrogates of one first block takes, beside the surrogates themselves.

    Either its tokens are centred and their moments added, or the moments are solved for; `lasts` maps at once.
    """
    n, d, lasts = fit_tokens(job), job.model.width, job.config.detection.max_length - 1
    square, tokens = _DOUBLE * d**2, n * d
    # Of both streams, before the interval and behind each.
    read = job.number * _STREAMS * tokens * (1 + lasts)
    centred = tokens * (1 + lasts) * (_SINGLE + (_DOUBLE if job.cpu else _SINGLE))
    adding = centred + square * (2 + 4 * lasts)
    solving = _SINGLE * tokens + square * (2 + 6 * lasts)
    return read + max(adding, solving)


def measuring_operations(job: JobSize) -> float:
    """Of measuring every interval on `detection.samples`, over all evaluators.

    For each group of intervals the teacher runs once, and again to the last first block; behind each interval its
    blocks run on from what the maps make.
    """
    settings, model = job.config.detection, job.model
    maps = 2 * model.tokens * model.width**2
    operations = 0.0
    for group in by_start(candidate_intervals(model.block_ranges, settings.max_length)):
        operations += job.forward_flops + sum(model.flops[: group[-1].first + 1])
        operations += sum(maps + model.rest_flops + sum(model.flops[interval.last + 1 :]) for interval in group)
    return min(settings.samples, job.validation) * operations


def fit_operations(job: JobSize) -> float:
    """Of fitting all surrogates: the moments, a factorisation and its solutions; see `fit_surrogates`.

    Each evaluator fits what it measures, so a group whose samples are dealt out is fitted on several.
    """
    settings, model = job.config.detection, job.model
    candidates = candidate_intervals(model.block_ranges, settings.max_length)
    chunks = -(-min(settings.samples, job.validation) // job.config.evaluation.batch_size)
    n, d, starts = fit_tokens(job), model.width, len({interval.first for interval in candidates})
    moments = 2 * n * d**2 * (starts + len(candidates))
    solving = d**3 * (starts / 3 + 6 * len(candidates))
    return _STREAMS * min(chunks, settings.workers) * (moments + solving)
