"""Heads of real clusters with a job API, and a server between us and one that breaks connections."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Head:
    """A cluster's head: the addresses of its job API and its GCS, and the folder of its logs."""

    api: str
    gcs: str
    logs: Path


@contextlib.contextmanager
def started(away, python=sys.executable, **settings):
    """`ray start --head` with a dashboard, from the folder `away` where no ppcl is; gives its `Head`.

    `settings`: of its environment.
    """
    dashboard, gcs = free_port(), free_port()
    # The names of sockets in it must be short, and pytest's own folders are not.
    short = tempfile.mkdtemp(prefix="ray")
    environment = (
        {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"RAY_JOB_START_TIMEOUT_SECONDS": "300"} | settings
    )
    environment["PATH"] = os.pathsep.join([os.path.dirname(python), os.environ["PATH"]])
    head = subprocess.Popen(
        [
            python,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={gcs}",
            "--num-cpus=4",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={short}",
            "--object-store-memory=200000000",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            "--include-dashboard=true",
        ],
        cwd=away,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 240
    try:
        while not _answers(address):
            assert head.poll() is None, head.stdout.read()
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.2)
        yield Head(address, f"127.0.0.1:{gcs}", Path(short, "session_latest", "logs"))
    finally:
        # Asked to end, it takes half a minute.
        family = [*psutil.Process(head.pid).children(recursive=True), head] if head.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        head.wait()
        shutil.rmtree(short, ignore_errors=True)


def _answers(address):
    """Whether a job API is there, with or without asking for a token."""
    try:
        return requests.get(f"{address}/api/version", timeout=10).status_code in (200, 401, 403)
    except requests.exceptions.RequestException:
        return False


@contextlib.contextmanager
def between(head, breaks, agentless=()):
    """A server between us and the head.

    The first connections to a log end after a line each, as `breaks` says: "closed", "broken". For every item of
    `agentless` a job is refused as by a head whose agents have not started yet.
    """
    from aiohttp import ClientSession, ClientWSTimeout, web

    async def relay(request):
        async with ClientSession() as session:
            if request.method == "POST" and agentless:
                agentless.pop()
                answer = "No available agent to submit job, please try again later."
                return web.Response(status=500, text=answer)
            if not request.path.endswith("/logs/tail"):
                async with session.request(request.method, head + request.path_qs, data=await request.read()) as answer:
                    return web.Response(
                        body=await answer.read(), status=answer.status, content_type=answer.content_type
                    )
            ours, end = web.WebSocketResponse(), breaks.pop(0) if breaks else None
            await ours.prepare(request)
            async with session.ws_connect(head + request.path, timeout=ClientWSTimeout(ws_close=0.1)) as theirs:
                async for message in theirs:
                    await ours.send_str(message.data)
                    if end == "closed":
                        await ours.close()
                    elif end == "broken":
                        request.transport.abort()
                    if end:
                        break
            return ours

    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve():
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(application, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        ready.set()
        await over.wait()
        await runner.cleanup()

    port, over = free_port(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
