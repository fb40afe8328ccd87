"""The server's log: a line a request, for programs or for people."""

import json
import logging
import re

from serve.logging import log_as_json, log_failure, readable
from tests.serve.served import until

VALID = {"prompt": "a red circle", "model": "all", "size": "32x32", "num_inference_steps": 1}


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


def test_a_failure_is_logged_by_its_place_without_its_words(lines):
    try:
        raise ValueError("the prompt was a secret wish")
    except ValueError as error:
        log_failure("req_1", error)
    (told,) = lines()
    assert (told["level"], told["id"], told["error"]) == ("error", "req_1", "ValueError")
    assert told["at"][-1].startswith("test_logging.py:") and "secret" not in json.dumps(told)


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
    assert re.fullmatch(r"\S+  failure  ValueError  test_logging\.py:\d+ \w+  req_1", readable(json.dumps(lines()[-1])))
