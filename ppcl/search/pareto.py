"""Which plan to choose: exact dynamic programming on what each replacement saves and costs, then a few plans measured as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from ppcl.config.schema import Target
from ppcl.errors import UserError
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.replacements.plan import Ffn, Interval, LowRankModulation, Replacement, TextRun, sort_key
from ppcl.search.latency_table import LatencyTable

Plan = tuple[Replacement, ...]
# What is saved, what it costs in sensitivity, and by which plan.
Row = tuple[int, float, Plan]


class Savings(Protocol):
    """What there is of something in the teacher, in whole numbers, and how much of it an replacement saves; see `ppcl.replacements.parameter_counts.ParameterCounts`."""

    @property
    def total(self) -> int: ...

    @property
    def blocks(self) -> Sized: ...

    def saved(self, replacement: Replacement, within: TextRun | None = None, folded: bool = False) -> int: ...


def pareto_front(savings: Savings, sensitivity: Mapping[Replacement, float]) -> list[Row]:
    """Every plan that no other beats in both what is saved and summed sensitivity.

    Rows of (saved, sensitivity, plan), both rising. Exact, by dynamic programming over the blocks from the last to the first:
    what is beaten stays beaten whatever is added to both. The rows number at most the distinct sums of what is
    saved, which are few since blocks are alike.
    """
    fold = LowRankModulation()
    if fold not in sensitivity:
        return _front(savings, sensitivity, folded=False)
    others = {replacement: value for replacement, value in sensitivity.items() if replacement != fold}
    row = savings.saved(fold), sensitivity[fold], (fold,)
    return _pareto(_front(savings, others, folded=False) + _added(_front(savings, others, folded=True), row))


def _front(savings: Savings, sensitivity: Mapping[Replacement, float], folded: bool) -> list[Row]:
    starting: dict[int, list[Replacement]] = {}
    for replacement in sorted(sensitivity, key=sort_key):
        starting.setdefault(replacement.first, []).append(replacement)
    best: dict[int, list[Row]] = {len(savings.blocks): [(0, 0.0, ())]}
    for block in range(len(savings.blocks) - 1, -1, -1):
        rows = list(best[block + 1])
        for replacement in starting.get(block, ()):
            alone = [(savings.saved(replacement, None, folded), sensitivity[replacement], (replacement,))]
            if isinstance(replacement, TextRun):
                for number in replacement.blocks:
                    ways = [e for e in starting.get(number, ()) if isinstance(e, Ffn)]
                    more = [
                        _added(alone, (savings.saved(ffn, replacement, folded), sensitivity[ffn], (ffn,)))
                        for ffn in ways
                    ]
                    alone = _pareto([*alone, *chain.from_iterable(more)])
            rows += chain.from_iterable(_added(best[replacement.last + 1], row) for row in alone)
        best[block] = _pareto(rows)
    return best[0]


def _added(rows: Iterable[Row], other: Row) -> list[Row]:
    return [(saved + other[0], sensitivity + other[1], (*other[2], *plan)) for saved, sensitivity, plan in rows]


def _pareto(rows: list[Row]) -> list[Row]:
    kept, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (-row[0], row[1], len(row[2]))):
        if row[1] < least:
            kept.append(row)
            least = row[1]
    return kept[::-1]


def choose(budget: float, sizes: ParameterCounts, sensitivity: Mapping[Replacement, float]) -> Plan:
    """The plan of least summed sensitivity that leaves at most the share `budget` of the parameters.

    Raises `UserError`, with the smallest share that can be met, where all replacements together do not meet it.
    """
    rows = pareto_front(sizes, sensitivity)
    for saved, _, plan in rows:
        if sizes.total - saved <= budget * sizes.total:
            return tuple(sorted(plan, key=sort_key))
    smallest = 1 - rows[-1][0] / sizes.total
    raise UserError(
        f"variants.budgets: {budget:g} of the parameters cannot be met; with every replacement on {smallest:.4f} of them "
        f"remain, so give {smallest + 0.00005:.4f} or more"
    )


def _kind(replacement: Replacement) -> str:
    return "narrow" if isinstance(replacement, Ffn) and replacement.keep_percent else type(replacement).__name__


_KINDS_TOGETHER = (
    {"Interval", "TextRun", "Ffn", "narrow", "Fold"},
    {"Interval", "TextRun", "narrow", "Fold"},
    {"TextRun", "narrow", "Fold"},
    {"Interval", "narrow", "Fold"},
    {"narrow", "Fold"},
    {"Interval", "TextRun", "Fold"},
    {"Interval", "Fold"},
    {"Interval"},
)


def candidates(budget: float, sizes: ParameterCounts, sensitivity: Mapping[Replacement, float]) -> list[Plan]:
    """Plans for a budget that are worth measuring as a whole: the sum of the sensitivities, of their square roots, and kinds left out.

    Damages do not simply add: those of neighbours grow together, so a plan of many small replacements, FFNs above all, looks
    better than it is. The square roots prefer few replacements. The first one is that of the plain sum. Raises `UserError`
    where the budget cannot be met.
    """
    found = {choose(budget, sizes, sensitivity): None}
    for wanted in _KINDS_TOGETHER:
        some = {replacement: value for replacement, value in sensitivity.items() if _kind(replacement) in wanted}
        for costs in (some, {replacement: value**0.5 for replacement, value in some.items()}):
            try:
                found[choose(budget, sizes, costs)] = None
            except UserError:  # not with these kinds alone
                continue
    return list(found)


@dataclass(frozen=True)
class _Mixed:
    """A share of what is saved in parameters and the rest in time, in parts of the teacher's that leave few distinct sums."""

    sizes: ParameterCounts
    times: LatencyTable
    share: float
    total = 400

    @property
    def blocks(self) -> Sized:
        return self.sizes.blocks

    def saved(self, replacement: Replacement, within: TextRun | None = None, folded: bool = False) -> int:
        parameters = self.sizes.saved(replacement, within, folded) / self.sizes.total
        time = self.times.saved(replacement, within, folded) / self.times.total
        return round(self.total * (self.share * parameters + (1 - self.share) * time))


# How much of a mixture is parameters.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of the wanted speed, what a plan is predicted to have: times add up roughly, and what counts is measured of each plan as a whole.
_MARGINS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
# Plans that are measured for each of them.
_A_MARGIN = 4


def target_candidates(
    name: str, target: Target, sizes: ParameterCounts, times: LatencyTable, sensitivity: Mapping[Replacement, float]
) -> list[Plan]:
    """Plans that may meet a target, worth measuring as a whole: of least sensitivity for mixtures of what they save.

    See `candidates` for why the least sum is not enough. Raises `UserError` where no plan is predicted to come near.
    """
    # By margin, the plans and the sums of their sensitivities.
    found: dict[float, dict[Plan, float]] = {margin: {} for margin in _MARGINS}
    fastest, smallest = 1.0, 1.0
    for wanted in _KINDS_TOGETHER:
        some = {replacement: value for replacement, value in sensitivity.items() if _kind(replacement) in wanted}
        for costs in (some, {replacement: value**0.5 for replacement, value in some.items()}):
            for share in _SHARES:
                plans = [plan for _, _, plan in pareto_front(_Mixed(sizes, times, share), costs)]
                left = {plan: sizes.parameters(plan) / sizes.total for plan in plans}
                speed = {
                    plan: times.speedup(plan)
                    for plan in plans
                    if target.parameters is None or left[plan] <= target.parameters
                }
                smallest, fastest = min(smallest, *left.values()), max([fastest, *speed.values()])
                for margin, known in found.items():
                    meeting = (
                        plan for plan in speed if target.speedup is None or speed[plan] >= margin * target.speedup
                    )
                    if (plan := next(meeting, None)) is not None:
                        known[tuple(sorted(plan, key=sort_key))] = sum(sensitivity[replacement] for replacement in plan)
    best = [plan for known in found.values() for plan in sorted(known, key=known.__getitem__)[:_A_MARGIN]]
    if not best:
        raise UserError(
            f"variants.targets.{name} cannot be met: the smallest plan leaves {smallest:.4f} of the parameters, and the fastest "
            f"that is small enough is about {fastest:.2f} times as fast as the teacher; ask for less or train more replacements"
        )
    return list(dict.fromkeys(best))


def choose_blocks(most: int, sizes: ParameterCounts, sensitivity: Mapping[Replacement, float]) -> Plan:
    """The intervals of least summed sensitivity that leave at most so many blocks running.

    Raises `UserError`, with the smallest number that can be met, where all intervals together do not meet it.
    """
    rows: list[Row] = [(0, 0.0, ())]
    for interval in sorted(replacement for replacement in sensitivity if isinstance(replacement, Interval)):
        rows = _pareto(rows + _added(rows, (interval.removed, sensitivity[interval], (interval,))))
    for removed, _, plan in rows:
        if len(sizes.blocks) - removed <= most:
            return tuple(sorted(plan))
    smallest = len(sizes.blocks) - rows[-1][0]
    raise UserError(
        f"variants.blocks: {most} blocks cannot be met; with every interval on {smallest} run, so give {smallest} or more"
    )
