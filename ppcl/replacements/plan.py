"""Plans: the replacements that are on together, each switched on or off by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ppcl.config.plan_syntax import PLAN_SYNTAX
from ppcl.errors import UserError
from ppcl.replacements.registry import parse_replacement, parse_text, sort_key
from ppcl.replacements.replacement import Replacement


class Plan(tuple[Replacement, ...]):
    """The replacements that are on, in running order. An empty plan is the teacher itself.

    Made from replacements, from their texts, or from `[u, v]` for intervals; `Plan.parse("3-5,text:6-8,ffn:9")` reads
    a text and `str` writes it. Whether a teacher has what is named is checked by `checked_plan`.
    """

    __slots__ = ()

    def __new__(cls, replacements: Iterable[Replacement | str | Sequence[int]] = ()) -> Plan:
        return super().__new__(cls, sorted(map(parse_replacement, replacements), key=sort_key))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Raises `UserError` where the text names something else."""
        replacements = parse_text(text) if text else []
        if replacements is None:
            raise UserError(f"{text!r} is not a plan; write {PLAN_SYNTAX}")
        return cls(replacements)

    def __str__(self) -> str:
        return ",".join(map(str, self))


def conflicts(a: Replacement, b: Replacement) -> bool:
    """Whether two replacements cannot be on together: the same, or in one block and neither contains the other."""
    overlap = range(max(a.blocks.start, b.blocks.start), min(a.blocks.stop, b.blocks.stop))
    return a == b or (len(overlap) > 0 and not a.contains(b) and not b.contains(a))


def enclosing(replacement: Replacement, plan: Iterable[Replacement]) -> Replacement | None:
    """The replacement of a plan that contains another one, such as the text run around an FFN."""
    return next((other for other in plan if other.contains(replacement)), None)


def checked_plan(replacements: Iterable[Replacement | str | Sequence[int]], block_ranges: Sequence[range]) -> Plan:
    """A plan that a teacher with these block lists can have.

    Raises `UserError` where a replacement is empty, out of range, crosses lists or conflicts with another.
    """
    plan = Plan(replacements)
    for replacement in plan:
        replacement.check(block_ranges)
    for index, a in enumerate(plan):
        for b in plan[index + 1 :]:
            if conflicts(a, b):
                raise UserError(f"{a.phrase} and {b.phrase} overlap; keep one of them")
    return plan
