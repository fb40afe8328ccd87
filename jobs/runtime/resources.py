"""Check that the Ray cluster has the CPUs or GPUs that a stage needs, and wait for missing nodes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import ray

from jobs.progress import Update, duration
from jobs.runtime import autoscaler, usage
from jobs.runtime.cluster import number
from jobs.stage import Workers
from ppcl.config.schema import Config
from ppcl.errors import UserError

# Times the worker_timeout_s, at most, that is waited while an autoscaler has nodes on their way.
_LAUNCHING = 4
# Seconds between two looks at who uses what is waited for.
_LOOK_EVERY = 5.0
# What is said after a wait, until workers say how far they are.
STARTING = "starting workers"


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
    What other jobs use is waited for, too, at most `busy_timeout_s` seconds.
    """

    def __init__(self, workers: int, device: str, key: str, worker_timeout_s: float, busy_timeout_s: float = math.inf):
        self.asked, self.worker_timeout_s, self.busy_timeout_s = (
            (workers, device, key),
            worker_timeout_s,
            busy_timeout_s,
        )
        self.short_since: float | None = None
        self._busy_since: float | None = None
        self._launching = 0.0

    @property
    def kind(self) -> str:
        """The resource as Ray names it."""
        return _kind(self.asked[1])

    @classmethod
    def of(cls, workers: Workers, device: str, config: Config) -> Resources:
        """Those of a stage's workers."""
        return cls(workers.number, device, workers.setting, config.worker_timeout_s, config.busy_timeout_s)

    def missing(self) -> str | None:
        """What the cluster lacks, in words for the user; None where it has enough.

        Raises `UserError` once there have been too few for too long.
        """
        reason = shortfall(*self.asked)
        if reason is None:
            self.short_since = None
            return None
        now = time.monotonic()
        self.short_since = self.short_since or now
        if autoscaler.launching():
            self._launching = now
        if (
            now - max(self.short_since, self._launching) > self.worker_timeout_s
            or now - self.short_since > _LAUNCHING * self.worker_timeout_s
        ):
            raise UserError(f"{reason}; ask for fewer or add nodes")
        return f"waiting for nodes: {reason}"

    def wait(self, tell: Callable[[str], None]) -> None:
        """Wait for missing nodes; `tell` is called with what is missing. Raises `UserError` as `missing` does."""
        if not self.missing():
            return
        workers, device, _ = self.asked
        with autoscaler.asked(bundles(workers, device)):
            while sentence := self.missing():
                tell(sentence)
                time.sleep(1)
        tell(STARTING)

    def waits_for(self) -> str | None:
        """What workers that have not all begun wait for, in words for the user: nodes, or what other jobs use.

        None where this job can have what they need. Raises `UserError` as `missing` and `busy` do.
        """
        return self.missing() or self.busy()

    def all_begun(self) -> None:
        """The workers have what they need: the next wait is another one, with its whole limit."""
        self._busy_since = None

    def wait_until_free(self, progress: Update) -> None:
        """Wait until no other job uses them; who does is the phase of `progress`. They are free, not reserved.

        Raises `UserError` once they have been in use for too long, or as `missing` does.
        """
        workers, device, _ = self.asked
        kind, needed = _kind(device), workers + _beside(device)
        if usage.free(kind) >= needed:
            return
        told = False
        # Ray gives a group all of it or nothing, in the order of the requests as far as it fits.
        with autoscaler.asked(bundles(workers, device)) as group:
            while not group.wait(min(_LOOK_EVERY, self.busy_timeout_s)):
                if sentence := self.waits_for():
                    progress(0, phase=sentence)
                    told = True
        if told:
            progress(0, phase=STARTING)

    def busy(self) -> str | None:
        """What these workers wait for and who uses it, in words for the user; None where this job can have it, or does.

        Raises `UserError` once it has been in use for too long.
        """
        workers, device, key = self.asked
        kind, needed = _kind(device), workers + _beside(device)
        used = usage.usage(kind)
        if usage.free(kind) + used.by_job.get(ray.get_runtime_context().get_job_id(), 0) >= needed:
            self._busy_since = None
            return None
        self._busy_since = self._busy_since or time.monotonic()
        who = f"{number(kind)} exist, {usage.told(used)}"
        if time.monotonic() - self._busy_since >= self.busy_timeout_s:
            raise UserError(
                f"{key} needs {_count(needed, kind)} and waited {duration(self.busy_timeout_s)} for them: {who}; the "
                "same command continues when they are free; ask for fewer, or raise busy_timeout_s"
            )
        return f"waiting for {_count(needed, kind)}; {who}"
