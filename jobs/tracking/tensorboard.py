"""TensorBoard: event files in a folder of the run. It has no place for the report.

The package is optional, so only who uses it imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import time as now
from time import time_ns
from typing import Any

from jobs.tracking.tracker import Outcome, Run, needs


class TensorBoardTracker:
    """Writes to `folder/<name of the run>`; a resumed job adds a file there."""

    def __init__(self, folder: Path):
        """Raises `UserError` where the package is missing."""
        if find_spec("tensorboardX") is None:
            raise needs("tracking.tensorboard", "tensorboardX")
        self.folder = folder.absolute()
        self.name = f"TensorBoard's files in {self.folder}"

    def start(self, run: Run) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter

        folder = self.folder / f"{run.name}-{run.id}"
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, in which the time is in seconds alone.
        # Not the `SummaryWriter`: its thread would end at a full disk, with a traceback and without a word to us.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time_ns()}")
        rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in run.parameters.items()]
        self._write(summary.text("configuration", "\n".join(["| key | value |", "|---|---|", *rows])))

    def log_metrics(self, metrics: Mapping[str, float], time: float, step: int | None = None) -> None:
        from tensorboardX import summary

        for name, value in metrics.items():
            self._write(summary.scalar(name, value), time, step or 0, flush=False)
        self._writer.flush()

    def log_artifact(self, path: Path) -> None:
        pass

    def finish(self, outcome: Outcome) -> None:
        from tensorboardX import summary

        self._write(summary.text("outcome", outcome))
        self._writer.close()

    def _write(self, content: Any, time: float | None = None, step: int = 0, flush: bool = True) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(summary=content, wall_time=now() if time is None else time, step=step))
        if flush:
            self._writer.flush()
