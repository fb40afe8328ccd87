"""The environment of a Ray that only this process and its children can use. Ray itself is not imported here."""

from __future__ import annotations

import os
import secrets
import sys

_TOKEN_BYTES = 32


def close_embedded_ray() -> None:
    """Set the environment so that a Ray started by this process cannot be reached by anybody else. Call it before Ray is imported.

    Two things are needed, since each leaves a gap. Ray binds to the machine's outward address and to all interfaces unless it is
    told that this machine has no cluster; the name of that switch is historical, it works on every system. The gRPC port of Ray
    Serve's replicas stays on all interfaces even then, so every request must carry a token that is drawn here, new for each run,
    and that only child processes inherit.

    Raises `RuntimeError` where Ray was imported already: it reads the switch at import.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its embedded instance was closed to others")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(_TOKEN_BYTES)
