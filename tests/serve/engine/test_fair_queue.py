"""The fair queue alone: which group runs next, by charged seconds and deadlines."""

from dataclasses import dataclass

import pytest

from serve.engine.fair_queue import FairQueue


@dataclass
class Call:
    group: str
    due: float | None = None


@pytest.fixture
def queue():
    queue = FairQueue()
    for group in ("a", "b"):
        queue.arrive(group)
    return queue


def run(queue, group, seconds, waiting):
    queue.start_batch(group, waiting)
    queue.charge(group, seconds)


def test_the_group_with_the_least_charged_seconds_is_next(queue):
    a, b = Call("a"), Call("b")
    run(queue, "a", 2.0, [b])
    queue.arrive("a")
    assert queue.next_group([a, b], 0.0) == "b"
    run(queue, "b", 3.0, [a])
    queue.arrive("b")
    assert queue.next_group([b, a], 0.0) == "a"


def test_of_equal_groups_the_longest_waiting_call_is_next(queue):
    assert queue.next_group([Call("b"), Call("a")], 0.0) == "b"
    assert queue.next_group([Call("a"), Call("b")], 0.0) == "a"


def test_a_cheap_group_runs_more_often_in_proportion(queue):
    waiting, ran = [Call("a"), Call("b")], []
    for _ in range(22):
        group = queue.next_group(waiting, 0.0)
        ran.append(group)
        run(queue, group, {"a": 10.0, "b": 1.0}[group], waiting)
    assert ran.count("a") == 2 and ran.count("b") == 20


def test_an_urgent_call_goes_first_and_the_most_urgent_of_several(queue):
    run(queue, "b", 100.0, [Call("a")])
    queue.arrive("b")
    calls = [Call("a"), Call("b", due=5.0), Call("a", due=4.0)]
    assert queue.next_group(calls, now=3.0) == "a", "nothing is urgent yet"
    assert queue.next_group(calls[:2], now=5.0) == "b"
    assert queue.next_group([Call("b", due=5.0), Call("a", due=4.0)], now=6.0) == "a"


def test_a_group_that_was_idle_starts_at_the_present_virtual_time(queue):
    for _ in range(5):
        run(queue, "a", 1.0, [])
        queue.arrive("a")
    queue.arrive("b")
    run(queue, "b", 1.5, [Call("a")])
    queue.arrive("b")
    assert queue.next_group([Call("b"), Call("a")], 0.0) == "a", "idle time earned credit"
