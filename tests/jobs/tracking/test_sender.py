"""What a tracker is given while it works, is slow, or fails."""

import threading

import pytest

from jobs.tracking import sender
from jobs.tracking.sender import Sender, close
from jobs.tracking.tracker import Run


class Memory:
    """A tracker that keeps what it is given; `failing`: what `start` raises."""

    name = "memory"

    def __init__(self, failing=None):
        self.failing, self.starts, self.got = failing, 0, []

    def start(self, run):
        self.starts += 1
        if self.failing:
            raise self.failing


@pytest.fixture
def said():
    return []


def sending(tracker, said):
    return Sender(tracker, Run("1", "run", {}, None), said.append)


def test_entries_come_in_their_order_after_one_start(said):
    tracker = Memory()
    to = sending(tracker, said)
    for number in range(100):
        to.put(lambda tracker, number=number: tracker.got.append(number))
    close([to])
    assert tracker.got == list(range(100)) and tracker.starts == 1 and not said


def test_a_slow_tracker_holds_nobody_and_the_oldest_entries_are_dropped(said, monkeypatch):
    monkeypatch.setattr(sender, "_WAITING", 10)
    tracker, go_on = Memory(), threading.Event()
    to = sending(tracker, said)
    to.put(lambda tracker: go_on.wait(60))
    for number in range(100):
        to.put(lambda tracker, number=number: tracker.got.append(number))
    go_on.set()
    close([to])
    assert tracker.got[-5:] == [95, 96, 97, 98, 99] and len(tracker.got) <= 10


def test_a_failure_is_told_once_without_credentials_and_what_is_important_is_tried_again(said):
    tracker = Memory(OSError("http://user:secret@host is away\nand more"))
    to = sending(tracker, said)
    for _ in range(50):
        to.put(lambda tracker: tracker.got.append("progress"))
    to.put(lambda tracker: tracker.got.append("end"), important=True)
    close([to])
    assert said == ["tracking: memory does not work (http://host is away and more); the job goes on"]
    assert tracker.starts == 2  # the first entry and the important one


def test_a_tracker_that_comes_back_has_what_is_important(said):
    tracker, failed = Memory(OSError("away")), threading.Event()
    to = Sender(tracker, Run("1", "run", {}, None), lambda line: (said.append(line), failed.set()))
    to.put(lambda tracker: tracker.got.append("progress"))
    assert failed.wait(60)
    tracker.failing = None
    to.put(lambda tracker: tracker.got.append("end"), important=True)
    close([to])
    assert tracker.got == ["end"] and len(said) == 1
