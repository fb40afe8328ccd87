"""Estimated device-seconds, on profiles and a clock that the test sets."""

import pytest

from ppcl.replacements import Interval
from serve.engine.cost_model import CostModel, Profile
from serve.engine.shared_pipeline import WorkloadKey

LARGE, SMALL = WorkloadKey((), 1000), WorkloadKey((Interval(0, 1),), 1000)
# One row takes 1 s, every further one 0.2 s; the small variant takes half of it.
COSTS = {LARGE.plan: Profile(1, 1.0, 4, 1.6), SMALL.plan: Profile(1, 0.5, 4, 0.8)}


def test_a_profile_is_linear_between_its_rows_and_never_falls():
    assert [COSTS[LARGE.plan].seconds(rows) for rows in (1, 2, 4, 9)] == pytest.approx([1.0, 1.2, 1.6, 2.6])
    assert Profile(1, 1.0, 4, 0.4).seconds(8) == pytest.approx(1.0), "a larger batch measured faster is noise"
    assert Profile(2, 1.0, 2, 1.0).seconds(4) == pytest.approx(2.0), "one measured size: proportional"


def test_overhead_grows_with_the_pixels():
    assert CostModel(COSTS, 3.0, 1000).overhead(WorkloadKey((), 500)) == pytest.approx(1.5)


def test_costs_follow_what_batches_take_size_by_size():
    costs = CostModel(COSTS, 1.0, 1000, clock=lambda: 0.0)
    twice = WorkloadKey((), 2000)
    assert costs.forward(twice, 4) == pytest.approx(3.2)
    for _ in range(100):
        costs.observe((twice, "whatever else"), 4, 9.6)
    assert costs.forward(twice, 4) == pytest.approx(9.6, rel=1e-3)
    assert costs.forward(WorkloadKey(SMALL.plan, 2000), 4) == pytest.approx(4.8, rel=1e-3)
    assert costs.forward(LARGE, 4) == costs.undisturbed(LARGE, 4) == pytest.approx(1.6)
    assert costs.forward(WorkloadKey((Interval(2, 3),), 1000), 1) == pytest.approx(1.0), "not profiled: the slowest"


def test_a_disturbance_is_forgotten_when_no_batch_tells_of_it_any_more():
    """Or a server that refuses everything for being slow would do so for ever."""
    now = [0.0]
    costs = CostModel(COSTS, 1.0, 1000, clock=lambda: now[0])
    for _ in range(200):
        costs.observe((LARGE, "whatever else"), 1, 1000.0)
    assert costs.forward(LARGE, 1) == pytest.approx(4.0, rel=1e-3), "no batch is believed beyond that"
    now[0] = 30.0
    assert costs.forward(LARGE, 1) == pytest.approx(1.0, abs=0.01)
