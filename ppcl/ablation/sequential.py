"""Sequential distillation: every student reads what the students before it made, as in common layer distillation.

The same students, losses, batches and steps as `ppcl.distillation.run.distil`; only the inputs differ. So errors travel from
interval to interval, and no student can be used without those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ppcl.architecture import run_blocks
from ppcl.config import Distillation
from ppcl.distillation.lessons import Depth, Seen, Wanted
from ppcl.distillation.mesh import Mesh
from ppcl.distillation.pupil import Pupil
from ppcl.distillation.run import Samples, Segment, batch_of
from ppcl.distillation.start import fit_starts
from ppcl.plan import Interval
from ppcl.replacements import save
from ppcl.segments import Chain
from ppcl.teacher import Teacher


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
    lessons = {i: Depth(architecture, segment.blocks, i, settings.start) for i in sorted(intervals)}
    for lesson in lessons.values():
        lesson.module.to(device)

    def seen(rows: torch.Tensor, wanted: Wanted) -> Seen:
        return segment.run(samples.batch(rows, device, segment.dtype), chain, wanted)

    if settings.start == "affine":
        wanted = Wanted(frozenset(b for lesson in lessons.values() for b in lesson.wanted_to_start.boundaries))
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
