"""Backlog: images that are accepted and not finished, in lanes, and their remaining device time.

A *lane* holds the images of one workload: one plan at one size. Each lane runs as many images at once as batching pays
for, so that running images end soon instead of all images ending late. No lane waits for another.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.engine.batcher import Ticket
from serve.engine.cost_model import CostModel
from serve.engine.shared_pipeline import WorkloadKey

# A batch is large enough if it reaches this share of a full batch's images per second.
_ENOUGH_THROUGHPUT = 0.9
# Fewest images at once in any lane, so that a long image does not block all others.
_MIN_CONCURRENCY = 2
# Seconds of one forward of a workload with a number of rows.
ForwardSeconds = Callable[[WorkloadKey, int], float]


@dataclass(eq=False)
class Work:
    """One image. `steps`: remaining steps, each of `per_step` calls of the transformer.

    `undegraded`: the workload it would have without degrading. `deadline`: by `time.monotonic()`, None without one.
    `payload`: what the owner needs to generate it.
    """

    workload: WorkloadKey
    undegraded: WorkloadKey
    steps: int
    per_step: int
    deadline: float | None
    payload: Any
    ticket: Ticket = field(default_factory=Ticket)
    running: bool = False

    @property
    def calls(self) -> int:
        """Remaining calls of the transformer."""
        return self.steps * self.per_step


class Backlog:
    """Starts images with `begin(work)` and estimates completion times. Not thread-safe: the owner holds a lock.

    Estimates assume that images run in order of acceptance, in batches of each lane. As every request is accepted only
    if it is in time behind all earlier ones, all deadlines can hold; `due` tells when that order must be kept.
    """

    def __init__(self, cost_model: CostModel, batch: int, begin: Callable[[Work], object]):
        self.cost_model, self.batch, self._begin = cost_model, batch, begin
        # A dict used as an ordered set: in order of acceptance.
        self.images: dict[Work, None] = {}
        self._waiting: dict[WorkloadKey, deque[Work]] = {}
        self._running: dict[WorkloadKey, int] = {}

    @property
    def queued(self) -> int:
        return sum(len(lane) for lane in self._waiting.values())

    def add(self, work: Work) -> None:
        self.images[work] = None
        self._waiting.setdefault(work.workload, deque()).append(work)
        self._fill(work.workload)

    def remove(self, work: Work) -> None:
        """Remove an image that is done or cancelled. Does nothing where it was removed before."""
        if work not in self.images:
            return
        del self.images[work]
        if work.running:
            self._running[work.workload] -= 1
            if not self._running[work.workload]:
                del self._running[work.workload]
        else:
            self._waiting[work.workload].remove(work)
        self._fill(work.workload)

    def _fill(self, workload: WorkloadKey) -> None:
        """Start waiting images up to the lane's concurrency."""
        lane, limit = self._waiting.get(workload, deque()), self.concurrency(workload)
        while lane and self._running.get(workload, 0) < limit:
            work = lane.popleft()
            work.running = True
            self._running[workload] = self._running.get(workload, 0) + 1
            self._begin(work)
        if not lane:
            self._waiting.pop(workload, None)

    def concurrency(self, workload: WorkloadKey) -> int:
        """Return the number of images of a workload that run at once."""

        def images_per_second(rows: int) -> float:
            return rows / self.cost_model.undisturbed(workload, rows)

        enough = _ENOUGH_THROUGHPUT * images_per_second(self.batch)
        rows = next((rows for rows in range(1, self.batch) if images_per_second(rows) >= enough), self.batch)
        return min(self.batch, max(_MIN_CONCURRENCY, rows))

    def seconds(self) -> float:
        """Return the seconds until all accepted images are done."""
        return sum(lane.seconds for lane in self._lanes().values())

    def expected_seconds(self, workload: WorkloadKey, steps: int, per_step: int, count: int) -> float:
        """Return the seconds until `count` more images are done, behind all accepted ones."""
        lanes = self._lanes()
        lane = lanes.setdefault(workload, self._lane(workload, self.cost_model.forward))
        for _ in range(count):
            lane.add(steps * per_step)
        return sum(lane.seconds for lane in lanes.values())

    def idle_seconds(self, workload: WorkloadKey, steps: int, per_step: int, count: int) -> float:
        """Return the same on an idle and undisturbed device."""
        lane = self._lane(workload, self.cost_model.undisturbed)
        for _ in range(count):
            lane.add(steps * per_step)
        return lane.seconds

    def undegraded_seconds(self) -> float:
        """Return the device-seconds of all accepted images in full batches, had no request been degraded."""
        return sum(self.undegraded(work.undegraded, work.calls) for work in self.images)

    def undegraded(self, workload: WorkloadKey, calls: int) -> float:
        """Return the device-seconds of one image of `calls` calls in full batches."""
        return calls * self.cost_model.forward(workload, self.batch) / self.batch + self.cost_model.overhead(workload)

    def due(self, workload: WorkloadKey) -> float | None:
        """Return the latest time of a lane's next step at which all deadlines of the lane still hold.

        The step must leave room for all work accepted before the lane's images, waiting images included. None where no
        image of the lane has a deadline.
        """
        lanes: dict[WorkloadKey, _Lane] = {}
        due, total = None, 0.0
        for work in self.images:
            if work.workload not in lanes:
                lanes[work.workload] = self._lane(work.workload, self.cost_model.forward)
            lane = lanes[work.workload]
            total -= lane.seconds
            lane.add(work.calls)
            total += lane.seconds
            if work.workload == workload and work.deadline is not None:
                due = work.deadline - total if due is None else min(due, work.deadline - total)
        return due

    def _lanes(self) -> dict[WorkloadKey, _Lane]:
        """Return the accepted images by lane."""
        lanes: dict[WorkloadKey, _Lane] = {}
        for work in self.images:
            if work.workload not in lanes:
                lanes[work.workload] = self._lane(work.workload, self.cost_model.forward)
            lanes[work.workload].add(work.calls)
        return lanes

    def _lane(self, workload: WorkloadKey, forward: ForwardSeconds) -> _Lane:
        return _Lane(workload, self.concurrency(workload), forward, self.cost_model.overhead(workload))


class _Lane:
    """Estimates the seconds that images of one workload take with `concurrency` of them at once.

    Each image starts where an earlier one ends. The batch keeps its size, since new images replace finished ones.
    """

    def __init__(self, workload: WorkloadKey, concurrency: int, forward: ForwardSeconds, overhead_s: float):
        self._workload, self._forward, self._overhead_s = workload, forward, overhead_s
        # For each slot of the batch, the number of the forward after which it is free.
        self._slot_ends, self._images = [0] * concurrency, 0

    def add(self, calls: int) -> None:
        """Add an image of so many calls of the transformer."""
        heapq.heapreplace(self._slot_ends, self._slot_ends[0] + calls)
        self._images += 1

    @property
    def seconds(self) -> float:
        rows = min(self._images, len(self._slot_ends))
        if not rows:
            return 0.0
        return max(self._slot_ends) * self._forward(self._workload, rows) + self._images * self._overhead_s
