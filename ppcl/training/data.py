"""Which samples a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Samples(Protocol):
    """The calibration set, as far as it is needed here."""

    def ids(self, held_out: bool) -> np.ndarray: ...

    def batch(self, ids: Sequence[int] | np.ndarray, device: str, dtype: torch.dtype) -> dict[str, Any]: ...


def batch_of(step: int, ids: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The sample ids of a step: consecutive pieces of one endless run of seeded shuffles, whatever ranks there are."""
    wanted = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(ids)
        for epoch in {position // len(ids) for position in wanted}
    }
    return np.array([orders[position // len(ids)][position % len(ids)] for position in wanted])
