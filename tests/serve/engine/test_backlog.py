"""Lanes and estimates, on costs that are told."""

import pytest

from ppcl.replacements import Interval
from serve.engine.backlog import Backlog, Work
from serve.engine.cost_model import CostModel, Profile
from serve.engine.shared_pipeline import WorkloadKey

LARGE, SMALL = WorkloadKey((), 1000), WorkloadKey((Interval(0, 1),), 1000)
# One row takes 1 s, every further one 0.2 s; the small variant half of it; 1 s for text and decoding.
COSTS = {LARGE.plan: Profile(1, 1.0, 4, 1.6), SMALL.plan: Profile(1, 0.5, 4, 0.8)}


@pytest.fixture
def begun():
    return []


@pytest.fixture
def backlog(begun):
    return Backlog(CostModel(COSTS, 1.0, 1000), 4, begun.append)


def work(workload=LARGE, steps=10, deadline=None, undegraded=LARGE):
    return Work(workload, undegraded, steps, 1, deadline, None)


def test_a_lane_has_a_batch_under_way_and_the_rest_waits_in_order(backlog, begun):
    works = [work() for _ in range(6)]
    for one in works:
        backlog.add(one)
    assert begun == works[:4] and backlog.queued == 2
    backlog.remove(works[1])
    assert begun == works[:5]
    backlog.remove(works[5])
    backlog.remove(works[0])
    assert begun == works[:5] and backlog.queued == 0 and len(backlog.images) == 3
    backlog.remove(works[0])
    assert len(backlog.images) == 3


def test_no_lane_waits_for_another(backlog, begun):
    for _ in range(20):
        backlog.add(work())
    other = work(SMALL)
    backlog.add(other)
    assert begun[-1] is other and len(begun) == 5


def test_a_lane_has_as_many_under_way_as_batching_pays_for(begun):
    """Where a batch takes as long as its images one after the other, more of them at once only end later."""
    linear = CostModel({LARGE.plan: Profile(1, 1.0, 8, 8.0), SMALL.plan: Profile(1, 1.0, 8, 2.0)}, 1.0, 1000)
    backlog = Backlog(linear, 8, begun.append)
    assert (backlog.concurrency(LARGE), backlog.concurrency(SMALL)) == (2, 7)
    for _ in range(5):
        backlog.add(work())
    assert len(begun) == 2 and backlog.queued == 3


def test_alone_a_request_takes_its_steps_and_what_is_around_them(backlog):
    assert backlog.expected_seconds(LARGE, 10, 1, 1) == pytest.approx(11)
    assert backlog.expected_seconds(LARGE, 10, 2, 1) == pytest.approx(21)
    assert backlog.expected_seconds(LARGE, 10, 1, 4) == pytest.approx(16 + 4)
    assert backlog.expected_seconds(LARGE, 10, 1, 8) == pytest.approx(2 * 16 + 8)
    assert backlog.idle_seconds(LARGE, 10, 1, 8) == pytest.approx(2 * 16 + 8)


def test_in_company_it_waits_for_what_the_device_has_to_do(backlog):
    for _ in range(3):
        backlog.add(work())
    # All four share batches: ten steps of four rows, and four times what is around them.
    assert backlog.expected_seconds(LARGE, 10, 1, 1) == pytest.approx(16 + 4)
    for _ in range(4):
        backlog.add(work(SMALL))
    assert backlog.expected_seconds(LARGE, 10, 1, 1) == pytest.approx(16 + 8 + 8)
    assert backlog.idle_seconds(LARGE, 10, 1, 1) == pytest.approx(11)


def test_a_batch_is_expected_to_stay_as_large_as_it_is(backlog):
    """Steps left: 10, 5, 5 and 2 in four slots, which others take as they end; a fifth starts after the shortest."""
    for steps in (10, 5, 5, 2):
        backlog.add(work(steps=steps))
    assert backlog.seconds() == pytest.approx(10 * 1.6 + 4)
    assert backlog.expected_seconds(LARGE, 10, 1, 1) == pytest.approx(12 * 1.6 + 5)


def test_what_is_done_does_not_count(backlog):
    one = work()
    backlog.add(one)
    before = backlog.seconds()
    one.steps = 4
    assert before - backlog.seconds() == pytest.approx(6)


def test_demand_is_counted_as_if_nothing_had_been_degraded(backlog):
    backlog.add(work(SMALL))
    assert backlog.undegraded_seconds() == pytest.approx(10 * 1.6 / 4 + 1)
    backlog.add(work(SMALL, undegraded=SMALL))
    assert backlog.undegraded_seconds() == pytest.approx(10 * (1.6 + 0.8) / 4 + 2)


def test_a_lanes_step_is_due_when_what_is_before_it_and_what_is_left_of_it_just_fit(backlog):
    for one in (work(deadline=100.0), work(SMALL, deadline=50.0), work(), work(SMALL)):
        backlog.add(one)
    assert backlog.due(LARGE) == pytest.approx(100 - 11)
    assert backlog.due(SMALL) == pytest.approx(50 - 11 - 6)
    assert backlog.due(WorkloadKey((), 2000)) is None


def test_those_that_wait_for_their_turn_hurry_a_lane_too(backlog):
    for _ in range(4):
        backlog.add(work())
    backlog.add(work(SMALL, deadline=50.0))
    backlog.add(work(deadline=60.0))
    # Five large ones in a lane of four, twenty forwards of four rows, and the small one before the last.
    assert backlog.due(LARGE) == pytest.approx(60 - (20 * 1.6 + 5) - 6)
