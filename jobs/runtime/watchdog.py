"""Actors without a heartbeat are killed: Ray finds a process that died, but waits for ever for one that is stopped.

Each actor sends heartbeats from a thread of its own, from the start of its constructor: asked by a call, it could not
answer before it has loaded its model. (Ray Train watches its own ranks.)
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.failures import WorkerLost
from jobs.runtime.resources import STARTING, Resources

# Seconds between two heartbeats, and between two looks at them; less where the worker_timeout_s is short.
_EVERY = 5.0
_A_TASK = 60.0
# Heartbeats that one may miss and still count as begun.
_MISSED = 3


class Process(NamedTuple):
    """`started` tells it from a later one that was given the same number."""

    node: str
    number: int
    started: float


class _Heartbeats:
    """When each process was heard of last, by this actor's own clock."""

    def __init__(self) -> None:
        self.heard: dict[Process, float] = {}

    def hear(self, process: Process) -> None:
        self.heard[process] = time.monotonic()

    def silent(self, seconds: float) -> list[Process]:
        """Those that were not heard of for so long."""
        return [process for process, last in self.heard.items() if time.monotonic() - last > seconds]

    def alive(self, seconds: float) -> int:
        """How many were heard of within so long."""
        return len(self.heard) - len(self.silent(seconds))

    def drop(self, process: Process) -> None:
        self.heard.pop(process, None)


_HeartbeatsActor: Any = ray.remote(num_cpus=0)(_Heartbeats)


class Heartbeat(NamedTuple):
    """What an actor needs to send heartbeats."""

    heartbeats: Any
    every: float

    def start(self) -> None:
        """Called once, first in the actor's constructor."""
        process = Process(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())

        # Who was never heard of cannot be missed.
        ray.get(self.heartbeats.hear.remote(process))

        def beat() -> None:
            while True:
                time.sleep(self.every)
                self.heartbeats.hear.remote(process)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()


@ray.remote(num_cpus=0, max_retries=0)
def _kill(process: Process) -> bool:
    """On the process's node; whether it was still there."""
    try:
        found = psutil.Process(process.number)
        if found.create_time() != process.started:
            return False
        found.kill()
    except psutil.NoSuchProcess:
        return False
    return True


class Watchdog:
    """Watches the actors of one stage: `with Watchdog("an evaluator", resources, tell) as watchdog`.

    Actors are given `watchdog.heartbeat`. `tell` is called with what they wait for while some have not begun, because
    nodes are missing or other jobs use what they need. An error that ends the block after an actor was killed becomes a
    `WorkerLost` that says so.
    """

    def __init__(self, who: str, resources: Resources, tell: Callable[[str], None]):
        self.who, self.resources, self._tell = who, resources, tell
        self._told = False
        self.every = min(_EVERY, resources.worker_timeout_s / 4)
        # On this node: another's loss must not take it away while the actors go on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.heartbeat = Heartbeat(_HeartbeatsActor.options(scheduling_strategy=here).remote(), self.every)
        self.killed: list[str] = []
        self.tried: set[Process] = set()

    def look(self) -> None:
        """Kill those that have been silent for too long, and tell what those that have not begun wait for.

        Raises `UserError` where resources were short, or in use, for too long.
        """
        self._tell_wait()
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        for process in ray.get(self.heartbeat.heartbeats.silent.remote(self.resources.worker_timeout_s)):
            if process.node in nodes and self._killed(process):
                self.killed.append(
                    f"{self.who} (process {process.number} on {nodes[process.node]}) sent no heartbeat for "
                    f"{self.resources.worker_timeout_s:.0f} s, the configuration's worker_timeout_s"
                )

    def _tell_wait(self) -> None:
        if ray.get(self.heartbeat.heartbeats.alive.remote(_MISSED * self.every)) >= self.resources.asked[0]:
            sentence = self.resources.missing()
            self.resources.all_begun()
        else:
            sentence = self.resources.waits_for()
        if sentence:
            self._tell(sentence)
        elif self._told:
            self._tell(STARTING)
        self._told = sentence is not None

    def _killed(self, process: Process) -> bool:
        """Whether it was killed; one that could not be, this time, is tried again at the next look."""
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        try:
            killed = ray.get(_kill.options(scheduling_strategy=there).remote(process), timeout=_A_TASK)
        except ray.exceptions.RayError:
            # Its task may still do it, too late to say so.
            self.tried.add(process)
            return False
        self.heartbeat.heartbeats.drop.remote(process)
        return killed or process in self.tried

    def results(self, rows: Iterator[Any]) -> Iterator[Any]:
        """What an iterator that blocks gives, while somebody looks."""
        coming: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                for row in rows:
                    coming.put(("row", row))
                coming.put(("end", None))
            except BaseException as error:
                coming.put(("error", error))

        threading.Thread(target=fetch, name=f"what {self.who} makes", daemon=True).start()
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked > self.every:
                self.look()
                looked = time.monotonic()
            try:
                kind, value = coming.get(timeout=self.every)
            except queue.Empty:
                continue
            if kind == "row":
                # Who gets it says how far the work is.
                self._told = False
                yield value
            elif kind == "error":
                raise value
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.kill(self.heartbeat.heartbeats)
        if self.killed and _of_an_actor_that_died(error):
            raise WorkerLost(self.killed[-1]) from error


def _of_an_actor_that_died(error: BaseException | None) -> bool:
    """Ray Data wraps it, Ray Core does not."""
    while error is not None:
        if isinstance(error, RayActorError):
            return True
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return False
