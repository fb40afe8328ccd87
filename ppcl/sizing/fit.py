"""Whether a job's workers fit the devices they are for, and which key of the configuration makes one smaller."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
_FEWER_EVALUATORS: _Levers = (("evaluation.workers", _FEWER, "{} or less"),)
_FEWER_REPLICAS: _Levers = (("distillation.data_parallel", _FEWER, "{} or less"),)
# On CPUs, before those: fewer workers that share a node, by stage and worker.
_SHARING: dict[str, _Levers] = {
    "calibration encoder": (("calibration.workers", _FEWER, "{} or less"),),
    "calibration sampler": (("calibration.workers", _FEWER, "{} or less"),),
    "probes rank": (("probes.workers", _FEWER, "{} or less"),),
    "detection evaluator": (("detection.workers", _FEWER, "{} or less"),),
    "screening rank": _FEWER_REPLICAS,
    "selection evaluator": _FEWER_EVALUATORS,
    "students rank": _FEWER_REPLICAS,
    "variants evaluator": _FEWER_EVALUATORS,
    "finetuning rank": (("finetuning.data_parallel", _FEWER, "{} or less"),),
    "evaluation evaluator": _FEWER_EVALUATORS,
    "evaluation coordinator": (("evaluation.max_prompts", (1000, 100, 10), "{} or less"),),
}


class Place(NamedTuple):
    """What workers have to fit: a GPU, which one worker has alone, or a node where they use CPUs.

    `memory`: its bytes. `cpus`: of a node; each worker takes one, and Ray fills a node before the next. None: so many
    that all workers of a stage share it.
    """

    memory: float
    cpus: int | None = None

    def fits(self, job: JobSize, worker: WorkerSize) -> bool:
        return self.needed(job, worker) <= USABLE * self.memory

    def sharing(self, job: JobSize, worker: WorkerSize) -> int:
        """The most workers of this kind that are there at once."""
        if not job.cpu:
            return 1
        return worker.count if self.cpus is None else max(1, min(worker.count, self.cpus))

    def needed(self, job: JobSize, worker: WorkerSize) -> int:
        """Bytes; on a node each that shares it counts as the fullest one."""
        return self.sharing(job, worker) * bytes_of(job, worker)


def bytes_of(job: JobSize, worker: WorkerSize) -> int:
    """What one worker needs of its GPU; on a CPU, of the node, where both memories are the process's."""
    return worker.device_bytes + (worker.host_bytes if job.cpu else 0)


def too_large(job: JobSize, workers: Sequence[WorkerSize], place: Place) -> list[WorkerSize]:
    """The workers that a place does not hold."""
    return [worker for worker in workers if not place.fits(job, worker)]


def refusal(job: JobSize, worker: WorkerSize, place: Place) -> str:
    """Why workers do not fit a place and what to do, as one sentence."""
    parts = {**worker.device, **(worker.host if job.cpu else {})}
    largest = max(parts, key=lambda part: parts[part])
    shared = place.sharing(job, worker)
    share = f", {shared} of them share a node" if shared > 1 else ""
    return (
        f"{worker.stage} needs {bytes_of(job, worker) / 1e9:.3g} GB for each {worker.worker}, most of it for its "
        f"{largest}{share}, and the largest {'node' if job.cpu else 'GPU'} here has {place.memory / 1e9:.3g} GB, of "
        f"which nine tenths are usable; {advice(job, worker, place)}"
    )


def advice(job: JobSize, worker: WorkerSize, place: Place) -> str:
    """The least change of the configuration by which workers fit; where none does, the memory that they need."""
    least = place.needed(job, worker)
    for changes in _changes(worker, job.cpu):
        found = _with(job, changes, worker)
        if found is None:
            continue
        least = min(least, place.needed(job, found))
        if place.fits(job, found):
            return "set " + " and ".join(f"{key} to {words.format(value)}" for key, value, words in changes)
    kind = "nodes" if job.cpu else "devices"
    return f"no setting makes it fit; use {kind} of {math.ceil(least / USABLE / 1e9)} GB or more"


Change = tuple[str, Any, str]


def _changes(worker: WorkerSize, cpu: bool) -> Iterator[list[Change]]:
    """What to try: each lever of a kind of worker alone, then the first two together."""
    own = _LEVERS.get(f"{worker.stage} {worker.worker}", _LEVERS[worker.stage])
    if cpu:
        # Weights that come and go would come from the same memory.
        own = (*_SHARING.get(f"{worker.stage} {worker.worker}", ()), *(lever for lever in own if lever is not _OFFLOAD))
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


def check_fits(job: JobSize, places: Sequence[Place], stages: Collection[str]) -> None:
    """Raise `UserError` where workers of these stages fit none of the places."""
    for worker in worker_sizes(job):
        if worker.stage in stages and not any(place.fits(job, worker) for place in places):
            roomiest = max(places, key=lambda place: place.memory / place.sharing(job, worker))
            raise UserError(f"{refusal(job, worker, roomiest)}; --no-memory-check starts all the same")


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
    place = Place(memory)
    refused = [refusal(job, worker, place) for worker in too_large(job, workers, place)]
    together = "all workers of a stage together fit" if job.cpu else "every worker fits"
    return refused or [f"{together} {memory / 1e9:.3g} GB, of which nine tenths are usable"]
