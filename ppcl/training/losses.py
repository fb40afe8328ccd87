"""The losses of distillation. Each is a term: a sum over tokens, and what it is divided by, a count or an energy.

Splitting a batch over replicas must not change the loss: every replica adds up its tokens, and the divisors are summed
over the replicas before the division (`ppcl.training.train_state`). Both stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

# A sum over tokens, with its gradient, and its divisor; both without dimensions.
LossTerm = tuple[torch.Tensor, torch.Tensor]
# Compares streams `(B, T, d)` of a student with the teacher's, where a mask `(B, T)` is true.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], LossTerm]

_LEAST_ENERGY = 1e-12


def normalized(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> LossTerm:
    """`Σ ‖norm(s) - norm(t)‖²` over tokens, with `norm` the L2 norm over features, and the number of tokens (Eq. 6).

    `student`, `teacher`: `(B, T, d)`; `mask`: `(B, T)`, true for tokens that count.
    """
    error = (F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)).square().sum(-1)
    count = torch.full_like(error, 1.0) if mask is None else mask.to(error)
    return _masked_sum(error, mask), count.sum()


def relative(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> LossTerm:
    """`Σ ‖s - t‖²` over tokens, and the divisor `Σ ‖t‖²`: keeps magnitude, which directions alone let drift.

    A target that is nothing at all, such as what a last block adds to a text stream nobody reads, counts as a tiny one.
    """
    error = (student.float() - teacher.float()).square().sum(-1)
    energy = _masked_sum(teacher.float().square().sum(-1), mask).detach()
    return _masked_sum(error, mask), energy.clamp_min(_LEAST_ENERGY)


def _masked_sum(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if mask is None else (values * mask).sum()


LOSSES: dict[str, Loss] = {"normalized": normalized, "relative": relative}
