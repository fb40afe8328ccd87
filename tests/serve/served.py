"""The API under uvicorn on a port of this machine, in a thread of its own."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from openai import AsyncOpenAI, OpenAI

from serve.api import create_app
from serve.config import Settings
from serve.protocol import Backend

PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What is in the envelope, which is all there is."""
        told = self.json()
        assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}, told
        assert isinstance(told["error"]["message"], str) and isinstance(told["error"]["type"], str)
        return told["error"]


class Server:
    def __init__(self, backend: Backend, settings: Settings, behind_ray: bool = False):
        config = uvicorn.Config(
            create_app(backend, settings, behind_ray=behind_ray),
            host="127.0.0.1",
            port=0,
            log_level="critical",
            access_log=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started, "the server did not start")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=retries, timeout=PATIENCE)

    def async_client(self, key: str = "none", retries: int = 0) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=retries, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: bytes | list[bytes] = b"", headers: Mapping[str, str | bytes] | None = None
    ) -> Answer:
        """Send one request as written, nothing checked or escaped. A list of bytes is sent in chunks."""
        framing = {"transfer-encoding": "chunked"} if isinstance(body, list) else {"content-length": str(len(body))}
        sent = {"host": f"127.0.0.1:{self.port}", "connection": "close"} | framing | dict(headers or {})
        lines = [f"{method} {path} HTTP/1.1".encode("latin-1")]
        lines += [
            name.encode() + b": " + (value if isinstance(value, bytes) else value.encode("latin-1"))
            for name, value in sent.items()
        ]
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
            for chunk in body if isinstance(body, list) else []:
                connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            connection.sendall(b"0\r\n\r\n" if isinstance(body, list) else body)
            response = http.client.HTTPResponse(connection, method=method)
            response.begin()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )

    def generate(self, values: Any, headers: Mapping[str, str | bytes] | None = None) -> Answer:
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        return self.ask(
            "POST", "/v1/images/generations", body, {"content-type": "application/json"} | dict(headers or {})
        )


def until(true: Any, complaint: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise AssertionError(complaint)
        time.sleep(0.02)
