"""Candidate plans of the budgets and targets, each worth measuring as a whole.

Sensitivities do not simply add: those of neighbours grow together, so a plan of many small replacements, FFNs above
all, looks better than it is. Candidates therefore come from several Pareto fronts: of the sum of the sensitivities, of
the sum of their square roots, which prefers few replacements, and with kinds of replacement left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass

import numpy as np

from ppcl.config.schema import Target
from ppcl.errors import UserError
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, Plan, PrunedFfn, Replacement, TextRun
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.latency_table import LatencyTable
from ppcl.search.pareto import ParetoFront, Savings, choose, pareto_front

_KINDS_TOGETHER: tuple[frozenset[type[Replacement]], ...] = (
    frozenset({Interval, TextRun, LinearFfn, PrunedFfn, LowRankModulation}),
    frozenset({Interval, TextRun, PrunedFfn, LowRankModulation}),
    frozenset({TextRun, PrunedFfn, LowRankModulation}),
    frozenset({Interval, PrunedFfn, LowRankModulation}),
    frozenset({PrunedFfn, LowRankModulation}),
    frozenset({Interval, TextRun, LowRankModulation}),
    frozenset({Interval, LowRankModulation}),
    frozenset({Interval}),
)

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
    """The Pareto fronts of one job: each is computed when it is first needed, and serves all budgets and targets.

    `sensitivity`: of each replacement alone. `times`: needed for targets.
    """

    def __init__(
        self, sizes: ParameterCounts, sensitivity: Mapping[Replacement, float], times: LatencyTable | None = None
    ):
        self.sizes, self.sensitivity, self.times = sizes, sensitivity, times
        self._by_parameters: list[ParetoFront] | None = None
        self._by_mixture: list[ParetoFront] | None = None

    def for_budget(self, budget: float) -> list[Plan]:
        """Plans that leave at most the share `budget` of the parameters; the first has the least summed sensitivity.

        Raises `UserError` where the budget cannot be met.
        """
        if self._by_parameters is None:
            self._by_parameters = [pareto_front(self.sizes, costs) for costs in self._costs()]
        every_kind, *fewer_kinds = self._by_parameters
        plans = {choose(budget, self.sizes, every_kind): None}
        for front in fewer_kinds:
            try:
                plans[choose(budget, self.sizes, front)] = None
            except UserError:  # not with these kinds alone
                continue
        return list(plans)

    def for_target(self, name: str, target: Target) -> list[Plan]:
        """Plans that may meet a target, of least sensitivity for mixtures of the parameters and the time they save.

        Raises `UserError` where no plan is predicted to come near.
        """
        # By margin, the plans that reach it and the sums of their sensitivities.
        reaching: dict[float, dict[Plan, float]] = {margin: {} for margin in _MARGINS}
        fastest, smallest = 1.0, 1.0
        for front in self._fronts_by_mixture():
            left, speed = self._left_and_speed(front)
            small = np.full(len(front), True) if target.parameters is None else left <= target.parameters
            smallest, fastest = min(smallest, left.min()), max(fastest, speed[small].max(initial=1.0))
            for margin, plans in reaching.items():
                meets = small if target.speedup is None else small & (speed >= margin * target.speedup)
                if meets.any():
                    plan = front.plan(int(meets.argmax()))
                    cost = sum(self.sensitivity[replacement] for replacement in plan)
                    plans[plan] = cost
        best = [
            plan for plans in reaching.values() for plan in sorted(plans, key=plans.__getitem__)[:_PLANS_PER_MARGIN]
        ]
        if not best:
            raise UserError(
                f"variants.targets.{name} cannot be met: the smallest plan leaves {smallest:.4f} of the parameters, "
                f"and the fastest that is small enough is about {fastest:.2f} times as fast as the teacher; "
                "ask for less or train more replacements"
            )
        return list(dict.fromkeys(best))

    def _fronts_by_mixture(self) -> list[ParetoFront]:
        """Fronts that track the parameters and the time saved."""
        if self._by_mixture is None:
            times = self._latencies()
            mixtures: list[Savings] = [_Mixture(self.sizes, times, share) for share in _MIXTURES]
            self._by_mixture = [
                pareto_front(mixture, costs, (self.sizes, times)) for costs in self._costs() for mixture in mixtures
            ]
        return self._by_mixture

    def _left_and_speed(self, front: ParetoFront) -> tuple[np.ndarray, np.ndarray]:
        """By row, the share of the parameters that is left, and how many times the teacher's speed is predicted."""
        times = self._latencies()
        parameters, microseconds = front.saved[:, 1], front.saved[:, 2]
        left = (self.sizes.total - parameters) / self.sizes.total
        return left, times.total / np.maximum(1, times.total - microseconds)

    def _latencies(self) -> LatencyTable:
        if self.times is None:
            raise ValueError("targets need measured latencies")
        return self.times

    def _costs(self) -> Iterator[Mapping[Replacement, float]]:
        """The sensitivities to sum, by kinds together and cost; choices of kinds that come to the same are left out."""
        transforms: tuple[Callable[[float], float], ...] = (lambda value: value, lambda value: value**0.5)
        subsets = dict.fromkeys(
            frozenset(replacement for replacement in self.sensitivity if type(replacement) in kinds)
            for kinds in _KINDS_TOGETHER
        )
        for subset in subsets:
            for transform in transforms:
                yield {entry: transform(value) for entry, value in self.sensitivity.items() if entry in subset}
