"""Candidate plans of the budgets and targets, each worth measuring as a whole.

The sum of the sensitivities, which dynamic programming minimises exactly, is not the error of a plan: see
`ppcl.search.error_model`. So the programme is solved again with costs that hold the products with the replacements of
the plan before, a few times; the plans that come up are compared by the error predicted of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass

import numpy as np

from ppcl.config.schema import Target
from ppcl.errors import UserError
from ppcl.replacements import Plan, Replacement
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.error_model import ErrorModel
from ppcl.search.latency_table import LatencyTable
from ppcl.search.pareto import ParetoFront, Savings, choose, pareto_front

Costs = Mapping[Replacement, float]

# How often costs are corrected by the plan before, and how far.
_ROUNDS = 3
_SHARES = (0.5, 1.0)
# Plans of a budget that are measured as a whole.
_PLANS_PER_BUDGET = 6

# The share of parameters, against time, in each mixture of the two.
_MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)

# Shares of the target's speed that a candidate is predicted to reach: latencies add up only roughly, and what counts is
# measured of each plan as a whole.
_MARGINS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
_PLANS_PER_MARGIN = 4


@dataclass(frozen=True)
class _Mixture:
    """A weighted mean of the shares of parameters and of time that are saved, in 400ths: few distinct sums."""

    sizes: ParameterCounts
    times: LatencyTable
    share: float
    total = 400

    @property
    def blocks(self) -> Sized:
        return self.sizes.blocks

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int:
        parameters = self.sizes.saved(replacement, within, low_rank) / self.sizes.total
        time = self.times.saved(replacement, within, low_rank) / self.times.total
        return round(self.total * (self.share * parameters + (1 - self.share) * time))


class CandidateSearch:
    """The candidate plans of one job. `errors`: predicts a plan's error. `times`: needed for targets.

    Cost: twelve Pareto fronts a budget and thirty a target, beside those of uncorrected costs, which are computed once.
    """

    def __init__(self, sizes: ParameterCounts, errors: ErrorModel, times: LatencyTable | None = None):
        self.sizes, self.errors, self.times = sizes, errors, times
        self._by_parameters: list[ParetoFront] | None = None
        self._by_mixture: list[ParetoFront] | None = None

    def for_budget(self, budget: float) -> list[Plan]:
        """Plans that leave at most the share `budget` of the parameters, of the least predicted error first.

        Raises `UserError` where the budget cannot be met.
        """
        if self._by_parameters is None:
            self._by_parameters = [pareto_front(self.sizes, costs) for costs in self._uncorrected()]
        plans = {choose(budget, self.sizes, front): None for front in self._by_parameters}
        for start in list(plans):
            best = self._corrected(start, lambda costs: choose(budget, self.sizes, pareto_front(self.sizes, costs)))
            plans |= dict.fromkeys(best)
        return sorted(plans, key=self.errors)[:_PLANS_PER_BUDGET]

    def for_target(self, name: str, target: Target) -> list[Plan]:
        """Plans that may meet a target, of little predicted error for mixtures of the parameters and time they save.

        Raises `UserError` where no plan is predicted to come near.
        """
        if self._by_mixture is None:
            self._by_mixture = [front for costs in self._uncorrected() for front in self._fronts_by_mixture(costs)]
        search = _TargetSearch(self, target)
        search.add(self._by_mixture)

        def best(costs: Costs) -> Plan:
            search.add(self._fronts_by_mixture(costs))
            return search.best()

        if not search.found:
            raise UserError(
                f"variants.targets.{name} cannot be met: the smallest plan leaves {search.smallest:.4f} of the "
                f"parameters, and the fastest that is small enough is about {search.fastest:.2f} times as fast as the "
                "teacher; ask for less or train more replacements"
            )
        for _ in self._corrected(search.best(), best):
            pass
        return search.plans()

    def _corrected(self, start: Plan, best: Callable[[Costs], Plan]) -> Iterator[Plan]:
        """Plans of costs that are corrected by the plan before: wholly, and half way, which swings less."""
        for share in _SHARES:
            plan, costs = start, dict(self.errors.sensitivity)
            for _ in range(_ROUNDS):
                costs = self.errors.corrected(costs, plan, share)
                plan = best(costs)
                yield plan

    def _uncorrected(self) -> Iterator[Costs]:
        """The sensitivities, and their square roots, which prefer few replacements."""
        sensitivity = self.errors.sensitivity
        yield sensitivity
        yield {replacement: value**0.5 for replacement, value in sensitivity.items()}

    def _fronts_by_mixture(self, costs: Costs) -> list[ParetoFront]:
        """Fronts that track the parameters and the time saved."""
        times = self.latencies()
        mixtures: list[Savings] = [_Mixture(self.sizes, times, share) for share in _MIXTURES]
        return [pareto_front(mixture, costs, (self.sizes, times)) for mixture in mixtures]

    def latencies(self) -> LatencyTable:
        if self.times is None:
            raise ValueError("targets need measured latencies")
        return self.times


class _TargetSearch:
    """The plans that were found for one target, by the share of its speed-up that they are predicted to reach."""

    def __init__(self, search: CandidateSearch, target: Target):
        self.sizes, self.times, self.errors = search.sizes, search.latencies(), search.errors
        self.target = target
        self.reaching: dict[float, dict[Plan, float]] = {margin: {} for margin in _MARGINS}
        self.smallest, self.fastest = 1.0, 1.0

    @property
    def found(self) -> bool:
        return any(self.reaching.values())

    def add(self, fronts: Iterable[ParetoFront]) -> None:
        target = self.target
        for front in fronts:
            left, speed = self._left_and_speed(front)
            small = np.full(len(front), True) if target.parameters is None else left <= target.parameters
            self.smallest = min(self.smallest, left.min())
            self.fastest = max(self.fastest, speed[small].max(initial=1.0))
            for margin, plans in self.reaching.items():
                meets = small if target.speedup is None else small & (speed >= margin * target.speedup)
                if meets.any():
                    plan = front.plan(int(meets.argmax()))
                    plans[plan] = self.errors(plan)

    def best(self) -> Plan:
        """The plan of the least predicted error among those that reach the target, else those that come nearest."""
        plans = self.reaching[1.0] or next(plans for plans in reversed(self.reaching.values()) if plans)
        return min(plans, key=plans.__getitem__)

    def plans(self) -> list[Plan]:
        """The plans to measure: a few of each margin."""
        best = [
            plan
            for plans in self.reaching.values()
            for plan in sorted(plans, key=plans.__getitem__)[:_PLANS_PER_MARGIN]
        ]
        return list(dict.fromkeys(best))

    def _left_and_speed(self, front: ParetoFront) -> tuple[np.ndarray, np.ndarray]:
        """By row, the share of the parameters that is left, and how many times the teacher's speed is predicted."""
        parameters, microseconds = front.saved[:, 1], front.saved[:, 2]
        left = (self.sizes.total - parameters) / self.sizes.total
        return left, self.times.total / np.maximum(1, self.times.total - microseconds)
