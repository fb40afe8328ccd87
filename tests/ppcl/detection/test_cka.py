"""Debiased linear CKA against the estimator written out with its n × n kernels."""

import numpy as np
import pytest
import torch

from ppcl.detection.cka import HsicSums, Representation, centred, cka, hsic, similarity
from ppcl.errors import UserError


def hsic_with_kernels(x, y):
    """HSIC₁ as Song et al. 2012 define it, Eq. 5 there."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    return (
        np.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    ) / (n * (n - 3))


def pair(n=40, p=7, q=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x[:, :q] + 0.7 * rng.normal(size=(n, q))


def test_hsic_is_the_estimator_written_with_kernels():
    x, y = pair()
    assert hsic(torch.tensor(x), torch.tensor(y)) == pytest.approx(hsic_with_kernels(x, y), rel=1e-10)
    # It does not depend on where the origin is.
    assert hsic(centred(torch.tensor(x + 3)), centred(torch.tensor(y - 9))) == pytest.approx(
        hsic_with_kernels(x, y), rel=1e-10
    )


def test_sums_of_batches_add_up():
    x, y = (torch.tensor(v) for v in pair())
    parts = HsicSums.of(x[:13], y[:13]) + HsicSums.of(x[13:], y[13:])
    assert parts.debiased() == pytest.approx(hsic(x, y), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_cka_is_the_ratio_of_the_estimators_outlier_channels_included(seed):
    x, y = pair(seed=seed)
    x[:, 0], y[:, 1] = 1000 * x[:, 0], y[:, 1] + 5000
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = hsic_with_kernels(xc, yc) / np.sqrt(hsic_with_kernels(xc, xc) * hsic_with_kernels(yc, yc))
    assert cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-9)


def test_cka_is_one_for_the_same_and_the_same_either_way_round():
    x, y = (torch.tensor(v) for v in pair())
    for debiased in (True, False):
        assert cka(x, x, debiased) == pytest.approx(1, abs=1e-12)
        assert cka(x, y, debiased) == pytest.approx(cka(y, x, debiased), rel=1e-12)
        assert cka(x, y, debiased) < 0.99


def test_biased_cka_is_written_with_centred_kernels():
    x, y = pair()
    n = len(x)
    h = np.eye(n) - 1 / n
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    expected = np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))
    assert cka(torch.tensor(x), torch.tensor(y), debiased=False) == pytest.approx(expected, rel=1e-10)


def test_cka_is_one_up_to_rotation_shift_and_scale():
    x = torch.tensor(pair()[0])
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert cka(x, 5 * x @ rotation + 2) == pytest.approx(1, abs=1e-12)
    y = torch.tensor(pair()[1])
    assert cka(0.01 * x @ rotation - 40, y) == pytest.approx(cka(x, y), rel=1e-9)
    stretched = x * torch.tensor([100.0] + 6 * [1.0], dtype=torch.float64)
    assert cka(x, stretched) < 0.9 < cka(x, stretched, standardize=True)


def test_unrelated_features_are_near_zero_only_when_debiased():
    values = {True: [], False: []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = (torch.tensor(rng.normal(size=(60, 50))) for _ in "xy")
        for debiased in values:
            values[debiased].append(cka(x, y, debiased))
    assert abs(np.mean(values[True])) < 0.02
    # About d / (n + d), which is what makes the usual estimate useless for few tokens.
    assert np.mean(values[False]) == pytest.approx(50 / 110, abs=0.03)


def test_a_representation_that_does_not_vary_is_like_nothing():
    x = torch.tensor(pair()[0])
    assert cka(x, torch.ones(40, 3)) == 0


def test_too_few_tokens_are_refused():
    with pytest.raises(UserError, match="at least 4 tokens, there are 3"):
        cka(torch.randn(3, 2), torch.randn(3, 2))


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("n", "p"), [(300, 7), (60, 90)])
def test_prepared_representations_give_the_same_cka(n, p, standardize):
    """With more tokens than channels and with fewer."""
    x, y = (torch.tensor(v) for v in pair(n, p, 5))
    value, _ = similarity(Representation.of(x, standardize), Representation.of(y, standardize))
    assert value == pytest.approx(cka(x, y, standardize=standardize), abs=1e-6)


def test_the_standard_error_is_how_far_values_of_other_tokens_lie_apart():
    draws = [similarity(*(Representation.of(torch.tensor(v)) for v in pair(400, 7, 5, seed))) for seed in range(60)]
    spread = np.std([value for value, _ in draws], ddof=1)
    told = np.sqrt(np.mean([error**2 for _, error in draws]))
    assert 0.7 < told / spread < 1.4


def test_too_few_tokens_have_no_standard_error():
    x, y = (torch.tensor(v) for v in pair(40))
    assert np.isnan(similarity(Representation.of(x), Representation.of(y))[1])
