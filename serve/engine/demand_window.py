"""What was wanted lately, whether it was accepted or not: the demand, which neither refusing nor degrading hides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve.engine.shared_pipeline import Plan


@dataclass(eq=False)
class Wanted:
    """A request: when it came, of `time.monotonic()`; its plan, None for `auto`; calls of the transformer of each picture."""

    time: float
    plan: Plan | None
    pixels: int
    calls: int
    count: int
    refused: bool = False


class Lately:
    """The requests of the last `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._wanted: deque[Wanted] = deque()

    def add(self, wanted: Wanted) -> None:
        self._forget(wanted.time)
        self._wanted.append(wanted)

    def load(self, now: float, cost: Callable[[Wanted], float]) -> float:
        """Device-seconds a second that it takes, where a request takes `cost(wanted)`."""
        self._forget(now)
        return sum(map(cost, self._wanted)) / self.seconds

    def refused(self, now: float, cost: Callable[[Wanted], float]) -> float:
        """Device-seconds of what was refused."""
        self._forget(now)
        return sum(cost(wanted) for wanted in self._wanted if wanted.refused)

    def _forget(self, now: float) -> None:
        while self._wanted and self._wanted[0].time < now - self.seconds:
            self._wanted.popleft()
