"""Tokens as a diffusion transformer has them, and numpy's least squares on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppcl.linalg import Moments


def data(n: int = 3000, p: int = 12, q: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 `x (n, p)`, one channel of scale 1000 and two whose means are far off, and `y (n, q)` near affine."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    x[:, 0] *= 1000
    x[:, 1] += 4000
    x[:, 2] = x[:, 2] * 0.01 - 700
    y = np.tanh(x[:, :q] * 0.1) + x @ rng.normal(size=(p, q)) * 0.01 + 0.1 * rng.normal(size=(n, q))
    return x.astype(np.float32), y.astype(np.float32)


def least_squares(x: np.ndarray, y: np.ndarray, ridge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Weight `(q, p)` and bias `(q,)` that minimise `‖y - W x - b‖² / n + ridge Σ (std(x_j) W_ij)²`, by numpy's lstsq.

    The columns are centred and scaled, so that the solver keeps its digits; the ridge is written as more rows.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, p = x.shape
    mean, scale = x.mean(0), x.std(0)
    design = np.vstack([(x - mean) / scale, np.sqrt(n * ridge) * np.eye(p)])
    target = np.vstack([y - y.mean(0), np.zeros((p, y.shape[1]))])
    weight = (np.linalg.lstsq(design, target, rcond=None)[0] / scale[:, None]).T
    return weight, y.mean(0) - weight @ mean


def counted(x: np.ndarray, y: np.ndarray, workers: int = 1, order: Sequence[int] = range(8)) -> Moments:
    """Eight batches in an order, dealt out to workers whose sums are merged."""
    batches = np.array_split(np.arange(len(x)), len(order))
    sums = [Moments(x.shape[1], y.shape[1]) for _ in range(workers)]
    for place, batch in enumerate(order):
        rows = batches[batch]
        sums[place % workers].update(torch.tensor(x[rows]), torch.tensor(y[rows]), part=batch)
    for other in sums[1:]:
        sums[0].merge(other)
    return sums[0]
