"""Jobs sent to a real cluster with a dashboard, by the command line alone; teacher, prompts and result lie in a bucket."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
import yaml
from safetensors.torch import load

from ppcl.config import Config
from ppcl.storage import Store, _files
from tests import bucket
from tests.jobs.test_compress import ppcl

pytestmark = pytest.mark.dashboard


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def store(s3_server, tmp_path_factory):
    """A place in a bucket, known to this process and to all it starts; `store.scratch` is what the cluster's node keeps of it."""
    with pytest.MonkeyPatch.context() as patch:
        scratch = tmp_path_factory.mktemp("node") / "scratch"
        for name, value in {**bucket.CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.url, "PPCL_SCRATCH": str(scratch)}.items():
            patch.setenv(name, value)
        _files.cache_clear()
        made = Store(f"s3://{bucket.BUCKET}/submitted")
        made.scratch = scratch
        yield made
    _files.cache_clear()


@pytest.fixture(scope="module")
def head(store, tmp_path_factory):
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
        # Asked to end, it takes half a minute.
        family = [*psutil.Process(head.pid).children(recursive=True), head]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        head.wait()


@pytest.fixture(scope="module")
def job(store, tmp_path_factory, teacher_folder):
    for path in sorted(teacher_folder.rglob("*")):
        if path.is_file():
            store.upload(path, f"teacher/{path.relative_to(teacher_folder)}")
    prompts = [f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "cross")]
    store.write("prompts.txt", "\n".join(prompts).encode())
    values = {
        "teacher": f"{store.url}/teacher",
        "prompts": f"{store.url}/prompts.txt",
        "output": f"{store.url}/result",
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "held_out": 0.3},
        "width": {"hidden": [], "text": False, "modulations": False},
        "distillation": {"steps": 40, "batch_size": 4, "warmup": 2, "pipeline": 2, "checkpoint_every": 2},
        "variants": {"budgets": [0.9]},
        "evaluation": {"limit": 2},
    }
    path = tmp_path_factory.mktemp("job") / "config.yaml"
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


@pytest.fixture(scope="module")
def stopped(head, job, store, s3_server):
    """The id of a job that was stopped in its distillation, when checkpoints of it were in the bucket."""
    code, said, wrong = ppcl("submit", job, "--address", head)
    assert code == 0, said + wrong
    first = re.match(r"(ppcl-\w{8}-1): sent", said)[1]
    assert f"{first}: RUNNING, calibration" in said
    code, _, wrong = ppcl("submit", job, "--address", head)
    assert code == 2 and f"the job {first} works on {store.url}/result already" in wrong

    # The stage cannot end before it is stopped: what it made does not go up.
    stopped, failure = threading.Event(), bucket.error(503, "SlowDown")
    with s3_server.failing(lambda r: stopped.wait(240) and failure(r), lambda r: r.method == "PUT" and "/students/0" in r.path):
        deadline = time.monotonic() + 240
        while not store.objects("result/students/checkpoints"):
            now = status(head)
            assert now["state"] in ("PENDING", "RUNNING"), now
            assert time.monotonic() < deadline
            time.sleep(0.5)
        now = status(head)
        assert now["id"] == first and now["output"] == f"{store.url}/result" and now["begun"] and not now["ended"]
        assert now["stage"] == "students" and now["complete"] == ["calibration", "probes", "detection"]
        code, said, wrong = ppcl("stop", "--address", head)
        stopped.set()
    assert code == 0 and f"{first}: STOPPED" in said, said + wrong
    return first


def test_a_stopped_job_says_so_and_has_left_what_it_completed(head, stopped, store):
    code, _, wrong = ppcl("stop", stopped, "--address", head)
    assert code == 2 and "has ended already" in wrong
    assert "ppcl: stopped; the same command continues" in ppcl("logs", stopped, "--address", head)[1]
    assert list(json.loads(store.read("result/manifest.json"))["stages"]) == ["calibration", "probes", "detection"]
    assert "result/lock.json" not in store.objects()


@pytest.fixture(scope="module")
def continued(head, stopped, job, store, s3_server):
    """What the job said that was submitted again, to a node that has nothing of the first one; and the checkpoints that it found."""
    kept = {name: load(store.read(name)) for name in store.objects("result/students/checkpoints")}
    shutil.rmtree(store.scratch)
    s3_server.requests.clear()
    # The store has a bad moment, too.
    with s3_server.failing(bucket.error(503, "SlowDown"), lambda r: r.method == "GET" and r.range is not None, times=2):
        code, said, wrong = ppcl("submit", job, "--address", head, "--follow")
    assert code == 0, said + wrong
    return said, kept


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head, stopped, continued, store):
    said, _ = continued
    for stage in ("calibration", "probes", "detection"):
        assert f"{stage}: complete, skipped" in said
    assert "students: done" in said and "evaluation: done" in said and "p90" in said
    last = status(head)
    assert last["state"] == "SUCCEEDED" and last["report"] == f"{store.url}/result/report.html" and last["id"] == stopped[:-1] + "2"
    code, said, _ = ppcl("list", "--address", head)
    assert [line.split(",")[0] for line in said.splitlines()[-2:]] == [f"{stopped}: STOPPED", f"{last['id']}: SUCCEEDED"]


def test_the_bucket_holds_what_the_manifest_names_and_weights_were_read_by_range(continued, store, s3_server):
    _, kept = continued
    # Two ranks of distillation read their own blocks; only the pipelines that make pictures are whole.
    weights = [r for r in s3_server.requests if r.method == "GET" and "/teacher/transformer/" in r.path and r.path.endswith("safetensors")]
    assert any(r.range for r in weights)
    result = Store(f"{store.url}/result")
    manifest = json.loads(result.read("manifest.json"))
    names = {name for entry in manifest["stages"].values() for name in entry["files"]}
    there = {name for name in result.objects() if not name.startswith("cache/")}
    assert there - names == {"manifest.json", "config.json", "log.txt", "report.html"} and names <= there
    assert kept
    for name, tensors in kept.items():
        done = load(result.read(f"students/{name.rpartition('/')[2]}"))
        assert all(t.isfinite().all() for t in done.values()) and len(tensors) > len(done)


def test_a_result_in_a_bucket_is_opened_anywhere_and_a_damaged_one_is_told(continued, store, monkeypatch, tmp_path):
    result = Store(f"{store.url}/result")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "another node"))
    picture = tmp_path / "x.png"
    code, said, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", picture)
    assert code == 0 and picture.exists(), said + wrong
    student = next(name for name in result.objects("students") if name.endswith("safetensors"))
    result.write(student, b"damaged")
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "a third node"))
    code, _, wrong = ppcl("generate", result.url, "a red circle", "--variant", "all", "-o", tmp_path / "y.png")
    assert code == 2 and f"{result.url}/{student} is damaged or gone" in wrong and wrong.count("\n") == 1


def test_paths_are_made_absolute_before_a_job_is_sent_and_urls_are_not(tmp_path, monkeypatch):
    from jobs.submission import absolute

    monkeypatch.chdir(tmp_path)
    sent = absolute(Config(teacher="t", prompts="s3://b/p.txt", output="o", evaluation={"prompts": "e.txt"}))
    assert (sent.teacher, sent.prompts, sent.output) == (tmp_path / "t", "s3://b/p.txt", tmp_path / "o")
    assert sent.evaluation.prompts == tmp_path / "e.txt"


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
