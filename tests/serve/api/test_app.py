"""What surrounds the API: keys, headers, bodies over a socket, clients that leave, health."""

import json
import socket
import time

import openai
import pytest

from serve.config import Settings
from tests.serve.api.test_client import waiting
from tests.serve.served import Server, until

VALID = {"prompt": "a red circle", "model": "all", "size": "32x32", "num_inference_steps": 1}
LONG = VALID | {"num_inference_steps": 2000}
JSON = {"content-type": "application/json"}


def test_with_keys_everything_but_the_page_and_health_asks_for_one(locked_server):
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/all"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/other"),
        ("POST", "/v1/images/generations"),
    ):
        answer = locked_server.ask(method, path)
        assert (answer.status, answer.error["code"], answer.headers["www-authenticate"]) == (
            401,
            "missing_api_key",
            "Bearer",
        )
        assert (
            locked_server.ask(method, path, headers={"authorization": "Bearer open-sesame"}).error["code"]
            == "invalid_api_key"
        )
    for path in ("/", "/health"):
        assert locked_server.ask("GET", path).status == 200
    for key in ("sesame", "open-up"):
        assert locked_server.generate(VALID, {"authorization": f"Bearer {key}"}).status == 200


def test_without_keys_a_page_under_another_name_cannot_use_the_server(server, locked_server):
    answer = server.generate(VALID, {"host": "images.example"})
    assert (answer.status, answer.error["code"]) == (403, "forbidden_host")
    assert server.ask("GET", "/", headers={"host": "images.example"}).status == 403
    assert server.ask("GET", "/health", headers={"host": "10.0.0.7"}).status == 200
    assert locked_server.generate(VALID, {"host": "images.example", "authorization": "Bearer sesame"}).status == 200


def test_other_sites_may_not_read_answers(server):
    preflight = {
        "origin": "https://other.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    for answer in (
        server.ask("OPTIONS", "/v1/images/generations", headers=preflight),
        server.generate(VALID, {"origin": "https://other.example"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.ask("OPTIONS", "/v1/images/generations", headers=preflight).status == 405
    # What a site can send without asking first is not read as JSON.
    assert server.generate(VALID, {"content-type": "text/plain"}).status == 415


def test_every_answer_forbids_what_browsers_might_make_of_it(server):
    answers = [server.ask("GET", path) for path in ("/", "/health", "/v1/models", "/nothing", "/metrics")] + [
        server.generate(VALID)
    ]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] in ("no-store", "no-cache")


def test_a_body_over_the_limit_is_refused_whether_or_not_it_tells_its_length(server):
    large = json.dumps(VALID | {"prompt": "a" * 100_000}).encode()
    for body in (large, [large[:50_000], large[50_000:]]):
        answer = server.ask("POST", "/v1/images/generations", body, JSON)
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert "65536 bytes" in answer.error["message"]


def test_a_body_within_the_limit_may_come_in_pieces(server):
    body = json.dumps(VALID).encode()
    answer = server.ask("POST", "/v1/images/generations", [body[:10], body[10:11], body[11:]], JSON)
    assert answer.status == 200


def test_a_client_that_is_refused_unread_still_gets_to_its_answer(locked_server):
    answer = locked_server.ask("POST", "/v1/images/generations", b"a" * 3_000_000, JSON)
    assert answer.status == 401


def test_a_body_that_does_not_arrive_in_time_is_refused(server):
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\n"
    head += "content-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + b'{"prompt"')
        told = connection.recv(65536)
    assert told.startswith(b"HTTP/1.1 408") and b"request_timeout" in told


def test_addresses_and_methods_that_are_not_there_are_told_in_the_envelope(server):
    assert server.ask("GET", "/v1/nothing").error["code"] == "unknown_url"
    answer = server.ask("GET", "/v1/images/generations")
    assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "POST", "method_not_allowed")


def _send(server, values) -> socket.socket:
    body = json.dumps(values).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize(
    "values", [LONG, LONG | {"n": 3}, LONG | {"stream": True, "partial_images": 3}], ids=["whole", "three", "stream"]
)
def test_a_client_that_goes_away_ends_the_work_for_it(server, engine, lines, values):
    connection = _send(server, values)
    until(lambda: waiting(server), "the work did not begin")
    if values.get("stream"):
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    steps = _steps(server)
    connection.close()
    until(lambda: not waiting(server), "the work did not end")
    # Two thousand steps would have been done, had it gone on.
    assert _steps(server) - steps < 1000
    until(lambda: any(line.get("error") == "client_gone" for line in lines()), "the log does not tell")
    (told,) = [line for line in lines() if line.get("error") == "client_gone"]
    assert (told["status"], told["variant"], told["images"]) == (499, "all", values.get("n", 1))


def _steps(server) -> float:
    told = server.ask("GET", "/metrics").body.decode()
    return sum(float(line.split()[-1]) for line in told.splitlines() if line.startswith("ppcl_step_seconds_count"))


def test_a_stream_without_news_sends_comments_that_clients_skip(server):
    with _send(server, LONG | {"stream": True}) as connection:
        told = b""
        while b": still at work\n\n" not in told:
            told += connection.recv(4096)
    assert b"content-type: text/event-stream" in told and b"data:" not in told


def test_an_engine_that_stops_is_told_in_the_stream_and_to_whoever_comes_later(served):
    from serve.engine.engine import Engine

    engine = Engine(served)
    stopping = Server(engine, Settings(limits=served.limits))
    try:
        with _send(stopping, LONG | {"stream": True}) as connection:
            told = connection.recv(4096)
            until(lambda: waiting(stopping), "the work did not begin")
            engine.close()
            while not told.endswith(b"0\r\n\r\n"):
                told += connection.recv(65536)
        assert told.startswith(b"HTTP/1.1 200")
        (data,) = [line.removeprefix(b"data: ") for line in told.splitlines() if line.startswith(b"data: ")]
        event = json.loads(data)
        assert (event["type"], event["error"]["type"], event["error"]["code"]) == (
            "error",
            "server_error",
            "shutting_down",
        )
        with pytest.raises(openai.InternalServerError) as later:
            stopping.client().images.generate(prompt="a red circle", size="32x32")
        assert later.value.status_code == 503 and later.value.response.headers["x-should-retry"] == "true"
        health = stopping.ask("GET", "/health")
        assert (health.status, health.error["code"]) == (503, "not_ready") and int(health.headers["retry-after"]) >= 1
    finally:
        stopping.close()


def test_behind_ray_the_id_is_the_one_that_rays_proxy_gave_the_request(engine, lines):
    behind = Server(engine, Settings(), behind_ray=True)
    try:
        for given in ("1bc87b29-6ac0-467a", "not an id"):
            answer = behind.ask("GET", "/health", headers={"x-request-id": given})
            assert "x-request-id" not in answer.headers
    finally:
        behind.close()
    first, second = (line["id"] for line in lines())
    assert first == "1bc87b29-6ac0-467a" and second.startswith("req_")


def test_a_client_cannot_choose_the_id_of_its_request(server):
    assert server.ask("GET", "/health", headers={"x-request-id": "mine"}).headers["x-request-id"].startswith("req_")


def test_health_means_ready(server):
    for method in ("GET", "HEAD"):
        assert server.ask(method, "/health").status == 200
    assert server.ask("GET", "/health").json() == {"status": "ready"}


def test_the_schema_is_there_to_read(server):
    told = server.ask("GET", "/openapi.json").json()
    body = told["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "deadline_ms" in body["properties"] and body["additionalProperties"] is False


def test_the_time_of_a_request_is_the_clients(server):
    began = time.monotonic()
    answer = server.generate(VALID | {"num_inference_steps": 50})
    assert 0 < answer.json()["timings"]["total"] <= time.monotonic() - began
