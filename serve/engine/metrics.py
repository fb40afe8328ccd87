"""What the engine counts. Every instrument is named here, once; where it is kept is a matter of who runs the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


@dataclass(frozen=True)
class Instrument:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_PICTURE_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_ROWS = (1, 2, 4, 8, 16, 32)

REQUESTS = Instrument("counter", "ppcl_requests", "Requests, by how they ended", ("outcome",))
ACCEPTED = Instrument(
    "counter",
    "ppcl_accepted",
    "Requests accepted, by variant, and whether it is smaller than auto would like",
    ("variant", "degraded"),
)
IMAGES = Instrument("counter", "ppcl_images", "Pictures drawn", ("variant",))
QUEUED = Instrument("gauge", "ppcl_pictures_queued", "Pictures that wait to be begun")
RUNNING = Instrument("gauge", "ppcl_pictures_running", "Pictures that are being drawn")
BACKLOG = Instrument("gauge", "ppcl_backlog_seconds", "Device-seconds of what is accepted, at undegraded quality")
BATCH_ROWS = Instrument("histogram", "ppcl_batch_rows", "Rows of a call of the transformer", ("variant",), _ROWS)
STEP_SECONDS = Instrument(
    "histogram", "ppcl_step_seconds", "Seconds of a call of the transformer", ("variant",), _STEP_SECONDS
)
PICTURE_SECONDS = Instrument(
    "histogram", "ppcl_picture_seconds", "Seconds of a picture, by phase", ("phase",), _PICTURE_SECONDS
)

INSTRUMENTS = (REQUESTS, ACCEPTED, IMAGES, QUEUED, RUNNING, BACKLOG, BATCH_ROWS, STEP_SECONDS, PICTURE_SECONDS)


VERBS = {"counter": "inc", "gauge": "set", "histogram": "observe"}


class Metrics:
    """Kept in this process, in a registry of its own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._kept = {}
        for one in INSTRUMENTS:
            more = {"buckets": one.buckets} if one.buckets else {}
            self._kept[one] = kinds[one.kind](one.name, one.description, one.labels, registry=self._registry, **more)

    def record(self, instrument: Instrument, value: float = 1, **labels: str) -> None:
        """Add to a counter, set a gauge, observe a value."""
        kept = self._kept[instrument].labels(**labels) if labels else self._kept[instrument]
        getattr(kept, VERBS[instrument.kind])(value)

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self._registry).decode()
