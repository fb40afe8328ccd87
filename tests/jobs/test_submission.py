"""Jobs sent to a real cluster with a dashboard, by the command line alone."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from tests.jobs.test_compress import ppcl

pytestmark = pytest.mark.dashboard


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """`ray start --head` with a dashboard, from a folder where no ppcl is; gives the job API's address."""
    away, dashboard = tmp_path_factory.mktemp("away"), free_port()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"RAY_JOB_START_TIMEOUT_SECONDS": "300"}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=4",
         f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={free_port()}", f"--temp-dir={away}/ray",
         "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}",
         "--include-dashboard=true"],
        cwd=away, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 240
    try:
        while ppcl("list", "--address", address)[0]:
            assert head.poll() is None, head.stdout.read()
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(1)
        yield address
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, 9)


@pytest.fixture(scope="module")
def job(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.txt").write_text("\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "cross")))
    values = {
        "teacher": str(teacher_folder),
        "prompts": "prompts.txt",
        "output": str(folder / "result"),
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "held_out": 0.3},
        "width": {"hidden": [], "text": False, "modulations": False},
        "distillation": {"steps": 30, "batch_size": 4, "warmup": 2, "checkpoint_every": 5},
        "variants": {"budgets": [0.9]},
        "evaluation": {"limit": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def status(head, *job):
    code, said, wrong = ppcl("status", *job, "--address", head, "--json")
    assert code == 0, wrong
    return json.loads(said)


def test_a_cluster_without_jobs_says_so(head):
    code, said, _ = ppcl("list", "--address", head)
    assert code == 0 and said == f"no jobs of ppcl at {head}\n"
    for command in ("status", "logs", "stop"):
        code, _, wrong = ppcl(command, "--address", head)
        assert code == 2 and "has no job of ppcl; send one with ppcl submit" in wrong


def test_what_the_cluster_can_never_have_is_told_at_once(head, job):
    code, said, wrong = ppcl("submit", job, "--address", head, "--output", job.parent / "big", "--set", "distillation.pipeline=64")
    assert code == 2 and "asks for 64 workers, but the cluster has 4 CPUs" in wrong and wrong.count("\n") == 1, said + wrong


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head, job):
    code, said, wrong = ppcl("submit", job, "--address", head)
    assert code == 0, said + wrong
    first = re.match(r"(ppcl-\w{8}-1): sent", said)[1]
    assert f"{first}: RUNNING, calibration" in said
    code, _, wrong = ppcl("submit", job, "--address", head)
    assert code == 2 and f"the job {first} works on {job.parent / 'result'} already" in wrong
    deadline = time.monotonic() + 240
    while "probes" not in (now := status(head))["complete"]:
        assert now["state"] in ("PENDING", "RUNNING"), now
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert now["id"] == first and now["output"] == str(job.parent / "result") and now["begun"] and not now["ended"]
    code, said, wrong = ppcl("stop", "--address", head)
    assert code == 0 and f"{first}: STOPPED" in said, said + wrong
    code, _, wrong = ppcl("stop", first, "--address", head)
    assert code == 2 and "has ended already" in wrong
    assert "ppcl: stopped; the same command continues" in ppcl("logs", first, "--address", head)[1]

    code, said, wrong = ppcl("submit", job, "--address", head, "--follow")
    assert code == 0, said + wrong
    assert "calibration: complete, skipped" in said and "probes: complete, skipped" in said and "evaluation: done" in said
    last = status(head)
    assert last["state"] == "SUCCEEDED" and last["report"] == str(job.parent / "result" / "report.html")
    assert last["id"] == first[:-1] + "2" and (job.parent / "result" / "report.html").exists()
    code, said, _ = ppcl("list", "--address", head)
    assert [line.split(",")[0] for line in said.splitlines()[-2:]] == [f"{first}: STOPPED", f"{last['id']}: SUCCEEDED"]


def test_a_job_that_is_not_there_is_told_with_those_that_are(head):
    for command in (["status"], ["logs"], ["logs", "-f"], ["stop"]):
        code, _, wrong = ppcl(command[0], "no-such-job", *command[1:], "--address", head)
        assert code == 2 and "there is no job 'no-such-job'" in wrong and wrong.count("\n") == 1


def test_an_address_where_nothing_or_something_else_is(job):
    code, _, wrong = ppcl("submit", job, "--address", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "nothing answers at http://127.0.0.1:" in wrong and wrong.count("\n") == 1
    code, _, wrong = ppcl("status", "--address", "head:8265")
    assert code == 2 and "'head:8265' is no address of Ray's job API" in wrong


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [(b'{"ray_version": "2.44.1"}', "runs Ray 2.44.1, this ppcl Ray 2.60"), (b"<html>", "is not Ray's job API"), (b"{}", "is not Ray's job API")],
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
