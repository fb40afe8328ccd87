"""Actors that score images: each makes one scorer, in its own runtime environment where the configuration gives one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import ray

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat
from jobs.runtime.watched_actors import WatchedActors
from jobs.stage import Workers
from ppcl.config.schema import Config, ScorerSettings
from ppcl.errors import UserError
from ppcl.scorers import checked_scores, load_scorer


class Batch(NamedTuple):
    """Images `(N, H, W, 3)` uint8 with their prompts and metadata, see `ppcl.scorers`."""

    prompts: list[str]
    images: np.ndarray
    metadata: list[dict[str, Any]]


class _ScorerWorker:
    def __init__(self, heartbeat: Heartbeat):
        heartbeat.start()

    def load(self, name: str, settings: ScorerSettings) -> None:
        """Called first: Ray does not keep the error of a constructor as it was."""
        device = "cuda" if settings.gpus else "cpu"
        self.name, self.scorer = name, load_scorer(name, settings.call, settings.arguments, device)

    def score(self, batch: Batch) -> np.ndarray:
        """`(N,)` float64."""
        return checked_scores(self.name, self.scorer, batch.prompts, batch.images, batch.metadata)


_ScorerActor: Any = ray.remote(_ScorerWorker)


class ScorerPool(WatchedActors):
    """The actors of one scorer."""

    def __init__(
        self,
        name: str,
        settings: ScorerSettings,
        config: Config,
        tell: Callable[[str], None],
        number: int | None = None,
    ):
        """`number`: of the actors; None: as configured. `tell` is called with what they wait for.

        Raises `UserError` where resources are short for too long.
        """
        self.name = name
        workers = Workers(number or settings.workers, f"evaluation.scorers.{name}.workers")
        options: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        if settings.runtime_env is not None:
            options["runtime_env"] = settings.runtime_env
        resources = Resources.of(workers, "cuda" if settings.gpus else "cpu", config)
        actor = _ScorerActor.options(**options)
        super().__init__(actor, (name, settings), f"a worker of the scorer {name}", resources, tell)

    def scores(
        self, batch_of: Callable[[Any], Batch], items: list[Any], done: Callable[[int], None]
    ) -> list[np.ndarray]:
        """The scores of `batch_of(item)` for every item, in their order; `done(count)` is called after each.

        A batch is made when an actor is free for it. Raises `UserError` as the scorer does.
        """
        try:
            return self.all(lambda actor, item: actor.score.remote(batch_of(item)), items, done)
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise UserError(
                f"evaluation.scorers.{self.name}.runtime_env cannot be set up: {' '.join(str(error).split())[:300]}"
            ) from error
