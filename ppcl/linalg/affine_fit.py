"""The closed form of a linear probe (PPCL, arXiv 2511.16156, Eq. 1 and 2), and of any affine map fitted the same way.

Eq. 2 trains by gradient what Eq. 1 solves: the same squared error, the same optimum. Here it is solved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppcl.errors import UserError
from ppcl.linalg.moments import Moments

# A channel whose spread is below this share of its mean does not vary, as far as its numbers can tell.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Fit:
    """How a fit went.

    `error`: the share of Y's variance the map leaves, 0 for an exact one, 1 for one no better than the mean.
    `dropped`: tokens with NaN or Inf, left out. `underdetermined`: no more tokens than input channels, so the ridge
    chose among many exact maps. `singular`: the Gram matrix could not be factored, and null directions were left at 0.
    """

    tokens: int
    dropped: int
    error: float
    underdetermined: bool
    singular: bool
    constant_channels: int


@dataclass(frozen=True)
class Affine:
    """`y = W x + b`: `weight (q, p)`, `bias (q,)`, float64 as solved."""

    weight: torch.Tensor
    bias: torch.Tensor
    fit: Fit


def fit_affine(moments: Moments, ridge: float) -> Affine:
    """The affine map that minimises `‖Y - W X - b‖²`, with a ridge on `W` in units of each channel's variance.

    The Gram matrix is scaled to unit diagonal first, or outlier channels would own the ridge. Raises `UserError` where
    there is no token to fit to.
    """
    s = moments
    if s.n == 0:
        raise UserError(
            f"there is no token to fit an affine map to ({s.dropped} were left out for NaN or Inf); "
            "check the teacher's weights and precision and the calibration set"
        )
    spread = (s.xx.diagonal().clamp(min=0) / s.n).sqrt()
    varies = spread > _CONSTANT * s.x_mean.abs()
    scale = torch.where(varies, spread, 1.0)
    # A constant channel gets no weight; its part is in the bias.
    both_vary = varies[:, None] & varies
    gram = torch.where(both_vary, s.xx / s.n / scale[:, None] / scale, 0.0)
    gram.diagonal().fill_(1.0 + ridge)
    cross = torch.where(varies[:, None], s.xy / s.n / scale[:, None], 0.0)
    solution, singular = _solve(gram, cross)
    weight = (solution / scale[:, None]).T
    total = float(s.yy.sum())
    left = total - 2 * float((weight.T * s.xy).sum()) + float(((weight @ s.xx) * weight).sum())
    fit = Fit(
        tokens=s.n,
        dropped=s.dropped,
        error=max(left, 0.0) / total if total > 0 else 0.0,
        underdetermined=s.n <= len(spread),
        singular=singular,
        constant_channels=int((~varies).sum()),
    )
    return Affine(weight, s.y_mean - weight @ s.x_mean, fit)


def _solve(gram: torch.Tensor, cross: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """`gram⁻¹ cross`, and whether the matrix was singular to float64, where the solution is the shortest one."""
    least = len(gram) * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and float(factor.diagonal().min()) ** 2 > least:
        return torch.cholesky_solve(cross, factor), False
    values, vectors = torch.linalg.eigh(gram)
    usable = values > least * values[-1]
    inverse = torch.where(usable, 1.0 / torch.where(usable, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross)), True


@dataclass(frozen=True)
class Probe:
    """`probe(x) = x + W x + b` (Eq. 1): one block on one stream as an affine map; `weight (d, d)`, `bias (d,)`."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, d)` to `(…, d)`; every token alone."""
        return x + torch.nn.functional.linear(x, self.weight, self.bias)

    @classmethod
    def fit(cls, moments: Moments, ridge: float) -> tuple[Probe, Fit]:
        """From the moments of `X_i - X_{i-1}` on `X_{i-1}`; float32."""
        affine = fit_affine(moments, ridge)
        return cls(affine.weight.float(), affine.bias.float()), affine.fit
