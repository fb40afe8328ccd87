"""Variants under their names, and the way of a family of them through JSON."""

import numpy as np
import pytest

from ppcl.config.schema import Variants
from ppcl.errors import UserError
from ppcl.replacements import Interval
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.latency_table import Speedup
from ppcl.search.variants import VariantCatalog, best_plans, make_variants, names_of

INTERVALS = [Interval(0, 2), Interval(3, 4), Interval(5, 8), Interval(9, 10), Interval(12, 13)]
STUDENTS = {i: {"w": size} for i, size in zip(INTERVALS, (80, 85, 80, 45, 50), strict=True)}
SIZES = ParameterCounts(1000, (80,) * 9 + (50,) * 5, STUDENTS)
SENSITIVITY = dict(zip(INTERVALS, (0.05, 0.01, 0.09, 0.015, 0.02), strict=True))


def test_named_variants_and_their_way_through_json():
    block_ranges = [range(9), range(9, 14)]
    settings = Variants(
        budgets=[0.9, 0.755], blocks=[13], targets={"fast": {"speedup": 1.5}}, custom={"mine": [(3, 4)]}
    )
    chosen = {"p90": (INTERVALS[0],), "p75.5": (INTERVALS[1],), "fast": tuple(INTERVALS[:2])}
    made = make_variants(settings, SIZES, SENSITIVITY, block_ranges, chosen)
    assert list(made) == ["teacher", "p90", "p75.5", "b13", "fast", "all", "mine"]
    assert set(list(made)[1:]) == set(names_of(settings))
    assert made["fast"].plan == tuple(INTERVALS[:2]) and (made["p90"].budget, made["fast"].budget) == (0.9, None)
    assert (made["teacher"].share, made["teacher"].blocks, made["mine"].blocks) == (1.0, 14, 13)
    assert made["mine"].parameters == 1000 - 75
    family = VariantCatalog(1000, 14, block_ranges, SENSITIVITY, made)
    assert VariantCatalog.from_json(family.to_json()) == family


@pytest.mark.parametrize(
    ("custom", "sentence"),
    [
        ({"all": [(3, 4)]}, "'all' is taken"),
        ({"../x": [(3, 4)]}, "is not a valid variant name"),
        ({"3-4": [(3, 4)]}, "'3-4' reads as a plan and cannot name a variant"),
        ({"mine": [(3, 5)]}, "variants.custom.mine: there is no replacement 3-5; there are 0-2, 3-4, 5-8, 9-10, 12-13"),
        ({"mine": ["ffn:3", "x"]}, "'x' is not a replacement; write intervals as 3-5"),
        ({"mine": [(4, 4)]}, "has fewer than two blocks"),
        ({"mine": [(8, 9)]}, "does not lie within one block list; the lists hold blocks 0 to 8, 9 to 13"),
        ({"mine": [(0, 2), (2, 3)]}, "overlap"),
    ],
)
def test_custom_variants_that_cannot_be(custom, sentence):
    with pytest.raises(UserError, match=sentence):
        make_variants(Variants(budgets=[], custom=custom), SIZES, SENSITIVITY, [range(9), range(9, 14)], {})


@pytest.mark.parametrize("names", [{"p90"}, {"teacher"}, {"all"}, {"b13"}])
def test_a_targets_name_is_not_taken(names):
    with pytest.raises(UserError, match="variants.targets: the name .* is taken"):
        names_of(Variants(budgets=[0.9], blocks=[13], targets=dict.fromkeys(names, {"parameters": 0.5})))


def test_the_smallest_error_is_chosen_among_the_plans_that_are_fast_enough():
    slow, good, fast = (INTERVALS[0],), (INTERVALS[1],), (INTERVALS[2],)
    settings = Variants(budgets=[0.9], targets={"quick": {"speedup": 1.5}, "quicker": {"speedup": 3.0}})
    plans = {"p90": [slow, good], "quick": [slow, good, fast], "quicker": [slow, fast]}
    errors = {slow: 0.1, good: 0.2, fast: 0.3}
    speedups = {slow: Speedup(1.2), good: Speedup(1.6), fast: Speedup(1.9)}
    assert best_plans(settings, plans, errors, speedups) == {"p90": slow, "quick": good, "quicker": fast}
    # Within the spread of its timing a plan is as fast as asked, and the smaller error wins.
    speedups[slow] = Speedup(1.47, 0.04)
    assert best_plans(settings, plans, errors, speedups)["quick"] == slow


def test_a_speedup_is_the_median_of_rounds_whatever_the_machine_does():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 5, 31)
    speedup = Speedup.of(drift, drift / 2 * (1 + 0.01 * rng.normal(size=31)))
    assert speedup.value == pytest.approx(2, rel=0.01) and 0 < speedup.spread < 0.01
    # One round that was disturbed changes nothing.
    disturbed = drift / 2
    disturbed[7] *= 100
    assert Speedup.of(drift, disturbed) == (pytest.approx(2), pytest.approx(0, abs=1e-12))
