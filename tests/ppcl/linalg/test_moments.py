"""Mergeable sums against numpy's float64 moments of all the tokens at once, outlier channels among them."""

import numpy as np
import pytest
import torch

from ppcl.linalg import Moments
from tests.ppcl.linalg.tokens import counted, data

FIELDS = ("x_mean", "y_mean", "xx", "xy", "yy")


def moments(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    return {"x_mean": x.mean(0), "y_mean": y.mean(0), "xx": xc.T @ xc, "xy": xc.T @ yc, "yy": (yc * yc).sum(0)}


def assert_moments(statistics, expected, tolerance):
    """Cross-products are held to their channels' own scale: the smallest channel counts as much as the outlier."""
    scale = {"xx": np.sqrt(np.outer(expected["xx"].diagonal(), expected["xx"].diagonal()))}
    scale["xy"] = np.sqrt(np.outer(expected["xx"].diagonal(), expected["yy"]))
    for name in FIELDS:
        wrong = abs(getattr(statistics, name).numpy() - expected[name]) / scale.get(name, abs(expected[name]))
        assert wrong.max() < tolerance, f"{name}: {wrong.max():.1e}"


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("order", [range(8), (6, 2, 4, 0, 7, 5, 1, 3)])
def test_sums_are_the_moments_of_all_tokens_whatever_workers_and_order(workers, order):
    x, y = data()
    statistics = counted(x, y, workers, order)
    assert statistics.n == len(x) and statistics.parts == set(range(8))
    assert_moments(statistics, moments(x, y), 1e-10)


def test_sums_that_are_not_centred_would_fail_that():
    """What the test above is worth: the same moments from raw float32 sums."""
    x, y = (torch.tensor(v) for v in data())
    n = len(x)
    naive = Moments(12, 8)
    naive.x_mean, naive.y_mean = x.mean(0).double(), y.mean(0).double()
    naive.xx = (x.T @ x).double() - n * torch.outer(naive.x_mean, naive.x_mean)
    naive.xy = (x.T @ y).double() - n * torch.outer(naive.x_mean, naive.y_mean)
    naive.yy = (y * y).sum(0).double() - n * naive.y_mean**2
    with pytest.raises(AssertionError, match="xx"):
        assert_moments(naive, moments(*data()), 1e-2)


def test_more_tokens_than_fit_in_one_chunk():
    x, y = data(n=40_000)
    statistics = Moments(12, 8)
    statistics.update(torch.tensor(x), torch.tensor(y))
    assert_moments(statistics, moments(x, y), 1e-10)


def test_a_batch_that_comes_twice_counts_once():
    x, y = (torch.tensor(v) for v in data(100))
    once, twice = Moments(12, 8), Moments(12, 8)
    once.update(x, y, part=3)
    for _ in range(2):
        twice.update(x, y, part=3)
    twice.merge(once)
    assert twice.n == 100 and torch.equal(twice.xx, once.xx)


def test_sums_that_share_only_some_batches_are_refused():
    x, y = (torch.tensor(v) for v in data(100))
    one, other = Moments(12, 8), Moments(12, 8)
    one.update(x, y, part=3)
    other.update(x, y, part=3)
    other.update(x, y, part=4)
    with pytest.raises(ValueError, match="1 of 2 parts are counted already, 3 among them"):
        one.merge(other)
    assert one.n == 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tokens_with_nan_or_inf_are_left_out_and_counted(bad):
    x, y = data()
    spoilt_x, spoilt_y = x.copy(), y.copy()
    spoilt_x[[5, 17], [0, 3]] = bad
    spoilt_y[2000, 7] = bad
    statistics = counted(spoilt_x, spoilt_y, workers=2)
    keep = np.delete(np.arange(len(x)), [5, 17, 2000])
    assert statistics.dropped == 3 and statistics.n == len(keep)
    assert_moments(statistics, moments(x[keep], y[keep]), 1e-10)


def test_sums_survive_the_way_through_tensors():
    x, y = data(200)
    x[3, 0] = np.nan
    there = counted(x, y)
    back = Moments.from_tensors({k: v.clone() for k, v in there.to_tensors().items()})
    assert (back.n, back.dropped, back.parts) == (199, 1, there.parts)
    assert all(torch.equal(getattr(back, name), getattr(there, name)) for name in FIELDS)
