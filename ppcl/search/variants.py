"""Variants: named plans, and the catalog of them that a job writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.config.schema import Variants
from ppcl.config.variant_names import ALL, TEACHER, blocks_name, budget_name, names_of
from ppcl.errors import UserError
from ppcl.replacements import Interval, Plan, Replacement, checked_plan, parse_replacement, sort_key
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.candidates import CandidateSearch
from ppcl.search.error_model import ErrorModel
from ppcl.search.latency_table import LatencyTable, Speedup
from ppcl.search.pareto import choose_blocks, deepest_plan


@dataclass(frozen=True)
class Variant:
    """A named plan. With it on: `parameters` of the transformer, their `share` of the teacher's, `blocks` that run.

    `budget`: the share of the parameters it was chosen for; None where it was not chosen by budget.
    """

    name: str
    plan: Plan
    parameters: int
    share: float
    blocks: int
    budget: float | None = None

    @classmethod
    def of(cls, name: str, plan: Iterable[Replacement], sizes: ParameterCounts, budget: float | None = None) -> Variant:
        plan = Plan(plan)
        parameters = sizes.parameters(plan)
        return cls(name, plan, parameters, parameters / sizes.total, sizes.running(plan), budget)


def available_plan(
    plan: Iterable[Replacement | str | Sequence[int]], known: Iterable[Replacement], block_ranges: list[range]
) -> Plan:
    """A plan of `known` replacements. Raises `UserError` where one is impossible or not known."""
    chosen, available = checked_plan(plan, block_ranges), sorted(known, key=sort_key)
    for replacement in chosen:
        if replacement not in available:
            listed = ", ".join(map(str, available)) or "none"
            raise UserError(f"there is no replacement {replacement}; there are {listed}")
    return chosen


def custom_plans(
    settings: Variants, block_ranges: list[range], known: Iterable[Replacement] | None = None
) -> dict[str, Plan]:
    """The plans of `variants.custom`, by name, of `known` replacements where these are given.

    Raises `UserError` for text that is no replacement, blocks that do not exist, overlaps, and replacements not known.
    """
    plans = {}
    for name, plan in settings.custom.items():
        try:
            plans[name] = (
                checked_plan(plan, block_ranges) if known is None else available_plan(plan, known, block_ranges)
            )
        except UserError as error:
            raise UserError(f"variants.custom.{name}: {error}") from None
    return plans


def custom_intervals(settings: Variants) -> list[Interval]:
    """The intervals of the custom plans, which are trained whatever detection finds."""
    replacements = (parse_replacement(item) for plan in settings.custom.values() for item in plan)
    return sorted({r for r in replacements if isinstance(r, Interval)}, key=sort_key)


def blocks_to_remove(settings: Variants, block_ranges: Sequence[range]) -> dict[str, int]:
    """By variant, how many blocks go at most: those that would have to if nothing else were replaced."""
    blocks = block_ranges[-1].stop
    # A block of each list stays.
    most = blocks - len(block_ranges)
    shares = {budget_name(budget): budget for budget in settings.budgets}
    shares |= {
        name: min(target.parameters or 1.0, 1 / target.speedup if target.speedup else 1.0)
        for name, target in settings.targets.items()
    }
    removed = {name: math.ceil((1 - share) * blocks) for name, share in shares.items()}
    removed |= {blocks_name(count): blocks - count for count in settings.blocks}
    return {name: min(count, most) for name, count in removed.items() if count > 0}


def plans_to_measure(
    settings: Variants, sizes: ParameterCounts, times: LatencyTable | None, errors: ErrorModel
) -> dict[str, list[Plan]]:
    """By name, the plans among which those of the budgets and targets are chosen; `times` is needed for targets.

    Raises `UserError` where one cannot be met.
    """
    search = CandidateSearch(sizes, errors, times)
    budgets = {budget_name(budget): search.for_budget(budget) for budget in settings.budgets}
    return budgets | {name: search.for_target(name, target) for name, target in settings.targets.items()}


def best_plans(
    settings: Variants,
    plans: Mapping[str, Sequence[Plan]],
    errors: Mapping[Plan, float],
    speedups: Mapping[Plan, Speedup],
) -> dict[str, Plan]:
    """By name, the plan of the smallest velocity error among those as fast as the target asks, else the fastest.

    `errors` and `speedups` are measured, of each plan as a whole. One within the spread of its timing is fast enough.
    """
    chosen = {}
    for name, candidates in plans.items():
        speedup = settings.targets[name].speedup if name in settings.targets else None
        fast = [plan for plan in candidates if speedup is None or speedups[plan].meets(speedup)]
        chosen[name] = min(fast, key=errors.__getitem__) if fast else max(candidates, key=speedups.__getitem__)
    return chosen


def missed_targets(settings: Variants, chosen: Mapping[str, Plan], speedups: Mapping[Plan, Speedup]) -> list[str]:
    """One sentence for each target whose plan was measured to be slower than asked."""
    return [
        f"variants: {name} was measured at {speedups[chosen[name]].value:.2f} times the teacher's speed, not the "
        f"{target.speedup:g} that variants.targets asks for; no plan measured was faster"
        for name, target in settings.targets.items()
        if target.speedup and not speedups[chosen[name]].meets(target.speedup)
    ]


def make_variants(
    settings: Variants,
    sizes: ParameterCounts,
    sensitivity: Mapping[Replacement, float],
    block_ranges: list[range],
    chosen: Mapping[str, Plan],
) -> dict[str, Variant]:
    """The named variants: the teacher, one a budget, number of blocks and target, the deepest, the custom ones.

    `chosen`: the plans of the budgets and targets. Raises `UserError`.
    """
    names_of(settings)
    plans: dict[str, Iterable[Replacement]] = {TEACHER: ()}
    plans |= {budget_name(budget): chosen[budget_name(budget)] for budget in settings.budgets}
    plans |= {blocks_name(most): choose_blocks(most, sizes.blocks, sensitivity) for most in settings.blocks}
    plans |= {name: chosen[name] for name in settings.targets}
    if deepest := deepest_plan(sizes.blocks, sensitivity):
        plans[ALL] = deepest
    plans |= custom_plans(settings, block_ranges, sizes.replacements)
    budgets = {budget_name(budget): budget for budget in settings.budgets}
    return {name: Variant.of(name, plan, sizes, budgets.get(name)) for name, plan in plans.items()}


@dataclass(frozen=True)
class VariantCatalog:
    """The content of `variants.json`: the teacher's size, the sensitivity of each replacement, and the named variants.

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
                "spans": [[block_range.start, block_range.stop] for block_range in self.block_ranges],
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
            variants={name: Variant(name, **{**v, "plan": Plan(v["plan"])}) for name, v in values["variants"].items()},
        )


def read_catalog(folder: Path) -> VariantCatalog:
    """The catalog that the stage `variants` wrote to its folder."""
    return VariantCatalog.from_json(json.loads((folder / "variants.json").read_text()))
