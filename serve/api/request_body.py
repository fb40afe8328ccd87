"""Read a request's body within limits of bytes and seconds, and parse it as strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from serve.api.client_disconnect import ClientDisconnected
from serve.api.errors import invalid, shown
from serve.config import Http, Limits
from serve.protocol import Refused


async def read_object(request: Request, http: Http, limits: Limits) -> dict[str, Any]:
    """Return the body, a JSON object.

    Raises `Refused` with 400, 408, 413 or 415, and `ClientDisconnected` where the client leaves before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid(
            f"the content type is {shown(kind)}; send application/json", code="unsupported_media_type", status=415
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise invalid("the body is compressed; send it uncompressed", code="unsupported_media_type", status=415)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(http.body_seconds):
            body = await _read(request, limits)
    except TimeoutError:
        raise Refused(
            408,
            "invalid_request_error",
            f"the body did not arrive within {http.body_seconds:g} seconds; send it faster",
            "request_timeout",
        ) from None
    return parse_object(body)


async def _read(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        body += message.get("body", b"")
        # What Content-Length says is not relied on: a chunked body has none.
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        if not message.get("more_body", False):
            return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises `Refused` for anything but a JSON object, and for what parsers disagree about: NaN and duplicate keys."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise invalid(
            f"the body is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at line {error.lineno}, "
            f"column {error.colno}",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise invalid("the body is nested too deeply; every value here is a plain one", code="invalid_json") from None
    except ValueError:
        # Python reads no integer of more than some thousand digits.
        raise invalid("the body holds a number with too many digits", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(
            f'the body is {shown(value)}; send a JSON object such as {{"prompt": "a red circle"}}', code="invalid_json"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise invalid(f"the key {shown(name)} is there twice; send it once", code="invalid_json")
        values[name] = value
    return values


def _no_constant(name: str) -> None:
    raise invalid(f"the body holds {name}, which is not JSON; send a finite number", code="invalid_json")


def _too_large(limits: Limits) -> Refused:
    return invalid(
        f"the body is larger than {limits.body_bytes} bytes, the most this server takes",
        code="request_too_large",
        status=413,
    )
