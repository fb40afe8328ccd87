"""Choices of a number of blocks to remove, as intervals, without any measurement of what they cost.

A way that names single blocks gives a set of them; each run of those joins the block before it, which becomes the
student.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ppcl.detection.intervals import Table
from ppcl.errors import UserError
from ppcl.replacements import Interval


def contracted(removed: Iterable[int], block_ranges: Sequence[range]) -> list[Interval]:
    """Intervals that remove these blocks: each run of them joins the block before it, at a list's start the one behind.

    Raises `UserError` where a whole list of blocks would go.
    """
    gone = set(removed)
    found: list[Interval] = []
    for span in block_ranges:
        if set(span) <= gone:
            raise UserError(f"all blocks from {span.start} to {span.stop - 1} would go; remove fewer")
        block = span.start
        while block < span.stop:
            first = block
            while block < span.stop and block in gone:
                block += 1
            if block == first:
                block += 1
            elif first > span.start:
                # Behind an interval that took its own next block, the run makes that interval longer.
                before = found.pop() if found and found[-1].last == first - 1 else Interval(first - 1, first - 1)
                found.append(Interval(before.first, block - 1))
            else:
                found.append(Interval(first, block))
                block += 1
    return found


def cheapest(scores: Sequence[float], count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """The `count` blocks of the smallest scores, one of each list at least staying."""
    chosen: list[int] = []
    for block in sorted(range(len(scores)), key=scores.__getitem__):
        span = next(span for span in block_ranges if block in span)
        if len(chosen) < count and sum(b in span for b in chosen) < len(span) - 1:
            chosen.append(block)
    if len(chosen) < count:
        raise UserError(f"{count} blocks cannot go; {len(chosen)} can")
    return contracted(chosen, block_ranges)


def table_value(table: Table, interval: Interval) -> float:
    """A table's value for an interval; Algorithm 1 and thresholds end intervals where there is one."""
    value = table[interval.first][interval.last]
    if value is None:
        raise ValueError(f"the table has no value for {interval}")
    return value


def threshold(table: Table, count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """From each block on, as far as `cka(u, k)` stays above a threshold: the highest that takes `count` blocks or more.

    Then cut short to `count`, from the least similar end.
    """
    values = sorted({v for row in table for v in row if v is not None}, reverse=True)
    for least in values:
        found = []
        for span in block_ranges:
            first = span.start
            while first < span.stop:
                last = first
                while last + 1 < span.stop and (table[first][last + 1] or -1.0) >= least:
                    last += 1
                found.append(Interval(first, last))
                first = last + 1
        found = [interval for interval in found if interval.removed]
        if sum(interval.removed for interval in found) >= count:
            while sum(interval.removed for interval in found) > count:
                worst = min(range(len(found)), key=lambda i: table_value(table, found[i]))
                found[worst] = Interval(found[worst].first, found[worst].last - 1)
                found = [interval for interval in found if interval.removed]
            return found
    raise UserError(f"{count} blocks cannot go at any threshold of CKA")


def evenly(count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """Blocks spread evenly over all, never the first or the last of a list where that can be helped."""
    inner = [block for span in block_ranges for block in range(span.start + 1, span.stop - 1)]
    if count > len(inner):
        return cheapest([0.0] * block_ranges[-1].stop, count, block_ranges)
    return contracted({inner[int((i + 0.5) * len(inner) / count)] for i in range(count)}, block_ranges)
