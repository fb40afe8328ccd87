"""The three splits of the calibration prompts: what is fitted, what chooses, and what is reported see other prompts.

    train        everything is fitted and trained on it
    validation   everything that chooses looks at it: CKA, sensitivities, plans, fine-tuned replacements or not
    test         evaluation alone looks at it

A prompt's place is a hash of its text, so every split keeps almost all of its prompts where more prompts come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from ppcl.calibration.seeding import seed_of

Split = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[Split, ...] = get_args(Split)

# So many prompts that differ are needed: one a split.
LEAST_PROMPTS = 3


def hashes(texts: Iterable[str], seed: int) -> np.ndarray:
    """One number a prompt, `(n,) int64`, the same for the same text: what `split_prompts` orders prompts by."""
    # The words have stayed those of the first version, so that its prompts stay where they were.
    return np.fromiter((seed_of("held out", seed, text) for text in texts), np.int64)


def split_prompts(hashes: np.ndarray, validation: float, test: float) -> dict[Split, np.ndarray]:
    """Indices of the prompts of each split, ascending; `validation` and `test` are shares of the prompts.

    In the order of hashes, validation comes first and test last, so neither moves where the other's share changes. The
    same prompt written twice falls into one split, which moves a border a little. Every split has at least one of the
    prompts, of which `LEAST_PROMPTS` must differ.
    """
    _, text, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first = min(_texts(counts, validation), len(counts) - 2)
    last = len(counts) - min(_texts(counts[::-1], test), len(counts) - 1 - first)
    return {
        "train": np.flatnonzero((text >= first) & (text < last)),
        "validation": np.flatnonzero(text < first),
        "test": np.flatnonzero(text >= last),
    }


def _texts(counts: np.ndarray, share: float) -> int:
    """How many texts, from the first, hold a share of all prompts, at least one; `counts`: prompts of each text."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, max(round(share * int(ends[-1])), 1))) + 1
