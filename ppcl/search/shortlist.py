"""Which of the candidate intervals are worth distilling: those of the best plans, over the range of plans asked for.

For each number of removed blocks the plan of the least predicted error is found by dynamic programming, on all samples
and on resamples of them. Intervals that many of these plans hold are shortlisted. How often the resamples agree with
the choice tells how far it can be trusted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ppcl.config.schema import Detection
from ppcl.replacements import Interval, Plan, Replacement
from ppcl.search.error_model import ErrorModel
from ppcl.search.pareto import RemovedBlocks, pareto_front

# Numbers of removed blocks for which plans are found, at most, spread over all that are asked for.
_COUNTS = 12
# How often costs are corrected by the plan before, and how far; see `ppcl.search.candidates`.
_ROUNDS, _SHARE = 2, 0.5


@dataclass(frozen=True)
class Shortlist:
    """`intervals`: those to distil. `plans`: by number of removed blocks, the best plan of intervals alone.

    `recurrence`: by number of removed blocks and boundary of its plan, the share of the resamples whose plan has that
    boundary too. Boundary `b` is the input of block `b`.
    """

    intervals: list[Interval]
    plans: dict[int, Plan]
    recurrence: dict[int, dict[int, float]]

    def stability(self, removed: int) -> float:
        """The mean recurrence of the boundaries of one plan."""
        shares = self.recurrence[removed].values()
        return sum(shares) / len(shares)


def most_intervals(settings: Detection, blocks: int) -> int:
    """The most intervals of a shortlist, of a teacher with so many blocks."""
    return settings.max_candidates or max(16, blocks // 2)


def longest_chain(settings: Detection, blocks: int) -> int:
    """The most blocks that overlapping intervals of a shortlist cover together, in a teacher of so many blocks.

    Only between such chains can a pipeline of ranks be cut. A large teacher needs eight ranks, so an eighth of its
    blocks is the most; one that has fewer than eight intervals' worth of them needs fewer ranks.
    """
    eighth = blocks // 8
    return eighth if eighth >= settings.max_length else 2 * settings.max_length


def best_depth_plans(errors: ErrorModel, blocks: int, counts: Sequence[int]) -> dict[int, Plan]:
    """By number of removed blocks, the plan of intervals of the least predicted error that removes as many or more.

    Those that cannot be met are left out. Cost: `1 + _ROUNDS · len(counts)` fronts of at most `blocks` rows.
    """
    front = pareto_front(RemovedBlocks(range(blocks)), errors.sensitivity)
    plans = {}
    for count in counts:
        plan = _first_that_removes(front, count)
        if plan is None:
            continue
        tried, costs = [plan], dict(errors.sensitivity)
        for _ in range(_ROUNDS):
            costs = errors.corrected(costs, tried[-1], _SHARE)
            corrected = _first_that_removes(pareto_front(RemovedBlocks(range(blocks)), costs), count)
            if corrected is None or corrected in tried:
                break
            tried.append(corrected)
        plans[count] = min(tried, key=errors)
    return plans


def _first_that_removes(front: Sequence[tuple[int, float, Plan]], count: int) -> Plan | None:
    return next((plan for removed, _, plan in front if removed >= count), None)


def shortlist(
    errors: ErrorModel,
    resampled: Callable[[], Iterator[ErrorModel]],
    block_ranges: Sequence[range],
    most_removed: int,
    most: int,
    longest_chain: int,
    tell: Callable[[int], None],
) -> Shortlist:
    """At most `most` intervals, of the plans that remove up to `most_removed` blocks.

    `resampled()`: models of resamples of the same samples. `longest_chain`: blocks that overlapping intervals may cover
    together: between such chains alone can a pipeline of ranks be cut. `tell(done)` counts resamples.
    """
    blocks = block_ranges[-1].stop
    counts = _spread(most_removed)
    plans = best_depth_plans(errors, blocks, counts)
    by_count: dict[int, list[Plan]] = {count: [plan] for count, plan in plans.items()}
    for done, model in enumerate(resampled(), 1):
        for count, plan in best_depth_plans(model, blocks, list(plans)).items():
            by_count[count].append(plan)
        tell(done)
    votes: Counter[Replacement] = Counter()
    for found in by_count.values():
        # The choice on all samples counts as much as all resamples.
        for number, plan in enumerate(found):
            votes.update(dict.fromkeys(plan, len(found) if number == 0 else 1))
    intervals = _apart([i for i, _ in votes.most_common() if isinstance(i, Interval)], most, longest_chain)
    recurrence = {count: _recurrence(plans[count], found[1:]) for count, found in by_count.items() if len(found) > 1}
    return Shortlist(intervals, plans, recurrence)


def _spread(most: int) -> list[int]:
    """At most `_COUNTS` whole numbers from 1 to `most`."""
    if most <= _COUNTS:
        return list(range(1, most + 1))
    return sorted({round(1 + i * (most - 1) / (_COUNTS - 1)) for i in range(_COUNTS)})


def boundaries(plan: Plan) -> set[int]:
    """Where the intervals of a plan begin, and where the blocks behind them do."""
    return {border for replacement in plan for border in (replacement.first, replacement.last + 1)}


def _recurrence(plan: Plan, others: Sequence[Plan]) -> dict[int, float]:
    return {
        border: sum(border in boundaries(other) for other in others) / len(others)
        for border in sorted(boundaries(plan))
    }


def _apart(intervals: Sequence[Interval], most: int, longest_chain: int) -> list[Interval]:
    """The first intervals, without those that would make a chain of overlapping ones too long; in order of blocks."""
    chosen: list[Interval] = []
    for interval in intervals:
        if len(chosen) < most and _chain(interval, chosen) <= max(longest_chain, len(interval.blocks)):
            chosen.append(interval)
    return sorted(chosen, key=lambda interval: (interval.first, interval.last))


def _chain(interval: Interval, others: Sequence[Interval]) -> int:
    """The blocks that an interval covers with all that overlap it, and those that overlap these."""
    first, last = interval.first, interval.last
    while True:
        touching = [other for other in others if other.first <= last and first <= other.last]
        wider = min([first, *(o.first for o in touching)]), max([last, *(o.last for o in touching)])
        if wider == (first, last):
            return last - first + 1
        first, last = wider


def unstable(shortlisted: Shortlist, asked: Mapping[str, int], least: float) -> list[str]:
    """One sentence for each variant whose number of removed blocks has a plan that resamples do not agree with."""
    notes = []
    for name, removed in asked.items():
        count = min((c for c in shortlisted.recurrence if c >= removed), default=None)
        if count is not None and shortlisted.stability(count) < least:
            notes.append(
                f"the intervals of {name} are not certain: {shortlisted.plans[count]} removes {count} blocks, and only "
                f"{shortlisted.stability(count):.0%} of its boundaries come again on resampled prompts and timesteps; "
                "raise detection.samples"
            )
    return notes
