"""How far a command is: a live bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.cli.shared import out

_SECONDS = 10.0


class ProgressLines:
    """Called with what is done and what there is. `what` is counted, such as `images drawn`; with `gb`, in bytes."""

    def __init__(self, what: str, gb: bool = False):
        self.what, self.gb = what, gb
        self.started = self.said = time.monotonic()
        count = DownloadColumn() if gb else MofNCompleteColumn()
        columns = TextColumn(what), BarColumn(), count, TimeRemainingColumn()
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
        how_far = f"{done / 1e9:.3g} of {total / 1e9:.3g} GB" if self.gb else f"{done} of {total}"
        out.print(f"{how_far} {self.what}, {left:.0f} s left", highlight=False, markup=False)
