"""Which Ray a job runs on: one started inside this process, or a running cluster."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.runtime.stopping import raise_on_signals, shut_down_ray, stop_signals
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.own_packages import check_working_folder
from ppcl.private_ray import close_embedded_ray, start_embedded_ray

# Ray Train asks its workers all the time; who has not answered for so long, seconds, is dead to it.
_SIGN_OF_LIFE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"

# What Ray looks up by itself.
_BY_NAME = ("auto", "local")
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 30

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # It would tell training functions of nodes that will go; ours resume from checkpoints and do not listen.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Idle workers are kept: importing torch anew costs more than the memory they hold.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def connected(address: str | None, config: Config) -> Iterator[str]:
    """A Ray to run on, for the length of a `with` block; gives the device the job's workers use.

    Within the block SIGINT and SIGTERM raise `jobs.runtime.stopping.Stopped`. Raises `UserError` where no Ray can be
    reached or started.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ[_SIGN_OF_LIFE] = str(config.worker_timeout_s)
    if address is None:
        check_working_folder(Path.cwd())
        close_embedded_ray()
    with stop_signals():
        try:
            _connect(address)
            if threading.current_thread() is threading.main_thread():
                raise_on_signals()
            yield device_of(config)
        finally:
            shut_down_ray()


def _connect(address: str | None) -> None:
    """Raises `UserError` where no Ray can be reached or started."""
    import ray
    import ray.data  # configures its logger when it is imported
    import ray.train  # noqa: F401 - configures its logger, too
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # of a compiled module
    from ray.exceptions import AuthenticationError

    if (
        address
        and is_token_auth_enabled()
        and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    ):
        # Ray would abort the process.
        raise needs_token(address)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _init(address)
    except AuthenticationError:
        raise needs_token(address or "this machine") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        # One that was looked up by its name was not asked before.
        if address == "auto" and _asks_for_token(_health_check()):
            raise needs_token(address) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("Version mismatch"):
            raise UserError(f"the cluster at {address} runs another Ray or Python than this ppcl: {reason}") from None
        raise UserError(f"no Ray cluster could be reached at {address or 'this machine'}: {reason}") from None


def _init(address: str | None) -> None:
    import ray

    if address is None:
        start_embedded_ray()
    else:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def needs_token(address: str) -> UserError:
    return UserError(
        f"the cluster at {address} needs a token; none or a wrong one was given; set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN"
    )


def _check_reachable(address: str) -> None:
    """Raises `UserError` where nothing, or something else than a Ray that lets us in, is at `host:port`.

    Ray itself would go on trying for minutes, with a page of warnings.
    """
    if address in _BY_NAME:
        return
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address!r} is that of a Ray Client, which cannot run a job; give host:port of the GCS, as "
            "HEAD:6379"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address {address!r} is not an address; give host:port or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"no Ray cluster could be reached at {address}: {reason}; check the address of the head node"
        ) from None
    wrong = _health_check("--address", address)
    if wrong is None:
        return
    if _asks_for_token(wrong):
        raise needs_token(address)
    raise UserError(
        f"what listens at {address} is not the head of a Ray cluster; give the address ray start printed there"
    )


def _health_check(*where: str) -> str | None:
    """What Ray has against a cluster; None where it is well."""
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check", *where]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return "no answer"
    return answer.stderr if answer.returncode else None


def _asks_for_token(wrong: str | None) -> bool:
    return wrong is not None and "AuthenticationError" in wrong


def device_of(config: Config) -> str:
    """What the job's workers use. Raises `UserError` where the configuration wants a GPU and the cluster can have none.

    Where it has none yet, its autoscaler is asked for one.
    """
    if config.device == "cpu":
        return "cpu"
    if number("GPU"):
        return "cuda"
    from jobs.runtime import autoscaler

    can = autoscaler.can_have([{"GPU": 1}])
    if config.device == "cuda" and can is False:
        raise UserError("device is 'cuda', but the cluster has no GPU; set device: cpu or add GPU nodes")
    if config.device == "auto" and can is None:
        raise UserError(
            "the cluster's autoscaler does not report whether it can add a GPU; set device: cuda or device: cpu"
        )
    return "cuda" if config.device == "cuda" or can else "cpu"


def number(kind: str) -> int:
    """How many of a resource, such as `GPU`, the cluster has now."""
    import ray

    return int(ray.cluster_resources().get(kind, 0))
