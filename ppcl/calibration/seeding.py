"""Random numbers of calibration: each depends on the seed and the prompt alone, never on a batch."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

_GOLDEN = (math.sqrt(5) - 1) / 2


def seed_of(*parts: object) -> int:
    """A 63-bit seed of any values, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, so that the numbers do not depend on the device."""
    return torch.Generator().manual_seed(seed_of(*parts))


def strata(seed: int, prompt_id: int, count: int) -> np.ndarray:
    """`count` positions in [0, 1), one in each of `count` equal strata.

    All strata of a prompt share one offset, and the offsets of successive prompts are a golden-ratio sequence: over the
    prompts the positions cover [0, 1) evenly, with less spread than independent draws.
    """
    offset = (seed_of("strata", seed) / 2**63 + prompt_id * _GOLDEN) % 1.0
    return (np.arange(count) + offset) / count


def chosen_steps(seed: int, prompt_id: int, count: int, steps: int) -> list[int]:
    """The denoising steps kept of a prompt's trajectory: `count` different ones of `steps`, or all, in order."""
    if count >= steps:
        return list(range(steps))
    return [int(position * steps) for position in strata(seed, prompt_id, count)]
