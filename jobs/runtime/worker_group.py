"""Run one function on every rank of a Ray Train worker group, with progress and errors that reach the user.

Progress and refusals travel through one small actor: `ray.train.report` is a barrier over all ranks and would make the
pipeline wait for its slowest rank at every step.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.failures import WorkerLost
from jobs.runtime.process_group import GroupConfig, free_resources
from jobs.runtime.progress_board import ProgressBoard, RankReporter
from jobs.runtime.resources import Resources
from ppcl.errors import UserError
from ppcl.training.progress import ProgressReport

# What a rank may wait for one that is alive, seconds: some have longer to load and to finish than others. Those that
# are dead or stopped are found much earlier.
_COLLECTIVE_TIMEOUT = 1800
_LOOK_EVERY = 5.0


_ProgressActor: Any = ray.remote(num_cpus=0)(ProgressBoard)


def run_worker_group(
    name: str,
    function: Callable[[dict[str, Any], RankReporter], None],
    arguments: dict[str, Any],
    places: Resources,
    scratch: Path,
    progress: ProgressReport,
) -> list[str]:
    """`function(arguments, report)` on every rank of a torch process group; gives their notes when all have finished.

    `places`: how many ranks, and of what. `arguments["attempt"]` names this call, the same on all ranks. `scratch`: a
    folder for Ray Train's own records, which no rank reads; removed at the end. Raises `UserError` with the sentence of
    a rank's `UserError`, or where the places stay too few; anything else a rank raises comes through as Ray Train tells
    it.
    """
    places.wait(lambda sentence: progress(0, 0, {}, phase=sentence))
    # On this node: another's loss must not take it away while the ranks go on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = _ProgressActor.options(scheduling_strategy=here).remote()
    training = _Training(name, _trainer(name, function, arguments, places, scratch, board))
    try:
        refusal = _follow(training, board, places, progress)
        if training.failure is not None:
            free_resources()
            raise UserError(refusal) if refusal else _told(training.failure, places.worker_timeout_s)
        return ray.get(board.noted.remote())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trainer(
    name: str,
    function: Callable[[dict[str, Any], RankReporter], None],
    arguments: dict[str, Any],
    places: Resources,
    scratch: Path,
    board: Any,
) -> TorchTrainer:
    """The worker group of Ray Train, not yet started. A rank's `UserError` is left on the board."""
    workers, device, _ = places.asked

    def loop(config: dict[str, Any]) -> None:
        import torch
        from ray.train import get_context

        context = get_context()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        try:
            function(config, RankReporter(board))
        except UserError as error:
            ray.get(board.refuse.remote(str(error)))
            raise

    return TorchTrainer(
        loop,
        train_loop_config=arguments | {"attempt": uuid.uuid4().hex},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=device == "cuda",
            resources_per_worker={"GPU" if device == "cuda" else "CPU": 1},
        ),
        torch_config=GroupConfig(
            backend="cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout_s=_COLLECTIVE_TIMEOUT
        ),
        run_config=RunConfig(name=name, storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)),
    )


class _Training(threading.Thread):
    """Runs a trainer to its end; `failure`: what it raised.

    In a thread of its own: in the main thread `fit` would replace the handler of Ctrl-C for good, by one that ends the
    program as if it had succeeded.
    """

    def __init__(self, name: str, trainer: TorchTrainer):
        super().__init__(name=name, daemon=True)
        self.trainer = trainer
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.failure = error


def _follow(training: _Training, board: Any, places: Resources, progress: ProgressReport) -> str | None:
    """Pass progress on until the training has ended; gives the sentence of a rank that refused its input.

    Raises `UserError` where a node is lost, or another job uses what the ranks need, before they have begun.
    """
    refusal, looked = None, time.monotonic()
    while training.is_alive():
        training.join(0.5)
        done, total, values, phase, refusal = ray.get(board.read.remote())
        if total:
            progress(done, total, values, phase=phase)
        elif time.monotonic() - looked > _LOOK_EVERY:
            # A node whose loss was not known yet may be missing now, or another job may have been faster, and Ray
            # Train would wait for ever.
            looked = time.monotonic()
            if sentence := places.waits_for():
                progress(0, 0, {}, phase=sentence)
    return refusal


def _told(failure: BaseException, worker_timeout_s: float) -> BaseException:
    """What ended a worker group. Of ranks that did not answer Ray says which variable to set, not which they are."""
    failed = failure.worker_failures.items() if isinstance(failure, WorkerGroupError) else ()
    for rank, error in failed:
        if isinstance(error, WorkerHealthCheckTimeoutError):
            return WorkerLost(
                f"rank {rank} sent no heartbeat for {worker_timeout_s:.0f} s, the configuration's worker_timeout_s"
            )
    return failure
