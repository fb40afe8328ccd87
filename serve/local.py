"""`ppcl serve`: the application on a Ray inside this machine, until it is stopped."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable

from ppcl.errors import UserError
from ppcl.storage import is_url
from serve.config import Served

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Nobody else can reach this Ray: it has no dashboard and listens on this machine alone.
    "RAY_AUTH_MODE": "disabled",
    # Or the autoscaler would learn of the load only every ten seconds.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # Or whatever else runs on this machine goes first: Ray's workers are nice by 15.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
NAME = "ppcl"


def check(settings: Served) -> None:
    """Raises `UserError` for what can be told before anything is started."""
    from ppcl.result import Result
    from serve.api import Keys, check_exposure

    check_exposure(settings.http, Keys(settings.http))
    known = Result(settings.result, settings.teacher).variants
    for key, names in (("engine.variants", settings.engine.variants), ("elastic.variants", settings.elastic.variants)):
        for name in names or ():
            if name not in known:
                raise UserError(f"{key}: there is no variant {name!r} in {settings.result}; there are {', '.join(known)}")
    with socket.socket(socket.AF_INET6 if ":" in settings.http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http.host, settings.http.port))
        except OSError as error:
            where = f"{settings.http.host}:{settings.http.port}"
            raise UserError(f"{where} cannot be listened at: {error.strerror}; choose another --host or --port") from None


def run(settings: Served, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Raises `UserError`."""
    check(settings)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Replicas have folders of their own.
    absolute = {
        name: path if is_url(path) else path.absolute()
        for name, path in (("result", settings.result), ("teacher", settings.teacher))
        if path
    }
    settings = settings.model_copy(update=absolute)
    import ray
    from ray import serve

    from serve.deployment import application, cpus

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    say("starting Ray and loading the variants")
    ray.init("local", num_cpus=max(os.cpu_count() or 1, 4), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.http.host, "port": settings.http.port})
        serve.run(application(settings), name=NAME, route_prefix="/")
        host = f"[{settings.http.host}]" if ":" in settings.http.host else settings.http.host
        say(f"serving {settings.result} at http://{host}:{settings.http.port} ({cpus(settings):g} CPUs a replica); Ctrl-C stops")
        stopped.wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        raise UserError(_reason(str(error))) from error
    finally:
        say("stopping")
        # Ray tells of its own controller's end as if it were a failure.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            serve.shutdown()
            ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _reason(text: str) -> str:
    """What a replica that could not start said, from Ray's report of it."""
    told = re.findall(r"(?:UserError|ValueError|RuntimeError|OSError|OutOfMemoryError): (.+)", text)
    return f"the engine could not start: {told[-1].strip() if told else text.strip().splitlines()[0]}"
