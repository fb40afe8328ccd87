"""How training tells how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ProgressReport(Protocol):
    """Called as often as something is done; who takes it decides what is shown."""

    def __call__(self, done: int, total: int, values: Mapping[str, float], /, phase: str | None = None) -> None:
        """`done` of `total` steps, or of what the phase counts; `values`: the last losses by name."""
        ...
