"""Prompts are encoded once, and what comes from memory is what the stock method gave."""

import pytest
import torch

from ppcl.config.schema import Sampling
from ppcl.evaluation.images import generate_images
from ppcl.evaluation.prompt_cache import keep_embeddings
from ppcl.models.teacher import Teacher
from tests import tiny

SAMPLING = Sampling(steps=2, height=32, width=32)
PROMPTS = ["a photo of a red circle", "two blue squares"]


@pytest.fixture
def pipeline(teacher_folder):
    pipeline = Teacher(teacher_folder).pipeline()
    pipeline.encoded = 0

    def count(*_):
        pipeline.encoded += 1

    pipeline.text_encoder.register_forward_hook(count)
    return pipeline


def test_images_are_the_same_and_each_batch_is_encoded_once(pipeline):
    stock = [generate_images(pipeline, prompts, [0, 1], SAMPLING) for prompts in (PROMPTS, PROMPTS[::-1])]
    assert pipeline.encoded == 2
    keep_embeddings(pipeline)
    for _ in range(3):
        made = [generate_images(pipeline, prompts, [0, 1], SAMPLING) for prompts in (PROMPTS, PROMPTS[::-1])]
        assert all((a == b).all() for a, b in zip(made, stock))
    assert pipeline.encoded == 4


def test_the_memory_of_embeddings_is_bounded(pipeline):
    keep_embeddings(pipeline, limit=1)
    for _ in range(2):
        generate_images(pipeline, PROMPTS, [0, 1], SAMPLING)
    assert pipeline.encoded == 2


@pytest.mark.parametrize("family", [tiny.flux_pipeline, tiny.sd3_pipeline])
def test_every_family_calls_its_method_with_what_can_be_a_key(tmp_path, family):
    pipeline, sampling = Teacher(family(tmp_path / "pipeline")).pipeline(), Sampling(steps=2, height=16, width=16)
    expected = generate_images(pipeline, ["a red circle"], [0], sampling)
    keep_embeddings(pipeline)
    generate_images(pipeline, ["a red circle"], [0], sampling)

    def refuse(*_):
        raise AssertionError("encoded again")

    for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
        getattr(pipeline, name).register_forward_pre_hook(refuse)
    assert (generate_images(pipeline, ["a red circle"], [0], sampling) == expected).all()


def test_embeddings_that_are_given_are_passed_on(pipeline):
    keep_embeddings(pipeline)
    embeddings, mask = pipeline.encode_prompt(prompt=PROMPTS)
    again, _ = pipeline.encode_prompt(prompt=None, prompt_embeds=embeddings, prompt_embeds_mask=mask)
    assert torch.equal(again, embeddings)
