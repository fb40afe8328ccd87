"""Scores of variants beside the teacher's, with paired intervals."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from ppcl.evaluation.benchmarks import Benchmark, mean_drops

RNG = np.random.default_rng(0)
TEACHERS = RNG.normal(20, 4, size=200)
# Worse by 1 each, with little noise: unpaired intervals would hide it.
VARIANTS = TEACHERS - 1 + RNG.normal(0, 0.2, size=200)


def benchmark(teacher=TEACHERS, variant=VARIANTS, **more):
    return Benchmark("clip", "dpg", {"teacher": {"": teacher}, "half": {"": variant}}, **more)


def test_means_differences_and_drops():
    rows = benchmark().record(0.95, 0)["variants"]
    assert rows["half"]["score"] == pytest.approx(VARIANTS.mean())
    assert rows["half"]["difference"] == pytest.approx((VARIANTS - TEACHERS).mean())
    assert rows["half"]["R"] == pytest.approx(100 * (1 - VARIANTS.mean() / TEACHERS.mean()))
    assert rows["teacher"]["difference"] == rows["teacher"]["R"] == 0


def test_intervals_are_those_of_a_paired_bootstrap():
    row = benchmark().record(0.95, 0)["variants"]["half"]
    for name, data in (("", VARIANTS), ("difference_", VARIANTS - TEACHERS)):
        expected = bootstrap(
            (data,), np.mean, n_resamples=5000, method="percentile", random_state=1
        ).confidence_interval
        width = expected.high - expected.low
        assert row[f"{name}low"] == pytest.approx(expected.low, abs=0.1 * width)
        assert row[f"{name}high"] == pytest.approx(expected.high, abs=0.1 * width)
    assert row["difference_high"] < 0 and row["high"] - row["low"] > 10 * (
        row["difference_high"] - row["difference_low"]
    )


def test_categories_count_alike_whatever_their_sizes():
    scores = {"easy": np.ones(30), "hard": np.zeros(10)}
    one = Benchmark("right", "geneval", {"teacher": scores, "half": scores | {"easy": np.zeros(30)}})
    rows = one.record(0.95, 0)["variants"]
    assert rows["teacher"]["score"] == 0.5 and rows["half"]["R"] == 100
    assert one.record(0.95, 0)["prompts"] == 40


def test_a_distance_drops_when_it_grows():
    row = benchmark(teacher=np.full(50, 0.2), variant=np.full(50, 0.3), higher_is_better=False).record(0.95, 0)
    assert row["variants"]["half"]["R"] == pytest.approx(50)
    assert row["variants"]["half"]["difference"] == pytest.approx(0.1)


@pytest.mark.parametrize("teacher", [np.zeros(50), np.full(50, -1.0), RNG.normal(0.1, 3, size=50)])
def test_there_is_no_r_of_a_teacher_that_may_have_0(teacher):
    row = benchmark(teacher=teacher, variant=teacher - 1).record(0.95, 0)["variants"]["half"]
    assert row["R"] is row["R_low"] is row["R_high"] is None and row["difference"] == pytest.approx(-1)


def test_a_result_without_the_teachers_scores_has_means_alone():
    rows = Benchmark("clip", "dpg", {"half": {"": VARIANTS}}).record(0.95, 0)["variants"]
    assert rows["half"]["R"] is None and "difference" not in rows["half"]


def test_the_mean_drop_is_over_the_benchmarks_that_have_one():
    negative = benchmark(teacher=np.full(9, -1.0), variant=np.full(9, -2.0))
    halved = benchmark(teacher=np.full(9, 2.0), variant=np.full(9, 1.0))
    rows = mean_drops([benchmark(), negative, halved], 0.95, 0)
    first = benchmark().record(0.95, 0)["variants"]["half"]
    assert rows["half"]["R"] == pytest.approx((first["R"] + 50) / 2) and rows["half"]["benchmarks"] == 2
    # The other has no spread.
    assert rows["half"]["R_high"] - rows["half"]["R_low"] == pytest.approx((first["R_high"] - first["R_low"]) / 2)
