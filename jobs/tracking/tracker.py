"""What every tracker can do. Each of them is one module beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ppcl.errors import UserError

Outcome = Literal["finished", "failed", "killed"]


@dataclass(frozen=True)
class Run:
    """A job as a tracker knows it. `id` stays the same when the job is resumed; `folder` is for a tracker's own files.

    `parameters`: the configuration's keys, dotted, with their values.
    """

    id: str
    name: str
    parameters: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """Called from one thread, `start` first. Any exception means that what was given is not logged.

    `name`: what a user calls it. Metrics have names such as `students/mean_loss`; without a `step` they are of the
    whole run. `time`: seconds since 1970.
    """

    name: str

    def start(self, run: Run) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], time: float, step: int | None = None) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def finish(self, outcome: Outcome) -> None: ...


def needs(key: str, package: str, extra: str = "ppcl[tracking]") -> UserError:
    """The error of a tracker whose package is missing."""
    return UserError(
        f"{key} needs the package {package}, which is not installed; pip install '{extra}', or remove {key}"
    )
