"""What is accepted and not finished: pictures in lanes, begun in turn, and what they will still cost the device.

A *lane* is one kind of picture: a plan at a size. Each lane has as many pictures under way as batching pays for, so that what runs
ends soon instead of everything ending late; no lane waits for another to have room.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.batcher import Member
from serve.engine.costs import Costs
from serve.engine.pipelines import Kind

# Batches that make so large a share of the pictures a second that full ones do are large enough.
_PAYS = 0.9
# Under way in any lane, so that a long picture does not stop all others.
_LEAST = 2


@dataclass(eq=False)
class Work:
    """One picture. `steps`: those left of it, each of `per_step` calls of the transformer. `undegraded`: its kind had there been time.

    `deadline`: when it is wanted, of `time.monotonic()`; None for no hurry. `what`: its owner's.
    """

    kind: Kind
    undegraded: Kind
    steps: int
    per_step: int
    deadline: float | None
    what: Any
    member: Member = field(default_factory=Member)
    running: bool = False


class Backlog:
    """`begin(work)` is called when a picture's turn comes. Not safe for threads by itself: its owner holds a lock.

    What is accepted is expected to be drawn in that order, lane by lane in batches. With every request only accepted if it is
    in time behind all before it, all deadlines can hold, and `due` says when the order has to be kept for it.
    """

    def __init__(self, costs: Costs, batch: int, begin: Callable[[Work], None]):
        self.costs, self.batch, self._begin = costs, batch, begin
        # In the order they were accepted.
        self.pictures: dict[Work, None] = {}
        self._waiting: dict[Kind, deque[Work]] = {}
        self._running: dict[Kind, int] = {}

    @property
    def queued(self) -> int:
        return sum(len(lane) for lane in self._waiting.values())

    def add(self, work: Work) -> None:
        self.pictures[work] = None
        self._waiting.setdefault(work.kind, deque()).append(work)
        self._fill(work.kind)

    def remove(self, work: Work) -> None:
        """A picture that is done, or not wanted any more."""
        if work not in self.pictures:
            return
        del self.pictures[work]
        if work.running:
            self._running[work.kind] -= 1
            if not self._running[work.kind]:
                del self._running[work.kind]
        else:
            self._waiting[work.kind].remove(work)
        self._fill(work.kind)

    def _fill(self, kind: Kind) -> None:
        lane, most = self._waiting.get(kind, deque()), self.together(kind)
        while lane and self._running.get(kind, 0) < most:
            work = lane.popleft()
            work.running = True
            self._running[kind] = self._running.get(kind, 0) + 1
            self._begin(work)
        if not lane:
            self._waiting.pop(kind, None)

    def together(self, kind: Kind) -> int:
        """Pictures of a kind that are drawn at once."""

        def a_second(rows: int) -> float:
            return rows / self.costs.undisturbed(kind, rows)

        enough = _PAYS * a_second(self.batch)
        pays = next(rows for rows in range(1, self.batch + 1) if rows == self.batch or a_second(rows) >= enough)
        return min(self.batch, max(_LEAST, pays))

    def seconds(self, last: Work | None = None) -> float:
        """Seconds until everything is done that was accepted, up to and with `last`."""
        return self._all(self._lanes(last))

    def expected(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """Seconds until `count` more pictures are done, behind all that were accepted."""
        lanes = self._lanes()
        lanes.setdefault(kind, []).extend([(steps, per_step)] * count)
        return self._all(lanes)

    def alone(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """The same on an idle and undisturbed device."""
        return self._lane(kind, [(steps, per_step)] * count, self.costs.undisturbed)

    def undegraded_seconds(self) -> float:
        """Device-seconds of what was accepted, had every request of `auto` been drawn with the largest variant, in full batches."""
        return sum(self.undegraded(work.undegraded, work.steps * work.per_step) for work in self.pictures)

    def undegraded(self, kind: Kind, calls: int) -> float:
        return calls * self.costs.forward(kind, self.batch) / self.batch + self.costs.besides(kind)

    def due(self, work: Work) -> float | None:
        """When its next step must run, and those of all that were accepted before it behind it, for its deadline to hold."""
        return None if work.deadline is None else work.deadline - self.seconds(work)

    def _lanes(self, last: Work | None = None) -> dict[Kind, list[tuple[int, int]]]:
        """By lane, what is left of each picture: steps, and calls a step."""
        lanes: dict[Kind, list[tuple[int, int]]] = {}
        for work in self.pictures:
            lanes.setdefault(work.kind, []).append((work.steps, work.per_step))
            if work is last:
                break
        return lanes

    def _all(self, lanes: dict[Kind, list[tuple[int, int]]]) -> float:
        return sum(self._lane(kind, left, self.costs.forward) for kind, left in lanes.items())

    def _lane(self, kind: Kind, left: Iterable[tuple[int, int]], forward: Callable[[Kind, int], float]) -> float:
        """Seconds that a lane takes by itself. A forward's seconds are linear in its rows, so only the numbers count of forwards and
        of rows in all of them: the pictures begin in turn, each where one before it ends."""
        ends, forwards, rows, pictures = [0] * self.together(kind), 0, 0, 0
        for steps, per_step in left:
            end = ends[0] + steps * per_step
            heapq.heapreplace(ends, end)
            forwards, rows, pictures = max(forwards, end), rows + steps * per_step, pictures + 1
        one = forward(kind, 1)
        each = (forward(kind, self.batch) - one) / (self.batch - 1) if self.batch > 1 else 0.0
        return forwards * (one - each) + rows * each + pictures * self.costs.besides(kind)
