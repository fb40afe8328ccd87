"""`ppcl serve`: the application on a Ray inside this machine, until it is stopped."""

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

from ppcl.config.location import is_url
from ppcl.errors import UserError
from ppcl.private_ray import close_embedded_ray
from serve.config import Served
from serve.logging import plain

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Or the autoscaler would learn of the load only every ten seconds.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # Or whatever else runs on this machine goes first: Ray's workers are nice by 15.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
NAME = "ppcl"

# Seconds between looks at the log and at what is still under way.
_LOOK = 0.2
# Seconds that requests have to be answered that the server ends by itself.
_LAST = 10.0


def check(settings: Served) -> None:
    """Raises `UserError` for what can be told before anything is started."""
    from ppcl.result import Result
    from serve.api import ApiKeys, check_exposure

    check_exposure(settings.http, ApiKeys(settings.http))
    known = Result(settings.result, settings.teacher).variants
    for key, names in (("engine.variants", settings.engine.variants), ("elastic.variants", settings.elastic.variants)):
        for name in names or ():
            if name not in known:
                raise UserError(
                    f"{key}: there is no variant {name!r} in {settings.result}; there are {', '.join(known)}"
                )
    with socket.socket(socket.AF_INET6 if ":" in settings.http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http.host, settings.http.port))
        except OSError as error:
            where = f"{settings.http.host}:{settings.http.port}"
            raise UserError(
                f"{where} cannot be listened at: {error.strerror}; choose another --host or --port"
            ) from None
    if settings.log.file is not None:
        try:
            settings.log.file.open("a").close()
        except OSError as error:
            raise UserError(
                f"log.file {settings.log.file} cannot be written: {error.strerror}; choose another file"
            ) from None


def run(settings: Served, say: Callable[[str], None], quiet: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is under way; a second one ends that too.

    `say`: shows a line. `quiet`: no line for each request. Raises `UserError`, and `KeyboardInterrupt` where it was stopped
    before it served.
    """
    check(settings)
    close_embedded_ray()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _log(settings, say, quiet) as file, _Signals() as signals:
        # Replicas have folders of their own.
        absolute = {
            name: path if is_url(path) else path.absolute()
            for name, path in (("result", settings.result), ("teacher", settings.teacher))
            if path
        }
        _serve(
            settings.model_copy(update=absolute | {"log": settings.log.model_copy(update={"file": file})}), signals, say
        )


def _serve(settings: Served, signals: _Signals, say: Callable[[str], None]) -> None:
    import ray
    from ray import serve

    from serve.ray_app import application, cpus

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    say("starting Ray and loading the variants")
    try:
        ray.init(
            "local",
            num_cpus=max(os.cpu_count() or 1, 4),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # Ray has put its own handler there, which ends the process.
        signals.handle()
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.http.host, "port": settings.http.port})
        try:
            serve.run(application(settings), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise UserError(_reason(str(error))) from error
        host = f"[{settings.http.host}]" if ":" in settings.http.host else settings.http.host
        say(
            f"serving {settings.result} at http://{host}:{settings.http.port} ({cpus(settings):g} CPUs a replica); Ctrl-C stops"
        )
        signals.wait()
        _finish(settings.autoscaling.shutdown_seconds, signals, say)
    finally:
        signals.ignore()
        say("stopping")
        # Ray tells of its own controller's end as if it were a failure.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # Where Ray is not there yet, Serve would start one to have something to shut down.
            if ray.is_initialized():
                serve.shutdown()
            ray.shutdown()


def _finish(seconds: float, signals: _Signals, say: Callable[[str], None]) -> None:
    """Let nobody in any more, and wait for those inside, so long at most; then, or at another signal, end them with a 503."""
    from ray import serve

    ingress, told = serve.get_app_handle(NAME), False

    def under_way() -> int:
        return sum(ingress.broadcast("stop").results(timeout_s=_LAST))

    def wait(end: float, until: Callable[[], bool] = lambda: False) -> int:
        nonlocal told
        while (left := under_way()) and not until() and time.monotonic() < end:
            if not told:
                say(
                    f"finishing {left} request{'s' if left > 1 else ''}; Ctrl-C again ends {'them' if left > 1 else 'it'}"
                )
                told = True
            time.sleep(_LOOK)
        return left

    with contextlib.suppress(TimeoutError, *_lost()):
        if wait(time.monotonic() + seconds, lambda: signals.came > 1):
            serve.get_deployment_handle("engine", NAME).broadcast("close").results(timeout_s=_LAST)
            wait(time.monotonic() + _LAST)


def _lost() -> tuple[type[Exception], ...]:
    """What a handle raises where the replicas that are asked are gone."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException


class _Signals:
    """SIGINT and SIGTERM: the first interrupts the start, as Ctrl-C does any program; from `wait` on they are counted only."""

    _numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.came, self._counting = 0, False

    def __enter__(self) -> _Signals:
        self._before = {number: signal.getsignal(number) for number in self._numbers}
        self.handle()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def handle(self) -> None:
        for number in self._numbers:
            signal.signal(number, self._come)

    def ignore(self) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def wait(self) -> None:
        """Until one comes."""
        self._counting = True
        while not self.came:
            time.sleep(_LOOK)

    def _come(self, *_: Any) -> None:
        self.came += 1
        if not self._counting:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _log(settings: Served, say: Callable[[str], None], quiet: bool) -> Iterator[Path | None]:
    """The file that replicas log to, its lines shown as they come: the one that is set, or one for as long as it is served."""
    with contextlib.ExitStack() as ends:
        file = settings.log.file and settings.log.file.absolute()
        if quiet:
            yield file
            return
        if file is None:
            file = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="ppcl-serve-"))) / "log.jsonl"
            file.touch()
        ended = threading.Event()
        showing = threading.Thread(target=_show, args=(file, file.stat().st_size, ended, say), daemon=True)
        showing.start()
        try:
            yield file
        finally:
            ended.set()
            showing.join()


def _show(file: Path, begin: int, ended: threading.Event, say: Callable[[str], None]) -> None:
    with file.open(encoding="utf-8") as lines:
        lines.seek(begin)
        rest, last = "", False
        while not last:
            last = ended.wait(_LOOK)
            *whole, rest = (rest + lines.read()).split("\n")
            for line in whole:
                say(plain(line))


def _reason(text: str) -> str:
    """What a replica that could not start said, from Ray's report of it."""
    told = re.findall(r"(?:UserError|ValueError|RuntimeError|OSError|OutOfMemoryError): (.+)", text)
    return f"the engine could not start: {told[-1].strip() if told else text.strip().splitlines()[0]}"
