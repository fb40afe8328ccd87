"""Progress of long work: a bar on a terminal, a line now and then everywhere else, and always a log file.

What the lines say can be read back from them, which is how the state of a job on another machine is known.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Told:
    """What a job has said last: its stage, how far it is in it, `seconds_left` of it, the `loss`; where the `report` is, or the
    `error` it ended with. None where it has not said so."""

    stage: str | None = None
    done: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    complete: tuple[str, ...] = ()
    report: str | None = None
    error: str | None = None


STAGES = ("calibration", "probes", "detection", "students", "variants", "finetuning", "evaluation", "ablation")
_STAGE = re.compile(rf"({'|'.join(STAGES)}): (.*)")
_PROGRESS = re.compile(r"(\d+)(?: of (\d+))?(?:, (?:(\d+) min )?(\d+) s left)?(?:, mean loss (\S+))?")


def told_by(log: str) -> Told:
    """What the lines of a `Reporter`, and the error behind them, say."""
    told = Told()
    for line in log.splitlines():
        if found := _STAGE.fullmatch(line):
            told = _after(told, *found.groups())
        elif line.startswith("report: "):
            told = Told(complete=told.complete, report=line.removeprefix("report: "))
        elif line.startswith("ppcl: "):
            told = replace(told, error=line.removeprefix("ppcl: "))
    return told


def _after(told: Told, stage: str, said: str) -> Told:
    if said.startswith("done in ") or said == "complete, skipped":
        return Told(stage, complete=(*told.complete, stage), loss=told.loss)
    if found := _PROGRESS.fullmatch(said):
        done, total, minutes, seconds, loss = found.groups()
        left = None if seconds is None else 60.0 * int(minutes or 0) + int(seconds)
        return Told(stage, int(done), total and int(total), left, float(loss) if loss else None, told.complete)
    # Its beginning, or a word about it.
    return told if told.stage == stage else Told(stage, complete=told.complete)


class Reporter:
    """Tells what runs, how far it is and how long it still takes, on the console and in `log`."""

    def __init__(self, console: Console, log: Path):
        self.console = console
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)

    def say(self, message: str) -> None:
        self._print(message)
        self._write(message)

    def _print(self, message: str) -> None:
        """One line, however long: it may be read back."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

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
            self._print(f"{name}: {what}")
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
                    self._print(line)

        with bar:
            yield update
        self.say(f"{name}: done in {duration(time.monotonic() - begun)}")


def _left(first: tuple[int, float], done: int, total: int | None, now: float) -> float | None:
    """Seconds still to go, from the pace since the first sign of work: workers take long to start, and say nothing of it."""
    before, at = first
    return (now - at) / (done - before) * (total - done) if total and done > before else None


def _mean(values: dict[str, float] | None) -> str:
    return f"mean loss {sum(values.values()) / len(values):.4f}" if values else ""
