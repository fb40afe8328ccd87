"""Variants: which of the trained students are on, what that leaves of the transformer, and which to choose for a budget.

A variant keeps the teacher's block lists at their length: the student stands at `u`, pass-throughs at `u+1..v`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.architecture import Architecture, PassThrough
from ppcl.errors import UserError
from ppcl.plan import Interval, checked, written
from ppcl.teacher import Teacher

TEACHER = "teacher"
ALL = "all"

# A name is also a folder of pictures and a part of an address.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Variant:
    """The intervals that are on. `parameters` of the transformer, `share` of the teacher's, `blocks` that run.

    `budget`: the share of the parameters it was chosen for, None where it was not chosen by budget.
    """

    name: str
    intervals: tuple[Interval, ...]
    parameters: int
    share: float
    blocks: int
    budget: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: of the whole transformer, of each block, of each student."""

    total: int
    blocks: tuple[int, ...]
    students: Mapping[Interval, int]

    def saved(self, interval: Interval) -> int:
        """Parameters fewer with the interval's student on."""
        return sum(self.blocks[block] for block in interval.blocks) - self.students[interval]

    def variant(self, name: str, intervals: Iterable[Interval], budget: float | None = None) -> Variant:
        on = tuple(sorted(intervals))
        parameters = self.total - sum(self.saved(interval) for interval in on)
        blocks = len(self.blocks) - sum(interval.removed for interval in on)
        return Variant(name, on, parameters, parameters / self.total, blocks, budget)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(teacher: Teacher, students: Mapping[Interval, Path]) -> Sizes:
    """Counted without loading a weight: the teacher's from its structure, a student's from its file's header."""
    model = teacher.empty_transformer()
    blocks = tuple(count(block) for block in teacher.architecture.blocks(model))
    return Sizes(count(model), blocks, {interval: _tensor_sizes(path) for interval, path in students.items()})


def _tensor_sizes(path: Path) -> int:
    total = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                elements = 1
                for length in file.get_slice(name).get_shape():
                    elements *= length
                total += elements
    except (SafetensorError, OSError) as error:
        raise UserError(f"the student {path} cannot be read as safetensors ({error}); run ppcl compress again") from None
    return total


def students_in(folder: Path) -> dict[Interval, Path]:
    """The students of a folder by interval, from their files' names, `05-07.safetensors`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        first, _, last = path.stem.partition("-")
        if first.isdigit() and last.isdigit():
            found[Interval(int(first), int(last))] = path
    return found


def entries(
    architecture: Architecture, students: Mapping[Interval, nn.Module], intervals: Iterable[Interval]
) -> dict[int, nn.Module]:
    """What stands at which block number with these intervals on; the blocks not named stay the teacher's."""
    through = PassThrough(architecture)
    placed: dict[int, nn.Module] = {}
    for interval in intervals:
        placed |= dict.fromkeys(interval.blocks[1:], through)
        placed[interval.first] = students[interval]
    return placed


def trained(intervals: Iterable[Sequence[int]], students: Iterable[Interval], spans: list[range]) -> list[Interval]:
    """A sorted, checked choice of intervals. Raises `UserError` where one is impossible or has no student."""
    plan, known = checked([(int(first), int(last)) for first, last in intervals], spans), sorted(students)
    for interval in plan:
        if interval not in known:
            exist = ", ".join(str(list(i)) for i in known) or "none"
            raise UserError(f"the interval {list(interval)} has no student; there are students for {exist}")
    return plan


def front(sizes: Sizes, damage: Mapping[Interval, float]) -> list[tuple[int, float, tuple[Interval, ...]]]:
    """Every choice of intervals that no other beats in both parameters saved and summed damage.

    Rows of (saved, damage, intervals), both rising. Exact, by dynamic programming over the intervals: what is beaten
    stays beaten whatever is added to both. The rows number at most the distinct sums of parameters, which are few
    since blocks are alike.
    """
    rows: list[tuple[int, float, tuple[Interval, ...]]] = [(0, 0.0, ())]
    for interval in sorted(damage):
        saved, cost = sizes.saved(interval), damage[interval]
        rows += [(s + saved, d + cost, (*on, interval)) for s, d, on in rows]
        rows.sort(key=lambda row: (-row[0], row[1], len(row[2])))
        kept, least = [], float("inf")
        for row in rows:
            if row[1] < least:
                kept.append(row)
                least = row[1]
        rows = kept[::-1]
    return rows


def choose(budget: float, sizes: Sizes, damage: Mapping[Interval, float]) -> tuple[Interval, ...]:
    """The intervals of least summed damage that leave at most the share `budget` of the parameters.

    Raises `UserError`, with the smallest share that can be met, where all students together do not meet it.
    """
    rows = front(sizes, damage)
    for saved, _, on in rows:
        if sizes.total - saved <= budget * sizes.total:
            return on
    smallest = 1 - rows[-1][0] / sizes.total
    raise UserError(
        f"variants.budgets: {budget:g} of the parameters cannot be met; with every student on {smallest:.4f} of them "
        f"remain, so give {smallest + 0.00005:.4f} or more"
    )


def budget_name(budget: float) -> str:
    """`p75` for 0.75."""
    return f"p{budget * 100:g}"


def make_variants(
    budgets: Sequence[float],
    custom: Mapping[str, Sequence[Sequence[int]]],
    sizes: Sizes,
    damage: Mapping[Interval, float],
    spans: list[range],
) -> dict[str, Variant]:
    """The named variants: the teacher, one a budget, all students on, and the custom ones. Raises `UserError`."""
    made = {TEACHER: sizes.variant(TEACHER, ())}
    for budget in budgets:
        name = budget_name(budget)
        made[name] = sizes.variant(name, choose(budget, sizes, damage), budget)
    made[ALL] = sizes.variant(ALL, sizes.students)
    for name, intervals in custom.items():
        if name in made:
            raise UserError(f"variants.custom: the name {name!r} is taken by a variant made anyway; choose another")
        if not _NAME.fullmatch(name):
            raise UserError(f"variants.custom: {name!r} is no name for a variant; use letters, digits, '.', '_' and '-'")
        if written(name):
            raise UserError(f"variants.custom: {name!r} reads as intervals and cannot name a variant; choose another name")
        try:
            made[name] = sizes.variant(name, trained(intervals, sizes.students, spans))
        except UserError as error:
            raise UserError(f"variants.custom.{name}: {error}") from None
    return made


@dataclass(frozen=True)
class Family:
    """What `variants.json` says: the teacher's size, what each interval alone costs, and the named variants.

    `damage`: relative squared error of the velocity with that one interval on.
    """

    parameters: int
    blocks: int
    spans: list[range]
    damage: dict[Interval, float]
    variants: dict[str, Variant]

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {
                "parameters": self.parameters,
                "blocks": self.blocks,
                "spans": [[span.start, span.stop] for span in self.spans],
            },
            "damage": {interval.name: value for interval, value in sorted(self.damage.items())},
            "variants": {
                v.name: {
                    "intervals": [list(interval) for interval in v.intervals],
                    "parameters": v.parameters,
                    "share": v.share,
                    "blocks": v.blocks,
                    "budget": v.budget,
                }
                for v in self.variants.values()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Family:
        teacher = values["teacher"]
        return cls(
            parameters=teacher["parameters"],
            blocks=teacher["blocks"],
            spans=[range(*span) for span in teacher["spans"]],
            damage={Interval(*map(int, name.split("-"))): value for name, value in values["damage"].items()},
            variants={
                name: Variant(name, **{**v, "intervals": tuple(Interval(*pair) for pair in v["intervals"])})
                for name, v in values["variants"].items()
            },
        )
