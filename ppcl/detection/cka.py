"""Linear centred kernel alignment (CKA) of two representations of the same tokens.

HSIC is estimated without bias (HSIC₁: Song et al., "Feature selection via dependence maximization", JMLR 2012): the
usual estimate is about `d / (n + d)` for features that have nothing in common. Both are computed from sums over tokens,
so `n × n` matrices are never made, and the sums of several batches add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ppcl.errors import UserError

# HSIC₁ divides by n (n - 3).
FEWEST_TOKENS = 4


@dataclass(frozen=True)
class HsicSums:
    """Sums over tokens from which HSIC of the linear kernels of X `(n, p)` and Y `(n, q)` follows; float64.

    With `a_i = ‖x_i‖²`, `b_i = ‖y_i‖²`: `x = Σx_i`, `y = Σy_i`, `xy = Σ x_i y_iᵀ`, `xb = Σ x_i b_i`, `ya = Σ y_i a_i`,
    `a`, `b`, `ab` the sums of those. HSIC does not change when X or Y is shifted: take a rough mean off first, the same
    one for all parts, or the difference of large sums loses digits.
    """

    n: int
    x: torch.Tensor
    y: torch.Tensor
    xy: torch.Tensor
    xb: torch.Tensor
    ya: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    ab: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> HsicSums:
        x, y = x.double(), y.double()
        a, b = (x * x).sum(1), (y * y).sum(1)
        return cls(len(x), x.sum(0), y.sum(0), x.T @ y, b @ x, a @ y, a.sum(), b.sum(), a @ b)

    def __add__(self, other: HsicSums) -> HsicSums:
        return HsicSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def debiased(self) -> float:
        """HSIC₁: the kernels' diagonals left out.

        `[tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1 / ((n-1)(n-2)) - 2/(n-2)·1ᵀK̃L̃1] / (n (n-3))`, each term written in the sums.
        """
        n = self.n
        if n < FEWEST_TOKENS:
            raise UserError(f"debiased CKA needs at least {FEWEST_TOKENS} tokens, there are {n}; hold out more prompts")
        trace = (self.xy * self.xy).sum() - self.ab
        k, l = self.x @ self.x - self.a, self.y @ self.y - self.b  # noqa: E741
        kl = self.x @ self.xy @ self.y - self.x @ self.xb - self.y @ self.ya + self.ab
        return float((trace + k * l / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl) / (n * (n - 3)))

    def biased(self) -> float:
        """HSIC₀: `tr(KHLH) / (n-1)²`."""
        centred = self.xy - torch.outer(self.x, self.y) / self.n
        return float((centred * centred).sum() / (self.n - 1) ** 2)


def centred(tokens: torch.Tensor, standardize: bool = False) -> torch.Tensor:
    """Tokens `(n, d)` in float64 less their mean; with `standardize`, every channel that varies over its spread too."""
    tokens = tokens.double()
    mean = tokens.mean(0)
    tokens = tokens - mean
    if standardize:
        spread = tokens.square().mean(0).sqrt()
        # Rounding alone gives a constant channel some spread; scaling that up would add a channel of noise.
        tokens = torch.where(
            spread > 1e-9 * mean.abs(), tokens / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0
        )
    return tokens


def hsic(x: torch.Tensor, y: torch.Tensor, debiased: bool = True) -> float:
    """HSIC of the linear kernels of `x (n, p)` and `y (n, q)`, which are `centred`."""
    sums = HsicSums.of(x, y)
    return sums.debiased() if debiased else sums.biased()


def ratio(xy: float, xx: float, yy: float) -> float:
    """CKA from three values of HSIC; 0 where a representation does not vary."""
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else 0.0


def cka(x: torch.Tensor, y: torch.Tensor, debiased: bool = True, standardize: bool = False) -> float:
    """Linear CKA of `x (n, p)` and `y (n, q)`: 1 for the same up to rotation, shift and one scale.

    Around 0 for unrelated features when debiased, where it can be slightly negative. `standardize` z-scores every
    channel, so that no single outlier channel decides. Raises `UserError` for fewer than four tokens.
    """
    x, y = centred(x, standardize), centred(y, standardize)
    return ratio(hsic(x, y, debiased), hsic(x, x, debiased), hsic(y, y, debiased))
