"""Authentication: API keys from the environment and from a file. Without any key only this machine is served."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from ipaddress import ip_address
from pathlib import Path

from ppcl.errors import UserError
from serve.config import Http
from serve.protocol import Refused

# What fits into an Authorization header.
_KEY = re.compile(r"[\x21-\x7e]+")


class ApiKeys:
    """The keys of `http.api_keys_env` and `http.api_keys_file`, kept as digests.

    Raises `UserError` where the file cannot be read or holds no key, or where a key cannot be sent in a header.
    """

    def __init__(self, http: Http):
        keys = [key.strip() for key in os.environ.get(http.api_keys_env, "").split(",") if key.strip()]
        if http.api_keys_file is not None:
            keys += _read_keys(http.api_keys_file)
        for number, key in enumerate(keys, start=1):
            if not _KEY.fullmatch(key):
                raise UserError(
                    f"API key {number} of {len(keys)} holds blanks or characters beyond ASCII; use letters and digits"
                )
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Raises `Refused` unless the header `Authorization` holds one of the keys. Runs in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("no API key was given; send the header Authorization: Bearer KEY", "missing_api_key")
        given, known = _digest(key.strip()), False
        for digest in self._digests:
            known |= hmac.compare_digest(given, digest)
        if not known:
            raise _refused(
                "this API key is not known here; check it, or ask who runs this server for one", "invalid_api_key"
            )


def _read_keys(file: Path) -> list[str]:
    """Return the keys of a file, one per line. Raises `UserError`."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"http.api_keys_file {file} cannot be read: {reason}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"http.api_keys_file {file} holds no key; write one a line, or leave the setting out")
    return keys


def check_exposure(http: Http, keys: ApiKeys) -> None:
    """Raises `UserError` where others could reach a server that asks for no key."""
    if not keys and not loopback(http.host):
        raise UserError(
            f"http.host is {http.host!r}, which others can reach, and there is no API key; set {http.api_keys_env} or "
            "http.api_keys_file, or listen at 127.0.0.1"
        )


def check_host(host: str | None) -> None:
    """Raises `Refused` unless the header `Host` names this machine.

    Protects a server without keys from DNS rebinding: a web page whose name resolves to 127.0.0.1 must not use it
    from a visitor's browser.
    """
    name = (host or "").rpartition("]")[0].removeprefix("[") or (host or "").partition(":")[0]
    if not loopback(name):
        raise Refused(
            403,
            "invalid_request_error",
            "this server has no API keys, so it answers only under the names localhost and 127.0.0.1",
            "forbidden_host",
        )


def loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _refused(message: str, code: str) -> Refused:
    return Refused(401, "authentication_error", message, code)
