"""Scores of a variant's images against the teacher's."""

from types import SimpleNamespace

import numpy as np
import pytest

from ppcl.evaluation.image_scores import ImageScorer
from ppcl.evaluation.prompt_checker import TestPrompt

PROMPTS = [TestPrompt("dark", "a"), TestPrompt("light", "b"), TestPrompt("dark", "a"), TestPrompt("light", "b")]


def images(*levels):
    return np.stack([np.full((16, 16, 3), level, np.uint8) for level in levels])


def checker(calls):
    def check(image, text):
        calls.append(text)
        return (image.mean() > 128) == (text == "light")

    return SimpleNamespace(CATEGORIES=("a", "b"), check=check)


def test_every_image_is_checked_once_and_scored_by_category():
    calls = []
    scorer = ImageScorer(PROMPTS, images(0, 255, 0, 255), checker(calls), confidence=0.95, seed=0)
    assert len(calls) == 4
    scores = scorer.score(images(0, 255, 255, 255))
    assert len(calls) == 8
    assert scores.correct == [True, True, False, True]
    assert scores.record["world"]["overall"]["score"] == pytest.approx(0.75)
    assert scores.record["R"] == pytest.approx(25.0)


def test_without_a_checker_only_the_similarity_is_known():
    scores = ImageScorer(PROMPTS, images(0, 255, 0, 255), None, 0.95, 0).score(images(0, 255, 0, 255))
    assert scores.correct is None and scores.record["R"] is None and scores.record["world"] is None
    assert scores.record["ssim"] == pytest.approx(1.0)
