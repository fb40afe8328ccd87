"""The real policy - admission, lanes, turns, costs - over a device that only takes time, on a clock that is told.

What it leaves out is arithmetic: a forward takes the seconds that its profile says, times `slower` and some noise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ppcl.replacements import Interval
from ppcl.search.variants import Variant
from serve.config import Elastic
from serve.engine.admission import Admission
from serve.engine.backlog import Backlog, Work
from serve.engine.cost_model import CostModel, Profile
from serve.engine.fair_queue import FairQueue
from serve.engine.quality_controller import QualityController, quality_levels
from serve.engine.shared_pipeline import WorkloadKey
from serve.protocol import AUTO, GenerationRequest, Refused

BATCH, QUEUE, STEPS, SIDE = 8, 64, 20, 64
# Steps between looks at how urgent an image is, as in the engine.
DUE_EVERY = 4


@dataclass(frozen=True)
class Machine:
    """`profiles` and `scores` by variant, the largest first; `overhead_s`: seconds of an image besides its steps."""

    profiles: Mapping[str, Profile]
    scores: Mapping[str, float]
    overhead_s: float
    slower: float = 1.0
    noise: float = 0.1

    @property
    def variants(self) -> dict[str, Variant]:
        # A plan for each, the teacher's empty one first.
        plans = {name: (Interval(0, number),) if number else () for number, name in enumerate(self.profiles)}
        return {name: Variant(name, plan, 1000 - number, 1.0, 1) for number, (name, plan) in enumerate(plans.items())}

    def picture(self, name: str, rows: int) -> float:
        """Device-seconds of one image in batches of so many rows."""
        return STEPS * self.profiles[name].seconds(rows) / rows + self.overhead_s


@dataclass
class _Call:
    work: Work
    group: WorkloadKey

    @property
    def due(self) -> float | None:
        return self.work.ticket.due


class Simulation:
    """One server. `run(arrivals, choose, deadline)`: what its clients got of requests at these seconds; None where
    refused, else the variant and the seconds until the image."""

    def __init__(self, machine: Machine, elastic: Elastic | None = None, seed: int = 0):
        self.machine, self.now, self._draw = machine, 0.0, random.Random(seed)
        settings, variants = elastic or Elastic(), machine.variants
        profiles = {variants[name].plan: profile for name, profile in machine.profiles.items()}
        self.cost_model = CostModel(profiles, machine.overhead_s, SIDE * SIDE, clock=lambda: self.now)
        self.backlog = Backlog(self.cost_model, BATCH, self._begin)
        steps = quality_levels({name: machine.picture(name, BATCH) for name in variants}, machine.scores)
        self.quality = QualityController(list(settings.variants or steps), settings)
        self.admission = Admission(self.backlog, self.quality, variants, QUEUE, settings)
        self._fair_queue, self._encoding, self._calls = FairQueue(), [], []
        self._told: dict[int, tuple[str, float] | None] = {}

    def run(
        self, arrivals: list[float], choose: Callable[[int], str], deadline: float | None
    ) -> list[tuple[str, float] | None]:
        coming = list(enumerate(arrivals))
        while coming or self._encoding or self._calls:
            if not (self._encoding or self._calls):
                self.now = max(self.now, coming[0][1])
            while coming and coming[0][1] <= self.now:
                self._arrive(*coming.pop(0), choose, deadline)
            if self._encoding:
                self._take(self.machine.overhead_s / 2)
                self._wait(self._encoding.pop(0))
            elif self._calls:
                self._batch()
        return [self._told[number] for number in range(len(arrivals))]

    def _arrive(self, number: int, at: float, choose: Callable[[int], str], deadline: float | None) -> None:
        name = choose(number)
        named = None if name == AUTO else self.machine.variants[name]
        request = GenerationRequest(str(number), "x", name, 1, SIDE, SIDE, STEPS, number, deadline=deadline)
        try:
            decision = self.admission.decide(request, named, 1, self.now)
        except Refused:
            self._told[number] = None
            return
        wanted = None if deadline is None else at + deadline
        self.backlog.add(Work(decision.workload, decision.undegraded, STEPS, 1, wanted, (number, at, decision.model)))

    def _begin(self, work: Work) -> None:
        self._encoding.append(work)

    def _wait(self, work: Work) -> None:
        if work.steps % DUE_EVERY == 0:
            work.ticket.due = self.backlog.due(work.workload)
        self._fair_queue.arrive(work.workload)
        self._calls.append(_Call(work, work.workload))

    def _take(self, seconds: float) -> float:
        seconds *= self.machine.slower * self._draw.lognormvariate(0, self.machine.noise)
        self.now += seconds
        return seconds

    def _batch(self) -> None:
        group = self._fair_queue.next_group(self._calls, self.now)
        taken = [call for call in self._calls if call.group == group][:BATCH]
        self._calls = [call for call in self._calls if call not in taken]
        self._fair_queue.start_batch(group, self._calls)
        seconds = self._take(self.cost_model.undisturbed(group, len(taken)))
        self._fair_queue.charge(group, seconds / len(taken))
        self.cost_model.observe((group, None), len(taken), seconds)
        for call in taken:
            call.work.steps -= 1
            if call.work.steps:
                self._wait(call.work)
            else:
                self._take(self.machine.overhead_s / 2)
                number, at, model = call.work.payload
                self._told[number] = model, self.now - at
                self.backlog.remove(call.work)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    draw, times, at = random.Random(seed), [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


def effective_quality(told: list[tuple[str, float] | None], deadline: float, scores: Mapping[str, float]) -> float:
    """Mean score of what was in time, times its share."""
    return sum(scores[one[0]] for one in told if one is not None and one[1] <= deadline) / len(told)


def compared(
    machine: Machine, load: float, deadline: float, seeds: int, seconds: float = 60.0, elastic: Elastic | None = None
) -> dict[str, list[float]]:
    """Effective quality by policy and seed.

    `load`: of the capacity of the largest variant in full batches. `deadline`: times the seconds of its image alone.
    """
    first = next(iter(machine.profiles))
    rate, limit = (
        load / machine.picture(first, BATCH) / machine.slower,
        deadline * machine.picture(first, 1) * machine.slower,
    )
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        arrivals = poisson(rate, seconds, seed)
        steps = Simulation(machine, elastic).quality.levels
        choices = {
            "elastic": lambda number: AUTO,
            **{f"always {name}": (lambda number, name=name: name) for name in steps},
            "random": lambda number: random.Random(number).choice(steps),  # noqa: B023
        }
        for policy, choose in choices.items():
            told = Simulation(machine, elastic, seed).run(arrivals, choose, limit)
            found.setdefault(policy, []).append(effective_quality(told, limit, machine.scores))
    return found


def mean(values: list[float]) -> float:
    return statistics.mean(values)
