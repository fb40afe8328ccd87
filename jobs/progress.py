"""Progress of long work: a bar on a terminal, a line now and then everywhere else, and always a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Between two lines about the same stage where there is no terminal, seconds.
_LINE_EVERY = 10.0

Update = Callable[..., None]


def duration(seconds: float) -> str:
    """`75.2` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Reporter:
    """Tells what runs, how far it is and how long it still takes, on the console and in `log`."""

    def __init__(self, console: Console, log: Path):
        self.console = console
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)
        self._write(message)

    def _write(self, message: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[Update]:
        """Progress of one stage; the context's value is `update(done, total=None, values=None)`."""
        begun = time.monotonic()
        last = begun
        first: tuple[int, float] | None = None
        bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._write(f"{name}: {what}")
        if not self.console.is_terminal:
            self.console.print(f"{name}: {what}", markup=False, highlight=False)
        task = bar.add_task(name, total=1, completed=0, values="")

        def update(done: int, total: int | None = None, values: dict[str, float] | None = None) -> None:
            nonlocal first, last
            words = _mean(values)
            bar.update(task, completed=done, total=total or max(done, 1), values=words)
            now = time.monotonic()
            first = first or (done, now)
            if now - last >= _LINE_EVERY:
                last = now
                left = f", {duration(seconds)} left" if (seconds := _left(first, done, total, now)) else ""
                line = f"{name}: {done}{f' of {total}' if total else ''}{left}{f', {words}' if words else ''}"
                self._write(line)
                if not self.console.is_terminal:
                    self.console.print(line, markup=False, highlight=False)

        with bar:
            yield update
        self.say(f"{name}: done in {duration(time.monotonic() - begun)}")


def _left(first: tuple[int, float], done: int, total: int | None, now: float) -> float | None:
    """Seconds still to go, from the pace since the first sign of work: workers take long to start, and say nothing of it."""
    before, at = first
    return (now - at) / (done - before) * (total - done) if total and done > before else None


def _mean(values: dict[str, float] | None) -> str:
    return f"mean loss {sum(values.values()) / len(values):.4f}" if values else ""
