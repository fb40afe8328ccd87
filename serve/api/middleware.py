"""Around every request: its id, the key it needs, the headers it gets, one line of log, one count, and no bare failure."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import errors
from serve.api.auth import ApiKeys, check_host
from serve.api.client_disconnect import ClientDisconnected
from serve.api.drain import DrainGate
from serve.api.metrics import HttpMetrics
from serve.config import Settings
from serve.logging import log_failure, log_request
from serve.protocol import Refused

# Needed before a key can be asked for, and without anything to tell of what is served.
OPEN = ("/", "/health")
OPEN_FOLDER = "/page/"

CLIENT_GONE = 499

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
_NO_CONTENT = "default-src 'none'; frame-ancestors 'none'"

# Of a body that is refused unread, so many times the largest is read and dropped, so that the client gets to the answer.
_DRAINED = 64


REQUEST_ID = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """ASGI middleware. `scope["state"]` gets `request_id`, and `told`, a dict for what the log shall say of the request.

    `behind_ray`: requests have an id already, which Ray Serve's proxy also puts into the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: ApiKeys,
        metrics: HttpMetrics,
        drain_gate: DrainGate,
        behind_ray: bool,
    ):
        self.app, self.settings, self.keys, self.metrics, self.drain_gate, self.behind_ray = (
            app,
            settings,
            keys,
            metrics,
            drain_gate,
            behind_ray,
        )

    def request_id(self, headers: Headers) -> str:
        given = headers.get(REQUEST_ID, "") if self.behind_ray else ""
        # A client can choose it there.
        return given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: RequestMiddleware, scope: Scope, receive: Receive, send: Send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.id = guard.request_id(Headers(scope=scope))
        self.told: dict[str, Any] = {}
        self.status: int | None = None
        self.body_read = False
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": self.id, "told": self.told, "started": time.monotonic()}

    async def run(self) -> None:
        self.guard.metrics.running.inc()
        try:
            await self._answer()
        finally:
            self.guard.metrics.running.dec()
            self._tell()

    async def _answer(self) -> None:
        headers = Headers(scope=self.scope)
        try:
            if self.scope["path"] != "/health" and not self.guard.keys:
                check_host(headers.get("host"))
            if self.guard.keys and not (self.scope["path"] in OPEN or self.scope["path"].startswith(OPEN_FOLDER)):
                self.guard.keys.check(headers.get("authorization"))
            with self.guard.drain_gate.admit():
                await self.guard.app(self.scope, self.receive, self.send)
        except Refused as refused:
            await self._refuse(refused)
        except ClientDisconnected:
            # Nobody reads it; the server in front of us still wants an answer.
            self.told["error"] = "client_gone"
            if self.status is None:
                await Response(status_code=CLIENT_GONE)(self.scope, self.receive, self.send)
            self.status = CLIENT_GONE
        except asyncio.CancelledError:
            # How Ray tells of a client that has gone, and any server of its own end.
            self.told["error"], self.status = "cancelled", CLIENT_GONE
            raise
        except Exception as error:
            log_failure(self.id, error)
            await self._refuse(errors.unexpected())

    async def _refuse(self, refused: Refused) -> None:
        self.told["error"] = refused.code
        if self.status is None:
            await errors.answer(refused)(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400 and self.status not in (408, CLIENT_GONE):
                await self._drain()
            headers = MutableHeaders(scope=message)
            if not self.guard.behind_ray:
                headers[REQUEST_ID] = self.id
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("content-security-policy", _NO_CONTENT)
            headers.setdefault("cache-control", "no-store")
        await self._send(message)

    async def _drain(self) -> None:
        """Read what is left of the body. A connection that is closed on a client still writing loses it the answer."""
        if Headers(scope=self.scope).get("expect"):
            return
        left = _DRAINED * self.guard.settings.limits.body_bytes
        try:
            async with asyncio.timeout(self.guard.settings.http.body_seconds):
                while not self.body_read and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass

    def _tell(self) -> None:
        seconds = time.monotonic() - self.scope["state"]["started"]
        # The route rather than the path, which may hold anything.
        route = getattr(self.scope.get("route"), "path", "unmatched")
        status = self.status or CLIENT_GONE
        self.guard.metrics.answered(self.scope["method"], route, status, seconds)
        log_request(
            id=self.id,
            method=self.scope["method"][:16],
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **self.told,
        )
