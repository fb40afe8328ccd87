"""What surrounds the API: keys, headers, bodies over a socket, clients that leave, logs, metrics, health."""

import json
import logging
import re
import socket
import time

import openai
import pytest

from serve.config import Settings
from serve.logging import log, log_as_json, log_failure, readable
from tests.serve.api.test_client import waiting
from tests.serve.served import Server, until

VALID = {"prompt": "a red circle", "model": "all", "size": "32x32", "num_inference_steps": 1}
LONG = VALID | {"num_inference_steps": 2000}
JSON = {"content-type": "application/json"}


@pytest.fixture
def lines(tmp_path):
    """The log's lines so far, parsed, while a test runs."""
    file, before = tmp_path / "log.jsonl", (list(log.handlers), log.level, log.propagate)
    log_as_json(file)
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


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


def test_the_log_has_a_line_a_request_and_neither_prompts_nor_keys(locked_server, lines):
    secret = "the secret wish of somebody"
    answers = [
        locked_server.generate(
            VALID | {"prompt": secret, "negative_prompt": secret}, {"authorization": "Bearer sesame"}
        ),
        locked_server.generate({"prompt": secret, secret: 1}, {"authorization": "Bearer sesame"}),
        locked_server.generate({"prompt": secret}, {"authorization": f"Bearer {secret}"}),
        locked_server.ask(
            "GET",
            f"/v1/models/{secret.replace(' ', '%20')}?q={secret.replace(' ', '+')}",
            headers={"authorization": "Bearer sesame"},
        ),
    ]
    assert [answer.status for answer in answers] == [200, 400, 401, 404]
    until(lambda: len(lines()) >= 4, "lines are missing")
    told = lines()
    assert [line["id"] for line in told] == [answer.headers["x-request-id"] for answer in answers]
    assert [line["status"] for line in told] == [200, 400, 401, 404]
    assert [line["route"] for line in told] == [
        "/v1/images/generations",
        "/v1/images/generations",
        "unmatched",
        "/v1/models/{model:path}",
    ]
    assert (told[0]["variant"], told[0]["degraded"], told[0]["images"]) == ("all", False, 1) and told[0]["seconds"] > 0
    assert [line.get("error") for line in told] == [None, "unknown_parameter", "invalid_api_key", "model_not_found"]
    assert "secret" not in json.dumps(told) and "sesame" not in json.dumps(told)


def test_metrics_tell_of_http_and_of_the_engine(server, engine):
    def figures():
        answer = server.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line for line in answer.body.decode().splitlines() if line and not line.startswith("#")]
        assert len({line.rpartition(" ")[0] for line in lines}) == len(lines), "a series is there twice"
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = figures()
    assert server.generate(VALID | {"n": 2}).status == 200
    assert server.generate(VALID | {"n": 0}).status == 400
    after = figures()

    def added(series):
        return after.get(series, 0) - before.get(series, 0)

    route = 'method="POST",route="/v1/images/generations"'
    assert added(f'ppcl_http_requests_total{{{route},status="200"}}') == 1
    assert added(f'ppcl_http_requests_total{{{route},status="400"}}') == 1
    assert added('ppcl_http_request_seconds_count{route="/v1/images/generations"}') == 2
    assert added('ppcl_images_total{variant="all"}') == 2
    assert added('ppcl_accepted_total{degraded="false",variant="all"}') == 1
    assert added('ppcl_step_seconds_count{variant="all"}') >= 1
    assert added('ppcl_batch_rows_sum{variant="all"}') == 2


def test_what_clients_invent_makes_no_new_series(server):
    for number, method in enumerate(("PROPFIND", "LOCK", "SEARCH")):
        server.ask(method, f"/invented/{number}")
        server.generate(VALID | {"model": f"invented{number}"})
    told = server.ask("GET", "/metrics").body.decode()
    assert "invented" not in told and "LOCK" not in told
    assert 'ppcl_http_requests_total{method="other",route="unmatched",status="404"}' in told


def test_health_means_ready(server):
    for method in ("GET", "HEAD"):
        assert server.ask(method, "/health").status == 200
    assert server.ask("GET", "/health").json() == {"status": "ready"}


def test_the_schema_is_there_to_read(server):
    told = server.ask("GET", "/openapi.json").json()
    body = told["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "deadline_ms" in body["properties"] and body["additionalProperties"] is False


def test_a_failure_is_logged_by_its_place_without_its_words(lines):
    try:
        raise ValueError("the prompt was a secret wish")
    except ValueError as error:
        log_failure("req_1", error)
    (told,) = lines()
    assert (told["level"], told["id"], told["error"]) == ("error", "req_1", "ValueError")
    assert told["at"][-1].startswith("test_http.py:") and "secret" not in json.dumps(told)


def test_the_servers_log_can_be_asked_for_twice_without_lines_coming_twice(lines, tmp_path):
    for _ in range(2):
        log_as_json(tmp_path / "log.jsonl")
    logging.getLogger("ppcl.serve").info("once")
    assert [told["event"] for told in lines()] == ["once"]


def test_a_line_of_the_log_can_be_read_by_people(server, lines):
    assert server.generate(VALID).status == 200 and server.generate(VALID | {"model": "no-such"}).status == 404
    until(lambda: len(lines()) == 2, "two lines")
    generated, refused = (readable(json.dumps(told)) for told in lines())
    assert re.fullmatch(r"\d\d:\d\d:\d\d  200  POST  /v1/images/generations  \d+\.\d{3} s  all  req_\w+", generated)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  404  POST  /v1/images/generations  \d+\.\d{3} s  model_not_found  req_\w+", refused
    )
    try:
        raise ValueError("a secret wish")
    except ValueError as error:
        log_failure("req_1", error)
    assert re.fullmatch(r"\S+  failure  ValueError  test_http\.py:\d+ \w+  req_1", readable(json.dumps(lines()[-1])))


def test_the_time_of_a_request_is_the_clients(server):
    began = time.monotonic()
    answer = server.generate(VALID | {"num_inference_steps": 50})
    assert 0 < answer.json()["timings"]["total"] <= time.monotonic() - began
