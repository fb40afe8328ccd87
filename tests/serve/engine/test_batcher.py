"""The batcher alone, with calls that only sleep: who goes together, who is next, and who pays for an error."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serve.engine.batcher import Batcher, Cancelled, Ticket

# Long enough that a thread which is to come back does, however busy the machine.
GATHER = 60.0


class Ran(list):
    """What ran, in order: (group, arguments) of each batch; a group's name says how many milliseconds one takes.

    `held`: the group that takes until `go` is set.
    """

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def __call__(self, group, arguments):
        if group == "held":
            assert self.go.wait(GATHER)
        else:
            time.sleep(int(group.split()[-1]) / 1000)
        self.append((group, list(arguments)))
        return [f"{argument}!" for argument in arguments]


@pytest.fixture
def made():
    batchers = []

    def make(run, most=8, gather=0.0):
        batchers.append(Batcher("test", run, lambda group: most, gather))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close()


def calls(batcher, group, count, name="call"):
    """An image: `count` calls one after the other."""
    ticket = Ticket()
    for number in range(count):
        assert batcher.call(group, 1, f"{name} {number}", ticket) == f"{name} {number}!"
    batcher.leave(ticket)


def held(pool, batcher, ticket=None):
    """Keeps the batcher busy, so that other calls wait."""
    one = pool.submit(batcher.call, "held", 1, "first", ticket or Ticket())
    until(lambda: one.running() and not batcher._waiting and batcher._fair_queue._virtual_times)
    return one


def asked(pool, batcher, *call):
    """A call that waits, behind those before it."""
    before = len(batcher._waiting)
    one = pool.submit(batcher.call, *call)
    until(lambda: len(batcher._waiting) == before + 1)
    return one


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_pictures_that_began_together_stay_together(made):
    ran = Ran()
    batcher = made(ran, gather=GATHER)
    with ThreadPoolExecutor(5) as pool:
        before = Ticket()
        first = held(pool, batcher, before)
        for number in range(4):
            pool.submit(calls, batcher, "steps 2", 10, str(number))
        until(lambda: len(batcher._waiting) == 4)
        ran.go.set()
        first.result()
        batcher.leave(before)
    del ran[0]
    assert [len(arguments) for _, arguments in ran] == [4] * 10
    assert all(len(set(number for number, _ in map(str.split, arguments))) == len(arguments) for _, arguments in ran)


def test_a_batch_holds_at_most_so_many_rows_and_the_longest_waiting_first(made):
    ran = Ran()
    batcher = made(ran, most=3)
    with ThreadPoolExecutor(6) as pool:
        held(pool, batcher)
        for number in range(5):
            asked(pool, batcher, "steps 1", 1, number, Ticket())
        ran.go.set()
    assert [arguments for group, arguments in ran if group == "steps 1"] == [[0, 1, 2], [3, 4]]


def test_a_crowd_of_long_calls_does_not_hold_a_short_one_up(made):
    """Sixteen images, 80 ms per batch of eight, against one of 1 ms: some ten of its calls to one of theirs."""
    ran = Ran()
    batcher = made(ran, gather=GATHER)
    with ThreadPoolExecutor(17) as pool:
        large = [pool.submit(calls, batcher, "large 80", 6) for _ in range(16)]
        while not ran:
            time.sleep(0.001)
        calls(batcher, "small 1", 19)
        between = [group for group, _ in ran]
        for one in large:
            one.result()
    last = len(between) - between[::-1].index("small 1")
    assert between[:last].count("large 80") <= 6, between
    assert 12 <= [group for group, _ in ran].count("large 80") <= 15, "the large ones did not stay together"


def test_pictures_of_a_batch_share_what_it_takes(made):
    """Eight together and one alone, all steps as long: each image gets its share, so the eight run 8 times as often."""
    ran = Ran()
    batcher = made(ran, gather=GATHER)
    with ThreadPoolExecutor(9) as pool:
        many = [pool.submit(calls, batcher, "many 5", 24) for _ in range(8)]
        while not ran:
            time.sleep(0.001)
        alone = pool.submit(calls, batcher, "alone 5", 24)
        for one in many:
            one.result()
        sizes = Counter(group for group, _ in ran)
        alone.result()
    assert 1 <= sizes["alone 5"] <= 8, sizes


def test_an_idle_group_comes_back_without_credit(made):
    """Two equal groups, of which one was idle for long: they take turns from then on."""
    ran = Ran()
    batcher = made(ran, gather=GATHER)
    calls(batcher, "idle 5", 1)
    calls(batcher, "busy 5", 20)
    ran.clear()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(calls, batcher, "busy 5", 10)
        pool.submit(calls, batcher, "idle 5", 10)
    turns = [group for group, _ in ran]
    assert "busy 5" in turns[:4] and turns[:12].count("busy 5") >= 4


def test_what_must_run_now_for_its_deadline_goes_first(made):
    ran = Ran()
    batcher = made(ran, most=1)
    with ThreadPoolExecutor(4) as pool:
        held(pool, batcher)
        asked(pool, batcher, "a 1", 1, "calm", Ticket())
        asked(pool, batcher, "b 1", 1, "late", Ticket(due=time.monotonic() - 1))
        asked(pool, batcher, "c 1", 1, "latest", Ticket(due=time.monotonic() - 2))
        ran.go.set()
    assert [arguments[0] for _, arguments in ran[1:]] == ["latest", "late", "calm"]


def test_a_cancelled_picture_neither_waits_nor_runs(made):
    ran, ticket = Ran(), Ticket()
    batcher = made(ran)
    with ThreadPoolExecutor(2) as pool:
        held(pool, batcher)
        waiting = asked(pool, batcher, "steps 1", 1, "unwanted", ticket)
        ticket.cancelled.set()
        batcher.leave(ticket)
        with pytest.raises(Cancelled):
            waiting.result(timeout=60)
        assert not ran, "it waited for the batch before it"
        with pytest.raises(Cancelled):
            batcher.call("steps 1", 1, "unwanted", ticket)
        ran.go.set()
    assert [group for group, _ in ran] == ["held"]


def test_an_error_is_that_of_its_batch_alone(made):
    def run(group, arguments):
        if group == "bad":
            raise ValueError("broken")
        return arguments

    batcher = made(run)
    with ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(batcher.call, "bad", 1, n, Ticket()) for n in range(2)]
        good = [pool.submit(batcher.call, "good", 1, n, Ticket()) for n in range(2)]
        assert [one.result() for one in good] == [0, 1]
        for one in bad:
            with pytest.raises(ValueError, match="broken"):
                one.result()
    assert batcher.alive


def test_what_does_not_fit_into_memory_is_run_alone_and_remembered(made):
    sizes, go = [], threading.Event()

    def run(group, arguments):
        sizes.append(len(arguments))
        assert go.wait(GATHER)
        if len(arguments) > 2 or "huge" in arguments:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return arguments

    batcher = made(run, gather=GATHER)

    def once(group, argument):
        ticket = Ticket()
        try:
            return batcher.call(group, 1, argument, ticket)
        finally:
            batcher.leave(ticket)

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(once, "one", "first")
        until(lambda: sizes)
        others = [pool.submit(once, "some", n) for n in ("a", "b", "c", "huge")]
        until(lambda: len(batcher._waiting) == 4)
        go.set()
        assert [one.result() for one in others[:3]] == ["a", "b", "c"]
        with pytest.raises(torch.OutOfMemoryError):
            others[3].result()
        first.result()
        assert sorted(sizes) == [1, 1, 1, 1, 1, 4]
        sizes.clear()
        list(pool.map(lambda n: once("some", n), "defg"))
    assert sum(sizes) == 4 and max(sizes) <= 2


def test_nobody_waits_for_a_batcher_that_is_closed(made):
    ran = Ran()
    batcher = made(ran)
    with ThreadPoolExecutor(3) as pool:
        held(pool, batcher)
        waiting = asked(pool, batcher, "steps 1", 1, "unwanted", Ticket())
        closing = pool.submit(batcher.close)
        until(lambda: not batcher.alive)
        ran.go.set()
        closing.result(timeout=60)
        with pytest.raises(Cancelled):
            waiting.result(timeout=60)
    with pytest.raises(Cancelled):
        batcher.call("steps 1", 1, "unwanted", Ticket())
