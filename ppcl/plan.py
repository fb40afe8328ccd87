"""Intervals and plans: which blocks become one student."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ppcl.errors import UserError


class Interval(NamedTuple):
    """Blocks `first..last`, from 0, inclusive at both ends, that become one student block (PPCL: `[u, v]`)."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """`05-07`: what files and checkpoints of this interval are called."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def removed(self) -> int:
        """Blocks fewer with this interval on."""
        return self.last - self.first


_WRITTEN = re.compile(r"\d+-\d+(,\d+-\d+)*")


def written(text: str) -> list[Interval] | None:
    """The intervals of a text such as `3-5,8-9`, as people write them; None where it is none."""
    if not _WRITTEN.fullmatch(text):
        return None
    return [Interval(*map(int, pair.split("-"))) for pair in text.split(",")]


def checked(intervals: Iterable[tuple[int, int]], spans: list[range]) -> list[Interval]:
    """Sorted intervals of a plan. Raises `UserError` where one is empty, out of range, crosses lists or overlaps."""
    plan = sorted(Interval(*pair) for pair in intervals)
    for interval in plan:
        if interval.first >= interval.last:
            raise UserError(f"the interval {list(interval)} holds no two blocks; give [u, v] with u < v")
        if not any(interval.first in span and interval.last in span for span in spans):
            known = ", ".join(f"{span.start} to {span.stop - 1}" for span in spans)
            raise UserError(f"the interval {list(interval)} does not lie within one block list; the lists hold blocks {known}")
    for a, b in zip(plan, plan[1:]):
        if b.first <= a.last:
            raise UserError(f"the intervals {list(a)} and {list(b)} overlap; keep one of them")
    return plan
