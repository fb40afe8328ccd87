"""Prompt checkers: captions with categories, and a check of whether the pixels of an image show its caption."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ppcl.config.checks import PROMPTS_SUITE
from ppcl.errors import UserError

# By the name in the configuration, a module with `captions()`, `CATEGORIES` and `check(image, text)`.
_CHECKERS = {"shapes": "ppcl.demo.world"}


@dataclass(frozen=True)
class TestPrompt:
    """The prompt of a test image. `suite`: which prompts it is of. `row`: all columns of its line in a suite."""

    __test__ = False  # pytest takes the name for a test's

    text: str
    category: str | None = None
    suite: str = PROMPTS_SUITE
    row: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_checker(name: str) -> ModuleType:
    return importlib.import_module(_CHECKERS[name])


def checker_prompts(checker: ModuleType, limit: int | None, seed: int, seen: Collection[str] = ()) -> list[TestPrompt]:
    """Captions that were held out of training, equally many of each category, in an order drawn from the seed.

    A category without held-out captions gives its trained ones. Where a category has fewer than its part, its captions
    come again, to be drawn with other noise. `limit`: prompts in total; None: every held-out caption once. `seen`:
    captions that a variant was fitted or chosen on; they come after all others of their category.
    """
    rng = np.random.default_rng(seed)
    by_category = {}
    for category in checker.CATEGORIES:
        captions = [c for c in checker.captions() if c.category == category]
        chosen = [c for c in captions if c.held_out] or captions
        texts = [chosen[i].text for i in rng.permutation(len(chosen))]
        by_category[category] = [TestPrompt(text, category) for text in sorted(texts, key=lambda text: text in seen)]
    if limit is None:
        return [prompt for prompts in by_category.values() for prompt in prompts]
    part, rest = divmod(limit, len(by_category))
    parts = [part + (index < rest) for index in range(len(by_category))]
    return [
        prompts[i % len(prompts)]
        for prompts, count in zip(by_category.values(), parts, strict=True)
        for i in range(count)
    ]


def named_prompts(checker: ModuleType, texts: Sequence[str]) -> list[TestPrompt]:
    """The given captions with their categories. Raises `UserError` for a text that is none of the checker's."""
    category = {c.text: c.category for c in checker.captions()}
    for text in texts:
        if text not in category:
            raise UserError(
                f"evaluation.prompts: {text!r} is not a caption that the checker knows; "
                f"captions are like {next(iter(category))!r}"
            )
    return [TestPrompt(text, category[text]) for text in texts]


def checked(checker: ModuleType, images: np.ndarray, prompts: Sequence[TestPrompt]) -> list[bool]:
    """Whether each image, `(N, H, W, 3)` uint8, shows its prompt."""
    return [bool(checker.check(image, prompt.text)) for image, prompt in zip(images, prompts, strict=True)]


def by_category(checker: ModuleType, prompts: Sequence[TestPrompt], correct: Sequence[bool]) -> dict[str, np.ndarray]:
    """Category to `(n,)` of 0 and 1, one a prompt of that category, in the checker's order of categories."""
    groups: dict[str | None, list[bool]] = {}
    for prompt, is_correct in zip(prompts, correct, strict=True):
        groups.setdefault(prompt.category, []).append(is_correct)
    return {category: np.array(groups[category], np.float64) for category in checker.CATEGORIES if category in groups}


def correctness(checker: ModuleType, images: np.ndarray, prompts: Sequence[TestPrompt]) -> dict[str, np.ndarray]:
    """Whether each image, `(N, H, W, 3)` uint8, shows its prompt: category to `(n,)` of 0 and 1."""
    return by_category(checker, prompts, checked(checker, images, prompts))
