"""How far a command is: a live bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.cli.shared import out

_SECONDS = 10.0


class ProgressLines:
    """Called with what is done and what there is. `what`: is counted, such as `images drawn`."""

    def __init__(self, what: str):
        self.what = what
        self.started = self.said = time.monotonic()
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> ProgressLines:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)
        now = time.monotonic()
        if out.is_terminal or now - self.said < _SECONDS:
            return
        self.said = now
        left = (now - self.started) * (total - done) / max(1, done)
        out.print(f"{done} of {total} {self.what}, {left:.0f} s left", highlight=False, markup=False)
