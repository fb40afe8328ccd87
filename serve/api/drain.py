"""Drain gate: counts requests in flight and stops admitting new ones, so that a server ends without losing any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.protocol import Refused


class DrainGate:
    """Belongs to one event loop. Set `open` to False to refuse new requests. `in_flight`: requests not yet answered."""

    def __init__(self) -> None:
        self.open, self.in_flight = True, 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as in flight inside the block. Raises `Refused` with 503 once the gate is closed."""
        if not self.open:
            raise Refused(
                503, "server_error", "the server is shutting down; try again soon", "shutting_down", retry_after=1.0
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
