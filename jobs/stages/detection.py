"""Detection of what can be replaced.

Rows of the similarity tables are Ray tasks of their own; evaluators measure the intervals, each some of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of, offload_of
from jobs.runtime.resources import Resources
from jobs.runtime.tasks import task_results
from jobs.stage import Stage, StageContext, Workers
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.detection.detect import (
    Task,
    detection_record,
    intervals_from_similarity,
    run_here,
    similarity_tables,
    write_detection,
)
from ppcl.detection.similarity import Similarity
from ppcl.detection.surrogates import by_start, candidate_intervals
from ppcl.errors import UserError
from ppcl.evaluation.velocity_error import ErrorSums, error_model, resampled_models
from ppcl.replacements import Interval, Replacement, sort_key
from ppcl.replacements.replacement import TeacherStructure
from ppcl.search.shortlist import longest_chain, most_intervals, shortlist, unstable
from ppcl.search.variants import blocks_to_remove, custom_intervals
from ppcl.storage.manifest import StageFiles
from ppcl.training.data import spread_samples

# Multiplications; a core does some ten thousand million a second.
_WORTH_A_TASK = 5e11
# Below this share of boundaries that come again on resamples a choice is called uncertain.
_LEAST_STABILITY = 0.6


def workers(config: Config) -> Workers:
    return Workers(config.detection.workers, "detection.workers")


def check(context: StageContext) -> list[str]:
    """Raises `UserError` where intervals are asked for that no list of blocks has."""
    settings = context.config.detection
    longest = max(map(len, _block_ranges(context)))
    # The default is for large teachers; a small one has shorter intervals.
    given = settings.method == "measured" and "max_length" in settings.model_fields_set
    if given and settings.max_length > longest:
        raise UserError(
            f"detection.max_length is {settings.max_length}, and the longest list of blocks of this teacher has "
            f"{longest}; give {longest} or less"
        )
    return []


def run(context: StageContext) -> dict[str, Any]:
    """Find the redundant intervals, text runs and FFNs; writes `detection.json`."""
    config = context.config
    probes = context.inputs["probes"]
    run_tasks = _RayTasks(context)
    tables = similarity_tables(
        probes.folder, _block_ranges(context), config.detection, config.width, context.events, run_tasks, context.device
    )
    notes: list[str] = []
    if config.detection.method == "measured":
        measured, intervals, layouts, notes = _measure(context)
        tables |= {"measured": measured}
    else:
        intervals = intervals_from_similarity(tables, config.detection)
        layouts = [intervals]
    custom = custom_intervals(config.variants)
    intervals = sorted({*intervals, *custom}, key=sort_key)
    detection = detection_record(tables, intervals, layouts, config.width, probes.folder, _prunable(context))
    write_detection(context.folder, detection)
    return {"plan": detection["plan"], "notes": notes}


def _block_ranges(context: StageContext) -> list[range]:
    return context.teacher.adapter.block_ranges(context.teacher.empty_transformer())


def _prunable(context: StageContext) -> list[int]:
    """The blocks of which hidden units and heads can go."""
    structure = TeacherStructure(context.teacher.adapter, context.teacher.empty_transformer())
    return [number for number in range(len(structure.blocks)) if structure.parts(number)]


def _measure(context: StageContext) -> tuple[dict[str, Any], list[Interval], list[list[Interval]], list[str]]:
    """Measure every interval in closed form: the record, the shortlist, plans of some lengths, and notes."""
    settings, progress, block_ranges = context.config.detection, context.events, _block_ranges(context)
    calibration, probes = context.inputs["calibration"], context.inputs["probes"]
    ids = spread_samples(CalibrationSet.of(calibration).ids("validation"), settings.samples)
    candidates = candidate_intervals(block_ranges, settings.max_length)
    work = [
        (tuple(group), chunk)
        for group in by_start(candidates)
        for chunk in chunks_of(ids, context.config.evaluation.batch_size)
    ]
    with EvaluatorPool(context, None, workers) as evaluators:
        _, notes = offload_of(evaluators)
        parts = evaluators.all(
            lambda a, item: a.surrogate_errors.remote(probes, calibration, *item),
            work,
            lambda done: progress(done, len(work), phase=f"measuring {len(candidates)} intervals"),
        )
    sums: dict[Replacement, ErrorSums] = {
        interval: ErrorSums.joined(errors[interval] for errors, _ in parts if interval in errors)
        for interval in candidates
    }
    few = {interval for _, underdetermined in parts for interval in underdetermined}
    if few:
        notes.append(
            f"{len(few)} of {len(candidates)} intervals had no more tokens to fit on than the streams have channels, "
            "so the ridge decided; raise detection.fit_tokens or use more prompts"
        )
    asked = blocks_to_remove(context.config.variants, block_ranges)
    found = shortlist(
        error_model(sums),
        lambda: resampled_models(sums, settings.resamples, context.seed),
        block_ranges,
        max(asked.values(), default=block_ranges[-1].stop // 2),
        most_intervals(settings, block_ranges[-1].stop),
        longest_chain(settings, block_ranges[-1].stop),
        lambda done: progress(done, settings.resamples, phase="choosing on resamples"),
    )
    notes += unstable(found, asked, _LEAST_STABILITY)
    record = {
        "samples": len(ids),
        "sensitivity": {str(interval): one.overall() for interval, one in sums.items()},
        "plans": {str(count): [str(r) for r in plan] for count, plan in found.plans.items()},
        "recurrence": {
            str(count): {str(border): share for border, share in shares.items()}
            for count, shares in found.recurrence.items()
        },
    }
    plans = [[i for i in plan if isinstance(i, Interval)] for plan in found.plans.values()]
    layouts = [plans[round(i * (len(plans) - 1) / 2)] for i in range(3)] if plans else [[]]
    return record, found.intervals, layouts, [f"detection: {note}" for note in notes]


class _RayTasks:
    """Runs rows of tables as Ray tasks, on GPUs where the job has them, and gives their results in order.

    What a core does in seconds is done here: workers take longer to start.
    """

    def __init__(self, context: StageContext):
        self.probes, self.progress = context.inputs["probes"], context.events
        # A task at a time is enough.
        self.resources = Resources.of(workers(context.config)._replace(number=1), context.device, context.config)
        gpus = 1 if context.device == "cuda" else 0
        self.remote = ray.remote(_rows).options(num_cpus=1, num_gpus=gpus, name="detection")

    def __call__(self, tasks: Sequence[Task]) -> Iterator[dict[int, list[Similarity | None]]]:
        tables = {(task.spec.stream, task.rows, task.spec.standardize): task.spec for task in tasks}
        if sum(spec.multiplications for spec in tables.values()) < _WORTH_A_TASK:
            yield from run_here([replace(task, spec=replace(task.spec, device="cpu")) for task in tasks])
            return
        calls = [(lambda begun, task=task: self.remote.remote(begun, self.probes, task)) for task in tasks]
        yield from task_results(calls, self.resources, lambda sentence: self.progress(0, phase=sentence))


def _rows(begun: Any, probes: StageFiles, task: Task) -> dict[int, list[Similarity | None]]:
    """On a worker: the files are fetched once a node."""
    begun.set.remote()
    return replace(task, spec=replace(task.spec, folder=probes.fetch().folder))()


def _also_reads(context: StageContext) -> list[Any]:
    variants = context.config.variants
    asked = blocks_to_remove(variants, _block_ranges(context)) if context.config.detection.method == "measured" else {}
    return [max(asked.values(), default=0), [str(interval) for interval in custom_intervals(variants)]]


STAGE = Stage(
    name="detection",
    run=run,
    describe=lambda context: (
        "the similarity and the velocity error of every interval, and the intervals, text runs and FFNs that can go"
    ),
    depends_on=("calibration", "probes"),
    sections=("detection", "width"),
    workers=workers,
    check=check,
    also_reads=_also_reads,
)
