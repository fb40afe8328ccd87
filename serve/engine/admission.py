"""What is decided when a request comes, on numbers alone: whether it is accepted, and with which variant it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ppcl.search.variants import Variant
from serve.config import Elastic
from serve.engine.backlog import Backlog
from serve.engine.demand_window import Lately, Wanted
from serve.engine.quality_controller import ElasticQuality
from serve.engine.shared_pipeline import Kind, Plan
from serve.protocol import GenerationRequest, Refused

# Seconds over which demand is looked at.
_LATELY = 10.0


@dataclass(frozen=True)
class Decision:
    """`model`: the variant as clients are told. `undegraded`: the kind it had been, had there been time. `expected`: seconds."""

    model: str
    degraded: bool
    kind: Kind
    undegraded: Kind
    expected: float


class Admission:
    """Over what is accepted already. `variants`: those that are served, by name; `queue`: pictures that may be accepted and not
    finished. Times are those of one monotonic clock. Not safe for threads by itself: its owner holds a lock."""

    def __init__(
        self, backlog: Backlog, elastic: ElasticQuality, variants: Mapping[str, Variant], queue: int, settings: Elastic
    ):
        self.backlog, self.elastic, self.variants, self.queue, self._settings = (
            backlog,
            elastic,
            variants,
            queue,
            settings,
        )
        self._names = {variant.plan: name for name, variant in variants.items()}
        self._lately = Lately(_LATELY)

    def decide(self, request: GenerationRequest, named: Variant | None, per_step: int, now: float) -> Decision:
        """`named`: the variant that the request names, None for `auto`; `per_step`: calls of the transformer a step.

        Raises `Refused`: a full queue, a deadline that cannot be met, no such smallest variant.
        """
        pixels = request.height * request.width

        def of(plan: Plan) -> tuple[Kind, int, int, int]:
            return Kind(plan, pixels), request.steps, per_step, request.count

        def expected(name: str) -> float:
            return self.backlog.expected(*of(self._plan(name)))

        def alone(name: str) -> float:
            return self.backlog.alone(*of(self._plan(name)))

        allowed = self._allowed(request.min_variant)
        largest = self._plan(self.elastic.steps[0]) if named is None else named.plan
        wanted = Wanted(now, None if named is None else named.plan, pixels, request.steps * per_step, request.count)
        # By those before it: where pictures take longer than what is looked at, one request alone would always be a crowd.
        self.elastic.watch(now, lambda name: self._lately.load(now, lambda one: self._seconds(one, self._plan(name))))
        self._lately.add(wanted)
        self._room(request, wanted)
        if named is None:
            patience = self._settings.patience * self.backlog.alone(*of(largest))
            budget = patience if request.deadline is None else request.deadline
            choice = self.elastic.choose(budget, expected, alone, allowed.__contains__)
            plan, model, degraded = self._plan(choice.variant), choice.variant, choice.degraded
            seconds, in_time = choice.expected, choice.in_time
        else:
            plan, degraded = named.plan, False
            model = self._names.get(plan) or ",".join(map(str, plan))
            seconds = self.backlog.expected(*of(plan))
            in_time = request.deadline is None or seconds * (1 + self._settings.margin) <= request.deadline
        if request.deadline is not None and not in_time:
            self._late(request.deadline, seconds, self.backlog.alone(*of(plan)), wanted)
        return Decision(model, degraded, Kind(plan, pixels), Kind(largest, pixels), seconds)

    def demand(self, now: float) -> float:
        """Device-seconds of what is accepted and of what was lately refused, at undegraded quality."""
        largest = self._plan(self.elastic.steps[0])
        return self.backlog.undegraded_seconds() + self._lately.refused(now, lambda one: self._seconds(one, largest))

    def _plan(self, name: str) -> Plan:
        return self.variants[name].plan

    def _allowed(self, smallest: str | None) -> set[str]:
        """The variants that `auto` may take."""
        if smallest is None:
            return set(self.elastic.steps)
        if smallest not in self.variants:
            message = f"min_variant is {smallest[:80]!r}; there are {', '.join(self.variants)}"
            raise Refused(404, "invalid_request_error", message, "model_not_found", "min_variant")
        floor = self.variants[smallest].parameters
        return {name for name in self.elastic.steps if self.variants[name].parameters >= floor}

    def _room(self, request: GenerationRequest, wanted: Wanted) -> None:
        """Raises `Refused` where the queue is full."""
        there = len(self.backlog.pictures)
        if there + request.count > self.queue:
            wanted.refused = True
            wait = max(1, there + request.count - self.queue) * self.backlog.seconds() / max(1, there)
            raise _busy(
                f"the server has {there} pictures to draw, of at most {self.queue}; try again later", "queue_full", wait
            )

    def _late(self, deadline: float, expected: float, alone: float, wanted: Wanted) -> None:
        """Raises `Refused` for a request that would not be done in time."""
        if alone > deadline:
            message = (
                f"deadline_ms is {1000 * deadline:g}; the pictures take {1000 * alone:.0f} ms where nothing else waits"
            )
            raise Refused(422, "invalid_request_error", message, "deadline_too_short", "deadline_ms")
        wanted.refused = True
        message = f"the pictures would take {expected:.2f} s and are wanted within {deadline:g} s; try again later"
        raise _busy(message, "deadline_unmet", expected - deadline)

    def _seconds(self, wanted: Wanted, plan: Plan) -> float:
        """Device-seconds of a request in full batches, with a plan if it is one of `auto`."""
        kind = Kind(plan if wanted.plan is None else wanted.plan, wanted.pixels)
        return wanted.count * self.backlog.undegraded(kind, wanted.calls)


def _busy(message: str, code: str, wait: float) -> Refused:
    return Refused(429, "rate_limit_error", message, code, retry_after=float(max(1, math.ceil(wait))))
