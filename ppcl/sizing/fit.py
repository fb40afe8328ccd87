"""Whether a job's workers fit the devices they are for, and which key of the configuration makes one smaller."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.sizing.device import USABLE
from ppcl.sizing.job import JobSize, WorkerSize, assumed_shortlist
from ppcl.sizing.memory import intervals, longest_pipeline, meshes
from ppcl.sizing.model import TeacherSize
from ppcl.sizing.stages import worker_sizes

_MORE = (2, 4, 8, 16, 32, 64)
_FEWER = (8, 4, 2, 1)
# Of a pipeline: shortlisted intervals overlap and leave few places to cut.
_LONGER = (2, 3, 4, 6, 8, 16, 32, 64)

_OFFLOAD = ("memory.offload", ("auto",), "{}")

# What to change, the gentlest first: the key, the values to try, and how a value is asked for.
_Levers = tuple[tuple[str, Sequence[Any], str], ...]

_EVALUATOR: _Levers = (_OFFLOAD, ("evaluation.batch_size", _FEWER, "{} or less"))
_DISTILLATION: _Levers = (
    ("distillation.pipeline_parallel", _LONGER, "{} or more"),
    ("distillation.moments_gb", (8, 4, 2), "{} or less"),
    ("distillation.batch_size", _FEWER, "{} or less"),
)
# By stage, or by stage and worker where a stage has several kinds.
_LEVERS: dict[str, _Levers] = {
    "calibration": (
        _OFFLOAD,
        ("calibration.batch_size", _FEWER, "{} or less"),
    ),
    "probes": (("probes.workers", _MORE, "{} or more"), ("probes.batch_size", _FEWER, "{} or less")),
    "detection": (("detection.tokens", (2048, 1024, 512), "{} or less"),),
    "detection evaluator": _EVALUATOR,
    # Where a longer pipeline does not do, fewer intervals leave fewer students on a rank.
    "screening": (_DISTILLATION[0], ("detection.max_candidates", (24, 16, 12, 8), "{} or less"), *_DISTILLATION[1:]),
    "selection": _EVALUATOR,
    "students": _DISTILLATION,
    "variants": _EVALUATOR,
    "finetuning": (
        ("finetuning.activation_checkpointing", (True,), "true"),
        ("finetuning.data_parallel", _MORE, "{} or more"),
    ),
    "evaluation": _EVALUATOR,
}


def too_large(workers: Sequence[WorkerSize], memory: float) -> list[WorkerSize]:
    """The workers of whom a device with `memory` bytes holds none."""
    return [worker for worker in workers if worker.device_bytes > USABLE * memory]


def refusal(job: JobSize, worker: WorkerSize, memory: float) -> str:
    """Why a worker does not fit a device of `memory` bytes and what to do, as one sentence."""
    largest = max(worker.device, key=lambda part: worker.device[part])
    kind = "node" if job.cpu else "GPU"
    return (
        f"{worker.stage} needs {worker.device_bytes / 1e9:.3g} GB for each {worker.worker}, most of it for its "
        f"{largest}, and the largest {kind} here has {memory / 1e9:.3g} GB, of which nine tenths are usable; "
        f"{advice(job, worker, memory)}"
    )


def advice(job: JobSize, worker: WorkerSize, memory: float) -> str:
    """The least change of the configuration by which a worker fits; where none does, the memory that it needs."""
    least = worker.device_bytes
    for changes in _changes(worker):
        found = _with(job, changes, worker)
        if found is None:
            continue
        least = min(least, found.device_bytes)
        if not too_large([found], memory):
            return "set " + " and ".join(f"{key} to {words.format(value)}" for key, value, words in changes)
    return f"no setting makes it fit; use devices of {math.ceil(least / USABLE / 1e9)} GB or more"


Change = tuple[str, Any, str]


def _changes(worker: WorkerSize) -> Iterator[list[Change]]:
    """What to try: each lever of a kind of worker alone, then the first two together."""
    own = _LEVERS.get(f"{worker.stage} {worker.worker}", _LEVERS[worker.stage])
    levers = [[(key, value, words) for value in values] for key, values, words in own]
    for lever in levers:
        yield from ([change] for change in lever)
    if len(levers) > 1:
        yield from ([first, second] for second in levers[1] for first in levers[0])


def _with(job: JobSize, changes: Sequence[Change], worker: WorkerSize) -> WorkerSize | None:
    """The same worker with some keys changed; None where the configuration or the intervals forbid it."""
    config = job.config
    for key, value, _ in changes:
        section, name = key.split(".")
        try:
            changed = type(getattr(config, section)).model_validate(
                getattr(config, section).model_dump() | {name: value}
            )
        except ValueError:
            return None
        config = config.model_copy(update={section: changed})
    if config.distillation.pipeline_parallel > max(
        job.config.distillation.pipeline_parallel, _longest_pipeline(job, config)
    ):
        return None
    return next(
        one
        for one in worker_sizes(replace(job, config=config))
        if (one.stage, one.worker) == (worker.stage, worker.worker)
    )


def _longest_pipeline(job: JobSize, config: Config) -> int:
    """The ranks of a pipeline for which the intervals that are assumed leave places to cut."""
    if config.detection.method != "measured":
        return longest_pipeline(job.model, list(job.replacements.students))
    return longest_pipeline(job.model, assumed_shortlist(config.detection, job.model))


def check_fits(job: JobSize, memory: float, stages: Collection[str]) -> None:
    """Raise `UserError` where a worker of these stages does not fit a device of `memory` bytes."""
    for worker in too_large(worker_sizes(job), memory):
        if worker.stage in stages:
            raise UserError(f"{refusal(job, worker, memory)}; --no-memory-check starts all the same")


def laid_out(config: Config, teacher: TeacherSize, gpus: int, interval: int) -> Config:
    """The configuration with all stages on so many GPUs: the longest pipeline, replicas of it, and workers elsewhere.

    Raises `UserError` where a replica would have no sample.
    """
    depth = intervals(teacher.model, interval)
    if config.detection.method == "measured":
        # Its intervals overlap, so there are fewer places to cut.
        depth = assumed_shortlist(config.detection, teacher.model)
    pp, dp = meshes(teacher.model, depth, config.distillation.batch_size, gpus)[-1]
    changes: dict[str, dict[str, int]] = {
        "calibration": {"workers": gpus},
        "probes": {"workers": min(gpus, len(teacher.model.blocks))},
        "detection": {"workers": gpus},
        "distillation": {"pipeline_parallel": pp, "data_parallel": dp},
        "finetuning": {"data_parallel": min(gpus, config.finetuning.batch_size)},
        "evaluation": {"workers": gpus},
    }
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def job_sentences(job: JobSize, workers: Sequence[WorkerSize], memory: float) -> list[str]:
    """What does not fit and what to change, a sentence each; or that all fits."""
    refused = [refusal(job, worker, memory) for worker in too_large(workers, memory)]
    return refused or [f"every worker fits {memory / 1e9:.3g} GB, of which nine tenths are usable"]
