"""Which held-out samples are measured on: a bounded number, spread over the prompts and over the timesteps of each."""

from __future__ import annotations

import math

import numpy as np

# Samples for the sensitivity of each replacement, and to compare candidate plans.
SEARCH_SAMPLES = 192
# Samples for the velocity errors that are reported of each variant.
REPORT_SAMPLES = 1024

_GOLDEN = (math.sqrt(5) - 1) / 2


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
