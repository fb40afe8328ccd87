"""The environment of a Ray that only this process and its children can use. Ray itself is not imported here."""

from __future__ import annotations

import os
import secrets
import sys

_TOKEN_BYTES = 32


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
