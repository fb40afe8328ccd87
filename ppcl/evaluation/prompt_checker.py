"""Worlds: captions with categories, and a checker that decides from the pixels whether a picture shows its caption."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

import numpy as np

from ppcl.errors import UserError

# By the name in the configuration, a module with `captions()`, `CATEGORIES` and `check(picture, text)`.
_CHECKERS = {"shapes": "ppcl.demo.world"}


@dataclass(frozen=True)
class TestPrompt:
    """What a test picture is asked to show; `category` is None where no world checks it."""

    __test__ = False  # pytest takes the name for a test's

    text: str
    category: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def load_checker(name: str) -> ModuleType:
    return importlib.import_module(_CHECKERS[name])


def checker_prompts(world: ModuleType, limit: int | None, seed: int) -> list[TestPrompt]:
    """Captions that were held out of training, equally many of each category, in an order drawn from the seed.

    A category without held-out captions gives its trained ones. Where a category has fewer than its part, its captions
    come again, to be drawn with other noise. `limit`: prompts in total; None: every held-out caption once.
    """
    rng = np.random.default_rng(seed)
    by_category = {}
    for category in world.CATEGORIES:
        captions = [c for c in world.captions() if c.category == category]
        chosen = [c for c in captions if c.held_out] or captions
        by_category[category] = [TestPrompt(chosen[i].text, category) for i in rng.permutation(len(chosen))]
    if limit is None:
        return [prompt for prompts in by_category.values() for prompt in prompts]
    part, rest = divmod(limit, len(by_category))
    parts = [part + (index < rest) for index in range(len(by_category))]
    return [
        prompts[i % len(prompts)]
        for prompts, count in zip(by_category.values(), parts, strict=True)
        for i in range(count)
    ]


def named_prompts(world: ModuleType, texts: Sequence[str]) -> list[TestPrompt]:
    """The given captions with their categories. Raises `UserError` for a text that is none of the world's captions."""
    category = {c.text: c.category for c in world.captions()}
    for text in texts:
        if text not in category:
            raise UserError(
                f"evaluation.prompts: {text!r} is no caption of the world, whose checker could not tell; "
                f"captions are like {next(iter(category))!r}"
            )
    return [TestPrompt(text, category[text]) for text in texts]


def correctness(world: ModuleType, pictures: np.ndarray, prompts: Sequence[TestPrompt]) -> dict[str, np.ndarray]:
    """Whether each picture, `(N, H, W, 3)` uint8, shows its caption: category to `(n,)` of 0 and 1."""
    found: dict[str, list[bool]] = {}
    for picture, prompt in zip(pictures, prompts, strict=True):
        found.setdefault(prompt.category, []).append(world.check(picture, prompt.text))
    return {c: np.array(found[c], np.float64) for c in world.CATEGORIES if c in found}
