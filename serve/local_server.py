"""`ppcl serve`: runs the application on a Ray of this machine until it is stopped."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ppcl.errors import UserError
from ppcl.own_packages import check_working_folder
from ppcl.private_ray import close_embedded_ray, start_embedded_ray
from ppcl.result import Result
from serve.api import ApiKeys, check_exposure
from serve.config import Served
from serve.logging import readable

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # By default the autoscaler learns of the load only every ten seconds.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # By default Ray's workers run at niceness 15, behind everything else on the machine.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
NAME = "ppcl"

# Seconds between looks at the log and at the requests in flight.
_POLL_S = 0.2
# Seconds in which Ray's processes must exit by themselves once Ray is shut down.
_EXIT_TIMEOUT_S = 3.0
# Seconds in which requests that the server ends must be answered.
_CANCEL_TIMEOUT_S = 10.0


def check(settings: Served) -> None:
    """Check the settings before anything starts. Raises `UserError`."""
    check_exposure(settings.http, ApiKeys(settings.http))
    known = Result(settings.result, settings.teacher).variants
    for key, names in (("engine.variants", settings.engine.variants), ("elastic.variants", settings.elastic.variants)):
        for name in names or ():
            if name not in known:
                raise UserError(
                    f"{key}: there is no variant {name!r} in {settings.result}; there are {', '.join(known)}"
                )
    _check_address(settings.http.host, settings.http.port)
    if settings.log.file is not None:
        try:
            settings.log.file.open("a").close()
        except OSError as error:
            raise UserError(
                f"log.file {settings.log.file} cannot be written: {error.strerror}; choose another file"
            ) from None


def _check_address(host: str, port: int) -> None:
    """Raises `UserError` where the address is taken or is not one of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened at: {error.strerror}; choose another --host or --port"
            ) from None


def run(settings: Served, say: Callable[[str], None], quiet: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests in flight; a second signal ends these too.

    `say`: shows a line. `quiet`: show no line per request. Raises `UserError`, and `KeyboardInterrupt` where a signal
    arrives before the server is ready.
    """
    check(settings)
    check_working_folder(Path.cwd())
    close_embedded_ray()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _log(settings, say, quiet) as file, _Signals() as signals:
        # Replicas run in folders of their own, so their paths must be absolute.
        locations = {
            name: location.absolute()
            for name, location in (("result", settings.result), ("teacher", settings.teacher))
            if location
        }
        loras = settings.engine.loras and settings.engine.loras.absolute()
        engine = settings.engine.model_copy(update={"loras": loras})
        log = settings.log.model_copy(update={"file": file})
        _serve(settings.model_copy(update=locations | {"log": log, "engine": engine}), signals, say)


def _serve(settings: Served, signals: _Signals, say: Callable[[str], None]) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    say("starting Ray and loading the variants")
    ready = False
    try:
        cpus = _start(settings, signals)
        ready = True
        host = f"[{settings.http.host}]" if ":" in settings.http.host else settings.http.host
        address = f"http://{host}:{settings.http.port}"
        say(_auto())
        say(f"serving {settings.result} at {address} ({cpus:g} CPUs a replica); Ctrl-C stops")
        signals.wait()
        _finish(settings.autoscaling.shutdown_seconds, signals, say)
    finally:
        signals.ignore()
        say("stopping")
        _stop(ready)


def _auto() -> str:
    """Return a line about the variants of `auto`, as the engine chose them."""
    # Not at the top: Ray reads the environment that `run` sets when it is imported.
    from ray import serve

    info = serve.get_deployment_handle("engine", NAME).pipeline.remote().result(timeout_s=_CANCEL_TIMEOUT_S)
    return f"auto takes {', '.join(info.auto)}: {info.auto_by}"


def _stop(ready: bool) -> None:
    """End Ray and every process that it started. `ready`: the application is served."""
    # Not at the top: Ray reads the environment that `run` sets when it is imported.
    import ray
    from ray import serve

    processes = psutil.Process().children(recursive=True)
    # Ray reports the end of its own controller as a failure.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # Serve waits for a replica that is still loading to finish that first; ending Ray ends it at once.
        if ready:
            serve.shutdown()
        ray.shutdown()
    # Agents of a raylet that was interrupted in its start notice its end only after a minute.
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _start(settings: Served, signals: _Signals) -> float:
    """Start Ray and the application; return the CPUs of a replica. Raises `UserError` where the engine cannot start."""
    # Not at the top: Ray reads the environment that `run` sets when it is imported.
    from ray import serve

    from serve.ray_app import application, cpus

    start_embedded_ray()
    # Ray has installed a handler of its own, which ends the process.
    signals.handle()
    serve.start(proxy_location="HeadOnly", http_options={"host": settings.http.host, "port": settings.http.port})
    try:
        serve.run(application(settings), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise UserError(_reason(str(error))) from error
    return cpus(settings)


def _finish(seconds: float, signals: _Signals, say: Callable[[str], None]) -> None:
    """Refuse new requests and wait for those in flight.

    After `seconds`, or at a second signal, the remaining ones end with 503.
    """
    # Not at the top: Ray reads the environment that `run` sets when it is imported.
    from ray import serve

    ingress, announced = serve.get_app_handle(NAME), False

    def in_flight() -> int:
        return sum(ingress.broadcast("stop").results(timeout_s=_CANCEL_TIMEOUT_S))

    def wait(end: float, interrupted: Callable[[], bool] = lambda: False) -> int:
        nonlocal announced
        while (count := in_flight()) and not interrupted() and time.monotonic() < end:
            if not announced:
                requests, them = ("requests", "them") if count > 1 else ("request", "it")
                say(f"finishing {count} {requests}; Ctrl-C again ends {them}")
                announced = True
            time.sleep(_POLL_S)
        return count

    with contextlib.suppress(TimeoutError, *_replica_errors()):
        if wait(time.monotonic() + seconds, lambda: signals.count > 1):
            serve.get_deployment_handle("engine", NAME).broadcast("close").results(timeout_s=_CANCEL_TIMEOUT_S)
            wait(time.monotonic() + _CANCEL_TIMEOUT_S)


def _replica_errors() -> tuple[type[Exception], ...]:
    """Return what a handle raises where its replicas are gone."""
    # Not at the top: Ray reads the environment that `run` sets when it is imported.
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException


class _Signals:
    """SIGINT and SIGTERM raise `KeyboardInterrupt` until `wait` is called, and are only counted from then on."""

    _numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.count, self._counting = 0, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.getsignal(number) for number in self._numbers}
        self.handle()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def handle(self) -> None:
        for number in self._numbers:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def wait(self) -> None:
        """Return once a signal arrives."""
        self._counting = True
        while not self.count:
            time.sleep(_POLL_S)

    def _receive(self, *_: Any) -> None:
        self.count += 1
        if not self._counting:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _log(settings: Served, say: Callable[[str], None], quiet: bool) -> Iterator[Path | None]:
    """Give the file that replicas log to, and show its lines as they come. It is temporary where none is configured."""
    with contextlib.ExitStack() as ends:
        file = settings.log.file and settings.log.file.absolute()
        if quiet:
            yield file
            return
        if file is None:
            file = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="ppcl-serve-"))) / "log.jsonl"
            file.touch()
        ended = threading.Event()
        showing = threading.Thread(target=_follow, args=(file, file.stat().st_size, ended, say), daemon=True)
        showing.start()
        try:
            yield file
        finally:
            ended.set()
            showing.join()


def _follow(file: Path, start: int, ended: threading.Event, say: Callable[[str], None]) -> None:
    with file.open(encoding="utf-8") as lines:
        lines.seek(start)
        rest, last = "", False
        while not last:
            last = ended.wait(_POLL_S)
            *whole, rest = (rest + lines.read()).split("\n")
            for line in whole:
                say(readable(line))


def _reason(text: str) -> str:
    """Return why a replica could not start, from Ray's report."""
    reasons = re.findall(r"(?:UserError|ValueError|RuntimeError|OSError|OutOfMemoryError): (.+)", text)
    return f"the engine could not start: {reasons[-1].strip() if reasons else text.strip().splitlines()[0]}"
