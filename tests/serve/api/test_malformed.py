"""Five hundred wrong requests: none makes the server fail, each gets the envelope, and the server goes on as before."""

from collections import Counter

from tests.serve.api.malformed import VALID, requests

# What each kind is refused with; a kind that may be valid by luck is at times answered with an image.
STATUSES = {
    "wrong value": {400, 404, 422},
    "wrong key": {400},
    "damaged body": {400, 404, 422},
    "noise": {400},
    "bad UTF-8": {400},
    "no number": {400},
    "key twice": {400},
    "deep": {400, 413},
    "huge": {400, 413},
    "content type": {415},
    "address": {404, 405},
    "method": {405},
    "model in address": {404},
    "model in body": {400, 404},
    "too much": {400, 413, 422, 404},
}


def test_five_hundred_malformed_requests_never_get_a_failure_and_always_the_envelope(server):
    seen, generated = Counter(), 0
    for wrong in requests(500, seed=20):
        answer = server.ask(wrong.method, wrong.path, wrong.body, wrong.headers)
        told = f"{wrong.kind}: {wrong.method} {wrong.path[:80]!r} {str(wrong.body)[:120]} "
        told += f"-> {answer.status} {answer.body[:200]}"
        assert answer.headers.get("x-request-id", "").startswith("req_"), told
        if wrong.harmless and answer.status == 200:
            generated += 1
            continue
        assert answer.status in STATUSES[wrong.kind], told
        if wrong.method != "HEAD":
            assert answer.error["message"] and "Traceback" not in answer.error["message"], told
        seen[wrong.kind] += 1
    assert set(seen) == set(STATUSES) and min(seen.values()) >= 10, seen
    assert generated < 50
    assert server.generate(VALID).status == 200
    assert server.ask("GET", "/health").status == 200
