"""A Ray that only this process and its children can use. Importing this module does not import Ray."""

from __future__ import annotations

import logging
import os
import secrets
import sys

from ppcl.errors import UserError

_TOKEN_BYTES = 32
# Logical CPUs: enough for a small pipeline beside Ray Data, even on a machine with fewer cores.
_LEAST_LOGICAL_CPUS = 4
# Ray gives its own processes 30 s to start, which is too short where their files must be read first.
_ATTEMPTS = 3
_TIMED_OUT = "timed out during startup"


def close_embedded_ray() -> None:
    """Set the environment so that nobody else can reach a Ray that this process starts. Call it before Ray is imported.

    Two settings are needed, since each leaves a gap. Ray binds to all interfaces unless an environment variable says
    that this machine has no cluster; its name is historical, it works on every system. The gRPC port of Ray Serve's
    replicas stays on all interfaces even then, so every request must carry a random token, new for each run, that only
    child processes inherit.

    Raises `RuntimeError` where Ray was imported already: it reads the variable at import.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its embedded instance was closed to others")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(_TOKEN_BYTES)


def start_embedded_ray() -> None:
    """Start Ray on this machine, as `close_embedded_ray` has prepared it; again where it did not come up in time.

    Raises `UserError` where it never does.
    """
    import psutil
    import ray

    cpus = max(os.cpu_count() or 1, _LEAST_LOGICAL_CPUS)
    others = set(psutil.Process().children())
    for _ in range(_ATTEMPTS):
        try:
            # Without "local" Ray would join one that somebody else has started on this machine.
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:
            # Ray has no class of its own for it, and leaves the processes behind that came too late.
            if _TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            for process in set(psutil.Process().children()) - others:
                process.kill()
    raise UserError(
        f"Ray did not start within 30 s, {_ATTEMPTS} times in a row: this machine is too busy; run the same command "
        "again"
    )
