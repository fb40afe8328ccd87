"""A batch through a segment at once, and block by block with what nobody needs any more dropped."""

import pytest
import torch

from ppcl.models.teacher import Teacher
from ppcl.training.captured import CaptureSpec
from ppcl.training.pipeline import PipelineStage
from ppcl.training.teacher_segment import Consumer, TeacherSegment
from tests import tiny
from tests.samples import MemorySamples

SPECS = [
    CaptureSpec(hidden=frozenset({0})),
    CaptureSpec(boundaries=frozenset({0, 4}), text_inputs=frozenset({1, 3})),
    CaptureSpec(hidden=frozenset({2}), residuals=frozenset({2})),
    CaptureSpec(hidden=frozenset({2})),
    CaptureSpec(boundaries=frozenset({6})),
]


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    folder = tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")
    return TeacherSegment(Teacher(folder), range(6), [], "cpu", torch.float32)


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
