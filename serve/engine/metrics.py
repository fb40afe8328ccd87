"""The engine's metrics. Every instrument is defined here once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
IMAGES = Instrument("counter", "ppcl_images", "Images generated", ("variant",))
QUEUED = Instrument("gauge", "ppcl_pictures_queued", "Images that wait to be started")
RUNNING = Instrument("gauge", "ppcl_pictures_running", "Images that are being generated")
BACKLOG = Instrument("gauge", "ppcl_backlog_seconds", "Device-seconds of what is accepted, at undegraded quality")
BATCH_ROWS = Instrument("histogram", "ppcl_batch_rows", "Rows of a call of the transformer", ("variant",), _ROWS)
STEP_SECONDS = Instrument(
    "histogram", "ppcl_step_seconds", "Seconds of a call of the transformer", ("variant",), _STEP_SECONDS
)
PICTURE_SECONDS = Instrument(
    "histogram", "ppcl_picture_seconds", "Seconds of an image, by phase", ("phase",), _PICTURE_SECONDS
)

INSTRUMENTS = (REQUESTS, ACCEPTED, IMAGES, QUEUED, RUNNING, BACKLOG, BATCH_ROWS, STEP_SECONDS, PICTURE_SECONDS)


VERBS = {"counter": "inc", "gauge": "set", "histogram": "observe"}


class Metrics:
    """Metrics of this process, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._metrics: dict[Instrument, Any] = {}
        for instrument in INSTRUMENTS:
            options: dict[str, Any] = {"buckets": instrument.buckets} if instrument.buckets else {}
            self._metrics[instrument] = kinds[instrument.kind](
                instrument.name, instrument.description, instrument.labels, registry=self._registry, **options
            )

    def record(self, instrument: Instrument, value: float = 1, **labels: str) -> None:
        """Add to a counter, set a gauge, observe a value."""
        metric = self._metrics[instrument].labels(**labels) if labels else self._metrics[instrument]
        getattr(metric, VERBS[instrument.kind])(value)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()
