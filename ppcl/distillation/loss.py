"""The losses of depth distillation. Each is a sum over tokens, to be divided by a count or an energy of all replicas.

Splitting a batch over replicas must not change the loss: every replica adds up its tokens, and the divisors are summed
over the replicas before the division.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def normalized(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """`Σ ‖norm(s) - norm(t)‖²` over tokens, with `norm` the L2 norm over features, and the number of tokens (Eq. 6).

    `student`, `teacher`: `(B, T, d)`; `mask`: `(B, T)`, true for tokens that count.
    """
    error = (F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)).square().sum(-1)
    return _masked_sum(error, mask), float(error.numel() if mask is None else mask.sum())


def relative(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """`Σ ‖s - t‖²` over tokens, and the divisor `Σ ‖t‖²`: keeps magnitude, which directions alone let drift."""
    error = (student.float() - teacher.float()).square().sum(-1)
    return _masked_sum(error, mask), float(_masked_sum(teacher.float().square().sum(-1), mask))


def _masked_sum(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if mask is None else (values * mask).sum()


LOSSES = {"normalized": normalized, "relative": relative}
