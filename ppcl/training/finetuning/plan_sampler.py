"""The plans to train: the named variants and their parts, any plan, or a single one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ppcl.config.schema import Finetuning
from ppcl.errors import UserError
from ppcl.replacements import (
    LowRankModulation,
    Plan,
    Replacement,
    checked_plan,
    conflicts,
    parse_text,
    sort_key,
)

VARIANTS, ANY = "variants", "any"
# Of `finetuning.train`.
ALL = "all"

# How often a drawn plan has none of a kind of replacement.
_WITHOUT = 0.4
# How often a variant is drawn whole.
_WHOLE = 0.5


class PlanSampler(Protocol):
    """Draws a plan for each step. `replacements`: all that can be in one."""

    replacements: list[Replacement]

    def draw(self, rng: np.random.Generator) -> list[Replacement]: ...


class FixedPlan:
    """Always the same plan."""

    def __init__(self, plan: Sequence[Replacement]):
        self.replacements = sorted(plan, key=sort_key)

    def draw(self, rng: np.random.Generator) -> list[Replacement]:
        return self.replacements


class VariantParts:
    """A named variant or a part of one: fewer plans than there are at all, so that each gets its share of the steps."""

    def __init__(self, variants: Iterable[Sequence[Replacement]]):
        """`variants`: those with something to train in them."""
        self.variants = [sorted(plan, key=sort_key) for plan in variants]
        self.replacements = sorted({replacement for plan in self.variants for replacement in plan}, key=sort_key)

    def draw(self, rng: np.random.Generator) -> list[Replacement]:
        plan = self.variants[rng.integers(len(self.variants))]
        if rng.random() < _WHOLE:
            return plan
        while True:
            share = rng.random()
            part = [replacement for replacement in plan if rng.random() < share]
            if trainable(part):
                return part


class AnyPlan:
    """Any plan of the given replacements, small plans and nearly full ones as likely as any."""

    def __init__(self, replacements: Iterable[Replacement]):
        self.replacements = sorted(trainable(replacements), key=sort_key)

    def draw(self, rng: np.random.Generator) -> list[Replacement]:
        """Draw kind after kind, in random order.

        There are far more FFNs than intervals: drawn all together, an interval would hardly ever find its place free.
        Each kind is left out, or each of its replacements taken with a probability that is itself drawn.
        """
        kinds = sorted({replacement.label for replacement in self.replacements})
        plan: list[Replacement] = []
        while not plan:
            for kind in rng.permutation(len(kinds)):
                share = rng.random() if rng.random() >= _WITHOUT else 0.0
                for index in rng.permutation(len(self.replacements)):
                    replacement = self.replacements[index]
                    taken = replacement.label == kinds[kind] and rng.random() < share
                    if taken and not any(conflicts(replacement, other) for other in plan):
                        plan.append(replacement)
        return sorted(plan, key=sort_key)


def trainable(plan: Iterable[Replacement]) -> list[Replacement]:
    """The replacements that can be trained: what low-rank modulations lose is no more than rounding."""
    return [replacement for replacement in plan if not isinstance(replacement, LowRankModulation)]


def random_plans(sampler: PlanSampler, count: int, seed: int) -> list[list[Replacement]]:
    """At most `count` different plans; fewer where not so many are found."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[Replacement, ...], None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[tuple(sampler.draw(rng))] = None
    return [list(plan) for plan in found]


def plan_sampler(
    settings: Finetuning,
    known: Iterable[Replacement],
    variants: Mapping[str, Sequence[Replacement]],
    block_ranges: list[range],
) -> PlanSampler:
    """The sampler that `finetuning.plan` asks for.

    `known`: the replacements that were distilled. `variants`: the named plans. Raises `UserError` for a plan or a
    variant that does not exist or has nothing to train. In full, every plan but that of the teacher has something.
    """
    in_full = settings.train == ALL
    named = {name: plan for name, plan in variants.items() if (plan if in_full else trainable(plan))}
    for name in settings.variants:
        if name not in named:
            raise UserError(
                f"finetuning.variants: there is no variant {name!r} with anything to train; "
                f"there are {', '.join(named) or 'none'}"
            )
    if settings.plan == ANY:
        return AnyPlan(known)
    if settings.plan == VARIANTS:
        if not named:
            raise UserError(
                "finetuning.plan is 'variants', but no variant has anything to train; give variants.budgets, or set "
                "finetuning.plan to any"
            )
        return VariantParts(named[name] for name in settings.variants or named)
    if settings.plan in named:
        return FixedPlan(named[settings.plan])
    plan = _plan_of_text(settings.plan, list(known), named, block_ranges)
    if not in_full and not trainable(plan):
        raise UserError(
            f"finetuning.plan: {settings.plan!r} has nothing to train; low-rank modulations are not fine-tuned"
        )
    return FixedPlan(plan)


def _plan_of_text(text: str, known: Sequence[Replacement], named: Iterable[str], block_ranges: Sequence[range]) -> Plan:
    replacements = parse_text(text)
    if replacements is None:
        raise UserError(
            f"finetuning.plan: {text!r} is neither {VARIANTS} nor {ANY}, no variant ({', '.join(named)}) and no plan; "
            "write a plan as 3-5,text:6-8,ffn:1"
        )
    plan = checked_plan(replacements, block_ranges)
    for replacement in plan:
        if replacement not in known:
            raise UserError(
                f"finetuning.plan: there is no replacement {replacement}; there are {', '.join(map(str, known))}"
            )
    return plan
