"""Batcher: one thread that runs waiting calls in batches, fairly.

A *group* is what can run as one batch. `serve.engine.fair_queue` chooses the next group; within a group the calls that
have waited longest go first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from serve.engine.fair_queue import FairQueue


class Cancelled(Exception):
    """The image was cancelled."""


@dataclass(eq=False)
class Ticket:
    """One image in the batchers. `due`: the latest `time.monotonic()` of its next call that meets its deadline."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    due: float | None = None

    def check(self) -> None:
        """Raises `Cancelled` where the image was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled


@dataclass(eq=False)
class _Call:
    group: Hashable
    rows: int
    arguments: Any
    ticket: Ticket
    answer: Future[Any] = field(default_factory=Future)
    arrived_at: float = field(default_factory=time.perf_counter)

    @property
    def due(self) -> float | None:
        return self.ticket.due


# Runs calls of one group together; returns one answer each, in order.
RunBatch = Callable[[Any, Sequence[Any]], Sequence[Any]]
# Is called after every batch with its group, its rows and its seconds.
BatchObserver = Callable[[Any, int, float], None]


def _ignore(group: Hashable, rows: int, seconds: float) -> None:
    pass


class Batcher:
    """`max_rows(group)`: most rows of a batch. `gather_s`: seconds to wait after a batch for its images' next calls,
    so that they stay together.

    An error of a batch fails its calls alone. A batch too large for the memory runs again call by call.
    """

    def __init__(
        self,
        name: str,
        run: RunBatch,
        max_rows: Callable[[Any], int],
        gather_s: float = 0.0,
        on_batch: BatchObserver = _ignore,
    ):
        self._run, self._max_rows, self._gather_s, self._on_batch = run, max_rows, gather_s, on_batch
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []
        # Images whose last call was answered and whose next is expected.
        self._expected_back: set[Ticket] = set()
        self._fair_queue = FairQueue()
        # Rows that fit into memory, for groups that once did not.
        self._row_limits: dict[Hashable, int] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def call(self, group: Hashable, rows: int, arguments: Any, ticket: Ticket) -> Any:
        """Wait for the answer of a call. Raises what the batch raised, or `Cancelled`."""
        ticket.check()
        call = _Call(group, rows, arguments, ticket)
        with self._changed:
            if self._closed:
                raise Cancelled
            self._expected_back.discard(ticket)
            self._fair_queue.arrive(group)
            self._waiting.append(call)
            self._changed.notify()
        return call.answer.result()

    def leave(self, ticket: Ticket) -> None:
        """Expect no further call of an image. If it was cancelled, its waiting calls end with `Cancelled`."""
        with self._changed:
            self._expected_back.discard(ticket)
            if ticket.cancelled.is_set():
                for call in [call for call in self._waiting if call.ticket is ticket]:
                    self._waiting.remove(call)
                    call.answer.set_exception(Cancelled())
            self._changed.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """End waiting calls with `Cancelled`. A running batch finishes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        ended_at = 0.0
        while (calls := self._next_batch()) is not None:
            # The wait for images of the batch before is part of a step's cost.
            started_at = max(ended_at, min(call.arrived_at for call in calls))
            self._answer(calls)
            ended_at = time.perf_counter()
            seconds = ended_at - started_at
            group, rows = calls[0].group, sum(call.rows for call in calls)
            with self._changed:
                self._fair_queue.charge(group, seconds / len(calls))
            self._on_batch(group, rows, seconds)

    def _next_batch(self) -> list[_Call] | None:
        """Return the calls of the next batch; None once closed."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._gather_s:
                    self._changed.wait_for(lambda: self._closed or not self._expected_back, self._gather_s)
                    self._expected_back.clear()
                if self._waiting and not self._closed:
                    return self._take(self._fair_queue.next_group(self._waiting, time.monotonic()))
            for call in self._waiting:
                call.answer.set_exception(Cancelled())
            self._waiting.clear()
            return None

    def _take(self, group: Hashable) -> list[_Call]:
        """Remove one batch of a group from the waiting calls."""
        limit = self._max_rows(group)
        limit = min(limit, self._row_limits.get(group, limit))
        batch: list[_Call] = []
        rows = 0
        for call in [call for call in self._waiting if call.group == group]:
            if not batch or rows + call.rows <= limit:
                batch.append(call)
                rows += call.rows
                self._waiting.remove(call)
        self._fair_queue.start_batch(group, self._waiting)
        return batch

    def _answer(self, calls: list[_Call]) -> None:
        """Run a batch and answer its calls."""
        out_of_memory = False
        try:
            answers = self._run(calls[0].group, [call.arguments for call in calls])
        except torch.OutOfMemoryError as error:
            if len(calls) == 1:
                calls[0].answer.set_exception(error)
                return
            # Or every further step would fail once more.
            self._row_limits[calls[0].group] = max(1, sum(call.rows for call in calls) // 2)
            out_of_memory = True
        except Exception as error:
            for call in calls:
                call.answer.set_exception(error)
            return
        if out_of_memory:
            # Outside the handler, where the error would still hold the batch's tensors.
            torch.cuda.empty_cache()
            for call in calls:
                self._answer([call])
            return
        if self._gather_s:
            with self._changed:
                self._expected_back.update(call.ticket for call in calls)
        for call, answer in zip(calls, answers, strict=True):
            call.answer.set_result(answer)
