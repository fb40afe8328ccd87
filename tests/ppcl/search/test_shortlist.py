"""The shortlist of intervals, on made-up errors whose best plans are known."""

import itertools

import numpy as np
import pytest

from ppcl.detection.surrogates import candidate_intervals
from ppcl.replacements import Interval, Plan, conflicts
from ppcl.search.error_model import ErrorModel
from ppcl.search.shortlist import Shortlist, best_depth_plans, shortlist, unstable

BLOCKS = 9
RANGES = [range(5), range(5, BLOCKS)]


def noisy(costs, noise, count):
    """Models of resamples: every cost off by some noise."""

    def models():
        rng = np.random.default_rng(1)
        for _ in range(count):
            yield ErrorModel.additive({i: c * np.exp(noise * rng.normal()) for i, c in costs.items()})

    return models


def planted(runs):
    """An interval costs 1 a block that it removes, but within a run of redundant blocks a thousandth of that."""
    return {
        i: i.removed * (0.001 if any(r[0] <= i.first and i.last <= r[1] for r in runs) else 1.0)
        for i in candidate_intervals(RANGES, 4)
    }


def test_candidates_are_all_intervals_up_to_a_length_within_a_list():
    found = candidate_intervals(RANGES, 3)
    assert len(set(found)) == len(found) == (4 + 3) + (3 + 2)
    assert all(2 <= len(i.blocks) <= 3 and any(i.first in r and i.last in r for r in RANGES) for i in found)


def test_planted_runs_are_recovered_exactly():
    runs = [(1, 3), (6, 8)]
    found = shortlist(
        ErrorModel.additive(planted(runs)), noisy(planted(runs), 0.1, 20), RANGES, 4, 8, 8, lambda _: None
    )
    assert found.plans[4] == Plan([(1, 3), (6, 8)])
    assert {Interval(1, 3), Interval(6, 8)} <= set(found.intervals)
    # All that is shortlisted lies within the runs: nothing else is worth a step.
    assert all(any(a <= i.first and i.last <= b for a, b in runs) for i in found.intervals)
    assert found.stability(4) == 1.0 and not unstable(found, {"p50": 4}, 0.7)


def test_the_best_plans_are_those_of_trying_all():
    rng = np.random.default_rng(0)
    intervals = candidate_intervals(RANGES, 4)
    rows = np.array([rng.normal(size=30) * rng.uniform(0.2, 2) for _ in intervals])
    model = ErrorModel(intervals, rows @ rows.T)
    plans = best_depth_plans(model, BLOCKS, [1, 2, 3, 4])
    for count, plan in plans.items():
        every = [
            subset
            for size in range(1, 5)
            for subset in itertools.combinations(intervals, size)
            if sum(i.removed for i in subset) >= count
            and not any(conflicts(a, b) for a, b in itertools.combinations(subset, 2))
        ]
        assert sum(i.removed for i in plan) >= count
        assert model(plan) <= 1.1 * min(map(model, every))


def test_a_number_that_cannot_be_met_has_no_plan():
    assert list(best_depth_plans(ErrorModel.additive(planted([])), BLOCKS, [5, 6, 7, 8, 9])) == [5, 6]


def test_the_shortlist_keeps_places_to_cut_a_pipeline_and_its_limit():
    blocks = 40
    rng = np.random.default_rng(3)
    costs = {i: i.removed * rng.uniform(0.5, 1.5) for i in candidate_intervals([range(blocks)], 5)}
    found = shortlist(ErrorModel.additive(costs), noisy(costs, 0.5, 10), [range(blocks)], 20, 25, 10, lambda _: None)
    assert len(found.intervals) <= 25
    inside = {b for i in found.intervals for b in i.blocks[1:]}
    cuts = [0, *(b for b in range(1, blocks) if b not in inside), blocks]
    assert max(b - a for a, b in zip(cuts, cuts[1:])) <= 10


def test_a_choice_that_resamples_do_not_share_is_told():
    """All intervals cost the same: what is chosen is chance."""
    costs = {i: float(i.removed) for i in candidate_intervals([range(30)], 3)}
    found = shortlist(ErrorModel.additive(costs), noisy(costs, 0.3, 20), [range(30)], 6, 20, 8, lambda _: None)
    assert found.stability(6) < 0.7
    (note,) = unstable(found, {"p80": 6, "none": 99}, 0.7)
    assert note.startswith("the intervals of p80 are not certain") and "detection.samples" in note
    assert unstable(Shortlist([], {}, {}), {"p80": 6}, 0.7) == []


@pytest.mark.parametrize("most", [1, 7, 12, 40])
def test_progress_counts_resamples(most):
    costs = planted([(1, 3)])
    told = []
    shortlist(ErrorModel.additive(costs), noisy(costs, 0.1, 3), RANGES, most, 8, 8, told.append)
    assert told == [1, 2, 3]
