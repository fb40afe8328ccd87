"""Mergeable sums and the closed form against a float64 least-squares solver on the same data."""

import numpy as np
import pytest
import torch

from ppcl.errors import UserError
from ppcl.probes import Probe, Statistics, affine_fit


def data(n=3000, p=12, q=8, seed=0):
    """Float32 tokens as a diffusion transformer has them: one channel of scale 1000, two with means far off."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    x[:, 0] *= 1000
    x[:, 1] += 4000
    x[:, 2] = x[:, 2] * 0.01 - 700
    y = np.tanh(x[:, :q] * 0.1) + x @ rng.normal(size=(p, q)) * 0.01 + 0.1 * rng.normal(size=(n, q))
    return x.astype(np.float32), y.astype(np.float32)


def least_squares(x, y):
    """Weight `(q, p)` and bias by numpy, on columns scaled and centred so that the solver keeps its digits."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean, scale = x.mean(0), x.std(0)
    solution = np.linalg.lstsq(np.column_stack([(x - mean) / scale, np.ones(len(x))]), y, rcond=None)[0]
    weight = (solution[:-1] / scale[:, None]).T
    return weight, solution[-1] - weight @ mean


def fitted(x, y, pieces=1, order=None):
    total = Statistics(x.shape[1], y.shape[1])
    parts = np.array_split(np.arange(len(x)), pieces)
    for index in order or range(pieces):
        one = Statistics(x.shape[1], y.shape[1])
        one.update(torch.tensor(x[parts[index]]), torch.tensor(y[parts[index]]), part=index)
        total.merge(one)
    return total


def test_the_closed_form_is_the_least_squares_solution_outliers_included():
    x, y = data()
    affine = affine_fit(fitted(x, y), ridge=0)
    weight, bias = least_squares(x, y)
    np.testing.assert_allclose(affine.weight.numpy(), weight, rtol=1e-6, atol=1e-9 * abs(weight).max())
    np.testing.assert_allclose(affine.bias.numpy(), bias, rtol=1e-6)
    left = (y - x.astype(np.float64) @ weight.T - bias).var(0).sum() / y.astype(np.float64).var(0).sum()
    assert affine.fit.error == pytest.approx(left, rel=1e-6)


def test_raw_moments_in_float32_would_fail_that():
    """What the test above is worth: sums that are not centred lose these channels."""
    x, y = (torch.tensor(v) for v in data())
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    naive = torch.linalg.lstsq(ones.T @ ones, ones.T @ y).solution[:-1].T
    assert abs(naive.numpy() - least_squares(*data())[0]).max() > 1e-3 * abs(naive).max()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 5, 1, 3]])
def test_neither_the_number_of_workers_nor_the_order_of_batches_matters(order):
    x, y = data()
    whole, parts = affine_fit(fitted(x, y), ridge=1e-6), affine_fit(fitted(x, y, 7, order), ridge=1e-6)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-8, atol=1e-10)
    assert parts.fit.tokens == whole.fit.tokens == len(x)


def test_a_batch_that_comes_twice_counts_once():
    x, y = (torch.tensor(v) for v in data(100))
    once, twice = Statistics(12, 8), Statistics(12, 8)
    once.update(x, y, part=3)
    for _ in range(2):
        twice.update(x, y, part=3)
    twice.merge(once)
    assert twice.n == 100 and torch.equal(twice.xx, once.xx)
    other = Statistics(12, 8)
    other.update(x, y, part=3)
    other.update(x, y, part=4)
    with pytest.raises(ValueError, match="1 of 2 parts"):
        twice.merge(other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_with_nan_or_inf_are_left_out_and_counted(bad):
    x, y = data()
    spoilt = x.copy()
    spoilt[[5, 17], [0, 3]] = bad
    got = affine_fit(fitted(spoilt, y, pieces=3), ridge=0)
    keep = np.delete(np.arange(len(x)), [5, 17])
    clean = affine_fit(fitted(x[keep], y[keep]), ridge=0)
    assert got.fit.dropped == 2 and got.fit.tokens == len(x) - 2
    torch.testing.assert_close(got.weight, clean.weight, rtol=1e-8, atol=1e-12)


def test_nothing_but_nan_is_refused():
    statistics = Statistics(3, 3)
    statistics.update(torch.full((4, 3), float("nan")), torch.zeros(4, 3))
    with pytest.raises(UserError, match="no token to fit .*4 were left out"):
        affine_fit(statistics, 1e-6)


def test_fewer_tokens_than_channels_and_constant_channels_still_fit():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=(6, 9)), np.full(6, 42.0)]).astype(np.float32)
    y = rng.normal(size=(6, 2)).astype(np.float32)
    affine = affine_fit(fitted(x, y), ridge=1e-6)
    assert affine.fit.underdetermined and affine.fit.constant_channels == 1 and affine.fit.error < 1e-6
    assert torch.isfinite(affine.weight).all() and affine.weight[:, 9].abs().max() == 0


def test_sums_survive_the_way_through_tensors():
    x, y = data(200)
    there = fitted(x, y, 3)
    back = Statistics.from_tensors({k: v.clone() for k, v in there.to_tensors().items()})
    assert back.n == there.n and back.parts == there.parts
    assert torch.equal(affine_fit(back, 0).weight, affine_fit(there, 0).weight)


def test_a_probe_is_the_residual_map_of_the_paper():
    """Eq. 1: `X_i ≈ X_{i-1} + W X_{i-1} + b`, so an affine block is followed exactly."""
    x = torch.tensor(data()[0][:, 3:9])
    w = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    after = x + x @ w.T + 3
    statistics = Statistics(6, 6)
    statistics.update(x, after - x)
    probe, fit = Probe.fit(statistics, 1e-12)
    torch.testing.assert_close(probe.weight, w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe(x), after, rtol=1e-4, atol=1e-4)
    assert fit.error < 1e-9
