"""Velocity error, PSNR, SSIM, world scores and R, each against a computation of its own."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binom

from ppcl.evaluation.image_metrics import psnr, ssim
from ppcl.evaluation.scoring import checker_scores, relative_drop
from ppcl.evaluation.velocity_error import ErrorSums, sensitivities, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.switcher import VariantSwitcher
from tests import made_result
from tests.samples import MemorySamples


def test_squares_are_relative_errors_that_join():
    rng = np.random.default_rng(0)
    v, t, at = rng.normal(size=(20, 3, 4)), rng.normal(size=(20, 3, 4)), rng.random(20)
    whole = ErrorSums.of(torch.tensor(v), torch.tensor(t), torch.tensor(at))
    assert whole.overall() == pytest.approx(((v - t) ** 2).sum() / (t**2).sum())
    joined = ErrorSums.joined(
        ErrorSums.of(*(torch.tensor(x[s]) for x in (v, t, at))) for s in (slice(0, 7), slice(7, 20))
    )
    assert joined.overall() == pytest.approx(whole.overall(), rel=1e-12)
    rows = whole.by_timestep()
    here = (at >= 0.4) & (at < 0.5)
    row = next(r for r in rows if 0.4 <= r["timestep"] < 0.5)
    assert row["error"] == pytest.approx(((v - t)[here] ** 2).sum() / (t[here] ** 2).sum())
    assert row["timestep"] == pytest.approx(at[here].mean())


def test_damage_of_one_interval_is_the_error_of_the_variant_with_it_alone(teacher_folder, tmp_path):
    """Two ways: branches off one pass over the teacher, and the stock forward with the student plugged in."""
    teacher = Teacher(teacher_folder)
    students = {i: made_result.student(teacher, i, affine=False) for i in (Interval(0, 1), Interval(3, 5))}
    model, inputs = teacher.transformer(), MemorySamples(8).batch(range(8))
    switch = VariantSwitcher(teacher, dict.fromkeys(students))
    switch._loaded = {(i, False, "cpu", torch.float32): s for i, s in students.items()}
    found = sensitivities(model, switch, inputs)
    errors = variant_errors(model, switch, {"a": [Interval(0, 1)], "b": [Interval(3, 5)], "teacher": []}, inputs)
    assert errors["teacher"].overall() == 0
    for name, interval in {"a": Interval(0, 1), "b": Interval(3, 5)}.items():
        assert found[interval].overall() == pytest.approx(errors[name].overall(), rel=1e-5)
        assert found[interval].overall() > 1e-4
    changed = copy.deepcopy(model)
    with torch.no_grad():
        teachers = changed(**inputs, return_dict=False)[0]
        changed.transformer_blocks[0] = students[Interval(0, 1)].block
        del changed.transformer_blocks[1]
        velocity = changed(**inputs, return_dict=False)[0]
    assert errors["a"].overall() == pytest.approx(
        float((velocity - teachers).square().sum() / teachers.square().sum()), rel=1e-5
    )


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
