"""Which group's batch is next.

Start-time fair queueing (Goyal, Vin and Cheng 1996) over device-seconds: every picture gets an equal share of the device, however
large its steps are, so a small one is through while a large one does a step; pictures of a batch share what it takes, and a group
that was idle has no credit from it. A call that must run now for its picture's deadline to hold goes before, the most urgent one
first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol


class Waiting(Protocol):
    """A call that waits. `due`: at which time it must run for its picture's deadline to hold; None for no hurry."""

    @property
    def group(self) -> Hashable: ...

    @property
    def due(self) -> float | None: ...


class Turns:
    """Not safe for threads by itself."""

    def __init__(self) -> None:
        # By group, the device-seconds of each of its pictures after which it is its turn; `_now` is that of the batch that ran last.
        self._turn: dict[Hashable, float] = {}
        self._now = 0.0

    def came(self, group: Hashable) -> None:
        """A call of a group waits."""
        self._turn[group] = max(self._turn.get(group, 0.0), self._now)

    def next(self, waiting: Sequence[Waiting], now: float) -> Hashable:
        """The group that is next, of calls in the order they came."""
        urgent = [call for call in waiting if call.due is not None and call.due <= now]
        if urgent:
            return min(urgent, key=lambda call: call.due).group
        # Of equal turns that of the call that waits longest: `min` takes the first.
        return min(waiting, key=lambda call: self._turn[call.group]).group

    def begun(self, group: Hashable, waiting: Iterable[Waiting]) -> None:
        """A batch of the group runs; these calls still wait."""
        self._now = self._turn[group]
        kept = {call.group for call in waiting} | {group}
        self._turn = {known: turn for known, turn in self._turn.items() if known in kept or turn > self._now}

    def took(self, group: Hashable, seconds: float) -> None:
        """What a batch of the group took, for each of its pictures."""
        self._turn[group] = self._turn.get(group, self._now) + seconds
