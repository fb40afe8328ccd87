"""Whether requests are still let in, and how many are inside: how a server ends without losing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.protocol import Refused


class Door:
    """Of one event loop. `open`: set to False, it refuses what comes from then on."""

    def __init__(self) -> None:
        self.open, self.under_way = True, 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around a request. Raises `Refused` with 503 where the door is shut."""
        if not self.open:
            raise Refused(
                503, "server_error", "the server is shutting down; try again soon", "shutting_down", retry_after=1.0
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
