"""Moments: sufficient statistics of an affine least-squares fit of Y on X, mergeable exactly.

Raw moments lose everything where a channel's mean is large against its spread, which is normal in diffusion
transformers. So cross-products are centred: each chunk by its own mean, and two sums are merged by Chan's formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Tokens worked on at once: bounds the memory of their wider copies.
CHUNK = 16384


class Moments:
    """What least squares of Y `(n, q)` on X `(n, p)` needs: `O(p² + pq)` numbers, whatever the number of tokens.

    `n`, `x_mean (p,)`, `y_mean (q,)`, and the centred sums `xx (p, p)`, `xy (p, q)`, `yy (q,)` (Y's diagonal alone), in
    float64. `parts`: the ids of the batches counted, so that one given twice, by a retried task, counts once.
    `dropped`: tokens left out for a NaN or Inf in X or Y.
    """

    def __init__(self, p: int, q: int, device: str | torch.device = "cpu"):
        self.n = 0
        self.dropped = 0
        self.parts: set[int] = set()
        self.x_mean = torch.zeros(p, dtype=torch.float64, device=device)
        self.y_mean = torch.zeros(q, dtype=torch.float64, device=device)
        self.xx = torch.zeros(p, p, dtype=torch.float64, device=device)
        self.xy = torch.zeros(p, q, dtype=torch.float64, device=device)
        self.yy = torch.zeros(q, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: torch.Tensor, y: torch.Tensor, part: int | None = None) -> None:
        """Count the tokens `x (n, p)`, `y (n, q)`; does nothing where `part` has been counted already."""
        if part is not None:
            if part in self.parts:
                return
            self.parts.add(part)
        for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            self._add(xs, ys)

    def merge(self, other: Moments) -> None:
        """Count what `other` counted; does nothing where all its parts are counted here already.

        Raises `ValueError` where only some are: sums cannot be taken apart again.
        """
        if common := self.parts & other.parts:
            if common == other.parts:
                return
            raise ValueError(f"{len(common)} of {len(other.parts)} parts are counted already, {min(common)} among them")
        self.parts |= other.parts
        self.dropped += other.dropped
        device = self.xx.device
        self._combine(other.n, *(t.to(device) for t in (other.x_mean, other.y_mean, other.xx, other.xy, other.yy)))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """As tensors by name, for safetensors or a process group."""
        return {
            "n": torch.tensor([self.n]),
            "dropped": torch.tensor([self.dropped]),
            "parts": torch.tensor(sorted(self.parts), dtype=torch.int64),
            "x_mean": self.x_mean,
            "y_mean": self.y_mean,
            "xx": self.xx,
            "xy": self.xy,
            "yy": self.yy,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Moments:
        p, q = tensors["xy"].shape
        new = cls(p, q, device=tensors["xx"].device)
        for name in ("x_mean", "y_mean", "xx", "xy", "yy"):
            setattr(new, name, tensors[name].double())
        new.n, new.dropped, new.parts = int(tensors["n"]), int(tensors["dropped"]), set(tensors["parts"].tolist())
        return new

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        finite = torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1)
        n = int(finite.sum())
        self.dropped += len(x) - n
        if n == 0:
            return
        # GPUs are slow in float64; there the product of one centred chunk is float32, and only its sum is wider.
        work = torch.float64 if x.device.type == "cpu" else torch.float32
        x, x_shift = _shifted(x[finite], work)
        y, y_shift = _shifted(y[finite], work)
        x_rest, y_rest = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
        with full_precision():
            xx, xy = (x.T @ x).double(), (x.T @ y).double()
        # What rounding the shift left of the mean.
        xx -= n * torch.outer(x_rest, x_rest)
        xy -= n * torch.outer(x_rest, y_rest)
        yy = (y * y).sum(0, dtype=torch.float64) - n * y_rest**2
        device = self.xx.device
        self._combine(n, *(t.to(device) for t in (x_shift + x_rest, y_shift + y_rest, xx, xy, yy)))

    def _combine(
        self, n: int, x_mean: torch.Tensor, y_mean: torch.Tensor, xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor
    ) -> None:
        """Chan, Golub and LeVeque's update: the centred sums of two sets of tokens from those of each."""
        total = self.n + n
        if n == 0:
            return
        dx, dy, weight = x_mean - self.x_mean, y_mean - self.y_mean, self.n * n / total
        self.xx += xx + weight * torch.outer(dx, dx)
        self.xy += xy + weight * torch.outer(dx, dy)
        self.yy += yy + weight * dy**2
        self.x_mean += dx * (n / total)
        self.y_mean += dy * (n / total)
        self.n = total


def _shifted(tokens: torch.Tensor, work: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens less their rounded mean, in the working precision, and that mean in float64."""
    shift = tokens.mean(0, dtype=torch.float64).to(work)
    return tokens.to(work) - shift, shift.double()


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32: its 10 bits would be all that is left of a cross-product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
