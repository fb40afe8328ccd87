"""The samples of training, and which of them a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ppcl.calibration.splits import Split

_GOLDEN = (math.sqrt(5) - 1) / 2


class Samples(Protocol):
    """The part of the calibration set that training needs; see `ppcl.calibration.dataset.CalibrationSet`."""

    def ids(self, split: Split) -> np.ndarray:
        """Sample ids of one split of the prompts, ascending."""
        ...

    def batch(self, ids: Sequence[int] | np.ndarray, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the transformer's call, one row per id."""
        ...


def batch_of(step: int, ids: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The `size` sample ids of a step: consecutive pieces of an endless series of seeded shuffles, for all ranks."""
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(ids)
        for epoch in {position // len(ids) for position in positions}
    }
    return np.array([orders[position // len(ids)][position % len(ids)] for position in positions])


def spread_samples(ids: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the ids, ascending: one of each of so many equal runs of them, at golden-ratio positions.

    A constant stride would take the same timesteps of every prompt, since each prompt has as many samples in order of
    their timesteps.
    """
    if len(ids) <= most:
        return ids
    borders = np.arange(most + 1) * len(ids) // most
    positions = np.arange(most) * _GOLDEN % 1.0
    return ids[borders[:-1] + (positions * np.diff(borders)).astype(np.int64)]
