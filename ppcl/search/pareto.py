"""Pareto fronts over plans: exact dynamic programming on what replacements save and cost in sensitivity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from ppcl.errors import UserError
from ppcl.replacements import Interval, LowRankModulation, Plan, Replacement, sort_key
from ppcl.replacements.parameter_counts import ParameterCounts

# What is saved, the summed sensitivity, and the plan.
Row = tuple[int, float, Plan]


class Savings(Protocol):
    """A quantity of the teacher in whole numbers, and what a replacement saves of it, as `ParameterCounts` has it."""

    @property
    def total(self) -> int: ...

    @property
    def blocks(self) -> Sized: ...

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int: ...


@dataclass(frozen=True, eq=False)
class ParetoFront(Sequence[Row]):
    """The plans that no other beats in both what is saved and summed sensitivity, both rising.

    `saved` `(n, 1 + tracked) int64`: the quantity of the front, then the tracked ones. `cost` `(n,) float64`: summed
    sensitivity. `length` `(n,) int64`: replacements of the plan. Plans are kept as back-pointers: the plan of row `r`
    is the replacement of `sources[origin[r]]` and the plan of row `parent[r]` of that source's front.
    """

    saved: np.ndarray
    cost: np.ndarray
    length: np.ndarray
    origin: np.ndarray
    parent: np.ndarray
    sources: tuple[tuple[ParetoFront, Replacement | None], ...]

    def __len__(self) -> int:
        return len(self.cost)

    @overload
    def __getitem__(self, row: int) -> Row: ...

    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...

    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        return int(self.saved[row, 0]), float(self.cost[row]), self.plan(row)

    def __iter__(self) -> Iterator[Row]:
        return (self[row] for row in range(len(self)))

    def plan(self, row: int) -> Plan:
        """The replacements of one row."""
        front, plan = self, []
        while front.sources:
            parent = int(front.parent[row])
            front, replacement = front.sources[front.origin[row]]
            row = parent
            if replacement is not None:
                plan.append(replacement)
        return Plan(plan)


@dataclass(frozen=True)
class _Extension:
    """The rows of a front, each with one more replacement on, or as they are."""

    front: ParetoFront
    replacement: Replacement | None = None
    saved: tuple[int, ...] = ()
    cost: float = 0.0


def _empty_plan(quantities: int) -> ParetoFront:
    zeros = np.zeros(1, np.int64)
    return ParetoFront(np.zeros((1, quantities), np.int64), np.zeros(1), zeros, zeros, zeros, ())


def _merge(extensions: Sequence[_Extension]) -> ParetoFront:
    """The rows of all extensions that no other row beats; of equal rows the shortest plan, then the earliest."""
    fronts = [extension.front for extension in extensions]
    saved = np.concatenate(
        [e.front.saved + np.array(e.saved, np.int64) if e.saved else e.front.saved for e in extensions]
    )
    cost = np.concatenate([e.front.cost + e.cost for e in extensions])
    length = np.concatenate([e.front.length + (e.replacement is not None) for e in extensions])
    origin = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    parent = np.concatenate([np.arange(len(front)) for front in fronts])
    order = np.lexsort((length, cost, -saved[:, 0]))
    least = np.minimum.accumulate(cost[order])
    # A row stays when it costs less than every row that saves as much or more.
    stays = np.append(True, least[1:] < least[:-1])
    kept = order[stays][::-1]
    sources = tuple((extension.front, extension.replacement) for extension in extensions)
    return ParetoFront(saved[kept], cost[kept], length[kept], origin[kept], parent[kept], sources)


class _FrontBuilder:
    """The dynamic programming over the blocks, with the modulations either computed in low rank or in full."""

    def __init__(self, quantities: Sequence[Savings], sensitivity: Mapping[Replacement, float], low_rank: bool):
        self.quantities, self.sensitivity, self.low_rank = quantities, sensitivity, low_rank
        self.by_first_block: dict[int, list[Replacement]] = {}
        for replacement in sorted(sensitivity, key=sort_key):
            self.by_first_block.setdefault(replacement.first, []).append(replacement)

    def front(self) -> ParetoFront:
        blocks = len(self.quantities[0].blocks)
        # By block, the front over the replacements that start there or later.
        best = {blocks: _empty_plan(len(self.quantities))}
        for block in range(blocks - 1, -1, -1):
            extensions = [_Extension(best[block + 1])]
            for replacement in self.by_first_block.get(block, ()):
                extension = self._extension(best[replacement.last + 1], replacement)
                if inside := self._inside(replacement):
                    extension = _Extension(self._with_inside(replacement, inside, _merge([extension])))
                extensions.append(extension)
            best[block] = _merge(extensions)
        return best[0]

    def _inside(self, outer: Replacement) -> list[list[Replacement]]:
        """The replacements that another contains, by the block they start at; none reaches into the next block."""
        by_block = (self.by_first_block.get(block, ()) for block in outer.blocks)
        inside = [[inner for inner in here if outer.contains(inner)] for here in by_block]
        return [here for here in inside if here]

    def _with_inside(self, outer: Replacement, inside: list[list[Replacement]], front: ParetoFront) -> ParetoFront:
        """The Pareto front over the FFNs within a text run that is on, and the blocks after the run."""
        for here in inside:
            front = _merge([_Extension(front), *(self._extension(front, inner, outer) for inner in here)])
        return front

    def _extension(self, front: ParetoFront, replacement: Replacement, within: Replacement | None = None) -> _Extension:
        saved = tuple(quantity.saved(replacement, within, self.low_rank) for quantity in self.quantities)
        return _Extension(front, replacement, saved, self.sensitivity[replacement])


def pareto_front(
    savings: Savings, sensitivity: Mapping[Replacement, float], tracked: Sequence[Savings] = ()
) -> ParetoFront:
    """Every plan that no other beats in both what it saves and summed sensitivity; `tracked` quantities are summed too.

    Exact, by dynamic programming over the blocks from the last to the first: a plan that is beaten stays beaten
    whatever is added to both. `n`, the rows of a front, is at most the number of distinct sums of what is saved, which
    are few since blocks are alike. A replacement costs one addition and one sort of `n` rows, and an FFN once more for
    each text run that holds it: O((replacements + FFNs within text runs) · n log n), independent of the number of
    plans, and twice that where modulations can be in low rank. A teacher of 60 blocks with seven kinds of replacement
    has some 2000 rows and takes a tenth of a second.
    """
    quantities = (savings, *tracked)
    low_rank = LowRankModulation()
    others = {replacement: value for replacement, value in sensitivity.items() if replacement != low_rank}
    front = _FrontBuilder(quantities, others, low_rank=False).front()
    if low_rank not in sensitivity:
        return front
    with_low_rank = _FrontBuilder(quantities, others, low_rank=True).front()
    saved = tuple(quantity.saved(low_rank) for quantity in quantities)
    return _merge([_Extension(front), _Extension(with_low_rank, low_rank, saved, sensitivity[low_rank])])


def choose(budget: float, sizes: ParameterCounts, front: ParetoFront) -> Plan:
    """The plan of least summed sensitivity that leaves at most the share `budget` of the parameters.

    `front`: of the parameters. Raises `UserError`, with the smallest share that can be met, where no plan meets it.
    """
    row = int(np.searchsorted(sizes.total - front.saved[:, 0] <= budget * sizes.total, True))
    if row < len(front):
        return front.plan(row)
    smallest = 1 - int(front.saved[-1, 0]) / sizes.total
    raise UserError(
        f"variants.budgets: {budget:g} of the parameters cannot be met; with every replacement on {smallest:.4f} of "
        f"them remain, so give {smallest + 0.00005:.4f} or more"
    )


@dataclass(frozen=True)
class RemovedBlocks:
    """A quantity to save: the number of blocks, of which a replacement removes some."""

    blocks: Sized

    @property
    def total(self) -> int:
        return len(self.blocks)

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int:
        return replacement.removed


def _depth_front(blocks: Sized, sensitivity: Mapping[Replacement, float]) -> ParetoFront:
    """The front of removed blocks, of the intervals alone."""
    intervals: dict[Replacement, float] = {
        entry: cost for entry, cost in sensitivity.items() if isinstance(entry, Interval)
    }
    return pareto_front(RemovedBlocks(blocks), intervals)


def deepest_plan(blocks: Sized, sensitivity: Mapping[Replacement, float]) -> Plan:
    """The intervals that remove the most blocks, of the least summed sensitivity; empty where there is none."""
    return _depth_front(blocks, sensitivity).plan(-1)


def choose_blocks(most: int, blocks: Sized, sensitivity: Mapping[Replacement, float]) -> Plan:
    """The intervals of least summed sensitivity that leave at most `most` of the blocks running.

    Raises `UserError`, with the smallest number that can be met, where all intervals together do not meet it.
    """
    front = _depth_front(blocks, sensitivity)
    for removed, _, plan in front:
        if len(blocks) - removed <= most:
            return plan
    smallest = len(blocks) - int(front.saved[-1, 0])
    raise UserError(
        f"variants.blocks: {most} blocks cannot be met; with every interval on {smallest} run, so give {smallest} or "
        "more"
    )
