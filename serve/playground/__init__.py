"""The playground: one page, one style sheet, one script, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import Response

from serve.protocol import Refused

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

_PARTS = {"page.css": "text/css", "page.js": "text/javascript"}


class Page:
    """The page at `/`, and its parts under names that hold their hash, which browsers keep for good.

    `key_needed`: whether it asks for an API key.
    """

    def __init__(self, key_needed: bool):
        self._parts: dict[str, tuple[bytes, str]] = {}
        names = {}
        for name, kind in _PARTS.items():
            content = files("serve.playground").joinpath(name).read_bytes()
            stem, _, suffix = name.partition(".")
            names[suffix] = f"{stem}.{_hash(content)}.{suffix}"
            self._parts[names[suffix]] = (content, kind)
        environment = Environment(
            loader=PackageLoader("serve.playground", "."), autoescape=True, undefined=StrictUndefined
        )
        html = environment.get_template("page.html.j2").render(key_needed=key_needed, parts=names)
        self._html, self._etag = html.encode(), f'"{_hash(html.encode())}"'

    def html(self, known: str | None) -> Response:
        """The page, or 304 where the browser's copy, of the ETag `known`, is this one."""
        headers = {"etag": self._etag, "cache-control": "no-cache", "content-security-policy": CONTENT_SECURITY_POLICY}
        if known == self._etag:
            return Response(status_code=304, headers=headers)
        return Response(self._html, media_type="text/html", headers=headers)

    def part(self, name: str) -> Response:
        """Raises `Refused` with 404 where there is none of this name."""
        if name not in self._parts:
            raise Refused(404, "invalid_request_error", "the page has no such part; reload the page", "unknown_url")
        content, kind = self._parts[name]
        return Response(content, media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"})


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
