"""Progress of long work: a live line on a terminal, occasional lines elsewhere, and always a log file and events."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from jobs.events import PRINT_EVENTS, Event, event_line
from ppcl.storage.manifest import EVENTS

# Seconds between two lines of the same stage in the log, with or without news.
_LINE_EVERY = 10.0
# Seconds between looks at the clock.
_TICK = 1.0
# Losses and the pace are exponential means over about so many updates.
_AVERAGED_UPDATES = 20
_WEIGHT = 2 / (_AVERAGED_UPDATES + 1)
# What a line says of a phase or of a stage, characters at most.
_LONGEST_TEXT = 160


class Update(Protocol):
    """Called by a stage as often as something is done."""

    def __call__(
        self,
        done: int,
        total: int | None = None,
        values: Mapping[str, float] | None = None,
        phase: str | None = None,
    ) -> None:
        """`done` of `total` of what the `phase` counts; `values`: losses by name."""
        ...


def duration(seconds: float) -> str:
    """`75.2` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class StageProgress:
    """How far a stage is in its present phase, with a mean loss and the time left from a smoothed pace.

    The time left is known from the second update of a phase on: workers take long to start, and say nothing of it.
    """

    def __init__(self, name: str, index: int, stages: int, started_at: float):
        self.name, self.index, self.stages, self.started_at = name, index, stages, started_at
        self.phase: str | None = None
        self.done: int | None = None
        self.total: int | None = None
        self.loss: float | None = None
        self.values: dict[str, float] = {}
        self._updated_at = started_at
        # Means over updates of the seconds and of what was done in them.
        self._seconds, self._steps = 0.0, 0.0

    def update(
        self, now: float, done: int, total: int | None, values: Mapping[str, float] | None, phase: str | None
    ) -> None:
        if phase != self.phase or self.done is None:
            self.phase, self.loss, self.values, self._seconds, self._steps = phase, None, {}, 0.0, 0.0
            self._updated_at = now
        elif done > self.done:
            self._seconds = _mean(self._seconds or None, now - self._updated_at)
            self._steps = _mean(self._steps or None, done - self.done)
            self._updated_at = now
        self.done, self.total = done, total
        if values:
            self.values.update(values)
            self.loss = _mean(self.loss, sum(values.values()) / len(values))

    @property
    def seconds_left(self) -> float | None:
        if not self.total or not self._steps or self.done is None:
            return None
        return self._seconds / self._steps * max(self.total - self.done, 0)

    @property
    def title(self) -> str:
        return f"{self.name}: {_shortened(self.phase)}" if self.phase else f"{self.name}:"

    def line(self, now: float) -> str:
        """All that is known, in one line."""
        if self.done is None:
            return f"{self.name}: starting workers, {duration(now - self.started_at)}"
        if not self.done and not self.total:
            return self.title
        count = f"{self.done} of {self.total}" if self.total else str(self.done)
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        loss = "" if self.loss is None else f", mean loss {self.loss:.4f}"
        return f"{self.title} {count}{left}{loss}"


class Listener(Protocol):
    """Hears every event of a job; `values`: the last losses by name, where it is one of progress. It must not wait."""

    def __call__(self, event: Event, values: Mapping[str, float]) -> None: ...


class Reporter:
    """Reports the running stage, its progress and the time left: on the console, in `log`, and in `events.jsonl`.

    Where the environment variable `PRINT_EVENTS` is set, the console gets the events too. `listeners` hear them, too.
    """

    def __init__(self, console: Console, log: Path, line_every: float = _LINE_EVERY):
        self.console = console
        self.log = log
        self.events = log.with_name(EVENTS)
        self.line_every = line_every
        self.listeners: list[Listener] = []
        self._print_events = os.environ.get(PRINT_EVENTS) == "1"
        # The ticker of a stage writes beside the stage itself.
        self._lock = threading.RLock()
        log.parent.mkdir(parents=True, exist_ok=True)

    def say(self, message: str) -> None:
        with self._lock:
            self._print(message)
            self._write(message)
            self._emit(Event("message", _now(), message=message))

    def skipped(self, name: str, index: int = 1, stages: int = 1) -> None:
        """A stage whose result is there and intact."""
        with self._lock:
            self._print(f"{name}: complete, skipped")
            self._write(f"{name}: complete, skipped")
            self._emit(Event("stage_skipped", _now(), stage=name, index=index, stages=stages))

    def job_done(self, report: str) -> None:
        """The job's last event; it says nothing on the console."""
        self._emit(Event("job_done", _now(), message=report))

    def job_failed(self, error: str) -> None:
        """The job's last event; it says nothing on the console."""
        self._emit(Event("job_failed", _now(), message=error))

    def job_stopped(self) -> None:
        """The job's last event where its user ended it; it says nothing on the console."""
        self._emit(Event("job_stopped", _now()))

    @contextmanager
    def stage(self, name: str, what: str, index: int = 1, stages: int = 1) -> Iterator[Update]:
        """Progress of one stage, number `index` of `stages`; the context's value takes its updates."""
        progress = StageProgress(name, index, stages, time.monotonic())
        beginning = f"{name}: {_shortened(what)} (stage {index} of {stages})"
        with self._lock:
            self._write(beginning)
            self._print_line(beginning)
            self._emit(Event("stage_started", _now(), stage=name, index=index, stages=stages, message=what))
        with self._live_line(progress) as show:
            yield self._update_of(progress, show)
        self._finish(progress)

    def _update_of(self, progress: StageProgress, show: _Show) -> Update:
        def update(
            done: int,
            total: int | None = None,
            values: Mapping[str, float] | None = None,
            phase: str | None = None,
        ) -> None:
            with self._lock:
                # The first one says where a stage goes on that was interrupted.
                first, new_phase = progress.done is None, phase != progress.phase
                if new_phase and progress.loss is not None:
                    # The last losses of the phase, which may have come since the last line.
                    self._emit_progress(progress)
                progress.update(time.monotonic(), done, total, values, phase)
                show(force=first or new_phase)

        return update

    @contextmanager
    def _live_line(self, progress: StageProgress) -> Iterator[_Show]:
        """Show the progress at updates and, where none comes, as time goes on."""
        bar = _bar(self.console, progress)
        task = bar.add_task(progress.name, total=1, completed=0, words="")
        last = time.monotonic()

        def show(force: bool = False) -> None:
            nonlocal last
            now = time.monotonic()
            bar.update(task, completed=progress.done or 0, total=progress.total, words=progress.line(now))
            if force or now - last >= self.line_every:
                last = now
                self._write(progress.line(now))
                self._print_line(progress.line(now))
                self._emit_progress(progress)

        finished = threading.Event()

        def tick() -> None:
            while not finished.wait(min(_TICK, self.line_every)):
                with self._lock:
                    show()

        ticker = threading.Thread(target=tick, name=f"progress of {progress.name}", daemon=True)
        with bar:
            ticker.start()
            try:
                yield show
            finally:
                finished.set()
                ticker.join()

    def _finish(self, progress: StageProgress) -> None:
        with self._lock:
            line = f"{progress.name}: done in {duration(time.monotonic() - progress.started_at)}"
            self._print(line)
            self._write(line)
            if progress.loss is not None:
                self._emit_progress(progress)
            done = Event("stage_done", _now(), progress.name, progress.index, progress.stages, loss=progress.loss)
            self._emit(done)

    def _emit_progress(self, progress: StageProgress) -> None:
        event = Event(
            "progress",
            _now(),
            stage=progress.name,
            index=progress.index,
            stages=progress.stages,
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            seconds_left=progress.seconds_left,
            loss=progress.loss,
        )
        self._emit(event, progress.values)

    def _emit(self, event: Event, values: Mapping[str, float] | None = None) -> None:
        with self._lock:
            with open(self.events, "a", encoding="utf-8") as file:
                file.write(json.dumps(event.to_json()) + "\n")
            if self._print_events:
                self._print(event_line(event))
            for listener in self.listeners:
                listener(event, dict(values or {}))

    def _print_line(self, line: str) -> None:
        """A line of a stage, where there is no live line."""
        if not self.console.is_terminal:
            self._print(line)

    def _print(self, message: str) -> None:
        """One line, however long."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _write(self, message: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")


class _Show(Protocol):
    """Shows a stage's progress; `force`: also where the last line is not long ago."""

    def __call__(self, force: bool = False) -> None: ...


def _bar(console: Console, progress: StageProgress) -> Progress:
    """The live line of a terminal: it is redrawn every second, and nowhere else."""
    return Progress(
        TextColumn(f"stage {progress.index} of {progress.stages}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _mean(mean: float | None, value: float) -> float:
    """The exponential mean with one more value; the first is its own."""
    return value if mean is None else mean + _WEIGHT * (value - mean)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
