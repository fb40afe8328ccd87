"""How training reports its progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressReport(Protocol):
    """Called after every step; the receiver decides what is shown."""

    def __call__(self, done: int, total: int, values: Mapping[str, float], /, phase: str | None = None) -> None:
        """`done` of `total` steps, or of the units that `phase` counts; `values`: the last losses by name."""
        ...


def no_report(done: int, total: int, values: Mapping[str, float], /, phase: str | None = None) -> None:
    """Ignore the progress."""
