"""What happens in a job, as data: one JSON object a line in `events.jsonl` beside the job's log.

Where the environment says so, a job's driver also prints each event as a line `ppcl-event {json}`: that is how the
progress of a job on a cluster is read through Ray's job API, which gives nothing but what the driver prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

# Where it is set to 1, the driver prints its events.
PRINT_EVENTS = "PPCL_PRINT_EVENTS"
_PREFIX = "ppcl-event "

Kind = Literal[
    "stage_started", "progress", "message", "stage_skipped", "stage_done", "job_done", "job_failed", "job_stopped"
]


@dataclass(frozen=True)
class Event:
    """One thing that happened. What does not apply to its kind is None.

    `time`: ISO 8601, with the offset from UTC. `stage` is number `index` of the job's `stages`. `done` of `total` is
    what the `phase` of the stage counts; `seconds_left` are those of the phase. `loss`: a running mean. `message`: what
    is said, the report's place where the job is done, the error where it failed.
    """

    kind: Kind
    time: str
    stage: str | None = None
    index: int | None = None
    stages: int | None = None
    phase: str | None = None
    done: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that apply; a loss that is no number is left out, which JSON cannot say."""
        values = asdict(self)
        return {
            name: value
            for name, value in values.items()
            if value is not None and not (isinstance(value, float) and not math.isfinite(value))
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Event:
        """Fields of a later version are left out. Raises `ValueError` for what is no event."""
        if not isinstance(values, dict) or values.get("kind") not in get_args(Kind) or "time" not in values:
            raise ValueError(f"no event: {values!r}")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class JobProgress:
    """How far a job is: its stage and how far it is in it, `complete` stages, the `report` or the `error` at its end.

    The other fields are those of `Event`; None where nothing is known.
    """

    stage: str | None = None
    index: int | None = None
    stages: int | None = None
    phase: str | None = None
    done: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    complete: tuple[str, ...] = ()
    report: str | None = None
    error: str | None = None

    def after(self, event: Event) -> JobProgress:
        """The progress once `event` has happened."""
        if event.kind in ("message", "job_stopped"):
            return self
        if event.kind == "job_done":
            return JobProgress(complete=self.complete, report=event.message)
        if event.kind == "job_failed":
            return replace(self, error=event.message)
        progress = JobProgress(event.stage, event.index, event.stages, complete=self.complete)
        if event.kind == "progress":
            return replace(
                progress,
                phase=event.phase,
                done=event.done,
                total=event.total,
                seconds_left=event.seconds_left,
                loss=event.loss,
            )
        if event.kind in ("stage_skipped", "stage_done") and event.stage:
            return replace(progress, complete=(*self.complete, event.stage), loss=event.loss)
        return progress


def progress_after(events: Iterable[Event]) -> JobProgress:
    """How far a job is by what has happened in it, the oldest first."""
    progress = JobProgress()
    for event in events:
        progress = progress.after(event)
    return progress


def event_line(event: Event) -> str:
    """The line that a driver prints for an event."""
    return f"{_PREFIX}{json.dumps(event.to_json())}"


def printed_events(log: str) -> list[Event]:
    """The events among the lines of a driver's log; a line that was cut off is none."""
    events = []
    for line in log.splitlines():
        if line.startswith(_PREFIX):
            try:
                events.append(Event.from_json(json.loads(line.removeprefix(_PREFIX))))
            except ValueError:
                continue
    return events


def without_events(log: str) -> str:
    """A driver's log as people read it."""
    return "".join(line for line in log.splitlines(keepends=True) if not line.startswith(_PREFIX))


class EventFilter:
    """Takes a driver's log in pieces, and gives what people read of it: whole lines, without those of events."""

    def __init__(self) -> None:
        self._incomplete = ""

    def __call__(self, piece: str) -> str:
        lines, newline, self._incomplete = (self._incomplete + piece).rpartition("\n")
        return without_events(lines + newline)

    def rest(self) -> str:
        """The log's last line, where it does not end in a newline."""
        rest, self._incomplete = self._incomplete, ""
        return without_events(rest)
