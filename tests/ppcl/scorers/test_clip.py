"""CLIPScore and PickScore against their definitions, computed from the model's own features."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from ppcl.errors import UserError
from ppcl.scorers.clip import ClipScore, PickScore
from tests.ppcl.scorers.tiny_clip import TOKENS, save_tiny_clip

PROMPTS = ["a red circle", "a blue square " * TOKENS, "a", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(256, size=(len(PROMPTS), 64, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def cosines(folder, images):
    """One pair at a time, by torch's own cosine."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    found = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        pixels = processor(images=image, return_tensors="pt")
        ids = processor(text=prompt, return_tensors="pt", truncation=True, max_length=TOKENS)
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(**pixels).pooler_output)
            b = model.text_projection(model.text_model(**ids).pooler_output)
        found.append(float(torch.nn.functional.cosine_similarity(a, b)))
    return np.array(found)


def test_clip_score_is_100_times_the_cosine_and_at_least_0(folder, images, cosines):
    assert (cosines < 0).any() and (cosines > 0).any()
    scores = ClipScore(str(folder))(PROMPTS, images, [{}] * len(PROMPTS))
    np.testing.assert_allclose(scores, 100 * np.maximum(cosines, 0), atol=1e-4)


def test_pick_score_is_the_cosine_times_the_models_scale(folder, images, cosines):
    scale = float(CLIPModel.from_pretrained(folder).logit_scale.exp())
    scores = PickScore(str(folder))(PROMPTS, images, [{}] * len(PROMPTS))
    np.testing.assert_allclose(scores, scale * cosines, atol=1e-4)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="the model folder .*nothing does not exist"):
        ClipScore(str(tmp_path / "nothing"))
