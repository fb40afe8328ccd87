"""Server-sent events over one request: whatever goes wrong after the first of them is an event too."""

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
    """Sends what `events` yields until it ends, fails, or the client goes away; closes it in each case, and the engine's own
    `source` too, which `events` alone does not where nothing was asked of it yet."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        source: AsyncGenerator,
        headers: dict[str, str],
        ping_seconds: float,
    ):
        # What buffers answers on the way is asked not to.
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
        last = time.monotonic()

        async def write(text: str) -> None:
            nonlocal last
            last = time.monotonic()
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def pings() -> None:
            while True:
                await asyncio.sleep(max(0.0, last + self.ping_seconds - time.monotonic()))
                if time.monotonic() >= last + self.ping_seconds:
                    await write(": still at work\n\n")

        pinging = asyncio.ensure_future(pings())
        try:
            async for event in self.events:
                await write(sent_event(event))
        except Refused as refused:
            scope["state"]["told"]["error"] = refused.code
            await write(sent_event({"type": "error", **errors.envelope(refused)}))
        except Exception as error:
            log_failure(scope["state"]["request_id"], error)
            scope["state"]["told"]["error"] = errors.unexpected().code
            await write(sent_event({"type": "error", **errors.envelope(errors.unexpected())}))
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sent_event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
