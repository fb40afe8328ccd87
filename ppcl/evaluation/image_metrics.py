"""Similarity of two images: PSNR, and SSIM after Wang et al. 2004. Images are `(N, H, W, 3)` uint8, data range 1."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Rounding to 8 bits alone makes this mean squared error: below it two images cannot be told apart, 58.9 dB.
_ROUNDING = (1 / 255) ** 2 / 12


def psnr(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`(N,)` in dB, at most the 58.9 dB of 8-bit rounding."""
    error = (_unit(pictures) - _unit(reference)) ** 2
    return -10 * np.log10(np.maximum(error.mean(axis=(1, 2, 3)), _ROUNDING))


def ssim(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`(N,)`: Gaussian window of 11 pixels, σ 1.5, only where it lies whole within the image; mean over channels."""
    return np.array([_ssim(_unit(a), _unit(b)) for a, b in zip(pictures, reference, strict=True)])


def _unit(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float64) / 255


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    variance_a = _local_mean(a * a) - mean_a**2
    variance_b = _local_mean(b * b) - mean_b**2
    covariance = _local_mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2))).mean())


def _local_mean(x: np.ndarray) -> np.ndarray:
    """The Gaussian-weighted mean around each pixel, `(H - 10, W - 10, 3)`."""
    half = _WINDOW // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    x = correlate1d(correlate1d(x, weights, axis=0), weights, axis=1)
    return x[half:-half, half:-half]
