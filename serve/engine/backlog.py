"""What is accepted and not finished: pictures in lanes, begun in turn, and what they will still cost the device.

A *lane* is one kind of picture: a plan at a size. Each lane has as many pictures under way as batching pays for, so that what runs
ends soon instead of everything ending late; no lane waits for another to have room.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.batcher import Member
from serve.engine.cost_model import Costs
from serve.engine.shared_pipeline import Kind

# Batches that make so large a share of the pictures a second that full ones do are large enough.
_PAYS = 0.9
# Seconds of one forward of a kind with so many rows.
Forward = Callable[[Kind, int], float]
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

    What is accepted is expected to be drawn in that order, in batches of each lane. With every request only accepted if it is
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

    def seconds(self) -> float:
        """Seconds until everything is done that was accepted."""
        return sum(lane.seconds for lane in self._lanes().values())

    def expected(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """Seconds until `count` more pictures are done, behind all that were accepted."""
        lanes = self._lanes()
        lane = lanes.setdefault(kind, self._lane(kind, self.costs.forward))
        for _ in range(count):
            lane.add(steps * per_step)
        return sum(lane.seconds for lane in lanes.values())

    def alone(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """The same on an idle and undisturbed device."""
        lane = self._lane(kind, self.costs.undisturbed)
        for _ in range(count):
            lane.add(steps * per_step)
        return lane.seconds

    def undegraded_seconds(self) -> float:
        """Device-seconds of what was accepted, had every request of `auto` been drawn with the largest variant, in full batches."""
        return sum(self.undegraded(work.undegraded, work.steps * work.per_step) for work in self.pictures)

    def undegraded(self, kind: Kind, calls: int) -> float:
        return calls * self.costs.forward(kind, self.batch) / self.batch + self.costs.besides(kind)

    def due(self, kind: Kind) -> float | None:
        """When the lane's next step must run, and those of all that was accepted before its pictures behind it, for their deadlines
        to hold, of those that wait for their turn too."""
        lanes: dict[Kind, _Lane] = {}
        due, total = None, 0.0
        for work in self.pictures:
            if work.kind not in lanes:
                lanes[work.kind] = self._lane(work.kind, self.costs.forward)
            lane = lanes[work.kind]
            total -= lane.seconds
            lane.add(work.steps * work.per_step)
            total += lane.seconds
            if work.kind == kind and work.deadline is not None:
                due = work.deadline - total if due is None else min(due, work.deadline - total)
        return due

    def _lanes(self) -> dict[Kind, _Lane]:
        """What is accepted, by lane."""
        lanes: dict[Kind, _Lane] = {}
        for work in self.pictures:
            if work.kind not in lanes:
                lanes[work.kind] = self._lane(work.kind, self.costs.forward)
            lanes[work.kind].add(work.steps * work.per_step)
        return lanes

    def _lane(self, kind: Kind, forward: Forward) -> _Lane:
        return _Lane(kind, self.together(kind), forward, self.costs.besides(kind))


class _Lane:
    """Seconds that pictures of one kind take, drawn so many `together`. They begin in turn, each where one before it ends, and a
    batch stays as large as it is, since others come in the place of those that end."""

    def __init__(self, kind: Kind, together: int, forward: Forward, a_picture: float):
        self._kind, self._forward, self._a_picture = kind, forward, a_picture
        self._ends, self._pictures = [0] * together, 0

    def add(self, calls: int) -> None:
        """One more picture, which takes so many calls of the transformer."""
        heapq.heapreplace(self._ends, self._ends[0] + calls)
        self._pictures += 1

    @property
    def seconds(self) -> float:
        rows = min(self._pictures, len(self._ends))
        return max(self._ends) * self._forward(self._kind, rows) + self._pictures * self._a_picture if rows else 0.0
