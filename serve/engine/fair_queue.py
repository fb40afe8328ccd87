"""Fair queue: decides which group's batch runs next.

Start-time fair queueing (Goyal, Vin and Cheng 1996) over device-seconds. Every image gets an equal share of the device,
however large its steps are, so a small image finishes while a large one does one step. Images of one batch share the
batch's cost. A group that was idle earns no credit. A call whose deadline requires it to run now goes first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol


class WaitingCall(Protocol):
    """A call in the queue. `due`: the latest start that meets its deadline; None without a deadline."""

    @property
    def group(self) -> Hashable: ...

    @property
    def due(self) -> float | None: ...


class FairQueue:
    """Virtual start times by group. Not thread-safe: the owner holds a lock."""

    def __init__(self) -> None:
        # Device-seconds charged to each image of a group. The group with the lowest value runs next.
        self._virtual_times: dict[Hashable, float] = {}
        # The virtual time of the batch that started last.
        self._virtual_now = 0.0

    def arrive(self, group: Hashable) -> None:
        """Register a call of a group."""
        self._virtual_times[group] = max(self._virtual_times.get(group, 0.0), self._virtual_now)

    def next_group(self, waiting: Sequence[WaitingCall], now: float) -> Hashable:
        """Return the group to run next. `waiting`: at least one call, in order of arrival."""
        urgent = [(call.due, number) for number, call in enumerate(waiting) if call.due is not None and call.due <= now]
        if urgent:
            _, number = min(urgent)
            return waiting[number].group
        # `min` takes the first of equal ones, which has waited longest.
        return min(waiting, key=lambda call: self._virtual_times[call.group]).group

    def start_batch(self, group: Hashable, waiting: Iterable[WaitingCall]) -> None:
        """Advance the virtual clock to a batch that starts. `waiting`: the calls left in the queue."""
        self._virtual_now = self._virtual_times[group]
        active = {call.group for call in waiting} | {group}
        self._virtual_times = {
            known: time for known, time in self._virtual_times.items() if known in active or time > self._virtual_now
        }

    def charge(self, group: Hashable, seconds: float) -> None:
        """Charge a group the device-seconds that its batch took for each of its images."""
        self._virtual_times[group] = self._virtual_times.get(group, self._virtual_now) + seconds
