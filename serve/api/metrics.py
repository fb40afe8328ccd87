"""HTTP metrics for Prometheus: requests by route and status, their duration, and requests in flight."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class HttpMetrics:
    """A registry of its own, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "ppcl", "subsystem": "http", "registry": self.registry}
        self._requests = Counter("requests", "Requests answered", ("method", "route", "status"), **common)
        self._seconds = Histogram(
            "request_seconds", "Seconds until an answer was complete", ("route",), buckets=_SECONDS, **common
        )
        self.running = Gauge("requests_running", "Requests not yet answered", **common)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        # Methods that clients invent must not create time series.
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> str:
        return generate_latest(self.registry).decode()
