"""The part of the teacher that one rank holds and runs: at once, or block by block with what nobody needs dropped."""

import pytest
import torch

from ppcl.config.schema import Distillation
from ppcl.models import adapter_of
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.training.captured import JOINT, CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.segments import segment_of
from ppcl.training.losses import normalized
from ppcl.training.pipeline import PipelineStage
from ppcl.training.teacher_segment import Consumer, TeacherSegment
from tests import tiny
from tests.samples import MemorySamples

INTERVALS = [Interval(0, 1), Interval(3, 5)]
SPECS = [
    CaptureSpec(hidden=frozenset({0})),
    CaptureSpec(boundaries=frozenset({0, 4}), text_inputs=frozenset({1, 3})),
    CaptureSpec(hidden=frozenset({2}), residuals=frozenset({2})),
    CaptureSpec(hidden=frozenset({2})),
    CaptureSpec(boundaries=frozenset({6})),
]


@pytest.fixture(scope="module")
def segment(teacher_folder):
    return TeacherSegment(Teacher(teacher_folder), range(6), [], "cpu", torch.float32)


def test_every_consumer_is_served_once_with_what_a_whole_run_captures(segment):
    inputs = MemorySamples().batch([0, 1])
    taken = {}

    def consumer(index, spec):
        def take(captured):
            assert index not in taken
            names = {(name, number) for name, number, _ in spec.items()}
            taken[index] = {name: dict(getattr(captured, name)) for name, _ in names}

        return Consumer(spec, take)

    segment.stream(inputs, PipelineStage(0, 1), [consumer(i, spec) for i, spec in enumerate(SPECS)])
    assert taken.keys() == set(range(len(SPECS)))
    for index, spec in enumerate(SPECS):
        whole = segment.run(inputs, PipelineStage(0, 1), spec)
        for name, fields in taken[index].items():
            for key, value in getattr(whole, name).items():
                for a, b in zip(
                    [value] if torch.is_tensor(value) else value,
                    [fields[key]] if torch.is_tensor(value) else fields[key],
                ):
                    assert torch.equal(a, b)


def test_the_hidden_units_of_one_block_are_alive_at_a_time(segment):
    alive = []
    everything = [CaptureSpec(hidden=frozenset({block}), boundaries=frozenset({block + 1})) for block in range(6)]

    def take(captured):
        alive.append(({block for block, _ in captured.hidden}, set(captured.boundaries)))

    segment.stream(MemorySamples().batch([0, 1]), PipelineStage(0, 1), [Consumer(spec, take) for spec in everything])
    assert alive == [({block}, {block + 1}) for block in range(6)]
    assert not any(module._forward_pre_hooks for module in segment.transformer.modules())


def test_a_segment_that_nobody_listens_to_passes_the_streams_on(segment):
    segment.stream(MemorySamples().batch([0]), PipelineStage(0, 1), [])


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


def test_tokens_of_a_joint_stream_are_those_of_the_text_that_are_no_padding_and_all_of_the_image():
    x = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    mask = torch.tensor([[True, False], [True, True]])
    captured = CapturedActivations(text_mask=mask)
    expected = torch.cat([x[0, :1], x[0, 2:], x[1]])
    assert torch.equal(captured.tokens(x, JOINT), expected.float())
    assert torch.equal(CapturedActivations().tokens(x, JOINT), x.flatten(0, 1).float())


@torch.no_grad()
def test_a_single_stream_block_has_both_under_one_name_and_no_residual(tmp_path):
    segment = TeacherSegment(Teacher(tiny.flux_pipeline(tmp_path / "teacher")), range(10), [], "cpu", torch.float32)
    numbers = frozenset({1, 4})
    spec = CaptureSpec(hidden=numbers, attended=numbers, residuals=numbers)
    captured = segment.run(tiny.inputs(segment.transformer), PipelineStage(0, 1), spec)
    both = {(1, "img"), (1, "txt")}
    assert captured.residuals.keys() == both
    assert captured.hidden.keys() == captured.attended.keys() == both | {(4, "img")}
    assert captured.hidden[4, "img"].shape == (3, 6 + 16, 128)
    assert captured.attended[4, "img"].shape == (3, 6 + 16, 32)
