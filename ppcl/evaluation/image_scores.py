"""Scores of a variant's images: similarity to the teacher's, and the prompt checker's, where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ppcl.evaluation.image_metrics import psnr, ssim
from ppcl.evaluation.prompt_checker import TestPrompt, by_category, checked
from ppcl.evaluation.scoring import checker_scores, relative_drop


@dataclass(frozen=True)
class ImageScores:
    """`record`: what `evaluation.json` says of a variant's images. `correct`: by image; None without a checker."""

    record: dict[str, Any]
    correct: list[bool] | None


class ImageScorer:
    """Scores the images of all variants against `reference`, the teacher's, `(N, H, W, 3)` uint8, one a prompt.

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
        self._teacher = by_category(checker, prompts, checked(checker, reference, prompts)) if checker else {}

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
        correct = checked(self.checker, images, self.prompts)
        correctness = by_category(self.checker, self.prompts, correct)
        record["world"] = checker_scores(correctness, self.confidence, self.seed)
        record |= relative_drop(correctness, self._teacher, self.confidence, self.seed)
        return ImageScores(record, correct)
