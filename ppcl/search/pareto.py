"""Which plan to choose: exact dynamic programming on what each entry saves and costs, then a few plans measured as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from ppcl.config.schema import Target
from ppcl.errors import UserError
from ppcl.replacements.parameter_counts import Sizes
from ppcl.replacements.plan import Entry, Ffn, Fold, Interval, TextRun, order
from ppcl.search.latency_table import Times

Plan = tuple[Entry, ...]
# What is saved, what it costs in damage, and by which plan.
Row = tuple[int, float, Plan]


class Savings(Protocol):
    """What there is of something in the teacher, in whole numbers, and how much of it an entry saves; see `ppcl.replacements.parameter_counts.Sizes`."""

    @property
    def total(self) -> int: ...

    @property
    def blocks(self) -> Sized: ...

    def saved(self, entry: Entry, within: TextRun | None = None, folded: bool = False) -> int: ...


def front(savings: Savings, damage: Mapping[Entry, float]) -> list[Row]:
    """Every plan that no other beats in both what is saved and summed damage.

    Rows of (saved, damage, plan), both rising. Exact, by dynamic programming over the blocks from the last to the first:
    what is beaten stays beaten whatever is added to both. The rows number at most the distinct sums of what is
    saved, which are few since blocks are alike.
    """
    fold = Fold()
    if fold not in damage:
        return _front(savings, damage, folded=False)
    others = {entry: value for entry, value in damage.items() if entry != fold}
    row = savings.saved(fold), damage[fold], (fold,)
    return _pareto(_front(savings, others, folded=False) + _added(_front(savings, others, folded=True), row))


def _front(savings: Savings, damage: Mapping[Entry, float], folded: bool) -> list[Row]:
    starting: dict[int, list[Entry]] = {}
    for entry in sorted(damage, key=order):
        starting.setdefault(entry.first, []).append(entry)
    best: dict[int, list[Row]] = {len(savings.blocks): [(0, 0.0, ())]}
    for block in range(len(savings.blocks) - 1, -1, -1):
        rows = list(best[block + 1])
        for entry in starting.get(block, ()):
            alone = [(savings.saved(entry, None, folded), damage[entry], (entry,))]
            if isinstance(entry, TextRun):
                for number in entry.blocks:
                    ways = [e for e in starting.get(number, ()) if isinstance(e, Ffn)]
                    more = [_added(alone, (savings.saved(ffn, entry, folded), damage[ffn], (ffn,))) for ffn in ways]
                    alone = _pareto([*alone, *chain.from_iterable(more)])
            rows += chain.from_iterable(_added(best[entry.last + 1], row) for row in alone)
        best[block] = _pareto(rows)
    return best[0]


def _added(rows: Iterable[Row], other: Row) -> list[Row]:
    return [(saved + other[0], damage + other[1], (*other[2], *plan)) for saved, damage, plan in rows]


def _pareto(rows: list[Row]) -> list[Row]:
    kept, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (-row[0], row[1], len(row[2]))):
        if row[1] < least:
            kept.append(row)
            least = row[1]
    return kept[::-1]


def choose(budget: float, sizes: Sizes, damage: Mapping[Entry, float]) -> Plan:
    """The plan of least summed damage that leaves at most the share `budget` of the parameters.

    Raises `UserError`, with the smallest share that can be met, where all replacements together do not meet it.
    """
    rows = front(sizes, damage)
    for saved, _, plan in rows:
        if sizes.total - saved <= budget * sizes.total:
            return tuple(sorted(plan, key=order))
    smallest = 1 - rows[-1][0] / sizes.total
    raise UserError(
        f"variants.budgets: {budget:g} of the parameters cannot be met; with every replacement on {smallest:.4f} of them "
        f"remain, so give {smallest + 0.00005:.4f} or more"
    )


def _kind(entry: Entry) -> str:
    return "narrow" if isinstance(entry, Ffn) and entry.kept else type(entry).__name__


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


def candidates(budget: float, sizes: Sizes, damage: Mapping[Entry, float]) -> list[Plan]:
    """Plans for a budget that are worth measuring as a whole: the sum of the damages, of their square roots, and kinds left out.

    Damages do not simply add: those of neighbours grow together, so a plan of many small entries, FFNs above all, looks
    better than it is. The square roots prefer few entries. The first one is that of the plain sum. Raises `UserError`
    where the budget cannot be met.
    """
    found = {choose(budget, sizes, damage): None}
    for wanted in _KINDS_TOGETHER:
        some = {entry: value for entry, value in damage.items() if _kind(entry) in wanted}
        for costs in (some, {entry: value**0.5 for entry, value in some.items()}):
            try:
                found[choose(budget, sizes, costs)] = None
            except UserError:  # not with these kinds alone
                continue
    return list(found)


@dataclass(frozen=True)
class _Mixed:
    """A share of what is saved in parameters and the rest in time, in parts of the teacher's that leave few distinct sums."""

    sizes: Sizes
    times: Times
    share: float
    total = 400

    @property
    def blocks(self) -> Sized:
        return self.sizes.blocks

    def saved(self, entry: Entry, within: TextRun | None = None, folded: bool = False) -> int:
        parameters = self.sizes.saved(entry, within, folded) / self.sizes.total
        time = self.times.saved(entry, within, folded) / self.times.total
        return round(self.total * (self.share * parameters + (1 - self.share) * time))


# How much of a mixture is parameters.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of the wanted speed, what a plan is predicted to have: times add up roughly, and what counts is measured of each plan as a whole.
_MARGINS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
# Plans that are measured for each of them.
_A_MARGIN = 4


def target_candidates(name: str, target: Target, sizes: Sizes, times: Times, damage: Mapping[Entry, float]) -> list[Plan]:
    """Plans that may meet a target, worth measuring as a whole: of least damage for mixtures of what they save.

    See `candidates` for why the least sum is not enough. Raises `UserError` where no plan is predicted to come near.
    """
    # By margin, the plans and the sums of their damages.
    found: dict[float, dict[Plan, float]] = {margin: {} for margin in _MARGINS}
    fastest, smallest = 1.0, 1.0
    for wanted in _KINDS_TOGETHER:
        some = {entry: value for entry, value in damage.items() if _kind(entry) in wanted}
        for costs in (some, {entry: value**0.5 for entry, value in some.items()}):
            for share in _SHARES:
                plans = [plan for _, _, plan in front(_Mixed(sizes, times, share), costs)]
                left = {plan: sizes.parameters(plan) / sizes.total for plan in plans}
                speed = {plan: times.speedup(plan) for plan in plans if target.parameters is None or left[plan] <= target.parameters}
                smallest, fastest = min(smallest, *left.values()), max([fastest, *speed.values()])
                for margin, known in found.items():
                    meeting = (plan for plan in speed if target.speedup is None or speed[plan] >= margin * target.speedup)
                    if (plan := next(meeting, None)) is not None:
                        known[tuple(sorted(plan, key=order))] = sum(damage[entry] for entry in plan)
    best = [plan for known in found.values() for plan in sorted(known, key=known.__getitem__)[:_A_MARGIN]]
    if not best:
        raise UserError(
            f"variants.targets.{name} cannot be met: the smallest plan leaves {smallest:.4f} of the parameters, and the fastest "
            f"that is small enough is about {fastest:.2f} times as fast as the teacher; ask for less or train more replacements"
        )
    return list(dict.fromkeys(best))


def choose_blocks(most: int, sizes: Sizes, damage: Mapping[Entry, float]) -> Plan:
    """The intervals of least summed damage that leave at most so many blocks running.

    Raises `UserError`, with the smallest number that can be met, where all intervals together do not meet it.
    """
    rows: list[Row] = [(0, 0.0, ())]
    for interval in sorted(entry for entry in damage if isinstance(entry, Interval)):
        rows = _pareto(rows + _added(rows, (interval.removed, damage[interval], (interval,))))
    for removed, _, plan in rows:
        if len(sizes.blocks) - removed <= most:
            return tuple(sorted(plan))
    smallest = len(sizes.blocks) - rows[-1][0]
    raise UserError(f"variants.blocks: {most} blocks cannot be met; with every interval on {smallest} run, so give {smallest} or more")
