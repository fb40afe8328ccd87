"""Server-sent events. An error after the first event is sent as an event too."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api import errors
from serve.api.client_disconnect import cancel_on_disconnect
from serve.logging import log_failure
from serve.protocol import Refused


class EventStream(Response):
    """Sends what `events` yields until it ends, fails, or the client disconnects, and then closes it.

    `source`, the engine's generator, is closed too: closing `events` does not reach it where `events` never started.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        source: AsyncGenerator[Any, None],
        headers: dict[str, str],
        ping_seconds: float,
    ):
        # Ask proxies on the way not to buffer.
        super().__init__(headers={**headers, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.source, self.ping_seconds = events, source, ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await cancel_on_disconnect(receive, self._send_all(scope, send))
        finally:
            await self.events.aclose()
            await self.source.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        writer = _Writer(send)
        pings = asyncio.ensure_future(writer.send_pings(self.ping_seconds))
        state = scope["state"]
        try:
            async for event in self.events:
                await writer.write(sent_event(event))
        except Refused as refused:
            state["log_fields"]["error"] = refused.code
            await writer.write(sent_event({"type": "error", **errors.envelope(refused)}))
        except Exception as error:
            log_failure(state["request_id"], error)
            state["log_fields"]["error"] = errors.unexpected().code
            await writer.write(sent_event({"type": "error", **errors.envelope(errors.unexpected())}))
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Writer:
    """Writes parts of the body and knows when it wrote last."""

    def __init__(self, send: Send):
        self._send, self._last = send, time.monotonic()

    async def write(self, text: str) -> None:
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def send_pings(self, seconds: float) -> None:
        """Send a comment whenever nothing was written for so many seconds, so that no proxy closes the connection."""
        while True:
            await asyncio.sleep(max(0.0, self._last + seconds - time.monotonic()))
            if time.monotonic() >= self._last + seconds:
                await self.write(": still at work\n\n")


def sent_event(event: dict[str, Any]) -> str:
    """Format an event as the protocol has it."""
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
