"""The closed form against numpy's least-squares solver in float64, on the same tokens."""

import numpy as np
import pytest
import torch

from ppcl.errors import UserError
from ppcl.linalg import Moments, Probe, fit_affine
from tests.ppcl.linalg.tokens import counted, data, least_squares


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_the_closed_form_is_the_least_squares_solution_outliers_included(workers, ridge):
    x, y = data()
    affine = fit_affine(counted(x, y, workers), ridge)
    weight, bias = least_squares(x, y, ridge)
    # In units of what a channel contributes, so that the weights of the outlier count too.
    spread = x.astype(np.float64).std(0)
    np.testing.assert_allclose(affine.weight.numpy() * spread, weight * spread, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(affine.bias.numpy(), bias, rtol=1e-7)
    left = (y - x.astype(np.float64) @ weight.T - bias).var(0).sum() / y.astype(np.float64).var(0).sum()
    assert affine.fit.error == pytest.approx(left, rel=1e-6)
    assert affine.fit.tokens == len(x) and not affine.fit.singular and not affine.fit.underdetermined


def test_no_other_map_does_better():
    """Eq. 2, the training loss, is least where Eq. 1 is solved: its gradient is zero, on the scale of the data."""
    x, y = (torch.tensor(v).double() for v in data())
    affine = fit_affine(counted(*data()), ridge=0)
    left = y - x @ affine.weight.T - affine.bias
    scaled = (x - x.mean(0)) / x.std(0)
    assert (left.T @ scaled / len(x)).abs().max() < 1e-9 and left.mean(0).abs().max() < 1e-9


def test_batches_of_nan_do_not_change_the_map():
    x, y = data()
    spoilt = x.copy()
    spoilt[[5, 17], [0, 3]] = np.nan, np.inf
    keep = np.delete(np.arange(len(x)), [5, 17])
    got, clean = fit_affine(counted(spoilt, y), 0), fit_affine(counted(x[keep], y[keep]), 0)
    assert got.fit.dropped == 2 and got.fit.tokens == len(keep)
    torch.testing.assert_close(got.weight, clean.weight, rtol=1e-8, atol=1e-12)


def test_nothing_but_nan_is_refused():
    statistics = Moments(3, 3)
    statistics.update(torch.full((4, 3), float("nan")), torch.zeros(4, 3))
    with pytest.raises(UserError, match=r"no token to fit an affine map to \(4 were left out for NaN or Inf\); check"):
        fit_affine(statistics, 1e-6)


def test_fewer_tokens_than_channels_and_a_constant_channel_still_fit():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=(6, 9)), np.full(6, 42.0)]).astype(np.float32)
    y = rng.normal(size=(6, 2)).astype(np.float32)
    affine = fit_affine(counted(x, y, order=range(3)), ridge=1e-6)
    assert affine.fit.underdetermined and affine.fit.constant_channels == 1 and affine.fit.error < 1e-6
    assert torch.isfinite(affine.weight).all() and affine.weight[:, 9].abs().max() == 0


def test_without_a_ridge_a_singular_fit_is_the_shortest_one():
    """A channel given twice: each copy gets half of the weight."""
    x, y = data()
    single = fit_affine(counted(x[:, 3:9], y), 0)
    double = fit_affine(counted(x[:, [3, 4, 5, 6, 7, 8, 8]], y), 0)
    assert double.fit.singular and not single.fit.singular
    torch.testing.assert_close(double.weight[:, :5], single.weight[:, :5], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(double.weight[:, 5:], single.weight[:, [5, 5]] / 2, rtol=1e-7, atol=1e-10)


def test_a_probe_is_the_residual_map_of_the_paper():
    """Eq. 1: `X_i ≈ X_{i-1} + W X_{i-1} + b`, so an affine block is followed exactly."""
    x = torch.tensor(data()[0][:, 3:9])
    w = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    after = x + x @ w.T + 3
    statistics = Moments(6, 6)
    statistics.update(x, after - x)
    probe, fit = Probe.fit(statistics, 1e-12)
    torch.testing.assert_close(probe.weight, w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe(x), after, rtol=1e-4, atol=1e-4)
    assert fit.error < 1e-9
