"""Ways to choose which blocks are removed: the paper's, and those it is compared with, all as intervals.

A way that names single blocks gives a set of them; each run of those joins the block before it, which becomes the
student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ppcl.detection.cka import cka
from ppcl.detection.intervals import Table, first_difference
from ppcl.errors import UserError
from ppcl.models import IdentityBlock, adapter_of, swapped
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


def adjacent_similarity(boundaries: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """CKA between what goes into each block and what comes out of it, the mean of the streams.

    `boundaries`: by boundary, the streams' held-out tokens, each `(n, d)`.
    """
    return [
        sum(cka(x, y) for x, y in zip(before, after, strict=False)) / min(len(before), len(after))
        for before, after in zip(boundaries, boundaries[1:])
    ]


def influence(boundaries: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """Block influence of ShortGPT (arXiv 2403.03853): 1 - the mean cosine of a token before and behind the block."""
    return [
        1
        - sum(float(F.cosine_similarity(x, y, dim=-1).mean()) for x, y in zip(before, after, strict=False))
        / min(len(before), len(after))
        for before, after in zip(boundaries, boundaries[1:])
    ]


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


def _value(table: Table, interval: Interval) -> float:
    """A table's value for an interval; Algorithm 1 and thresholds end intervals where there is one."""
    value = table[interval.first][interval.last]
    if value is None:
        raise ValueError(f"the table has no value for {interval}")
    return value


def algorithm1(delta: Table, count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """Algorithm 1's intervals, cut short where they would remove more than `count` blocks, from the largest last Δ on.

    Raises `UserError` where they take fewer.
    """
    found = [interval for interval in first_difference(delta, block_ranges) if interval.removed]
    most = sum(interval.removed for interval in found)
    if most < count:
        raise UserError(f"{count} blocks cannot go by Algorithm 1, which finds {most}; ask for {most} or fewer")
    while sum(interval.removed for interval in found) > count:
        worst = max(range(len(found)), key=lambda i: _value(delta, found[i]))
        found[worst] = Interval(found[worst].first, found[worst].last - 1)
        found = [interval for interval in found if interval.removed]
    return found


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
                worst = min(range(len(found)), key=lambda i: _value(table, found[i]))
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


def equal_lengths(count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """Intervals of one length, one behind the other through the lists: the shortest that remove `count` blocks."""
    for length in range(2, max(map(len, block_ranges)) + 1):
        places = [(span, first) for span in block_ranges for first in range(span.start, span.stop - length + 1, length)]
        if len(places) * (length - 1) >= count:
            wanted = -(-count // (length - 1))
            chosen = [places[int((i + 0.5) * len(places) / wanted)][1] for i in range(wanted)]
            found = [Interval(first, first + length - 1) for first in chosen]
            extra = wanted * (length - 1) - count
            if extra:
                found[-1] = Interval(found[-1].first, found[-1].last - extra)
            return [interval for interval in found if interval.removed]
    raise UserError(f"{count} blocks cannot go in intervals of one length")


@torch.no_grad()
def skip_errors(transformer: nn.Module, batches: Iterable[dict], tell: Callable[[int], None]) -> list[float]:
    """The velocity error with one block left out, by block."""
    adapter = adapter_of(transformer)
    count = len(adapter.blocks(transformer))
    error, energy = torch.zeros(count, dtype=torch.float64), 0.0
    for inputs in batches:
        target = transformer(**{**inputs, "return_dict": False})[0].double()
        energy += float(target.square().sum())
        for block in range(count):
            with swapped(transformer, {block: IdentityBlock(adapter)}):
                made = transformer(**{**inputs, "return_dict": False})[0].double()
            error[block] += (made - target).square().sum().cpu()
            tell(block)
    return (error / energy).tolist()


def by_position(errors: Sequence[float]) -> list[float]:
    """By block, the error of leaving it out times a weight, after HierarchicalPrune (arXiv 2508.04663).

    Early blocks lay the image out and late ones refine it: the weight falls from 1 to 1 / M over M blocks.
    """
    count = len(errors)
    return [error * (count - block) / count for block, error in enumerate(errors)]
