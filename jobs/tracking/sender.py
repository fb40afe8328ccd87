"""Gives a tracker what is logged, from a thread of its own, and bears with it when it fails."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence

from jobs.tracking.tracker import Run, Tracker

Entry = Callable[[Tracker], None]

# Entries that may wait; beyond that the oldest are dropped.
_WAITING = 1000
# Seconds for which nothing is tried after a failure, and for which the end of a job waits for what is not logged yet.
_PAUSE, _END = 30.0, 15.0

_CREDENTIALS = re.compile(r"://[^/@\s]*@")
_LONGEST_REASON = 200


def close(senders: Sequence[Sender]) -> None:
    """Wait for the last entries of all, a short time; says where they were not logged."""
    for sender in senders:
        sender._put(None)
    deadline = time.monotonic() + _END
    for sender in senders:
        sender._close(deadline)


class Sender:
    """Logs entries in their order. Where the tracker fails, `say` is told once, and entries are lost until it works."""

    def __init__(self, tracker: Tracker, run: Run, say: Callable[[str], None]):
        self._tracker, self._run, self._say = tracker, run, say
        self._entries: queue.Queue[tuple[Entry, bool] | None] = queue.Queue(_WAITING)
        self._started = self._told = False
        self._next_try = 0.0
        self._thread = threading.Thread(target=self._work, name=f"tracking: {tracker.name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry, important: bool = False) -> None:
        """Never waits. An `important` entry is tried soon after a failure, too."""
        self._put((entry, important))

    def _close(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say(
                f"tracking: {self._tracker.name} has not taken the last of the job within {_END:.0f} s; it is left out"
            )

    def _put(self, item: tuple[Entry, bool] | None) -> None:
        while True:
            try:
                return self._entries.put_nowait(item)
            except queue.Full:
                try:
                    self._entries.get_nowait()
                except queue.Empty:
                    continue

    def _work(self) -> None:
        while (item := self._entries.get()) is not None:
            entry, important = item
            if not important and time.monotonic() < self._next_try:
                continue
            try:
                if not self._started:
                    self._tracker.start(self._run)
                    self._started = True
                entry(self._tracker)
            except Exception as error:
                self._next_try = time.monotonic() + _PAUSE
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._say(f"tracking: {self._tracker.name} does not work ({_reason(error)}); the job goes on")


def _reason(error: Exception) -> str:
    """One line, without the credentials that a URL may hold."""
    words = " ".join(str(error).split()) or type(error).__name__
    return _CREDENTIALS.sub("://", words)[:_LONGEST_REASON]
