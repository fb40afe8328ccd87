"""An S3 server over HTTP (moto's, in a process of its own) behind a proxy that notes requests and makes them fail."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "right", "AWS_SECRET_ACCESS_KEY": "right", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "models"


def error(status: int, code: str) -> Callable[[Any], tuple[int, bytes]]:
    """A fault: the answer that S3 gives for an error."""
    return lambda request: (status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())


def slow(seconds: float) -> Callable[[Any], None]:
    """A fault: an answer that takes its time."""
    return lambda request: time.sleep(seconds)


@dataclass
class Request:
    method: str
    path: str
    range: tuple[int, int] | None = None
    sent: int = 0


@dataclass
class Proxy:
    """`faults`: called at each request, in order, until one returns (status, body); None lets the request through."""

    port: int
    behind: int
    requests: list[Request] = field(default_factory=list)
    faults: list[Callable[[Request], Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def failing(
        self, fault: Callable[[Request], Any], when: Callable[[Request], bool] = lambda r: True, times: int = 10**9
    ) -> Iterator[None]:
        """The first `times` requests that `when` is true of fail."""
        left = [times]

        def asked(request: Request) -> Any:
            if not when(request) or left[0] <= 0:
                return None
            left[0] -= 1
            return fault(request)

        self.faults.append(asked)
        try:
            yield
        finally:
            self.faults.remove(asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: Any) -> None: ...

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        request = Request(self.command, self.path, (int(asked[1]), int(asked[2]) + 1) if asked else None)
        self.proxy.requests.append(request)
        for fault in list(self.proxy.faults):
            if answer := fault(request):
                status, content = answer
                self._send(status, [("Content-Type", "application/xml")], content)
                return
        behind = http.client.HTTPConnection("127.0.0.1", self.proxy.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content = answer.read()
        request.sent = len(content)
        self._send(answer.status, answer.getheaders(), content, answer.getheader("Content-Length"))
        behind.close()

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None) -> None:
        try:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(address: str = "127.0.0.1") -> Iterator[Proxy]:
    """A server with one empty bucket, and the proxy before it, which listens at `address`."""
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                made = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                made.request("PUT", f"/{BUCKET}")
                assert made.getresponse().status == 200
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "the S3 server does not start"
                time.sleep(0.2)
        handler = type("Handler", (_Handler,), {})
        front = ThreadingHTTPServer((address, 0), handler)
        front.daemon_threads = True
        proxy = handler.proxy = Proxy(front.server_address[1], port)
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield proxy
        front.shutdown()
    finally:
        server.kill()
        server.wait()
