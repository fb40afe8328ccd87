"""Whether a cluster has the places that some workers need."""

from __future__ import annotations

import time

from jobs.cluster import most
from ppcl.errors import UserError


def check_resources(workers: int, device: str, key: str) -> None:
    """Refuse at once what the cluster can never run. Raises `UserError` with what it has."""
    kind = "GPU" if device == "cuda" else "CPU"
    have = most(kind)
    # Ray Data and the progress actors need a CPU beside the workers, or both would wait for each other.
    usable = have if kind == "GPU" else have - 1
    if workers > usable:
        raise UserError(
            f"{key} asks for {workers} workers, but the cluster has {have} {kind}s, of which {max(usable, 0)} can be used by "
            f"workers; ask for fewer or add nodes"
        )


class Places:
    """Whether the cluster has places for some workers. A node that was lost may come back: for `patience` seconds it is waited for."""

    def __init__(self, workers: int, device: str, key: str, patience: float):
        self.asked, self.patience = (workers, device, key), patience
        self.lacking_since: float | None = None

    def enough(self) -> bool:
        """Raises `UserError` once there have been too few for too long."""
        try:
            check_resources(*self.asked)
        except UserError:
            now = time.monotonic()
            self.lacking_since = self.lacking_since or now
            if now - self.lacking_since > self.patience:
                raise
            return False
        self.lacking_since = None
        return True

    def wait(self) -> None:
        while not self.enough():
            time.sleep(1)
