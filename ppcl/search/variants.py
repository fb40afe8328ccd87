"""Variants: which of the trained replacements are on, under names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.config.schema import Variants
from ppcl.config.variant_names import ALL, TEACHER, blocks_name, budget_name, names_of
from ppcl.errors import UserError
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.replacements.plan import Interval, Replacement, checked_plan, parse_replacement, sort_key
from ppcl.search.latency_table import LatencyTable
from ppcl.search.pareto import Plan, candidates, choose_blocks, target_candidates


@dataclass(frozen=True)
class Variant:
    """The plan that is on. `parameters` of the transformer, `share` of the teacher's, `blocks` that run.

    `budget`: the share of the parameters it was chosen for, None where it was not chosen by budget.
    """

    name: str
    plan: tuple[Replacement, ...]
    parameters: int
    share: float
    blocks: int
    budget: float | None = None

    @classmethod
    def of(cls, name: str, plan: Iterable[Replacement], sizes: ParameterCounts, budget: float | None = None) -> Variant:
        on = tuple(sorted(plan, key=sort_key))
        parameters = sizes.parameters(on)
        return cls(name, on, parameters, parameters / sizes.total, sizes.running(on), budget)


def available_plan(
    plan: Iterable[Replacement | str | Sequence[int]], known: Iterable[Replacement], block_ranges: list[range]
) -> list[Replacement]:
    """A sorted, checked choice of replacements. Raises `UserError` where one is impossible or was not trained."""
    chosen, known = checked_plan(plan, block_ranges), sorted(known, key=sort_key)
    for replacement in chosen:
        if replacement not in known:
            raise UserError(f"there is no replacement {replacement}; there are {', '.join(map(str, known)) or 'none'}")
    return chosen


def plans_to_measure(
    settings: Variants, sizes: ParameterCounts, times: LatencyTable | None, sensitivity: Mapping[Replacement, float]
) -> dict[str, list[Plan]]:
    """By name, the plans among which those of the budgets and targets are chosen; `times` is needed for targets.

    Raises `UserError` where one cannot be met.
    """
    plans = {budget_name(budget): candidates(budget, sizes, sensitivity) for budget in settings.budgets}
    return plans | {
        name: target_candidates(name, target, sizes, times, sensitivity) for name, target in settings.targets.items()
    }


def best_plans(
    settings: Variants,
    plans: Mapping[str, Sequence[Plan]],
    errors: Mapping[Plan, float],
    speedups: Mapping[Plan, float],
) -> dict[str, Plan]:
    """By name, the plan of the smallest velocity error among those that are as fast as wanted, else the fastest one.

    `errors` and `speedups` (times the teacher's speed) are measured, of each plan as a whole.
    """
    chosen = {}
    for name, some in plans.items():
        speedup = settings.targets[name].speedup if name in settings.targets else None
        fast = [plan for plan in some if speedup is None or speedups[plan] >= speedup]
        chosen[name] = min(fast, key=errors.__getitem__) if fast else max(some, key=speedups.__getitem__)
    return chosen


def make_variants(
    settings: Variants,
    sizes: ParameterCounts,
    sensitivity: Mapping[Replacement, float],
    block_ranges: list[range],
    chosen: Mapping[str, Plan],
) -> dict[str, Variant]:
    """The named variants: the teacher, one a budget, one a number of blocks, one a target, all intervals on, and the custom ones.

    `chosen`: the plans of the budgets and targets. Raises `UserError`.
    """
    names_of(settings)

    def variant(name: str, plan: Iterable[Replacement], budget: float | None = None) -> Variant:
        return Variant.of(name, plan, sizes, budget)

    made = {TEACHER: variant(TEACHER, ())}
    made |= {budget_name(b): variant(budget_name(b), chosen[budget_name(b)], b) for b in settings.budgets}
    made |= {
        blocks_name(most): variant(blocks_name(most), choose_blocks(most, sizes, sensitivity))
        for most in settings.blocks
    }
    made |= {name: variant(name, chosen[name]) for name in settings.targets}
    if intervals := [replacement for replacement in sensitivity if isinstance(replacement, Interval)]:
        made[ALL] = variant(ALL, intervals)
    for name, plan in settings.custom.items():
        try:
            made[name] = variant(name, available_plan(plan, sizes.replacements, block_ranges))
        except UserError as error:
            raise UserError(f"variants.custom.{name}: {error}") from None
    return made


@dataclass(frozen=True)
class VariantCatalog:
    """What `variants.json` says: the teacher's size, what each replacement alone costs, and the named variants.

    `sensitivity`: relative squared error of the velocity with that one replacement on, before any fine-tuning.
    """

    parameters: int
    blocks: int
    block_ranges: list[range]
    sensitivity: dict[Replacement, float]
    variants: dict[str, Variant]

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {
                "parameters": self.parameters,
                "blocks": self.blocks,
                "spans": [[span.start, span.stop] for span in self.block_ranges],
            },
            "damage": {
                str(replacement): self.sensitivity[replacement]
                for replacement in sorted(self.sensitivity, key=sort_key)
            },
            "variants": {
                v.name: {
                    "plan": [str(replacement) for replacement in v.plan],
                    "parameters": v.parameters,
                    "share": v.share,
                    "blocks": v.blocks,
                    "budget": v.budget,
                }
                for v in self.variants.values()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VariantCatalog:
        teacher = values["teacher"]
        return cls(
            parameters=teacher["parameters"],
            blocks=teacher["blocks"],
            block_ranges=[range(*span) for span in teacher["spans"]],
            sensitivity={parse_replacement(name): value for name, value in values["damage"].items()},
            variants={
                name: Variant(name, **{**v, "plan": tuple(map(parse_replacement, v["plan"]))})
                for name, v in values["variants"].items()
            },
        )


def read_catalog(folder: Path) -> VariantCatalog:
    """What the stage `variants` left in its folder."""
    return VariantCatalog.from_json(json.loads((folder / "variants.json").read_text()))
