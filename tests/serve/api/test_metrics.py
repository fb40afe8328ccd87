"""Metrics of HTTP and of the engine."""

from tests.serve.api.test_client import waiting
from tests.serve.served import until

VALID = {"prompt": "a red circle", "model": "all", "size": "32x32", "num_inference_steps": 1}


def test_metrics_tell_of_http_and_of_the_engine(server, engine):
    def figures():
        answer = server.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line for line in answer.body.decode().splitlines() if line and not line.startswith("#")]
        assert len({line.rpartition(" ")[0] for line in lines}) == len(lines), "a series is there twice"
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    # An image of another test, whose client has gone, takes one more step.
    until(lambda: not waiting(server), "the work of another test did not end")
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
