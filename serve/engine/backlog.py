"""What is accepted and not finished: pictures in lanes, begun in turn, and what they will still cost the device.

A *lane* is one kind of picture: a plan at a size. Each lane has as many pictures under way as make a batch, so that what runs
ends soon instead of everything ending late; no lane waits for another to have room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.batcher import Member
from serve.engine.costs import Costs
from serve.engine.pipelines import Kind


@dataclass(eq=False)
class Work:
    """One picture. `steps`: those left of it, each of `per_step` rows of the transformer. `undegraded`: its kind had there been time.

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
    """`begin(work)` is called when a picture's turn comes. Not safe for threads by itself: its owner holds a lock."""

    def __init__(self, costs: Costs, batch: int, begin: Callable[[Work], None]):
        self.costs, self.batch, self._begin = costs, batch, begin
        self.pictures: set[Work] = set()
        self._waiting: dict[Kind, deque[Work]] = {}
        self._running: dict[Kind, int] = {}

    @property
    def queued(self) -> int:
        return sum(len(lane) for lane in self._waiting.values())

    def add(self, work: Work) -> None:
        self.pictures.add(work)
        self._waiting.setdefault(work.kind, deque()).append(work)
        self._fill(work.kind)

    def remove(self, work: Work) -> None:
        """A picture that is done, or not wanted any more."""
        if work not in self.pictures:
            return
        self.pictures.remove(work)
        if work.running:
            self._running[work.kind] -= 1
            if not self._running[work.kind]:
                del self._running[work.kind]
        else:
            self._waiting[work.kind].remove(work)
        self._fill(work.kind)

    def _fill(self, kind: Kind) -> None:
        lane = self._waiting.get(kind, deque())
        while lane and self._running.get(kind, 0) < self.batch:
            work = lane.popleft()
            work.running = True
            self._running[kind] = self._running.get(kind, 0) + 1
            self._begin(work)
        if not lane:
            self._waiting.pop(kind, None)

    def rows(self, kind: Kind, more: int = 0) -> int:
        """Rows of a batch of this kind, with `more` pictures of it."""
        return max(1, min(self.batch, more + sum(work.kind == kind for work in self.pictures)))

    def seconds(self, more: Kind | None = None, count: int = 0) -> float:
        """Device-seconds until everything is done that was accepted, if `count` pictures of the kind `more` come to share batches."""
        rows = {kind: self.rows(kind, count if kind == more else 0) for kind in {work.kind for work in self.pictures}}
        return sum(self.left(work.kind, work.steps * work.per_step, rows[work.kind]) for work in self.pictures)

    def left(self, kind: Kind, calls: int, rows: int) -> float:
        return calls * self.costs.forward(kind, rows) / rows + self.costs.besides(kind)

    def undegraded_seconds(self) -> float:
        """The same had every request of `auto` been drawn with the largest variant, in full batches."""
        return sum(self.left(work.undegraded, work.steps * work.per_step, self.batch) for work in self.pictures)

    def expected(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """Seconds until `count` more pictures are done: the longer of what all of it costs the device, and their own steps."""
        rows = self.rows(kind, count)
        own = count * self.left(kind, steps * per_step, rows)
        return max(self.seconds(kind, count) + own, self._alone(self.costs.forward, kind, steps, per_step, count))

    def alone(self, kind: Kind, steps: int, per_step: int, count: int) -> float:
        """The same on an idle and undisturbed device."""
        return self._alone(self.costs.undisturbed, kind, steps, per_step, count)

    def _alone(self, forward: Callable[[Kind, int], float], kind: Kind, steps: int, per_step: int, count: int) -> float:
        rows = min(self.batch, count)
        return -(-count // rows) * steps * per_step * forward(kind, rows) + count * self.costs.besides(kind)

    def due(self, work: Work) -> float | None:
        """When the picture's next step must run for its deadline to hold."""
        if work.deadline is None:
            return None
        rows = self.rows(work.kind)
        return work.deadline - work.steps * work.per_step * self.costs.forward(work.kind, rows) - self.costs.besides(work.kind)
