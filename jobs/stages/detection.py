"""Detection of what can be replaced, from the probes: rows of the similarity tables are Ray tasks of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from jobs.stage import Stage, StageContext
from ppcl.detection.detect import Task, detect, write_detection
from ppcl.detection.similarity import Similarity
from ppcl.storage.manifest import StageFiles


def run(context: StageContext) -> dict[str, Any]:
    """Find the redundant intervals, text runs and FFNs; writes `detection.json`."""
    config, teacher = context.config, context.teacher
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    probes = context.inputs["probes"].folder
    run_tasks = _RayTasks(context.inputs["probes"], context.device)
    detection = detect(probes, block_ranges, config.detection, config.width, context.events, run_tasks, context.device)
    write_detection(context.folder, detection)
    return {"plan": detection["plan"]}


class _RayTasks:
    """Runs rows of tables as Ray tasks, on GPUs where the job has them, and gives their results in order."""

    def __init__(self, probes: StageFiles, device: str):
        self.probes = probes
        self.remote = ray.remote(_rows).options(num_cpus=1, num_gpus=1 if device == "cuda" else 0, name="detection")

    def __call__(self, tasks: Sequence[Task]) -> Iterator[dict[int, list[Similarity | None]]]:
        for reference in [self.remote.remote(self.probes, task) for task in tasks]:
            yield ray.get(reference)


def _rows(probes: StageFiles, task: Task) -> dict[int, list[Similarity | None]]:
    """On a worker: the files are fetched once a node."""
    return replace(task, spec=replace(task.spec, folder=probes.fetch().folder))()


STAGE = Stage(
    name="detection",
    run=run,
    describe=lambda context: (
        "CKA of every interval, the contiguous redundant ones, and the text runs and FFNs that can go"
    ),
    depends_on=("probes",),
    sections=("detection", "width"),
)
