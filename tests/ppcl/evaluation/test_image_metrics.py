"""PSNR and SSIM, each against a computation of its own."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ppcl.evaluation.image_metrics import psnr, ssim


def pictures(seed):
    rng = np.random.default_rng(seed)
    reference = (gaussian_filter(rng.random((2, 40, 36, 3)), (0, 2, 2, 0)) * 255).astype(np.uint8)
    return np.clip(reference + rng.normal(0, 12, reference.shape), 0, 255).astype(np.uint8), reference


def test_psnr_by_its_definition_and_capped_where_pictures_are_the_same():
    a, b = pictures(0)
    expected = [10 * np.log10(255**2 / ((x.astype(float) - y) ** 2).mean()) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(a, b), expected)
    assert psnr(b, b) == pytest.approx(58.92, abs=0.01)


def test_ssim_pixel_by_pixel():
    """Wang et al. 2004 written with an explicit window at every place."""
    a, b = pictures(1)
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        x, y = a[0, :, :, channel] / 255, b[0, :, :, channel] / 255
        for i in range(5, x.shape[0] - 5):
            for j in range(5, x.shape[1] - 5):
                p, q = (z[i - 5 : i + 6, j - 5 : j + 6] for z in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                c = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 0.01**2) * (2 * c + 0.03**2) / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))
                )
    assert ssim(a, b)[0] == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(b, b) == pytest.approx(1)
