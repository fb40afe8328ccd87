"""Errors in OpenAI's envelope, whichever part refuses the request."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from serve.protocol import Refused

INVALID = "invalid_request_error"
SERVER = "server_error"

# Longer values are cut where an error shows them.
_SHOWN = 60

_BY_STATUS = {
    404: (
        "unknown_url",
        "there is nothing at this address; images are made by POST /v1/images/generations, "
        "models are at GET /v1/models",
    ),
    405: ("method_not_allowed", "this address does not take this method"),
}


def invalid(message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> Refused:
    """Return the refusal of a request that is malformed (400) or that this server does not serve (422)."""
    return Refused(status, INVALID, message, code, param)


def envelope(refused: Refused) -> dict[str, Any]:
    return {
        "error": {
            "message": refused.message,
            "type": refused.type,
            "param": refused.param,
            "code": refused.code,
        }
    }


def response(refused: Refused, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer of a refusal.

    OpenAI's client retries 408, 409, 429 and 5xx unless a header forbids it. A retry helps only where the server is
    busy or not ready.
    """
    headers = dict(headers or {})
    if refused.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(refused.retry_after)))
    if refused.status in (408, 429) or refused.status >= 500:
        headers["x-should-retry"] = "true" if refused.status in (408, 429, 502, 503) else "false"
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(refused), refused.status, headers)


def unexpected() -> Refused:
    return Refused(
        500,
        SERVER,
        "the server failed on this request; look up the id in x-request-id in its log",
        "internal_error",
    )


def from_http(error: HTTPException) -> Refused:
    """Return the refusal for an error of the router: an unknown address or a wrong method."""
    code, message = _BY_STATUS.get(error.status_code, (None, str(error.detail)))
    return Refused(error.status_code, INVALID if error.status_code < 500 else SERVER, message, code)


def from_validation(error: ValidationError) -> Refused:
    """Return the first of pydantic's errors as one sentence about one key."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) if first["loc"] else None
    if first["type"] == "missing":
        return invalid(f"{key} is missing", key, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(f"{key} is {shown(first['input'])}: {message[:1].lower()}{message[1:]}", key, code)


def shown(value: Any) -> str:
    """Format a value for a message: printable and short."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
