"""Linear centred kernel alignment (CKA) of two representations of the same tokens.

HSIC is estimated without bias (HSIC₁: Song et al., "Feature selection via dependence maximization", JMLR 2012): the
usual estimate is about `d / (n + d)` for features that have nothing in common. Both are computed from sums over tokens,
so `n × n` matrices are never made, and the sums of several batches add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch

from ppcl.errors import UserError
from ppcl.linalg.moments import full_precision

# HSIC₁ divides by n (n - 3).
FEWEST_TOKENS = 4
# Groups of tokens whose own CKA is compared, and the fewest tokens of one.
_GROUPS = 8
_FEWEST_IN_GROUP = 32


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
        _check_tokens(n)
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


class Representation:
    """The tokens of one representation, centred, prepared for HSIC with others: whole, and by groups of tokens.

    With no more tokens than channels the linear kernel `(n, n)` is what is kept, in float32 with sums in float64;
    else the tokens `(n, d)` in float64. The groups tell how far chance in the choice of tokens reaches.
    """

    def __init__(self, tokens: torch.Tensor, kernel: torch.Tensor | None):
        self.tokens, self.kernel = tokens, kernel
        self.groups = _groups(len(tokens))
        self.own = self.hsic(self)

    @classmethod
    def of(cls, tokens: torch.Tensor, standardize: bool = False) -> Representation:
        """Of tokens `(n, d)`. Raises `UserError` for fewer than four."""
        _check_tokens(len(tokens))
        x = centred(tokens, standardize)
        if len(x) > x.shape[1]:
            return cls(x, None)
        x = x.float()
        with full_precision():
            kernel = x @ x.T
        kernel.fill_diagonal_(0.0)
        return cls(x, kernel)

    def hsic(self, other: Representation) -> list[float]:
        """HSIC₁ with another representation of the same tokens: of all, then of each group."""
        if self.kernel is not None and other.kernel is not None:
            parts = [slice(None), *self.groups]
            return [_kernel_hsic(self.kernel[part, part], other.kernel[part, part]) for part in parts]
        sums = [HsicSums.of(self.tokens[group], other.tokens[group]) for group in self.groups]
        return [reduce(add, sums).debiased(), *(part.debiased() for part in sums)]


def similarity(x: Representation, y: Representation) -> tuple[float, float]:
    """CKA of two representations of the same tokens, and its standard error: from the groups' own values of it."""
    value, *groups = map(ratio, x.hsic(y), x.own, y.own)
    if len(groups) < 2:
        return value, float("nan")
    mean = sum(groups) / len(groups)
    variance = sum((group - mean) ** 2 for group in groups) / (len(groups) - 1)
    return value, (variance / len(groups)) ** 0.5


def _groups(tokens: int) -> list[slice]:
    """As many equal groups as are worth comparing; a lone one where the tokens are few."""
    count = min(_GROUPS, max(1, tokens // _FEWEST_IN_GROUP))
    ends = [tokens * index // count for index in range(count + 1)]
    return [slice(first, last) for first, last in zip(ends, ends[1:])]


def _kernel_hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """HSIC₁ from kernels with zero diagonals, as Song et al. define it."""
    n = len(k)
    rows_k, rows_l = k.sum(1, dtype=torch.float64), l.sum(1, dtype=torch.float64)
    trace = (k * l).sum(dtype=torch.float64)
    product = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float((trace + product - 2 / (n - 2) * (rows_k @ rows_l)) / (n * (n - 3)))


def _check_tokens(tokens: int) -> None:
    if tokens < FEWEST_TOKENS:
        raise UserError(
            f"debiased CKA needs at least {FEWEST_TOKENS} tokens, there are {tokens}; hold out more prompts"
        )
