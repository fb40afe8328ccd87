"""The LoRA of the demo's teacher: what it is trained on, that it is a LoRA which results take, and how it is scored."""

import argparse

import numpy as np

from ppcl.demo import world
from ppcl.demo.score_lora import measures, without_colours
from ppcl.demo.train_lora import in_ink, train
from ppcl.demo.train_vae import scenes
from ppcl.lora import read_lora
from ppcl.models.teacher import Teacher
from tests.conftest import REPOSITORY


def test_it_is_trained_on_what_captions_say_but_for_the_colours():
    pictures, texts = scenes(24, np.random.default_rng(0), change=in_ink)
    images = pictures.permute(0, 2, 3, 1).numpy()
    assert measures(images, texts) == (1.0, 1.0)
    coloured, texts = scenes(24, np.random.default_rng(0))
    black, right = measures(coloured.permute(0, 2, 3, 1).numpy(), texts)
    assert black < 0.5 and right < 0.8


def test_a_caption_without_its_colours():
    assert without_colours("a photo of a red circle and a green cross") == "a photo of a black circle and a black cross"
    assert all(world.parse(without_colours(caption.text)) for caption in world.captions()[::50])


def test_the_file_is_a_lora_of_the_teacher(tmp_path):
    options = argparse.Namespace(
        teacher=REPOSITORY / "demo" / "teacher",
        output=tmp_path / "ink.safetensors",
        rank=2,
        steps=2,
        batch=4,
        learning_rate=1e-3,
        scenes=8,
        seed=0,
        device="cpu",
    )
    train(options)
    lora = read_lora(options.output, Teacher(options.teacher))
    assert len(lora.layers) == 16 * 12 and all(layer.scale == 1 for layer in lora.layers.values())
    assert sum(layer.norm for layer in lora.layers.values()) > 0


def test_the_one_in_the_repository_fits():
    lora = read_lora(REPOSITORY / "demo" / "loras" / "ink.safetensors", Teacher(REPOSITORY / "demo" / "teacher"))
    assert len(lora.layers) == 16 * 12
