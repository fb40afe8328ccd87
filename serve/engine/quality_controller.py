"""Elastic quality: chooses the variant for a request of `auto`.

The controller takes the largest variant that would meet the deadline even if the request had to wait twice as long. The
other half of the slack is left to later requests: a server that gives all of it away accepts large images until its
queue is full and must then refuse requests. Switching later is too late, because the first image of a smaller variant
costs a batch of its own.

`auto` degrades at once and recovers by one level after some seconds of low load. This keeps it from oscillating: images
of two variants share no batch, so mixing variants costs more than using one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.config import Elastic

# A saving within the noise of a profile is not worth degrading for.
_CHEAPER = 0.95


def quality_levels(costs: Mapping[str, float], qualities: Mapping[str, float | None]) -> list[str]:
    """Return the variants that `auto` may use, from large to small; the first is the largest.

    `costs`: device-seconds of one image by variant, the largest variant first. `qualities`: scores by variant.

    A cheaper variant is a level if it gives more score per second than the level above it. With a variant that gives
    less, the device would make more images and still less quality, so refusing requests is better. A variant without a
    score is none: nobody has said that its images are good enough.
    """
    scores = {name: score for name in costs if (score := qualities.get(name)) is not None}
    if next(iter(costs)) not in scores:
        return [next(iter(costs))]
    costs = {name: costs[name] for name in costs if name in scores}
    levels = [next(iter(costs))]
    for name in sorted(costs, key=lambda name: -costs[name]):
        last = levels[-1]
        if costs[name] > _CHEAPER * costs[last] or scores[name] / costs[name] <= scores[last] / costs[last]:
            continue
        while len(levels) > 1 and scores[levels[-1]] <= scores[name]:
            levels.pop()
        levels.append(name)
    return levels


@dataclass(frozen=True)
class Choice:
    """`expected`: seconds until the request is done. `in_time`: whether that meets its deadline."""

    variant: str
    degraded: bool
    expected: float
    in_time: bool


class QualityController:
    """`levels`: variants from large to small. Times are seconds of one monotonic clock."""

    def __init__(self, levels: Sequence[str], settings: Elastic):
        self.levels, self._settings = list(levels), settings
        # Index of the largest variant in use.
        self.level = 0
        self._low_load_since: float | None = None

    def watch(self, now: float, load: Callable[[str], float]) -> None:
        """Recover by one level after a period of low load.

        `load(variant)`: the share of the device that the offered load takes with that variant. The queue's length would
        not do: it is short because requests were degraded.
        """
        if not self.level or load(self.levels[self.level - 1]) >= self._settings.low_water:
            self._low_load_since = None
        elif self._low_load_since is None:
            self._low_load_since = now
        elif now - self._low_load_since >= self._settings.recover_seconds:
            self.level -= 1
            self._low_load_since = now

    def choose(
        self,
        budget: float,
        expected: Callable[[str], float],
        alone: Callable[[str], float],
        allowed: Callable[[str], bool] = lambda variant: True,
    ) -> Choice:
        """Return the variant for a request with `budget` seconds to finish.

        `expected(variant)`: seconds until the request is done. `alone(variant)`: the same on an idle device.
        `allowed(variant)`: whether the variant is not smaller than the request's floor. Where no variant is in time,
        the choice is the fastest one, with `in_time` False.
        """
        index = self.levels.index
        candidates = [name for name in self.levels if allowed(name)] or self.levels[:1]
        late = 1 + self._settings.margin
        # At or below the current level; the nearest one where the request's floor is above it.
        at_level = [name for name in candidates if index(name) >= self.level] or candidates[-1:]
        feasible = [name for name in at_level if late * expected(name) <= budget]
        with_headroom = (name for name in feasible if late * (2 * expected(name) - alone(name)) <= budget)
        variant = next(with_headroom, (feasible or at_level)[-1])
        # A deadline that even an idle server meets only with a smaller variant says nothing about the load.
        idle_level = next((index(name) for name in candidates if late * alone(name) <= budget), len(self.levels))
        if index(variant) > max(self.level, idle_level):
            self.level = index(variant)
        return Choice(variant, variant != self.levels[0], expected(variant), variant in feasible)
