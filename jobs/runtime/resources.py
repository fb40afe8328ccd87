"""Whether a cluster has the places that some workers need, and waiting for those it lacks."""

from __future__ import annotations

import time
from collections.abc import Iterable

from jobs.runtime import autoscaler
from jobs.runtime.cluster import number
from ppcl.errors import UserError

# Times the patience, at most, that is waited while an autoscaler has nodes on their way.
_LAUNCHING = 4


def shortfall(workers: int, device: str, key: str) -> str | None:
    """What the cluster lacks now for these workers, in words for the user; None where it has it."""
    kind = _kind(device)
    have = number(kind)
    usable = max(have - _beside(device), 0)
    if workers <= usable:
        return None
    return f"{key} asks for {_count(workers, 'worker')}, but the cluster has {_count(have, kind)}, of which {usable} can be used by workers"


def refuse_impossible(needs: Iterable[tuple[int, str]], device: str) -> None:
    """Refuse at once what the cluster can never run: `needs` are numbers of workers, not at the same time, and the keys that ask for
    them. Raises `UserError` with what it has.

    An autoscaler is asked for the most of them: that it can is known only once it does.
    """
    missing = [(workers, key, told) for workers, key in needs if (told := shortfall(workers, device, key))]
    if not missing:
        return
    workers, _, told = max(missing, key=lambda need: need[0])
    if not autoscaler.runs():
        raise UserError(f"{missing[0][2]}; ask for fewer or add nodes")
    # What it does not say is known when the stage has waited for it.
    if autoscaler.can_have(bundles(workers, device)) is False:
        needed = _count(workers + _beside(device), _kind(device))
        raise UserError(
            f"{told}, and its autoscaler cannot bring it to {needed}; ask for fewer or raise what it may add"
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
    """Whether the cluster has places for some workers.

    What is missing is asked of its autoscaler, where one runs, and waited for: a node that was lost may come back, too. That takes
    `patience` seconds at most from the moment when none is on its way any more, and four times that in all.
    """

    def __init__(self, workers: int, device: str, key: str, patience: float):
        self.asked, self.patience = (workers, device, key), patience
        self.lacking_since: float | None = None
        self._launching = 0.0

    def enough(self) -> bool:
        """Raises `UserError` once there have been too few for too long."""
        told = shortfall(*self.asked)
        if told is None:
            self.lacking_since = None
            return True
        now = time.monotonic()
        self.lacking_since = self.lacking_since or now
        if autoscaler.launching():
            self._launching = now
        if (
            now - max(self.lacking_since, self._launching) > self.patience
            or now - self.lacking_since > _LAUNCHING * self.patience
        ):
            raise UserError(f"{told}; ask for fewer or add nodes")
        return False

    def wait(self) -> None:
        """Raises `UserError` as `enough` does."""
        if self.enough():
            return
        workers, device, _ = self.asked
        with autoscaler.asked(bundles(workers, device)):
            while not self.enough():
                time.sleep(1)
