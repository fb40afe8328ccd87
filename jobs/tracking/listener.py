"""Listens to a job's events, and logs what they say to the trackers of its configuration."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from jobs.events import Event
from jobs.progress import Reporter
from jobs.tracking.metrics import losses, parameters, recorded_losses, stage_metrics
from jobs.tracking.mlflow import MlflowTracker
from jobs.tracking.sender import Entry, Sender, close
from jobs.tracking.tensorboard import TensorBoardTracker
from jobs.tracking.tracker import Outcome, Run, Tracker
from jobs.tracking.wandb import WandbTracker
from ppcl.config.schema import Config
from ppcl.report.page import REPORT
from ppcl.storage.manifest import Artifacts, write_atomically
from ppcl.storage.mirror import upload
from ppcl.storage.results import read_results

RUN = "tracking.json"  # beside the manifest: the id that a resumed job goes on with
_OUTCOMES: dict[str, Outcome] = {"job_done": "finished", "job_failed": "failed", "job_stopped": "killed"}


def trackers_of(config: Config) -> list[Tracker]:
    """The trackers of a configuration; nothing is started. Raises `UserError` for one that cannot work."""
    settings = config.tracking
    trackers: list[Tracker] = []
    if settings.tensorboard is not None:
        trackers.append(TensorBoardTracker(settings.tensorboard))
    if settings.mlflow is not None:
        trackers.append(MlflowTracker(settings.mlflow))
    if settings.wandb is not None:
        trackers.append(WandbTracker(settings.wandb))
    return trackers


@contextmanager
def tracked(trackers: list[Tracker], config: Config, artifacts: Artifacts, reporter: Reporter) -> Iterator[None]:
    """Log what the reporter reports within a `with` block, and how the job ends. Called by who holds the job's lock."""
    if not trackers:
        yield
        return
    run = Run(_run_id(artifacts), _name(artifacts.place), parameters(config), artifacts.root)
    senders = [Sender(tracker, run, reporter.say) for tracker in trackers]
    listener = _Listener(artifacts, senders)
    reporter.listeners.append(listener)
    try:
        yield
    finally:
        reporter.listeners.remove(listener)
        close(senders)


def _name(place: str) -> str:
    """What trackers show: the last part of the output's location."""
    return place.rstrip("/").rpartition("/")[2]


def _run_id(artifacts: Artifacts) -> str:
    """The id of the job's run: the one it began with, where it is resumed."""
    try:
        return json.loads(artifacts.text(RUN))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    run_id = uuid.uuid4().hex[:8]
    write_atomically(artifacts.path(RUN), json.dumps({"id": run_id}))
    upload(artifacts.path(RUN))
    return run_id


class _Listener:
    """Turns events into entries. What is read from the job's folder is read by the trackers' threads."""

    def __init__(self, artifacts: Artifacts, senders: list[Sender]):
        self._artifacts, self._senders = artifacts, senders
        self._last: tuple[str | None, int | None] = (None, None)
        self._complete: list[str] = []

    def __call__(self, event: Event, values: Mapping[str, float]) -> None:
        time = datetime.fromisoformat(event.time).timestamp()
        if (metrics := losses(event, values)) and self._last != (event.stage, event.done):
            self._last = (event.stage, event.done)
            self._log(lambda tracker: tracker.log_metrics(metrics, time, event.done))
        elif event.kind in ("stage_done", "stage_skipped") and event.stage:
            self._complete.append(event.stage)
            if event.kind == "stage_done":
                self._log(self._losses_after(event.stage, time))
            self._log(self._results_of([event.stage], time))
        elif outcome := _OUTCOMES.get(event.kind):
            self._log(self._end(outcome, time), important=True)

    def _log(self, entry: Entry, important: bool = False) -> None:
        for sender in self._senders:
            sender.put(entry, important)

    def _end(self, outcome: Outcome, time: float) -> Entry:
        """All that was found, once more: a tracker that was away meanwhile has it in the end."""
        log_results = self._results_of(list(self._complete), time)

        def entry(tracker: Tracker) -> None:
            try:
                log_results(tracker)
                if outcome == "finished":
                    tracker.log_artifact(self._artifacts.path(REPORT))
            finally:
                tracker.finish(outcome)

        return entry

    def _losses_after(self, stage: str, time: float) -> Entry:
        """The losses of a stage since its last progress: a short training may end before it is asked for any."""
        last = self._last[1] or 0 if self._last[0] == stage else 0

        def entry(tracker: Tracker) -> None:
            for step, metrics in recorded_losses(read_results(self._artifacts.place), stage, last).items():
                tracker.log_metrics(metrics, time, step)

        return entry

    def _results_of(self, stages: list[str], time: float) -> Entry:
        """What complete stages have found."""

        def entry(tracker: Tracker) -> None:
            results = read_results(self._artifacts.place)
            metrics: dict[str, float] = {}
            for stage in stages:
                metrics |= stage_metrics(results, stage)
            tracker.log_metrics(metrics, time)

        return entry
