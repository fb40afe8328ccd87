"""The losses of depth distillation. Each is a sum over tokens, to be divided by a count or an energy of all replicas.

Splitting a batch over replicas must not change the loss: every replica adds up its tokens, and the divisors are summed
over the replicas before the division.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LEAST_ENERGY = 1e-12


def normalized(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """`Σ ‖norm(s) - norm(t)‖²` over tokens, with `norm` the L2 norm over features, and the number of tokens (Eq. 6).

    `student`, `teacher`: `(B, T, d)`; `mask`: `(B, T)`, true for tokens that count.
    """
    error = (F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)).square().sum(-1)
    return _masked_sum(error, mask), float(error.numel() if mask is None else mask.sum())


def relative(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """`Σ ‖s - t‖²` over tokens, and the divisor `Σ ‖t‖²`: keeps magnitude, which directions alone let drift.

    A target that is nothing at all, such as what a last block adds to a text stream nobody reads, counts as a tiny one.
    """
    error = (student.float() - teacher.float()).square().sum(-1)
    energy = float(_masked_sum(teacher.float().square().sum(-1), mask))
    return _masked_sum(error, mask), max(energy, _LEAST_ENERGY)


def _masked_sum(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if mask is None else (values * mask).sum()


LOSSES = {"normalized": normalized, "relative": relative}
