"""Sliding window of offered load, rejected and degraded requests included."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ppcl.replacements import Plan


@dataclass(eq=False)
class OfferedRequest:
    """A request that arrived. `time`: its arrival by `time.monotonic()`; `plan`: None for `auto`.

    `calls`: calls of the transformer for each of its `count` images.
    """

    time: float
    plan: Plan | None
    pixels: int
    calls: int
    count: int
    refused: bool = False


class DemandWindow:
    """The requests of the last `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._requests: deque[OfferedRequest] = deque()

    def add(self, request: OfferedRequest) -> None:
        self._expire(request.time)
        self._requests.append(request)

    def load(self, now: float, cost: Callable[[OfferedRequest], float]) -> float:
        """Return the offered load as a share of one device. `cost(request)`: device-seconds of a request."""
        self._expire(now)
        return sum(map(cost, self._requests)) / self.seconds

    def refused(self, now: float, cost: Callable[[OfferedRequest], float]) -> float:
        """Return the device-seconds of refused requests."""
        self._expire(now)
        return sum(cost(request) for request in self._requests if request.refused)

    def _expire(self, now: float) -> None:
        while self._requests and self._requests[0].time < now - self.seconds:
            self._requests.popleft()
