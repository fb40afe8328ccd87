"""ASGI middleware: request ids, authentication, security headers, logging, metrics and error answers."""

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

# Paths without authentication: the page that asks for a key, and the health check.
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

# An unread body is read and dropped up to so many times the limit, so that the client reads the answer.
_DRAIN_FACTOR = 64


REQUEST_ID = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Adds `request_id`, `started` and `log_fields` (a dict for the request's line of log) to `scope["state"]`.

    `behind_ray`: Ray Serve's proxy gives requests their id and puts it into the answer.
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
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.drain_gate, self.behind_ray = drain_gate, behind_ray

    def request_id(self, headers: Headers) -> str:
        given = headers.get(REQUEST_ID, "") if self.behind_ray else ""
        # Behind Ray a client can choose it.
        return given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, middleware: RequestMiddleware, scope: Scope, receive: Receive, send: Send):
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.id = middleware.request_id(Headers(scope=scope))
        self.log_fields: dict[str, Any] = {}
        self.status: int | None = None
        self.body_read = False
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": self.id, "log_fields": self.log_fields, "started": time.monotonic()}

    async def run(self) -> None:
        self.middleware.metrics.running.inc()
        try:
            await self._answer()
        finally:
            self.middleware.metrics.running.dec()
            self._record()

    async def _answer(self) -> None:
        try:
            self._authorize(Headers(scope=self.scope))
            with self.middleware.drain_gate.admit():
                await self.middleware.app(self.scope, self.receive, self.send)
        except Refused as refused:
            await self._refuse(refused)
        except ClientDisconnected:
            # Nobody reads the answer, but the proxy in front still needs one.
            self.log_fields["error"] = "client_gone"
            if self.status is None:
                await Response(status_code=CLIENT_GONE)(self.scope, self.receive, self.send)
            self.status = CLIENT_GONE
        except asyncio.CancelledError:
            # Ray signals a disconnected client this way, and any server its own shutdown.
            self.log_fields["error"], self.status = "cancelled", CLIENT_GONE
            raise
        except Exception as error:
            log_failure(self.id, error)
            await self._refuse(errors.unexpected())

    def _authorize(self, headers: Headers) -> None:
        """Raises `Refused` without a valid key, or, on a server without keys, for a foreign host name."""
        path, keys = self.scope["path"], self.middleware.keys
        if not keys and path != "/health":
            check_host(headers.get("host"))
        if keys and path not in OPEN and not path.startswith(OPEN_FOLDER):
            keys.check(headers.get("authorization"))

    async def _refuse(self, refused: Refused) -> None:
        self.log_fields["error"] = refused.code
        if self.status is None:
            await errors.response(refused)(self.scope, self.receive, self.send)

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
            if not self.middleware.behind_ray:
                headers[REQUEST_ID] = self.id
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("content-security-policy", _NO_CONTENT)
            headers.setdefault("cache-control", "no-store")
        await self._send(message)

    async def _drain(self) -> None:
        """Read the rest of the body: closing the connection on a client that still writes would lose it the answer."""
        if Headers(scope=self.scope).get("expect"):
            return
        remaining = _DRAIN_FACTOR * self.middleware.settings.limits.body_bytes
        try:
            async with asyncio.timeout(self.middleware.settings.http.body_seconds):
                while not self.body_read and remaining > 0:
                    remaining -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass

    def _record(self) -> None:
        seconds = time.monotonic() - self.scope["state"]["started"]
        # The route rather than the path, which may hold anything.
        route = getattr(self.scope.get("route"), "path", "unmatched")
        status = self.status or CLIENT_GONE
        self.middleware.metrics.answered(self.scope["method"], route, status, seconds)
        log_request(
            id=self.id,
            method=self.scope["method"][:16],
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **self.log_fields,
        )
