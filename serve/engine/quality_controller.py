"""Elastic quality: which variant a request of `auto` is drawn with.

It is the largest one with which the request were in time even if it had to wait twice as long: half of its slack is left to those
that come after it. A server that gives all of it away takes in large pictures until its queue is full, and has to refuse what
comes then; the smaller variant comes too late, because its first picture costs a batch of its own. `auto` degrades at once, and recovers by one variant after some
seconds of little load, so that it does not swing: pictures of two variants share no batch, so drawing some with each costs more
than drawing all with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.config import Elastic

# A variant that is not cheaper by more than the noise of a profile is not worth degrading to.
_CHEAPER = 0.95


def ladder(costs: Mapping[str, float], qualities: Mapping[str, float | None]) -> list[str]:
    """The variants worth taking, from large to small. `costs`: device-seconds of one picture, by variant, the largest first.

    The first is the largest. A cheaper one follows if it gives more score a second than those before it: with one that gives
    less, the device makes more pictures and yet less quality, and refusing some would be better. Where scores are not known,
    every cheaper one follows that is smaller too.
    """
    steps = [next(iter(costs))]
    known = all(qualities.get(name) is not None for name in costs)
    for name in sorted(costs, key=lambda name: -costs[name]) if known else costs:
        last = steps[-1]
        if costs[name] > _CHEAPER * costs[last]:
            continue
        if known:
            if qualities[name] / costs[name] <= qualities[last] / costs[last]:
                continue
            while len(steps) > 1 and qualities[steps[-1]] <= qualities[name]:
                steps.pop()
        steps.append(name)
    return steps


@dataclass(frozen=True)
class Choice:
    """`expected`: seconds until the request is done. `in_time`: whether that meets its deadline."""

    variant: str
    degraded: bool
    expected: float
    in_time: bool


class ElasticQuality:
    """`steps`: the ladder, from large to small. Times are those of one monotonic clock, in seconds."""

    def __init__(self, steps: Sequence[str], settings: Elastic):
        self.steps, self._settings = list(steps), settings
        # Steps below the largest variant that requests are held at, and since when there is little load.
        self.level = 0
        self._low_since: float | None = None

    def watch(self, now: float, load: Callable[[str], float]) -> None:
        """Take notice of the load: `load(variant)` is the share of the device that what was wanted lately takes with that variant.

        It is not what waits: that is little just because it was degraded.
        """
        if not self.level or load(self.steps[self.level - 1]) >= self._settings.low_water:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - self._low_since >= self._settings.recover_seconds:
            self.level -= 1
            self._low_since = now

    def choose(
        self,
        budget: float,
        expected: Callable[[str], float],
        alone: Callable[[str], float],
        allowed: Callable[[str], bool] = lambda variant: True,
    ) -> Choice:
        """The variant for a request that is to be done in `budget` seconds.

        `expected(variant)`: seconds until it is done, `alone(variant)` if nothing else waited. `allowed`: whether it is not
        smaller than the request's floor. Where no variant is in time it is the fastest one, which then is not.
        """
        steps = [step for step in self.steps if allowed(step)] or self.steps[:1]
        late = 1 + self._settings.margin
        # Those it is held at, or the nearest where its floor is above.
        held = [step for step in steps if self.steps.index(step) >= self.level] or steps[-1:]
        fits = [step for step in held if late * expected(step) <= budget]
        roomy = (step for step in fits if late * (2 * expected(step) - alone(step)) <= budget)
        first = next(roomy, (fits or held)[-1])
        # A deadline that an idle server could not meet with a larger variant says nothing about the load.
        could = next((self.steps.index(step) for step in steps if late * alone(step) <= budget), len(self.steps))
        if (index := self.steps.index(first)) > max(self.level, could):
            self.level = index
        return Choice(first, first != self.steps[0], expected(first), first in fits)
