"""Lanes and estimates, on costs that are told."""

import pytest

from ppcl.plan import Interval
from serve.engine.backlog import Backlog, Work
from serve.engine.costs import Costs, Profile
from serve.engine.pipelines import Kind

LARGE, SMALL = Kind((), 1000), Kind((Interval(0, 1),), 1000)
# One row takes 1 s, four rows 2.5 s; the small variant half of it; 1 s for text and decoding.
COSTS = {LARGE.plan: Profile(1, 1.0, 4, 2.5), SMALL.plan: Profile(1, 0.5, 4, 1.25)}


@pytest.fixture
def begun():
    return []


@pytest.fixture
def backlog(begun):
    return Backlog(Costs(COSTS, 1.0, 1000), 4, begun.append)


def work(kind=LARGE, steps=10, deadline=None, undegraded=LARGE):
    return Work(kind, undegraded, steps, 1, deadline, None)


def test_a_lane_has_a_batch_under_way_and_the_rest_waits_in_order(backlog, begun):
    works = [work() for _ in range(6)]
    for one in works:
        backlog.add(one)
    assert begun == works[:4] and backlog.queued == 2
    backlog.remove(works[1])
    assert begun == works[:5]
    backlog.remove(works[5])
    backlog.remove(works[0])
    assert begun == works[:5] and backlog.queued == 0 and len(backlog.pictures) == 3
    backlog.remove(works[0])
    assert len(backlog.pictures) == 3


def test_no_lane_waits_for_another(backlog, begun):
    for _ in range(20):
        backlog.add(work())
    other = work(SMALL)
    backlog.add(other)
    assert begun[-1] is other and len(begun) == 5


def test_alone_a_request_takes_its_steps_and_what_is_around_them(backlog):
    assert backlog.expected(LARGE, 10, 1, 1) == pytest.approx(11)
    assert backlog.expected(LARGE, 10, 2, 1) == pytest.approx(21)
    assert backlog.expected(LARGE, 10, 1, 4) == pytest.approx(25 + 4)
    assert backlog.expected(LARGE, 10, 1, 8) == pytest.approx(2 * 25 + 8)


def test_in_company_it_waits_for_what_the_device_has_to_do(backlog):
    for _ in range(3):
        backlog.add(work())
    # All four share batches: ten steps of four rows, and four times what is around them.
    assert backlog.expected(LARGE, 10, 1, 1) == pytest.approx(25 + 4)
    for _ in range(4):
        backlog.add(work(SMALL))
    assert backlog.expected(LARGE, 10, 1, 1) == pytest.approx(25 + 12.5 + 8)


def test_what_is_done_does_not_count(backlog):
    one = work()
    backlog.add(one)
    before = backlog.seconds()
    one.steps = 4
    assert before - backlog.seconds() == pytest.approx(6)


def test_demand_is_counted_as_if_nothing_had_been_degraded(backlog):
    backlog.add(work(SMALL))
    assert backlog.undegraded_seconds() == pytest.approx(10 * 2.5 / 4 + 1)
    backlog.add(work(SMALL, undegraded=SMALL))
    assert backlog.undegraded_seconds() == pytest.approx(10 * (2.5 + 1.25) / 4 + 2)


def test_a_step_is_due_when_what_is_left_just_fits(backlog):
    one = work(deadline=100.0)
    backlog.add(one)
    assert backlog.due(one) == pytest.approx(100 - 10 - 1)
    assert backlog.due(work()) is None


def test_costs_follow_what_batches_take_size_by_size():
    costs = Costs(COSTS, 1.0, 1000, clock=lambda: 0.0)
    twice = Kind((), 2000)
    assert costs.forward(twice, 4) == pytest.approx(5.0)
    for _ in range(100):
        costs.observe((twice, "whatever else"), 4, 15.0)
    assert costs.forward(twice, 4) == pytest.approx(15.0, rel=1e-3)
    assert costs.forward(Kind(SMALL.plan, 2000), 4) == pytest.approx(7.5, rel=1e-3)
    assert costs.forward(LARGE, 4) == costs.undisturbed(LARGE, 4) == pytest.approx(2.5)
    assert costs.forward(Kind((Interval(2, 3),), 1000), 1) == pytest.approx(1.0), "not profiled: the slowest"


def test_a_disturbance_is_forgotten_when_no_batch_tells_of_it_any_more():
    """Or a server that refuses everything for being slow would do so for ever."""
    now = [0.0]
    costs = Costs(COSTS, 1.0, 1000, clock=lambda: now[0])
    for _ in range(200):
        costs.observe((LARGE, "whatever else"), 1, 1000.0)
    assert costs.forward(LARGE, 1) == pytest.approx(4.0, rel=1e-3), "no batch is believed beyond that"
    now[0] = 30.0
    assert costs.forward(LARGE, 1) == pytest.approx(1.0, abs=0.01)
