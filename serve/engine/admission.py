"""Admission: decides on numbers alone whether a request is accepted, and with which variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ppcl.lora import AppliedLora
from ppcl.replacements import Plan
from ppcl.search.variants import Variant
from serve.config import Elastic
from serve.engine.backlog import Backlog
from serve.engine.demand_window import DemandWindow, OfferedRequest
from serve.engine.quality_controller import QualityController
from serve.engine.shared_pipeline import WorkloadKey
from serve.protocol import GenerationRequest, Refused

_DEMAND_WINDOW_S = 10.0

# The arguments of the backlog's estimates, of a request, by plan.
_JobOf = Callable[[Plan], tuple[WorkloadKey, int, int, int]]


@dataclass(frozen=True)
class Decision:
    """`model`: the variant's name for clients. `undegraded`: the workload on an idle server. `expected`: seconds."""

    model: str
    degraded: bool
    workload: WorkloadKey
    undegraded: WorkloadKey
    expected: float


@dataclass(frozen=True)
class _Selection:
    """The variant for a request: its plan, its name, and whether it is expected in time."""

    plan: Plan
    model: str
    degraded: bool
    expected: float
    in_time: bool


class Admission:
    """`variants`: the served ones by name. `queue`: most images that may be accepted and not finished.

    Times are those of one monotonic clock. Not thread-safe: the owner holds a lock.
    """

    def __init__(
        self,
        backlog: Backlog,
        quality: QualityController,
        variants: Mapping[str, Variant],
        queue: int,
        settings: Elastic,
    ):
        self.backlog, self.quality, self.variants = backlog, quality, variants
        self.queue, self._settings = queue, settings
        self._names = {variant.plan: name for name, variant in variants.items()}
        self._demand_window = DemandWindow(_DEMAND_WINDOW_S)

    def decide(
        self,
        request: GenerationRequest,
        named: Variant | None,
        per_step: int,
        now: float,
        lora: AppliedLora | None = None,
    ) -> Decision:
        """Accept a request. `named`: its variant, None for `auto`. `per_step`: calls of the transformer per step.

        Raises `Refused` for a full queue, a deadline that cannot be met, or an unknown `min_variant`.
        """
        allowed = self._allowed(request.min_variant)
        largest = self._plan(self.quality.levels[0]) if named is None else named.plan
        offered = self._offer(request, named, per_step, now)
        self._check_queue(request, offered)
        job = partial(_job, request=request, per_step=per_step, lora=lora)
        if named is None:
            selection = self._select_automatically(request, job, largest, allowed)
        else:
            selection = self._select_named(request, job, named)
        pixels = request.height * request.width
        if request.deadline is not None and not selection.in_time:
            idle = self.backlog.idle_seconds(*job(selection.plan))
            self._refuse_late(request.deadline, selection.expected, idle, offered)
        return Decision(
            selection.model,
            selection.degraded,
            WorkloadKey(selection.plan, pixels, lora),
            WorkloadKey(largest, pixels, lora),
            selection.expected,
        )

    def demand(self, now: float) -> float:
        """Return the device-seconds of accepted and of recently refused requests, at undegraded quality."""
        largest = self._plan(self.quality.levels[0])
        refused = self._demand_window.refused(now, lambda offered: self._device_seconds(offered, largest))
        return self.backlog.undegraded_seconds() + refused

    def _offer(self, request: GenerationRequest, named: Variant | None, per_step: int, now: float) -> OfferedRequest:
        """Record a request in the demand window, after the quality controller has seen the load before it.

        Where an image takes longer than the window, a load that included the request itself would never be low.
        """

        def load(variant: str) -> float:
            plan = self._plan(variant)
            return self._demand_window.load(now, lambda offered: self._device_seconds(offered, plan))

        self.quality.watch(now, load)
        plan = None if named is None else named.plan
        offered = OfferedRequest(now, plan, request.height * request.width, request.steps * per_step, request.count)
        self._demand_window.add(offered)
        return offered

    def _select_automatically(
        self, request: GenerationRequest, job: _JobOf, largest: Plan, allowed: set[str]
    ) -> _Selection:
        def expected(name: str) -> float:
            return self.backlog.expected_seconds(*job(self._plan(name)))

        def alone(name: str) -> float:
            return self.backlog.idle_seconds(*job(self._plan(name)))

        patience = self._settings.patience * self.backlog.idle_seconds(*job(largest))
        budget = patience if request.deadline is None else request.deadline
        choice = self.quality.choose(budget, expected, alone, allowed.__contains__)
        return _Selection(self._plan(choice.variant), choice.variant, choice.degraded, choice.expected, choice.in_time)

    def _select_named(self, request: GenerationRequest, job: _JobOf, variant: Variant) -> _Selection:
        model = self._names.get(variant.plan) or ",".join(map(str, variant.plan))
        seconds = self.backlog.expected_seconds(*job(variant.plan))
        in_time = request.deadline is None or seconds * (1 + self._settings.margin) <= request.deadline
        return _Selection(variant.plan, model, False, seconds, in_time)

    def _plan(self, name: str) -> Plan:
        return self.variants[name].plan

    def _allowed(self, smallest: str | None) -> set[str]:
        """Return the variants that `auto` may take. Raises `Refused` where `smallest` is not served."""
        if smallest is None:
            return set(self.quality.levels)
        if smallest not in self.variants:
            message = f"min_variant is {smallest[:80]!r}; there are {', '.join(self.variants)}"
            raise Refused(404, "invalid_request_error", message, "model_not_found", "min_variant")
        floor = self.variants[smallest].parameters
        return {name for name in self.quality.levels if self.variants[name].parameters >= floor}

    def _check_queue(self, request: GenerationRequest, offered: OfferedRequest) -> None:
        """Raises `Refused` where the queue is full."""
        accepted = len(self.backlog.images)
        if accepted + request.count > self.queue:
            offered.refused = True
            excess = max(1, accepted + request.count - self.queue)
            message = f"the server has {accepted} images to generate, of at most {self.queue}; try again later"
            raise _busy(message, "queue_full", excess * self.backlog.seconds() / max(1, accepted))

    def _refuse_late(self, deadline: float, expected: float, idle: float, offered: OfferedRequest) -> None:
        """Raises `Refused` for a request that would miss its deadline, with 422 if it would on an idle server too."""
        if idle > deadline:
            message = (
                f"deadline_ms is {1000 * deadline:g}; the images take {1000 * idle:.0f} ms where nothing else waits"
            )
            raise Refused(422, "invalid_request_error", message, "deadline_too_short", "deadline_ms")
        offered.refused = True
        message = f"the images would take {expected:.2f} s and exceed the deadline of {deadline:g} s; try again later"
        raise _busy(message, "deadline_unmet", expected - deadline)

    def _device_seconds(self, offered: OfferedRequest, plan: Plan) -> float:
        """Return the device-seconds of a request in full batches, with `plan` if it is one of `auto`."""
        workload = WorkloadKey(plan if offered.plan is None else offered.plan, offered.pixels)
        return offered.count * self.backlog.undegraded(workload, offered.calls)


def _job(
    plan: Plan, request: GenerationRequest, per_step: int, lora: AppliedLora | None
) -> tuple[WorkloadKey, int, int, int]:
    """Return the arguments of the backlog's estimates for a request with a plan."""
    return WorkloadKey(plan, request.height * request.width, lora), request.steps, per_step, request.count


def _busy(message: str, code: str, wait: float) -> Refused:
    return Refused(429, "rate_limit_error", message, code, retry_after=float(max(1, math.ceil(wait))))
