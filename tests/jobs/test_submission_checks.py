"""What is made and checked of a job before it is sent: no cluster is needed."""

import re
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions

import pytest

from ppcl.config.schema import Config
from tests.commands import in_process as ppcl
from tests.conftest import REPOSITORY


def test_paths_are_made_absolute_before_a_job_is_sent_and_urls_are_not(tmp_path, monkeypatch):
    from jobs.submission import absolute

    monkeypatch.chdir(tmp_path)
    tracking = {"tensorboard": "tb", "mlflow": {"uri": "mlruns"}}
    values = {"teacher": "t", "prompts": "s3://b/p.txt", "output": "o", "evaluation": {"prompts": "e.txt"}}
    sent = absolute(Config(**values, tracking=tracking))
    assert (sent.teacher.path, sent.prompts.url, sent.output.path) == (tmp_path / "t", "s3://b/p.txt", tmp_path / "o")
    assert sent.evaluation.prompts.path == tmp_path / "e.txt" and sent.tracking.tensorboard == tmp_path / "tb"
    assert sent.tracking.mlflow.uri == (tmp_path / "mlruns").as_uri()
    sent = absolute(Config(**values, tracking={"mlflow": {"uri": "http://mlflow:5000"}}))
    assert sent.tracking.mlflow.uri == "http://mlflow:5000"


def test_what_a_job_needs_is_what_ppcl_depends_on_but_for_serving():
    from jobs.submission import _NEEDED

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["jobs"]]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in needed}
    provided = packages_distributions()
    assert {provided[name][0].lower() for name in _NEEDED} | {"ray"} == names


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b'{"ray_version": "2.44.1"}', "runs Ray 2.44.1, this ppcl Ray 2.60"),
        (b"<html>", "is not Ray's job API"),
        (b"{}", "is not Ray's job API"),
    ],
)
def test_another_ray_and_another_server_are_told(answer, sentence):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_): ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        code, _, wrong = ppcl("list", "--address", f"http://127.0.0.1:{server.server_port}")
    assert code == 2 and sentence in wrong and wrong.count("\n") == 1
