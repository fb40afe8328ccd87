"""Contiguous redundant intervals from a table of similarities: Algorithm 1 of PPCL (arXiv 2511.16156, Eq. 3 to 5).

Blocks count from 0. `cka[u][k]` (Eq. 3): block `u` is kept, blocks `u+1..k` are replaced by their probes, and what
comes out is compared with the teacher's streams after block `k`; `cka[u][u]` is 1. None stands where there is no value.
"""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.replacements import Interval

Table = list[list[float | None]]


def differences(cka: Table) -> Table:
    """`Δ(u, k) = -(cka(u, k) - cka(u, k-1))`, what the `k`-th block costs in similarity (Eq. 4); None for `k ≤ u`."""
    return [[_difference(row, k) if k > u else None for k in range(len(row))] for u, row in enumerate(cka)]


def _difference(row: Sequence[float | None], k: int) -> float | None:
    before, value = row[k - 1], row[k]
    return None if before is None or value is None else before - value


def first_difference(delta: Table, block_ranges: Sequence[range]) -> list[Interval]:
    """Algorithm 1: every block in one interval, in order; an interval never crosses from one block list to the next.

    From `u`, the first `k ≥ u + 2` with `Δ(u, k) > Δ(u, k-1)` ends the interval at `k - 1`; the next begins at `k`
    (Eq. 5). So an interval holds two blocks at least, but for the last of a list:

    - where Δ never rises, the interval ends with its list;
    - where the block before the end closed an interval, the list's last block is left alone, `[u, u]`: it stays;
    - where Δ has no value any more (a stream the last block drops), the interval ends before, on what was measured.
    """
    intervals = []
    for span in block_ranges:
        first = span.start
        while first < span.stop:
            last = _last(delta[first], first, span.stop - 1)
            intervals.append(Interval(first, last))
            first = last + 1
    return intervals


def _last(row: Sequence[float | None], first: int, end: int) -> int:
    """The last block of the interval that begins at `first`, in a list of blocks that ends at `end`."""
    before: float | None = None
    for k in range(first + 1, end + 1):
        value = row[k]
        if value is None or (before is not None and value > before):
            return k - 1
        before = value
    return end
