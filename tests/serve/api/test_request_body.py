"""What counts as a request's body: a JSON object that every parser would read alike."""

import json

import pytest

from serve.api.request_body import parse_object
from serve.protocol import Refused


def refusal(body: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        parse_object(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"
    return caught.value


def test_an_object_is_read_as_json_reads_it():
    told = {"prompt": "ein Kreis, ein Quadrat ☂ 𝄞", "n": 2, "seed": None, "nested": [1.5, {"a": []}]}
    for ascii_only in (True, False):
        assert parse_object(json.dumps(told, ensure_ascii=ascii_only).encode()) == told


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "a"} trailing', "not JSON"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 12"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"guidance_scale": NaN}', "NaN"),
        (b'{"guidance_scale": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[]", "is []"),
        (b'"text"', "is 'text'"),
        (b"null", "is None"),
        (b"12", "is 12"),
    ],
)
def test_what_is_no_plain_json_object_is_refused_with_the_reason(body, said):
    assert said in refusal(body).message


def test_a_key_repeated_among_very_many_is_found_without_comparing_all_with_all():
    keys = ", ".join(f'"key{number}": 0' for number in range(50_000))
    assert "'key49999' is there twice" in refusal(f'{{{keys}, "key49999": 0}}'.encode()).message
