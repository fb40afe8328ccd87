"""The demo teachers' families: what their text encoders tell apart, and that each learns from both lessons."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline

from ppcl.demo import text_encoders, world
from ppcl.demo.families import FAMILIES, sd3
from ppcl.demo.lessons import Batch, Scenes, Velocities
from ppcl.demo.train_image_vae import new_vae, normalised_latents
from ppcl.demo.train_teacher import TeacherTraining
from ppcl.models.teacher import Teacher
from tests.conftest import REPOSITORY

TEACHER = REPOSITORY / "demo" / "teacher"
ORDERS = ["a photo of a circle left of a square", "a photo of a square left of a circle"]


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_vae")
    new_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Scenes:
    work = tmp_path_factory.mktemp("work")
    return Scenes(Teacher(TEACHER).pipeline().vae, 24, 0, work, "cpu")


def test_each_word_is_one_token_and_the_longest_caption_fits():
    clip, t5 = text_encoders.clip_tokenizer(), text_encoders.t5_tokenizer()
    for word in text_encoders.words():
        assert len(clip.tokenize(word)) == 1
        assert len(t5.tokenize(word)) == 1
    longest = max(len(tokenizer(c.text)["input_ids"]) for c in world.captions() for tokenizer in (clip, t5))
    assert longest == text_encoders.TOKENS


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_order_of_words_is_in_what_the_text_encoders_give(name, image_vae):
    family = FAMILIES[name](image_vae, 0)
    family.read(ORDERS, "cpu")
    # A transformer without positions on text reads the tokens as a set.
    tokens = family.encoded["encoder_hidden_states"]
    assert torch.cdist(tokens[0], tokens[1]).amin(1).max() > 0.1 * tokens[0].norm(dim=1).mean()


def test_sd3_latents_are_packed_as_the_other_families_pack_them():
    latents = torch.randn(3, 8, 8, 8)
    packed = QwenImagePipeline._pack_latents(latents.unsqueeze(2), 3, 8, 8, 8)
    assert torch.equal(sd3._packed(latents), packed)
    assert torch.equal(sd3._unpacked(packed), latents)


def test_velocities_are_the_teachers_guided_ones(scenes, tmp_path):
    pipeline = Teacher(TEACHER).pipeline()
    lesson = Velocities(pipeline, scenes, 16, (1.0, 3.0), tmp_path)
    batch = lesson.batch(3, 8)
    assert torch.equal(batch.target, Velocities(pipeline, scenes, 16, (1.0, 3.0), tmp_path).batch(3, 8).target)
    captions = [lesson.vocabulary[index] for index in batch.captions]
    for row, caption in enumerate(captions):
        given = {"hidden_states": batch.noisy[row : row + 1], "timestep": batch.t[row : row + 1]}
        answers = []
        for said in (caption, " "):
            embeddings, mask = pipeline.encode_prompt([said])
            said_to = {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}
            with torch.no_grad():
                answers.append(pipeline.transformer(**given, **said_to, img_shapes=[[(1, 4, 4)]])[0])
        guided = answers[1] + batch.guidance[row] * (answers[0] - answers[1])
        assert (guided - batch.target[row]).norm() < 0.02 * guided.norm()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_family_learns_a_lesson_and_goes_on_from_a_checkpoint(name, image_vae, scenes, tmp_path):
    options = argparse.Namespace(
        work=tmp_path, learning_rate=5e-2, steps=12, batch=8, device="cpu", seed=0, checkpoint_every=6
    )

    def run(training: TeacherTraining, until: int) -> list[float]:
        return [training.train_step(_Same(scenes)) for _ in range(until - training.step)]

    whole = _new(name, image_vae, scenes, options)
    losses = run(whole, 12)
    assert losses[-1] < 0.95 * losses[0]
    begun = _new(name, image_vae, scenes, options)
    run(begun, 6)
    begun.save()
    resumed = _new(name, image_vae, scenes, options)
    resumed.load()
    assert resumed.step == 6
    # Training multiplies differences of rounding: only the next steps are alike.
    torch.testing.assert_close(torch.tensor(run(resumed, 8)), torch.tensor(losses[6:8]), rtol=1e-2, atol=0)


def test_the_image_vae_learns_normalised_latents():
    vae = Teacher(TEACHER).pipeline().vae
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = vae.encode(x.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(normalised_latents(vae, x), (z - mean) / std, rtol=1e-4, atol=1e-4)
    assert new_vae().encode(x).latent_dist.mean.shape == z.shape


class _Same:
    """The same batch at every step."""

    def __init__(self, scenes: Scenes):
        self.scenes, self.vocabulary = scenes, scenes.vocabulary

    def batch(self, step: int, count: int) -> Batch:
        return self.scenes.batch(0, count)


def _new(name: str, vae: Path, scenes: Scenes, options: argparse.Namespace) -> TeacherTraining:
    torch.manual_seed(0)
    family = FAMILIES[name](vae, 0)
    family.read(scenes.vocabulary, "cpu")
    return TeacherTraining(family, options)
