"""The part of the teacher that one rank holds and runs."""

import torch

from ppcl.config.schema import Distillation
from ppcl.models import adapter_of
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.segments import segment_of
from ppcl.training.losses import normalized
from ppcl.training.pipeline import PipelineStage
from ppcl.training.teacher_segment import TeacherSegment
from tests.samples import MemorySamples

INTERVALS = [Interval(0, 1), Interval(3, 5)]


def test_a_rank_holds_its_own_blocks_only(teacher_folder):
    teacher = Teacher(teacher_folder)
    whole = teacher.transformer()
    block = sum(p.numel() for p in adapter_of(whole).blocks(whole)[0].parameters())
    rest = sum(p.numel() for p in whole.parameters()) - 6 * block
    parts = [segment_of(stage, 2, 6, INTERVALS, "students") for stage in range(2)]
    assert [b for part in parts for b in part] == list(range(6))
    for part in parts:
        segment = TeacherSegment(teacher, part, INTERVALS, "cpu", torch.float32)
        assert sum(p.numel() for p in segment.transformer.parameters()) == len(part) * block + rest
        assert all(i.first in part and i.last in part for i in segment.plan)


def test_a_student_in_training_keeps_what_goes_into_its_interval_and_what_comes_out(teacher_folder):
    segment = TeacherSegment(Teacher(teacher_folder), range(6), INTERVALS, "cpu", torch.float32)
    blocks = TeacherBlocks(segment.adapter, segment.transformer, segment.blocks, 6)
    objective = new_objective(blocks, Interval(3, 5), Distillation())
    inputs = MemorySamples().batch([0, 1])
    # The first block's own output is needed for the fit of the affine start, and no longer.
    assert segment.run(inputs, PipelineStage(0, 1), objective.init_capture).boundaries.keys() == {4, 6}
    captured = segment.run(inputs, PipelineStage(0, 1), objective.capture)
    assert captured.boundaries.keys() == {3, 6}
    assert objective.losses(captured, normalized).keys() == {"img", "txt"}
