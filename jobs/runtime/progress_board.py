"""Where the ranks of a worker group leave their progress, and how they do.

A module of its own, without torch: the board is an actor in a process that imports what this module imports.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

# Seconds between two reports of a rank.
_UPDATE_EVERY = 1.0


class RankReporter:
    """Sends what a rank reports: how far it is, as `report(done, total, values)`, and notes for the user at the end."""

    def __init__(self, board: Any):
        self._board, self._last = board, 0.0

    def __call__(self, done: int, total: int, values: Mapping[str, float], phase: str | None = None) -> None:
        if time.monotonic() - self._last > _UPDATE_EVERY or done == total:
            self._last = time.monotonic()
            self._board.update.remote(done, total, dict(values), phase)

    def note(self, sentence: str) -> None:
        """Several ranks may have the same to say."""
        ray.get(self._board.note.remote(sentence))


class ProgressBoard:
    """Where ranks leave their progress and, if they refuse their input, why."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0
        self.values: dict[str, float] = {}
        self.refusal: str | None = None
        self.phase: str | None = None
        self.notes: dict[str, None] = {}

    def update(self, done: int, total: int, values: dict[str, float], phase: str | None) -> None:
        if phase != self.phase:
            # The losses of one phase say nothing of the next.
            self.done, self.values, self.phase = 0, {}, phase
        # Ranks report one after the other: the one that is furthest on counts.
        self.done, self.total = max(done, self.done), total
        self.values.update(values)

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def noted(self) -> list[str]:
        return list(self.notes)

    def refuse(self, sentence: str) -> None:
        self.refusal = self.refusal or sentence

    def read(self) -> tuple[int, int, dict[str, float], str | None, str | None]:
        return self.done, self.total, dict(self.values), self.phase, self.refusal
