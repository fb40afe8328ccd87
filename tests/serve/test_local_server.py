"""`ppcl serve` itself, in a process of its own: what it shows, how it ends, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from jobs.cli import main as cli
from ppcl.storage.object_store import Store
from tests import bucket
from tests.listening import nobody_else_gets_in
from tests.serve.waiting import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parents[2]


class Command:
    """One that runs. `said`: its lines so far."""

    def __init__(self, result, *more, environment=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "jobs.cli.main",
            "serve",
            str(result),
            "--port",
            str(self.port),
            "--set",
            "engine.variants=[teacher,all]",
        ]
        self.process = subprocess.Popen(
            [*command, "--set", "limits.steps=100000", "--set", "engine.cpus=1", *more],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
        )
        self.said: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self._children: set[psutil.Process] = set()

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))

    def serving(self):
        self.saying("serving ")
        return self

    def saying(self, words):
        def said():
            assert self.process.poll() is None, self.said
            return any(words in line for line in self.said)

        until(said, f"it says {words!r}")

    def send(self, number):
        """Signal the command alone, as `kill` does. Ray shields the children from a terminal's Ctrl-C."""
        self._children |= set(psutil.Process(self.process.pid).children(recursive=True))
        self.process.send_signal(number)

    def ended(self):
        """Its exit code, with nothing of it left."""
        code = self.process.wait(PATIENCE)
        self._reading.join(PATIENCE)
        until(
            lambda: not [child for child in self._children if child.is_running() and child.status() != "zombie"],
            "its processes end",
        )
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", self.port))
        return code

    def generate(self, steps, **more):
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        )
        usual = {"model": "all", "prompt": "a secret wish", "extra_body": {"num_inference_steps": steps}}
        return client.images.generate(**(usual | more))

    def health(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=PATIENCE) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def requests_running(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as answer:
            return [
                float(line.split()[1])
                for line in answer.read().decode().splitlines()
                if line.startswith("ppcl_pictures_running ")
            ] or [0.0]

    def kill(self):
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else ():
            child.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start():
    commands = []

    def make(*arguments, **more):
        commands.append(Command(*arguments, **more))
        return commands[-1]

    yield make
    for command in commands:
        command.kill()


@pytest.fixture(scope="module")
def bucket_server(result_folder, s3_server, tmp_path_factory):
    """A server of a result in a bucket, shared by the tests up to the one that stops it."""
    environment = {
        **bucket.CREDENTIALS,
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_MAX_ATTEMPTS": "3",
        "PPCL_SCRATCH": str(tmp_path_factory.mktemp("scratch")),
    }
    url = f"s3://{bucket.BUCKET}/served"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        store = Store(url)
        for path in sorted(result_folder.rglob("*")):
            if path.is_file():
                store.upload(path, f"result/{path.relative_to(result_folder)}")
    command = Command(f"{url}/result", environment=environment)
    yield command
    command.kill()


def test_a_result_in_a_bucket_is_served(bucket_server):
    assert bucket_server.serving().health() == 200


def test_nobody_else_reaches_the_processes_of_a_server(bucket_server):
    nobody_else_gets_in(bucket_server.serving().process.pid)


def test_ctrl_c_finishes_requests_in_flight(bucket_server):
    command = bucket_server.serving()
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(command.generate, 600)
        until(lambda: command.requests_running() == [1.0], "an image is under way")
        command.send(signal.SIGINT)
        until(lambda: command.health() == 503, "nobody is let in any more")
        with pytest.raises(openai.InternalServerError) as refused:
            command.generate(2)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert len(generating.result(PATIENCE).data[0].b64_json) > 0
    assert command.ended() == 0
    assert any("  200  POST  /v1/images/generations  " in line and "  all  " in line for line in command.said)
    assert any("  503  POST  " in line and "shutting_down" in line for line in command.said)
    # Lines of requests come by a thread of their own, and may come after it.
    assert "stopping" in command.said and "secret" not in "\n".join(command.said), command.said


def test_a_second_signal_ends_what_is_under_way_with_a_clear_answer(start, result_folder, tmp_path):
    file = tmp_path / "log.jsonl"
    command = start(result_folder, "--quiet", "--set", f"log.file={file}").serving()
    told = (
        "auto takes teacher: the result has no checker's scores; name another score in elastic.score, or list in "
        "elastic.variants what it may degrade to"
    )
    assert told in command.said
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(command.generate, 100_000)
        stream = pool.submit(lambda: list(command.generate(100_000, stream=True, partial_images=1)))
        until(lambda: command.requests_running() == [2.0], "both are under way")
        command.send(signal.SIGTERM)
        command.saying("finishing 2 requests; Ctrl-C again ends them")
        command.send(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as refused:
            whole.result(PATIENCE)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        with pytest.raises(openai.APIError) as broken:
            stream.result(PATIENCE)
        assert "shut down" in str(broken.value)
    assert command.ended() == 0
    assert not any("POST" in line for line in command.said), "it was to be quiet"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line.get("error") for line in lines if line["route"] == "/v1/images/generations"} == {"shutting_down"}
    assert all(line["id"] for line in lines) and "secret" not in file.read_text()


def test_ctrl_c_while_it_starts_leaves_nothing_behind(start, result_folder):
    command = start(result_folder)
    until(lambda: len(psutil.Process(command.process.pid).children(recursive=True)) > 3, "Ray starts")
    time.sleep(2)
    command.send(signal.SIGINT)
    assert command.ended() == 130
    assert "Traceback" not in "\n".join(command.said)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the command in this process; gives what it says of a mistake, in one line."""
    monkeypatch.delenv("PPCL_API_KEYS", raising=False)

    def start(name):
        raise AssertionError(f"{name} was started")

    # A mistake that passes fails the test instead of serving.
    monkeypatch.setattr("serve.local_server.close_embedded_ray", lambda: start("Ray"))

    def run(result, *arguments):
        monkeypatch.setattr(sys, "argv", ["ppcl", "serve", str(result), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code == 2 and not output.out and output.err.count("\n") == 1, output
        return output.err.removeprefix("ppcl: ").rstrip("\n")

    return run


def test_mistakes_are_told_before_anything_is_started(refused, result_folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert (
            refused(result_folder, "--port", port)
            == f"127.0.0.1:{port} cannot be listened at: Address already in use; choose another --host or --port"
        )
    assert "there is no API key; set PPCL_API_KEYS or http.api_keys_file, or listen at 127.0.0.1" in refused(
        result_folder, "--host", "0.0.0.0"
    )
    assert f"log.file {tmp_path} cannot be written: Is a directory" in refused(
        result_folder, "--set", f"log.file={tmp_path}"
    )
    assert "there is no variant 'p50' in" in refused(result_folder, "--set", "engine.variants=[p50]")
