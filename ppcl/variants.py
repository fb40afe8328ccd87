"""Variants: which of the trained replacements are on, what that leaves of the transformer, and which to choose for a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.config import Variants
from ppcl.errors import UserError
from ppcl.plan import Entry, Ffn, Fold, Interval, TextRun, checked, entry_of, order, written
from ppcl.replacements import stored_sizes
from ppcl.teacher import Teacher

TEACHER = "teacher"
ALL = "all"

# A name is also a folder of pictures and a part of an address.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Variant:
    """The plan that is on. `parameters` of the transformer, `share` of the teacher's, `blocks` that run.

    `budget`: the share of the parameters it was chosen for, None where it was not chosen by budget.
    """

    name: str
    plan: tuple[Entry, ...]
    parameters: int
    share: float
    blocks: int
    budget: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: of the whole transformer, of each block, of what each replacement takes away and brings.

    `replacements`: by entry, the numbers each tensor of its file holds. `ffns`: by block and stream, parameters of the FFN,
    and `chunks` of its part of the modulation, which a linear map takes away too; `texts`: by block, those that a text run takes away. `rows`: by block and stream, what
    its modulation gives, of which folding makes each `width` parameters cheaper.
    """

    total: int
    blocks: tuple[int, ...]
    replacements: Mapping[Entry, Mapping[str, int]]
    ffns: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    chunks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    width: int = 0

    def saved(self, entry: Entry, within: TextRun | None = None, folded: bool = False) -> int:
        """Parameters fewer with an entry on; of an FFN `within` a text run that is on, where its text part is gone.

        `folded`: with the modulations folded, of which what is replaced needs none.
        """
        if isinstance(entry, Fold):
            every_row = sum(sum(rows.values()) for rows in self.rows.values())
            return every_row * self._folding() - sum(self.replacements[entry].values())
        saved = self._unfolded(entry, within)
        return saved - self._rows(entry, within) * self._folding() if folded else saved

    def _folding(self) -> int:
        """Parameters fewer for each row of a modulation that is folded."""
        directions = self.replacements[Fold()]["directions"]
        return self.width - directions // self.width

    def _rows(self, entry: Entry, within: TextRun | None) -> int:
        """Rows of modulations that an entry takes away."""
        if isinstance(entry, Interval):
            return sum(sum(self.rows[block].values()) for block in entry.blocks) - sum(self.rows[entry.first].values())
        if isinstance(entry, TextRun):
            return sum(self.rows[block]["txt"] for block in entry.blocks[1:])
        return 0 if entry.kept else 3 * self.width * len(self._streams(entry, within))

    def _streams(self, entry: Ffn, within: TextRun | None) -> set[str]:
        return {"img"} if within is not None and entry.block != within.first else set(self.ffns[entry.block])

    def _unfolded(self, entry: Entry, within: TextRun | None) -> int:
        brought = self.replacements[entry]
        if isinstance(entry, Interval):
            return sum(self.blocks[block] for block in entry.blocks) - sum(brought.values())
        if isinstance(entry, TextRun):
            return sum(self.texts[block] for block in entry.blocks[1:]) - sum(brought.values())
        streams = self._streams(entry, within)
        gone = sum(self.ffns[entry.block][s] + (0 if entry.kept else self.chunks[entry.block][s]) for s in streams)
        # Tensors are called `img.weight`, or `up.img.weight`.
        return gone - sum(size for name, size in brought.items() if streams & set(name.split(".")))

    def parameters(self, plan: Iterable[Entry]) -> int:
        """What is left with a plan on, whose entries do not clash."""
        plan = list(plan)
        folded = Fold() in plan
        return self.total - sum(self.saved(entry, _run_around(entry, plan), folded) for entry in plan)

    def variant(self, name: str, plan: Iterable[Entry], budget: float | None = None) -> Variant:
        on = tuple(sorted(plan, key=order))
        parameters = self.parameters(on)
        blocks = len(self.blocks) - sum(entry.removed for entry in on)
        return Variant(name, on, parameters, parameters / self.total, blocks, budget)


def _run_around(entry: Entry, plan: Iterable[Entry]) -> TextRun | None:
    """The text run of a plan that an FFN lies in."""
    if not isinstance(entry, Ffn):
        return None
    return next((run for run in plan if isinstance(run, TextRun) and entry.block in run.blocks), None)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(teacher: Teacher, files: Mapping[Entry, Path]) -> Sizes:
    """Counted without loading a weight: the teacher's from its structure, a replacement's from its file's header."""
    model, architecture = teacher.empty_transformer(), teacher.architecture
    blocks = architecture.blocks(model)
    ffns: dict[int, dict[str, int]] = {}
    chunks: dict[int, dict[str, int]] = {}
    texts: dict[int, int] = {}
    rows: dict[int, dict[str, int]] = {}
    width = 0
    for number, block in enumerate(blocks):
        for stream, where in architecture.parts_of(model, number, block).items():
            modulation, ffn = block.get_submodule(where.modulation), count(block.get_submodule(where.ffn))
            width = modulation.in_features
            rows.setdefault(number, {})[stream] = modulation.out_features
            # Shift, scale and gate of the FFN: three chunks of the modulation.
            ffns.setdefault(number, {})[stream] = ffn
            chunks.setdefault(number, {})[stream] = 3 * width * (modulation.in_features + (modulation.bias is not None))
            if stream == "txt":
                texts[number] = ffn + count(modulation) + count(block.get_submodule(where.out))
    return Sizes(
        count(model), tuple(map(count, blocks)), {entry: stored_sizes(path) for entry, path in files.items()}, ffns, chunks,
        texts, rows, width,
    )  # fmt: skip


def trained(plan: Iterable[Entry | str | Sequence[int]], known: Iterable[Entry], spans: list[range]) -> list[Entry]:
    """A sorted, checked choice of entries. Raises `UserError` where one is impossible or was not trained."""
    chosen, known = checked(plan, spans), sorted(known, key=order)
    for entry in chosen:
        if entry not in known:
            raise UserError(f"there is no replacement {entry}; there are {', '.join(map(str, known)) or 'none'}")
    return chosen


Row = tuple[int, float, tuple[Entry, ...]]


def front(sizes: Sizes, damage: Mapping[Entry, float]) -> list[Row]:
    """Every plan that no other beats in both parameters saved and summed damage.

    Rows of (saved, damage, plan), both rising. Exact, by dynamic programming over the blocks from the last to the first:
    what is beaten stays beaten whatever is added to both. The rows number at most the distinct sums of parameters, which
    are few since blocks are alike.
    """
    fold = Fold()
    if fold not in damage:
        return _front(sizes, damage, folded=False)
    others = {entry: value for entry, value in damage.items() if entry != fold}
    row = sizes.saved(fold), damage[fold], (fold,)
    return _pareto(_front(sizes, others, folded=False) + _added(_front(sizes, others, folded=True), row))


def _front(sizes: Sizes, damage: Mapping[Entry, float], folded: bool) -> list[Row]:
    starting: dict[int, list[Entry]] = {}
    for entry in sorted(damage, key=order):
        starting.setdefault(entry.first, []).append(entry)
    best: dict[int, list[Row]] = {len(sizes.blocks): [(0, 0.0, ())]}
    for block in range(len(sizes.blocks) - 1, -1, -1):
        rows = list(best[block + 1])
        for entry in starting.get(block, ()):
            alone = [(sizes.saved(entry, None, folded), damage[entry], (entry,))]
            if isinstance(entry, TextRun):
                for number in entry.blocks:
                    ways = [e for e in starting.get(number, ()) if isinstance(e, Ffn)]
                    more = [_added(alone, (sizes.saved(ffn, entry, folded), damage[ffn], (ffn,))) for ffn in ways]
                    alone = _pareto([*alone, *chain.from_iterable(more)])
            rows += chain.from_iterable(_added(best[entry.last + 1], row) for row in alone)
        best[block] = _pareto(rows)
    return best[0]


def _added(rows: Iterable[Row], other: Row) -> list[Row]:
    return [(saved + other[0], damage + other[1], (*other[2], *plan)) for saved, damage, plan in rows]


def _pareto(rows: list[Row]) -> list[Row]:
    kept, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (-row[0], row[1], len(row[2]))):
        if row[1] < least:
            kept.append(row)
            least = row[1]
    return kept[::-1]


def choose(budget: float, sizes: Sizes, damage: Mapping[Entry, float]) -> tuple[Entry, ...]:
    """The plan of least summed damage that leaves at most the share `budget` of the parameters.

    Raises `UserError`, with the smallest share that can be met, where all replacements together do not meet it.
    """
    rows = front(sizes, damage)
    for saved, _, plan in rows:
        if sizes.total - saved <= budget * sizes.total:
            return tuple(sorted(plan, key=order))
    smallest = 1 - rows[-1][0] / sizes.total
    raise UserError(
        f"variants.budgets: {budget:g} of the parameters cannot be met; with every replacement on {smallest:.4f} of them "
        f"remain, so give {smallest + 0.00005:.4f} or more"
    )


def _kind(entry: Entry) -> str:
    return "narrow" if isinstance(entry, Ffn) and entry.kept else type(entry).__name__


_KINDS_TOGETHER = (
    {"Interval", "TextRun", "Ffn", "narrow", "Fold"},
    {"Interval", "TextRun", "narrow", "Fold"},
    {"TextRun", "narrow", "Fold"},
    {"Interval", "narrow", "Fold"},
    {"narrow", "Fold"},
    {"Interval", "TextRun", "Fold"},
    {"Interval", "Fold"},
    {"Interval"},
)


def candidates(budget: float, sizes: Sizes, damage: Mapping[Entry, float]) -> list[tuple[Entry, ...]]:
    """Plans for a budget that are worth measuring as a whole: the sum of the damages, of their square roots, and kinds left out.

    Damages do not simply add: those of neighbours grow together, so a plan of many small entries, FFNs above all, looks
    better than it is. The square roots prefer few entries. The first one is that of the plain sum. Raises `UserError`
    where the budget cannot be met.
    """
    found = {choose(budget, sizes, damage): None}
    for wanted in _KINDS_TOGETHER:
        some = {entry: value for entry, value in damage.items() if _kind(entry) in wanted}
        for costs in (some, {entry: value**0.5 for entry, value in some.items()}):
            try:
                found[choose(budget, sizes, costs)] = None
            except UserError:  # not with these kinds alone
                continue
    return list(found)


def choose_blocks(most: int, sizes: Sizes, damage: Mapping[Entry, float]) -> tuple[Entry, ...]:
    """The intervals of least summed damage that leave at most so many blocks running.

    Raises `UserError`, with the smallest number that can be met, where all intervals together do not meet it.
    """
    rows: list[Row] = [(0, 0.0, ())]
    for interval in sorted(entry for entry in damage if isinstance(entry, Interval)):
        rows = _pareto(rows + _added(rows, (interval.removed, damage[interval], (interval,))))
    for removed, _, plan in rows:
        if len(sizes.blocks) - removed <= most:
            return tuple(sorted(plan))
    smallest = len(sizes.blocks) - rows[-1][0]
    raise UserError(f"variants.blocks: {most} blocks cannot be met; with every interval on {smallest} run, so give {smallest} or more")


def budget_name(budget: float) -> str:
    """`p75` for 0.75."""
    return f"p{budget * 100:g}"


def blocks_name(blocks: int) -> str:
    """`b40` for 40 blocks that run."""
    return f"b{blocks}"


def names_of(settings: Variants) -> list[str]:
    """What the variants of a configuration will be called, but for the teacher."""
    return [*map(budget_name, settings.budgets), *map(blocks_name, settings.blocks), ALL, *settings.custom]


def make_variants(
    budgets: Sequence[float],
    blocks: Sequence[int],
    custom: Mapping[str, Sequence[str | Sequence[int]]],
    sizes: Sizes,
    damage: Mapping[Entry, float],
    spans: list[range],
    errors: Mapping[tuple[Entry, ...], float] | None = None,
) -> dict[str, Variant]:
    """The named variants: the teacher, one a budget, one a number of blocks, all intervals on, and the custom ones.

    `errors`: of the `candidates` measured as a whole, by which a budget's plan is chosen among them. Raises `UserError`.
    """
    made = {TEACHER: sizes.variant(TEACHER, ())}
    for budget in budgets:
        name = budget_name(budget)
        plans = candidates(budget, sizes, damage)
        best = min(plans, key=errors.__getitem__) if errors else plans[0]
        made[name] = sizes.variant(name, best, budget)
    for most in blocks:
        made[blocks_name(most)] = sizes.variant(blocks_name(most), choose_blocks(most, sizes, damage))
    if intervals := [entry for entry in damage if isinstance(entry, Interval)]:
        made[ALL] = sizes.variant(ALL, intervals)
    for name, plan in custom.items():
        if name in made:
            raise UserError(f"variants.custom: the name {name!r} is taken by a variant made anyway; choose another")
        if not _NAME.fullmatch(name):
            raise UserError(f"variants.custom: {name!r} is no name for a variant; use letters, digits, '.', '_' and '-'")
        if written(name):
            raise UserError(f"variants.custom: {name!r} reads as a plan and cannot name a variant; choose another name")
        try:
            made[name] = sizes.variant(name, trained(plan, sizes.replacements, spans))
        except UserError as error:
            raise UserError(f"variants.custom.{name}: {error}") from None
    return made


@dataclass(frozen=True)
class Family:
    """What `variants.json` says: the teacher's size, what each entry alone costs, and the named variants.

    `damage`: relative squared error of the velocity with that one entry on, before any fine-tuning.
    """

    parameters: int
    blocks: int
    spans: list[range]
    damage: dict[Entry, float]
    variants: dict[str, Variant]

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {
                "parameters": self.parameters,
                "blocks": self.blocks,
                "spans": [[span.start, span.stop] for span in self.spans],
            },
            "damage": {str(entry): self.damage[entry] for entry in sorted(self.damage, key=order)},
            "variants": {
                v.name: {
                    "plan": [str(entry) for entry in v.plan],
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
            damage={entry_of(name): value for name, value in values["damage"].items()},
            variants={
                name: Variant(name, **{**v, "plan": tuple(map(entry_of, v["plan"]))})
                for name, v in values["variants"].items()
            },
        )
