"""The learning rate by step."""

from __future__ import annotations

import math
from typing import Protocol


class RateSettings(Protocol):
    """The part of a configuration section that decides the learning rate."""

    @property
    def steps(self) -> int: ...

    @property
    def warmup(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


def learning_rate(step: int, settings: RateSettings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
