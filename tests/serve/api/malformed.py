"""Requests that are wrong in many ways, generated from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serve.api.schema import ImageRequest

GENERATIONS = "/v1/images/generations"
VALID = {"prompt": "a red circle", "model": "all", "size": "32x32", "num_inference_steps": 1, "seed": 1}
PARAMETERS = list(ImageRequest.model_fields)

_TRICKS = (
    "../teacher",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "....//....//etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/model",
    "s3://bucket/model",
    "teacher%00.safetensors",
    "teacher/../../students",
    "C:\\\\model",
    "~/.ssh/id_rsa",
    "teacher;ls",
    "$(id)",
    "`id`",
    "{{7*7}}",
    "<script>",
    "' OR 1=1 --",
    "teacher ",
    " teacher",
    "TEACHER",
    "auto/",
    "0-99",
    "9-0",
    "0-1,0-1",
    "0-1,1-2",
    "ffn:99",
    "text:0-99",
    "text:3-1",
    "modulations,modulations",
    ",",
    "-",
    "0-",
    "a" * 4000,
    "0-1," * 900 + "2-3",
)


@dataclass(frozen=True)
class Wrong:
    """`kind` names what is wrong; `harmless`: by luck it can also be a valid request."""

    kind: str
    method: str = "POST"
    path: str = GENERATIONS
    body: bytes | list[bytes] = b""
    headers: dict[str, str | bytes] = field(default_factory=lambda: {"content-type": "application/json"})
    harmless: bool = False


def _value(draw: random.Random) -> object:
    """Any JSON value, of which few are right anywhere."""
    text = "".join(
        chr(draw.choice((0, 9, 10, 34, 92, 127, 233, 8238, 0x2028, 0xD800, 0x1F600, 65)))
        for _ in range(draw.randint(0, 8))
    )
    return draw.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            11,
            2**31,
            2**63,
            -(2**70),
            10**300,
            0.5,
            -0.0,
            1e308,
            text,
            text * 500,
            "",
            " ",
            "NaN",
            "1",
            "64x64",
            [],
            {},
            [1],
            {"a": 1},
            [[[]]],
            {"$ref": "#"},
            ["a"] * 1000,
            "99999x1",
            "0x0",
            "1x1",
            "32x33",
            "32X32",
            "3.2e1x32",
        )
    )


def _wrong_value(draw: random.Random) -> Wrong:
    values = VALID | {draw.choice(PARAMETERS): _value(draw) for _ in range(draw.randint(1, 3))}
    return Wrong("wrong value", body=json.dumps(values).encode(), harmless=True)


def _wrong_key(draw: random.Random) -> Wrong:
    key = draw.choice(PARAMETERS)
    at = draw.randrange(len(key))
    odd = draw.choice(
        (
            "__proto__",
            "constructor",
            "",
            "\ud800",
            key.upper(),
            key[:at] + "x" + key[at:],
            key + " ",
            "a" * 50_000,
            "input_image",
        )
    )
    return Wrong("wrong key", body=json.dumps(VALID | {odd: _value(draw)}).encode())


def _damaged(draw: random.Random) -> Wrong:
    body = bytearray(json.dumps(VALID).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body))
        change = draw.randrange(3)
        if change == 0:
            body[at] = draw.randrange(256)
        elif change == 1:
            del body[at : at + draw.randint(1, 5)]
        else:
            body[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
        body = body or bytearray(b"{")
    return Wrong("damaged body", body=bytes(body), harmless=True)


def _noise(draw: random.Random) -> Wrong:
    return Wrong("noise", body=draw.randbytes(draw.choice((0, 1, 2, 100, 5000))))


def _bad_utf8(draw: random.Random) -> Wrong:
    bad = draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80", b"\xfe\xff"))
    return Wrong("bad UTF-8", body=b'{"prompt": "a%b"}' % bad)


def _no_number(draw: random.Random) -> Wrong:
    number = draw.choice(
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x10", "01", "1.", ".5", "+1", "1_0")
    )
    key = draw.choice(("guidance_scale", "true_cfg_scale", "n", "seed", "num_inference_steps", "deadline_ms"))
    return Wrong("no number", body=f'{{"prompt": "a", "{key}": {number}}}'.encode())


def _twice(draw: random.Random) -> Wrong:
    key = draw.choice(list(VALID))
    return Wrong("key twice", body=f'{json.dumps(VALID)[:-1]}, "{key}": {json.dumps(VALID[key])}}}'.encode())


def _deep(draw: random.Random) -> Wrong:
    depth, (opening, closing) = draw.choice((1000, 20_000, 100_000)), draw.choice((("[", "]"), ('{"a":', "}")))
    inner = opening * depth + "1" + closing * depth
    return Wrong("deep", body=f'{{"prompt": "a", "user": {inner}}}'.encode() if depth > 1000 else inner.encode())


def _huge(draw: random.Random) -> Wrong:
    size = draw.choice((200_000, 2_000_000))
    text = draw.choice((b'{"prompt": "%b"}' % (b"a" * size), b"[" + b"1," * (size // 2) + b"1]", b" " * size))
    chunks = [text[at : at + 65_536] for at in range(0, len(text), 65_536)]
    return Wrong("huge", body=draw.choice((text, chunks)))


def _content_type(draw: random.Random) -> Wrong:
    kind = draw.choice(
        (
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/xml",
            "json",
            b"\xff",
        )
    )
    headers: dict[str, str | bytes] = {"content-type": kind} if kind else {}
    if draw.random() < 0.2:
        headers = {"content-type": "application/json", "content-encoding": draw.choice(("gzip", "br", "nonsense"))}
    return Wrong("content type", body=json.dumps(VALID).encode(), headers=headers)


def _address(draw: random.Random) -> Wrong:
    method = draw.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"))
    path = draw.choice(
        (
            "/v1",
            "/v1/images",
            "/v1/images/edits",
            "/v1/images/generations/",
            "//v1/models",
            "/V1/models",
            "/v1/chat/completions",
            "/docs",
            "/page/",
            "/page/page.js",
            "/page/..%2fapp.py",
            "/page/%2e%2e/config.py",
            "/static/../../etc/passwd",
            "/.env",
            "/-/routes",
            "/" + "a" * 5000,
            "/%00",
            "/%ff%fe",
            "/v1/images/generations%0d%0ax-injected:%201",
            "/?" + "q=1&" * 1000 + "x",
            "/;",
            "/*",
        )
    )
    body = json.dumps(VALID).encode() if method != "GET" else b""
    return Wrong("address", method, path, body, harmless=path.startswith("/?"))


def _method(draw: random.Random) -> Wrong:
    method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD_", "TRACE"))
    return Wrong("method", method.strip("_") if method != "HEAD_" else "LINK", GENERATIONS)


def _model_in_address(draw: random.Random) -> Wrong:
    name = "".join(
        character if character.isascii() and character not in ' <>"{}`\\^|#?' else f"%{ord(character):02x}"
        for character in draw.choice(_TRICKS)
    )
    return Wrong("model in address", "GET", f"/v1/models/{name}")


def _model_in_body(draw: random.Random) -> Wrong:
    name, key = draw.choice(_TRICKS), draw.choice(("model", "min_variant"))
    return Wrong(
        "model in body",
        body=json.dumps(VALID | ({"model": "auto"} if key == "min_variant" else {}) | {key: name}).encode(),
    )


def _too_much(draw: random.Random) -> Wrong:
    much = draw.choice(
        (
            {"size": "99999x99999"},
            {"size": "4096x32"},
            {"size": "33x32"},
            {"num_inference_steps": 10**6},
            {"num_inference_steps": 2001},
            {"n": 10, "size": "2048x2048", "num_inference_steps": 100},
            {"prompt": "a" * 32_001},
            {"negative_prompt": "b " * 16_001},
            {"prompt": "circle " * 4000},
            {"guidance_scale": 1.0},
        )
    )
    return Wrong("too much", body=json.dumps(VALID | much).encode())


_KINDS: tuple[Callable[[random.Random], Wrong], ...] = (
    _wrong_value,
    _wrong_key,
    _damaged,
    _noise,
    _bad_utf8,
    _no_number,
    _twice,
    _deep,
    _huge,
    _content_type,
    _address,
    _method,
    _model_in_address,
    _model_in_body,
    _too_much,
)


def requests(count: int, seed: int) -> Iterator[Wrong]:
    """All kinds in turn."""
    draw = random.Random(seed)
    for number in range(count):
        yield _KINDS[number % len(_KINDS)](draw)
