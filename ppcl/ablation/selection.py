"""Ways to choose which blocks are removed: the paper's, and those it is compared with, all as intervals.

See `ppcl.detection.selection` for those that need no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ppcl.detection.cka import cka
from ppcl.detection.intervals import Table, first_difference
from ppcl.detection.selection import table_value
from ppcl.errors import UserError
from ppcl.models import IdentityBlock, adapter_of, swapped
from ppcl.replacements import Interval


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


def algorithm1(delta: Table, count: int, block_ranges: Sequence[range]) -> list[Interval]:
    """Algorithm 1's intervals, cut short where they would remove more than `count` blocks, from the largest last Δ on.

    Raises `UserError` where they take fewer.
    """
    found = [interval for interval in first_difference(delta, block_ranges) if interval.removed]
    most = sum(interval.removed for interval in found)
    if most < count:
        raise UserError(f"{count} blocks cannot go by Algorithm 1, which finds {most}; ask for {most} or fewer")
    while sum(interval.removed for interval in found) > count:
        worst = max(range(len(found)), key=lambda i: table_value(delta, found[i]))
        found[worst] = Interval(found[worst].first, found[worst].last - 1)
        found = [interval for interval in found if interval.removed]
    return found


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
    blocks = adapter.blocks(transformer)
    count = len(blocks)
    layouts = [adapter.layout_at(transformer, block) for block in range(count)]
    error, energy = torch.zeros(count, dtype=torch.float64), 0.0
    for inputs in batches:
        target = transformer(**{**inputs, "return_dict": False})[0].double()
        energy += float(target.square().sum())
        for block in range(count):
            identity = IdentityBlock(adapter, layouts[block], blocks[block])
            with swapped(transformer, {block: identity}):
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
