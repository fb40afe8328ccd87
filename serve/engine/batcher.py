"""One thread that runs waiting calls in batches, fairly.

A *group* is what can run as one batch. Which group is next is said by `serve.engine.fair_queue`; within a group the calls that wait
longest go first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from serve.engine.fair_queue import Turns


class Cancelled(Exception):
    """The picture is not wanted any more."""


@dataclass(eq=False)
class Member:
    """A picture as batchers see it. `due`: at which time of `time.monotonic()` its next call must run for its deadline to hold."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    due: float | None = None

    def check(self) -> None:
        """Raises `Cancelled` where the picture is not wanted any more."""
        if self.cancelled.is_set():
            raise Cancelled


@dataclass(eq=False)
class _Call:
    group: Hashable
    rows: int
    arguments: Any
    member: Member
    answer: Future = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)

    @property
    def due(self) -> float | None:
        return self.member.due


# Runs calls of one group together; gives one answer each, in their order.
Run = Callable[[Hashable, Sequence[Any]], Sequence[Any]]
# Told of every batch: its group, its rows, its seconds.
Told = Callable[[Hashable, int, float], None]


class Batcher:
    """`most_rows` of a group's batch. `gather`: seconds to wait, after a batch, for the next calls of the pictures that were in
    it, so that they stay together.

    An error of a batch is that of its calls alone. A batch that is too large for the memory is run again call by call.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        most_rows: Callable[[Hashable], int],
        gather: float = 0.0,
        told: Told = lambda group, rows, seconds: None,
    ):
        self._run, self._most_rows, self._gather, self._told = run, most_rows, gather, told
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []
        # Pictures whose last call was answered and whose next is expected.
        self._away: set[Member] = set()
        self._turns = Turns()
        # Rows a group was found to have memory for.
        self._fits: dict[Hashable, int] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def call(self, group: Hashable, rows: int, arguments: Any, member: Member) -> Any:
        """Wait for the answer; raises what the batch raised, or `Cancelled`."""
        member.check()
        call = _Call(group, rows, arguments, member)
        with self._changed:
            if self._closed:
                raise Cancelled
            self._away.discard(member)
            self._turns.came(group)
            self._waiting.append(call)
            self._changed.notify()
        return call.answer.result()

    def leave(self, member: Member) -> None:
        """No further call of a picture is to be expected; those that wait end with `Cancelled` where it was cancelled."""
        with self._changed:
            self._away.discard(member)
            if member.cancelled.is_set():
                for call in [call for call in self._waiting if call.member is member]:
                    self._waiting.remove(call)
                    call.answer.set_exception(Cancelled())
            self._changed.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Waiting calls end with `Cancelled`; a batch that runs ends by itself."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        ended = 0.0
        while (calls := self._next()) is not None:
            # Waiting for pictures of the batch before is a part of what a step takes.
            began = max(ended, min(call.since for call in calls))
            self._answer(calls)
            ended = time.perf_counter()
            seconds = ended - began
            group, rows = calls[0].group, sum(call.rows for call in calls)
            with self._changed:
                self._turns.took(group, seconds / len(calls))
            self._told(group, rows, seconds)

    def _next(self) -> list[_Call] | None:
        """The calls of the next batch; None at the end."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._gather:
                    self._changed.wait_for(lambda: self._closed or not self._away, self._gather)
                    self._away.clear()
                if self._waiting and not self._closed:
                    return self._taken(self._turns.next(self._waiting, time.monotonic()))
            for call in self._waiting:
                call.answer.set_exception(Cancelled())
            self._waiting.clear()
            return None

    def _taken(self, group: Hashable) -> list[_Call]:
        """As many calls of a group as are one batch, which do not wait any more."""
        most = self._most_rows(group)
        most = min(most, self._fits.get(group, most))
        calls, rows = [], 0
        for call in [call for call in self._waiting if call.group == group]:
            if not calls or rows + call.rows <= most:
                calls.append(call)
                rows += call.rows
                self._waiting.remove(call)
        self._turns.begun(group, self._waiting)
        return calls

    def _answer(self, calls: list[_Call]) -> None:
        alone = False
        try:
            answers = self._run(calls[0].group, [call.arguments for call in calls])
        except torch.OutOfMemoryError as error:
            if len(calls) == 1:
                calls[0].answer.set_exception(error)
                return
            # Not again as many at once, at every step.
            self._fits[calls[0].group] = max(1, sum(call.rows for call in calls) // 2)
            alone = True
        except Exception as error:
            for call in calls:
                call.answer.set_exception(error)
            return
        if alone:
            # Out of the handler, where the error would still hold the batch's tensors.
            torch.cuda.empty_cache()
            for call in calls:
                self._answer([call])
            return
        if self._gather:
            with self._changed:
                self._away.update(call.member for call in calls)
        for call, answer in zip(calls, answers, strict=True):
            call.answer.set_result(answer)
