"""Sequential distillation: every student reads what the students before it made, as in common layer distillation.

The same students, losses, batches and steps as `ppcl.training.distillation.trainer.distil`; only the inputs differ. So
errors travel from interval to interval, and no student can be used without those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ppcl.config.schema import Distillation
from ppcl.models import run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, sort_key
from ppcl.replacements.io import save_replacement
from ppcl.replacements.student_block import StudentBlock
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import ClosedForm
from ppcl.training.distillation.objectives import StudentObjective, TeacherBlocks
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import Consumer, TeacherSegment


@dataclass(frozen=True)
class SequentialRun:
    """Sequential distillation: every student is trained on the streams that the students before it make."""

    teacher: Teacher
    samples: Samples
    settings: Distillation
    seed: int
    device: str

    def distil(self, intervals: Sequence[Interval], folder: Path, tell: Callable[[int], None]) -> None:
        """Train the students of `intervals` and write them to `folder/<interval>.safetensors`. `tell(steps)` counts."""
        adapter, dims = self.teacher.adapter, ParallelDims()
        segment, trainees = self._trainees(sorted(intervals, key=sort_key), dims)
        ids, pipeline_stage = self.samples.ids("train"), PipelineStage(0, 1, 0)
        spec = CaptureSpec(frozenset({0, *(interval.last + 1 for interval in trainees)}))
        for step in range(self.settings.steps):
            rows = batch_of(step, ids, self.settings.batch_size, self.seed)
            batch = segment.run(self.samples.batch(rows, self.device, segment.dtype), pipeline_stage, spec)
            self._train_step(segment, trainees, batch)
            tell(step + 1)
        for interval, trainee in trainees.items():
            save_replacement(trainee.export(), interval, adapter, folder / f"{interval.name}.safetensors")

    def _trainees(
        self, intervals: Sequence[Interval], dims: ParallelDims
    ) -> tuple[TeacherSegment, dict[Interval, Trainee]]:
        """The whole teacher as one segment, and the students in their closed-form initialisation."""
        count, settings = self.teacher.adapter.block_ranges(self.teacher.empty_transformer())[-1].stop, self.settings
        # Nothing is written by it: the folders stay unused.
        run = RunContext(Path(), Path(), device=self.device)
        segment = TeacherSegment(self.teacher, range(count), intervals, self.device, run.dtype(settings.precision))
        blocks = TeacherBlocks(self.teacher.adapter, segment.transformer, segment.blocks, count)
        objectives = {interval: StudentObjective(blocks, interval, settings) for interval in intervals}
        for objective in objectives.values():
            objective.module.to(self.device)
        if settings.init == "affine":
            pipeline_stage = PipelineStage(0, 1, 0)

            def stream(ids: np.ndarray, consumers: Sequence[Consumer]) -> None:
                segment.stream(self.samples.batch(ids, self.device, segment.dtype), pipeline_stage, consumers)

            closed_form = ClosedForm(list(objectives.values()), settings, run)
            closed_form.fit(stream, self.samples.ids("train"), lambda objective: None)
        return segment, {interval: Trainee(objective, settings, dims) for interval, objective in objectives.items()}

    def _train_step(
        self, segment: TeacherSegment, trainees: Mapping[Interval, Trainee], batch: CapturedActivations
    ) -> None:
        """One step of every student, in order, each on what the students before it make of the batch."""
        streams, block = batch.boundaries[0], 0
        for interval, trainee in trainees.items():
            with torch.no_grad():
                between = [segment.blocks[number] for number in range(block, interval.first)]
                streams = run_blocks(self.teacher.adapter, between, streams, batch.context, block)
            ends = {interval.first: streams, interval.last + 1: batch.boundaries[interval.last + 1]}
            seen = CapturedActivations(boundaries=ends, context=batch.context, text_mask=batch.text_mask)
            trainee.train_step(seen, segment.dtype is torch.bfloat16)
            student = trainee.objective.module
            assert isinstance(student, StudentBlock)
            with torch.no_grad():
                streams = student.streams(streams, batch.context)
            block = interval.last + 1
