"""Scores of a variant's images: similarity to the teacher's, and the prompt checker's, where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ppcl.config.checks import PROMPTS_SUITE
from ppcl.evaluation.image_metrics import psnr, ssim
from ppcl.evaluation.prompt_checker import TestPrompt, by_category, checked
from ppcl.evaluation.scoring import checker_scores, relative_drop


@dataclass(frozen=True)
class ImageScores:
    """`record`: what `evaluation.json` says of a variant's images. `correct`: by image, None where none is checked.

    Without a checker, `correct` is None.
    """

    record: dict[str, Any]
    correct: list[bool | None] | None


class ImageScorer:
    """Scores the images of all variants against `reference`, the teacher's, `(N, H, W, 3)` uint8, one a prompt.

    The checker looks at images of `evaluation.prompts`, or of its own captions, and at those of no other suite.
    `confidence`: level of the intervals. `seed`: of their bootstrap.
    """

    def __init__(
        self,
        prompts: Sequence[TestPrompt],
        reference: np.ndarray,
        checker: ModuleType | None,
        confidence: float,
        seed: int,
    ):
        self.prompts, self.reference, self.checker = prompts, reference, checker
        self.confidence, self.seed = confidence, seed
        self._checkable = [index for index, prompt in enumerate(prompts) if prompt.suite == PROMPTS_SUITE]
        self._teacher = self._by_category(checker, reference)[0] if checker else {}

    def score(self, images: np.ndarray) -> ImageScores:
        record: dict[str, Any] = {
            "psnr": float(psnr(images, self.reference).mean()),
            "ssim": float(ssim(images, self.reference).mean()),
            "world": None,
            "R": None,
            "R_low": None,
            "R_high": None,
        }
        if self.checker is None:
            return ImageScores(record, None)
        correctness, correct = self._by_category(self.checker, images)
        record["world"] = checker_scores(correctness, self.confidence, self.seed)
        record |= relative_drop(correctness, self._teacher, self.confidence, self.seed)
        return ImageScores(record, correct)

    def _by_category(self, checker: ModuleType, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[bool | None]]:
        """Which images are right, by category and by image."""
        prompts = [self.prompts[index] for index in self._checkable]
        right = checked(checker, images[self._checkable], prompts)
        correct: list[bool | None] = [None] * len(self.prompts)
        for index, is_right in zip(self._checkable, right, strict=True):
            correct[index] = is_right
        return by_category(checker, prompts, right), correct
