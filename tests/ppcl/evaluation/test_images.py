"""Pictures of variants by the stock pipeline: a seed's picture is its own, and timing leaves the teacher plugged in."""

import numpy as np
import pytest

from ppcl.config.schema import Sampling
from ppcl.evaluation.images import generate_images, image_path, load_images, save_images, seconds_per_step, step_times
from ppcl.result import Result
from tests import made_result

SAMPLING = Sampling(
    steps=3, height=32, width=32, arguments={"true_cfg_scale": 2.0, "negative_prompt": "a photo of a cross"}
)
PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]


@pytest.fixture(scope="module")
def result(tmp_path_factory, teacher_folder):
    return Result(made_result.result(tmp_path_factory.mktemp("result") / "job", teacher_folder))


@pytest.fixture(scope="module")
def pipeline(result):
    return result.pipeline()


def test_a_seeds_picture_does_not_depend_on_the_batch_it_is_made_in(pipeline, tmp_path):
    both = generate_images(pipeline, PROMPTS, [5, 6], SAMPLING)
    assert both.shape == (2, 32, 32, 3) and both.dtype == np.uint8
    turned = generate_images(pipeline, PROMPTS[::-1], [6, 5], SAMPLING)
    # Sums in another order may round one level away.
    assert np.abs(both.astype(int) - turned[::-1]).max() <= 1
    reseeded = generate_images(pipeline, PROMPTS, [5, 7], SAMPLING)
    assert np.abs(both.astype(int) - reseeded).max(axis=(1, 2, 3))[1] > 1
    paths = [image_path(tmp_path, "p75", index) for index in range(2)]
    save_images(both, paths)
    assert np.array_equal(load_images(paths), both)


def test_timing_gives_every_variant_its_turns_and_leaves_the_teacher(result, pipeline, monkeypatch):
    blocks = list(pipeline.transformer.transformer_blocks)
    turns = []

    def switch(transformer, intervals):
        turns.append(tuple(intervals))
        result._switch(transformer, intervals)

    variants = {name: result.variants[name].plan for name in ("teacher", "all")}
    times = step_times(pipeline, switch, variants, PROMPTS[:1], SAMPLING)
    # Of the steps of a turn the first is not counted.
    assert times.keys() == variants.keys() and all(len(seconds) == SAMPLING.steps - 1 for seconds in times.values())
    assert all(value > 0 for seconds in times.values() for value in seconds)
    # One turn each, and the teacher put back.
    assert turns == [(), variants["all"], ()]
    assert all(a is b for a, b in zip(blocks, pipeline.transformer.transformer_blocks, strict=True))


def test_a_pipeline_that_fails_while_timed_is_left_with_the_teacher(result, pipeline, monkeypatch):
    blocks = list(pipeline.transformer.transformer_blocks)
    monkeypatch.setattr(pipeline.transformer, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_times(pipeline, result._switch, {"all": result.variants["all"].plan}, PROMPTS[:1], SAMPLING)
    assert all(a is b for a, b in zip(blocks, pipeline.transformer.transformer_blocks, strict=True))


def test_a_steps_seconds_are_the_median_over_all_rounds():
    rounds = [{"teacher": [1.0, 5.0]}, {"teacher": [2.0, 3.0]}, {"teacher": [4.0, 6.0]}]
    assert seconds_per_step(rounds) == {"teacher": 3.5}
