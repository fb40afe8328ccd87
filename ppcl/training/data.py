"""The samples of training, and which of them a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Samples(Protocol):
    """The part of the calibration set that training needs; see `ppcl.calibration.dataset.CalibrationSet`."""

    def ids(self, held_out: bool) -> np.ndarray:
        """Sample ids of one side of the split, ascending."""
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
