"""Actors of one kind that are watched while they load and work, and whose refusals reach the user as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

import ray
from ray.util import ActorPool

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Watchdog
from ppcl.errors import UserError


class WatchedActors:
    """They are given back at the end of a `with` block.

    `actor`: the actor class with its options; its constructor takes a heartbeat, its `load` the arguments of `load`,
    since Ray does not keep the error of a constructor as it was. `who` they are, in words. `tell` is called with what
    they wait for. Raises `UserError` where the cluster has too few resources for too long.
    """

    def __init__(self, actor: Any, load: tuple[Any, ...], who: str, resources: Resources, tell: Callable[[str], None]):
        resources.wait(tell)
        self._exit = ExitStack()
        self._watchdog = self._exit.enter_context(Watchdog(who, resources, tell))
        number = resources.asked[0]
        self.actors = [actor.remote(self._watchdog.heartbeat) for _ in range(number)]
        for one in self.actors:
            self._exit.callback(ray.kill, one)
        self._loading = [one.load.remote(*load) for one in self.actors]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def all(
        self, call: Callable[[Any, Any], Any], items: list[Any], done: Callable[[int], None], by: int | None = None
    ) -> list[Any]:
        """`call(actor, item)` for every item, in the order of the items, by all actors or the first `by`.

        It is called when an actor is free for the item. `done(count)` is called after each. Raises `UserError` as an
        actor did.
        """
        results = []
        for _ in self._results(ray.get(loading) for loading in self._loading):
            pass
        self._loading = []
        for result in self._results(ActorPool(self.actors[:by]).map(call, items)):
            results.append(result)
            done(len(results))
        return results

    def _results(self, coming: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from self._watchdog.results(coming)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
