"""Plans: which parts of the teacher are replaced. Four kinds of replacement, each switched on or off by itself.

- `Interval`: a run of blocks becomes one student block (depth).
- `TextRun`: in a run of blocks the text stream is replaced by linear projectors (width).
- `Ffn`: a block's FFNs become residual linear maps, or keep a part of their hidden units (width).
- `LowRankModulation`: all modulations are computed in the few directions the timestep moves them in (width, nearly without loss).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppcl.config.plan_syntax import PLAN_SYNTAX, REPLACEMENT
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

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class TextRun:
    """Blocks `first..last` of which the first keeps its text stream and the others take theirs from it (PPCL: Eq. 7, 8)."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"text-{self.first:02d}-{self.last:02d}"

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)

    removed = 0

    def __str__(self) -> str:
        return f"text:{self.first}-{self.last}"


@dataclass(frozen=True)
class Ffn:
    """Block `block`, whose image and text FFN are replaced.

    `keep_percent`: percent of their hidden units that stay, 1 to 99; 0 for one residual linear map each (PPCL: Eq. 9).
    """

    block: int
    keep_percent: int = 0

    @property
    def first(self) -> int:
        return self.block

    @property
    def last(self) -> int:
        return self.block

    @property
    def name(self) -> str:
        return f"ffn-{self.block:02d}" + (f"-{self.keep_percent:02d}" if self.keep_percent else "")

    @property
    def blocks(self) -> range:
        return range(self.block, self.block + 1)

    removed = 0

    def __str__(self) -> str:
        return f"ffn:{self.block}" + (f"/{self.keep_percent}" if self.keep_percent else "")


@dataclass(frozen=True)
class LowRankModulation:
    """The modulations of all blocks, of students too, in low rank. Goes with everything."""

    first = 0
    last = 0
    removed = 0
    name = "modulations"

    @property
    def blocks(self) -> range:
        """None of its own."""
        return range(0)

    def __str__(self) -> str:
        return self.name


Replacement = Interval | TextRun | Ffn | LowRankModulation

_KINDS = (Interval, TextRun, Ffn, LowRankModulation)
_FILE = re.compile(r"ffn-(?P<block>\d+)(?:-(?P<kept>\d+))?|(?P<text>text-)?(?P<first>\d+)-(?P<last>\d+)")


def sort_key(replacement: Replacement) -> tuple[int, int, int]:
    """The key plans are sorted by: the first block, then the kind, then what is kept."""
    return replacement.first, _KINDS.index(type(replacement)), getattr(replacement, "keep_percent", 0)


def _entry(match: re.Match | None) -> Replacement | None:
    if match is None:
        return None
    if match["block"] is not None:
        kept = int(match["kept"] or 0)
        # What keeps none of its units or all of them is written otherwise.
        return Ffn(int(match["block"]), kept) if kept < 100 and (kept or match["kept"] is None) else None
    return (TextRun if match["text"] else Interval)(int(match["first"]), int(match["last"]))


def parse_name(name: str) -> Replacement | None:
    """The replacement whose `name` this is; None where it is none."""
    return LowRankModulation() if name == LowRankModulation.name else _entry(_FILE.fullmatch(name))


def parse_text(text: str) -> list[Replacement] | None:
    """The replacements of a text such as `3-5,text:6-8,ffn:9`, as people write them; None where it is none."""
    replacements = [
        LowRankModulation() if part == LowRankModulation.name else _entry(REPLACEMENT.fullmatch(part))
        for part in text.split(",")
    ]
    return None if None in replacements else replacements


def parse_replacement(value: Replacement | str | Sequence[int]) -> Replacement:
    """An replacement from what configurations and callers give: itself, `[u, v]` for an interval, or a text."""
    if isinstance(value, _KINDS):
        return value
    if isinstance(value, str):
        replacements = parse_text(value)
        if replacements is None or len(replacements) != 1:
            raise UserError(f"{value!r} names no replacement; write {PLAN_SYNTAX}")
        return replacements[0]
    return Interval(*map(int, value))


def conflicts(a: Replacement, b: Replacement) -> bool:
    """Whether two replacements cannot be on together. An FFN can be replaced within a text run, where its text part is gone."""
    if {type(a), type(b)} == {TextRun, Ffn}:
        return False
    if isinstance(a, LowRankModulation) or isinstance(b, LowRankModulation):
        return type(a) is type(b)
    return a.first <= b.last and b.first <= a.last


def checked_plan(
    replacements: Iterable[Replacement | str | Sequence[int]], block_ranges: list[range]
) -> list[Replacement]:
    """A sorted plan. Raises `UserError` where an replacement is empty, out of range, crosses lists or clashes with another."""
    plan = sorted(map(parse_replacement, replacements), key=sort_key)
    for replacement in plan:
        if isinstance(replacement, LowRankModulation):
            continue
        if not isinstance(replacement, Ffn) and replacement.first >= replacement.last:
            raise UserError(f"{_called(replacement)} holds no two blocks; the first must be less than the last")
        if not any(replacement.first in span and replacement.last in span for span in block_ranges):
            known = ", ".join(f"{span.start} to {span.stop - 1}" for span in block_ranges)
            raise UserError(f"{_called(replacement)} does not lie within one block list; the lists hold blocks {known}")
    for index, a in enumerate(plan):
        for b in plan[index + 1 :]:
            if conflicts(a, b):
                raise UserError(f"{_called(a)} and {_called(b)} overlap; keep one of them")
    return plan


def _called(replacement: Replacement) -> str:
    if isinstance(replacement, LowRankModulation):
        return "the modulations"
    kind = {Interval: "the interval", TextRun: "the text run", Ffn: "the FFN"}[type(replacement)]
    return (
        f"{kind} {str(replacement).removeprefix('ffn:')}"
        if isinstance(replacement, Ffn)
        else f"{kind} [{replacement.first}, {replacement.last}]"
    )
