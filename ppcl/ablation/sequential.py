"""Sequential distillation: every student reads what the students before it made, as in common layer distillation.

The same students, losses, batches and steps as `ppcl.training.distillation.trainer.distil`; only the inputs differ. So
errors travel from interval to interval, and no student can be used without those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from pathlib import Path

import torch

from ppcl.config.schema import Distillation
from ppcl.models import run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import save_replacement
from ppcl.replacements.plan import Interval
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import fit_closed_form
from ppcl.training.distillation.objectives import StudentObjective
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage
from ppcl.training.teacher_segment import TeacherSegment


def distil_in_sequence(
    teacher: Teacher,
    samples: Samples,
    intervals: Sequence[Interval],
    settings: Distillation,
    folder: Path,
    seed: int,
    device: str,
    tell: Callable[[int], None],
) -> None:
    """Train the students of `intervals` and write them to `folder/<interval>.safetensors`."""
    adapter, dims = teacher.adapter, ParallelDims()
    count = adapter.block_ranges(teacher.empty_transformer())[-1].stop
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    segment = TeacherSegment(teacher, range(count), intervals, device, torch.bfloat16 if bfloat16 else torch.float32)
    pipeline_stage, ids = PipelineStage(0, 1, 0), samples.ids(held_out=False)
    objectives = {
        i: StudentObjective(adapter, segment.transformer, segment.blocks, i, settings) for i in sorted(intervals)
    }
    for objective in objectives.values():
        objective.module.to(device)

    def captured(rows: torch.Tensor, wanted: CaptureSpec) -> CapturedActivations:
        return segment.run(samples.batch(rows, device, segment.dtype), pipeline_stage, wanted)

    if settings.init == "affine":
        wanted = reduce(or_, (objective.init_capture for objective in objectives.values()), CaptureSpec())
        fit_closed_form(
            list(objectives.values()),
            lambda rows: captured(rows, wanted),
            ids,
            settings.batch_size,
            settings.ridge,
            dims,
        )
    trainees = {i: Trainee(objective, settings, dims) for i, objective in objectives.items()}
    wanted = CaptureSpec(frozenset({0, *(i.last + 1 for i in intervals)}))
    for step in range(settings.steps):
        now = captured(batch_of(step, ids, settings.batch_size, seed), wanted)
        streams, block = now.boundaries[0], 0
        for interval, trainee in trainees.items():
            with torch.no_grad():
                streams = run_blocks(
                    adapter, [segment.blocks[b] for b in range(block, interval.first)], streams, now.context
                )
            ends = {interval.first: streams, interval.last + 1: now.boundaries[interval.last + 1]}
            trainee.train_step(
                CapturedActivations(boundaries=ends, context=now.context, text_mask=now.text_mask), bfloat16
            )
            with torch.no_grad():
                streams = trainee.module.streams(streams, now.context)
            block = interval.last + 1
        tell(step + 1)
    for interval, trainee in trainees.items():
        save_replacement(trainee.export(), interval, adapter, folder / f"{interval.name}.safetensors")
