"""Actors that score images: each makes one scorer, in its own runtime environment where the configuration gives one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import numpy as np
import ray
from ray.util import ActorPool

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat, Watchdog
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


class ScorerPool:
    """The actors of one scorer, given back at the end of a `with` block."""

    def __init__(self, name: str, settings: ScorerSettings, config: Config, number: int | None = None):
        """`number`: of the actors; None: as configured. Raises `UserError` where resources are short for too long."""
        self.name, count = name, number or settings.workers
        workers = Workers(count, f"evaluation.scorers.{name}.workers")
        resources = Resources.of(workers, "cuda" if settings.gpus else "cpu", config)
        resources.wait()
        self._exit = ExitStack()
        self._watchdog = self._exit.enter_context(Watchdog(f"a worker of the scorer {name}", resources))
        options: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        if settings.runtime_env is not None:
            options["runtime_env"] = settings.runtime_env
        actor = _ScorerActor.options(**options)
        self.actors = [actor.remote(self._watchdog.heartbeat) for _ in range(count)]
        for worker in self.actors:
            self._exit.callback(ray.kill, worker)
        self._loading = [worker.load.remote(name, settings) for worker in self.actors]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def scores(
        self, batch_of: Callable[[Any], Batch], items: Sequence[Any], done: Callable[[int], None]
    ) -> list[np.ndarray]:
        """The scores of `batch_of(item)` for every item, in their order; `done(count)` is called after each.

        A batch is made when an actor is free for it. Raises `UserError` as the scorer does.
        """
        for _ in self._results(ray.get(loading) for loading in self._loading):
            pass
        self._loading, results = [], []
        for scored in self._results(
            ActorPool(self.actors).map(lambda actor, item: actor.score.remote(batch_of(item)), list(items))
        ):
            results.append(scored)
            done(len(results))
        return results

    def _results(self, coming: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from self._watchdog.results(coming)
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise UserError(
                f"evaluation.scorers.{self.name}.runtime_env cannot be set up: {' '.join(str(error).split())[:300]}"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
