"""The learning rate by step."""

from __future__ import annotations

import math

from ppcl.config.schema import Distillation


def learning_rate(step: int, settings: Distillation) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
