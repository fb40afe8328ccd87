"""Sequential distillation: every student reads what the students before it made, as in common layer distillation.

The same students, losses, batches and steps as `ppcl.training.distillation.trainer.distil`; only the inputs differ. So errors travel from
interval to interval, and no student can be used without those before it.
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
from ppcl.replacements.io import save
from ppcl.replacements.plan import Interval
from ppcl.training.captured import Seen, Wanted
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import fit_starts
from ppcl.training.distillation.objectives import Depth
from ppcl.training.parallel_dims import Mesh
from ppcl.training.pipeline import Chain
from ppcl.training.teacher_segment import Segment
from ppcl.training.trainee import Pupil


def distil_in_sequence(
    teacher: Teacher, samples: Samples, intervals: Sequence[Interval], settings: Distillation, folder: Path, seed: int,
    device: str, tell: Callable[[int], None],
) -> None:  # fmt: skip
    """Train the students of `intervals` and write them to `folder/<interval>.safetensors`."""
    architecture, mesh = teacher.architecture, Mesh()
    count = architecture.spans(teacher.empty_transformer())[-1].stop
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    segment = Segment(teacher, range(count), intervals, device, torch.bfloat16 if bfloat16 else torch.float32)
    chain, ids = Chain(0, 1, 0), samples.ids(held_out=False)
    lessons = {i: Depth(architecture, segment.transformer, segment.blocks, i, settings) for i in sorted(intervals)}
    for lesson in lessons.values():
        lesson.module.to(device)

    def seen(rows: torch.Tensor, wanted: Wanted) -> Seen:
        return segment.run(samples.batch(rows, device, segment.dtype), chain, wanted)

    if settings.start == "affine":
        wanted = reduce(or_, (lesson.wanted_to_start for lesson in lessons.values()), Wanted())
        fit_starts(list(lessons.values()), lambda rows: seen(rows, wanted), ids, settings.batch_size, settings.ridge, mesh)
    pupils = {i: Pupil(lesson, settings, mesh) for i, lesson in lessons.items()}
    wanted = Wanted(frozenset({0, *(i.last + 1 for i in intervals)}))
    for step in range(settings.steps):
        now = seen(batch_of(step, ids, settings.batch_size, seed), wanted)
        streams, block = now.boundaries[0], 0
        for interval, pupil in pupils.items():
            with torch.no_grad():
                streams = run_blocks(architecture, [segment.blocks[b] for b in range(block, interval.first)], streams, now.context)
            ends = {interval.first: streams, interval.last + 1: now.boundaries[interval.last + 1]}
            pupil.learn(Seen(boundaries=ends, context=now.context, text_mask=now.text_mask), bfloat16)
            with torch.no_grad():
                streams = pupil.module.streams(streams, now.context)
            block = interval.last + 1
        tell(step + 1)
    for interval, pupil in pupils.items():
        save(pupil.trained(), interval, architecture, folder / f"{interval.name}.safetensors")
