"""Check that the Ray cluster has the CPUs or GPUs that a stage needs, and wait for missing nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable

from jobs.runtime import autoscaler
from jobs.runtime.cluster import number
from ppcl.errors import UserError

# Times the worker_timeout_s, at most, that is waited while an autoscaler has nodes on their way.
_LAUNCHING = 4


def shortfall(workers: int, device: str, key: str) -> str | None:
    """What the cluster lacks for these workers, in words for the user; None where it lacks nothing."""
    kind = _kind(device)
    have = number(kind)
    usable = max(have - _beside(device), 0)
    if workers <= usable:
        return None
    return (
        f"{key} asks for {_count(workers, 'worker')}, but the cluster has {_count(have, kind)}, of which {usable} can "
        "be used by workers"
    )


def refuse_impossible(needs: Iterable[tuple[int, str]], device: str) -> None:
    """Refuse at once what the cluster can never run. Raises `UserError` with what it has.

    `needs`: numbers of workers, not at the same time, and the configuration keys that ask for them. An autoscaler is
    asked for the most of them: that it can add them is known only once it does.
    """
    missing = [(workers, key, reason) for workers, key in needs if (reason := shortfall(workers, device, key))]
    if not missing:
        return
    workers, _, reason = max(missing, key=lambda need: need[0])
    if not autoscaler.runs():
        raise UserError(f"{missing[0][2]}; ask for fewer or add nodes")
    # What it does not say is known when the stage has waited for it.
    if autoscaler.can_have(bundles(workers, device)) is False:
        needed = _count(workers + _beside(device), _kind(device))
        raise UserError(
            f"{reason}, and its autoscaler cannot bring it to {needed}; ask for fewer or raise what it may add"
        )


def bundles(workers: int, device: str) -> autoscaler.Bundles:
    return [{_kind(device): 1}] * (workers + _beside(device))


def _kind(device: str) -> str:
    return "GPU" if device == "cuda" else "CPU"


def _beside(device: str) -> int:
    """Ray Data and the progress actors need a CPU beside the workers, or both would wait for each other."""
    return 0 if device == "cuda" else 1


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class Resources:
    """The CPUs or GPUs that some workers need.

    What is missing is requested from the autoscaler, where one runs, and waited for: a lost node may come back, too.
    That takes at most `worker_timeout_s` seconds from when no node is on its way any more, and four times that in all.
    """

    def __init__(self, workers: int, device: str, key: str, worker_timeout_s: float):
        self.asked, self.worker_timeout_s = (workers, device, key), worker_timeout_s
        self.short_since: float | None = None
        self._launching = 0.0

    def enough(self) -> bool:
        """Raises `UserError` once there have been too few for too long."""
        reason = shortfall(*self.asked)
        if reason is None:
            self.short_since = None
            return True
        now = time.monotonic()
        self.short_since = self.short_since or now
        if autoscaler.launching():
            self._launching = now
        if (
            now - max(self.short_since, self._launching) > self.worker_timeout_s
            or now - self.short_since > _LAUNCHING * self.worker_timeout_s
        ):
            raise UserError(f"{reason}; ask for fewer or add nodes")
        return False

    def wait(self) -> None:
        """Raises `UserError` as `enough` does."""
        if self.enough():
            return
        workers, device, _ = self.asked
        with autoscaler.asked(bundles(workers, device)):
            while not self.enough():
                time.sleep(1)
