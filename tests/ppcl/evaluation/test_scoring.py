"""Velocity error, PSNR, SSIM, world scores and R, each against a computation of its own."""

import numpy as np
import pytest
from scipy.stats import binom

from ppcl.evaluation.scoring import checker_scores, relative_drop


def test_r_is_the_mean_relative_drop_over_categories():
    teacher = {"a": np.array([1, 1, 1, 1.0]), "b": np.array([1, 0, 1, 0.0]), "never": np.zeros(4)}
    variant = {"a": np.array([1, 1, 1, 0.0]), "b": np.array([1, 0, 1, 0.0]), "never": np.ones(4)}
    got = relative_drop(variant, teacher, 0.95, 0)
    assert got["R"] == pytest.approx((25 + 0) / 2)
    assert got["R_low"] <= got["R"] <= got["R_high"]
    assert relative_drop(teacher, teacher, 0.95, 0)["R"] == 0
    assert relative_drop({"a": np.ones(3)}, {"a": np.zeros(3)}, 0.95, 0) == {"R": None, "R_low": None, "R_high": None}
    scores = checker_scores(variant, 0.95, 0)
    assert scores["overall"]["score"] == pytest.approx((0.75 + 0.5 + 1) / 3)


def test_a_category_in_which_every_picture_is_right_is_not_certain():
    """Wilson 1927: with all of n right, the interval is [n / (n + z²), 1]."""
    row = checker_scores({"a": np.ones(16)}, 0.95, 0)["categories"]["a"]
    assert (row["score"], row["high"]) == (1, pytest.approx(1)) and row["low"] == pytest.approx(16 / (16 + 1.959964**2))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.97])
def test_intervals_of_one_category_hold_the_truth_about_as_often_as_they_say(p):
    """Weighed exactly, by the binomial probability of every count of right pictures."""
    n = 16
    held = 0.0
    for right in range(n + 1):
        row = checker_scores({"a": (np.arange(n) < right).astype(float)}, 0.9, 0)["categories"]["a"]
        held += binom.pmf(right, n, p) * (row["low"] <= p <= row["high"])
    assert 0.85 <= held <= 0.99


def test_confidence_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        passes = {c: (rng.random(60) < p).astype(float) for c, p in {"a": 0.7, "b": 0.5}.items()}
        row = checker_scores(passes, 0.9, seed)["overall"]
        held += row["low"] <= 0.6 <= row["high"]
    # 0.9 ± three standard errors of 200 draws, and a little for the percentile bootstrap being short.
    assert 0.82 <= held / 200 <= 0.97
