"""The plans that are trained: the named variants and what lies within them, any at all, or a single one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ppcl.config.schema import Finetuning
from ppcl.errors import UserError
from ppcl.replacements.plan import Entry, Fold, checked, clash, entry_of, order, written

VARIANTS, ANY = "variants", "any"

# How often a drawn plan has none of a kind of replacement.
_WITHOUT = 0.4
# How often a variant is drawn whole.
_WHOLE = 0.5


class Draws(Protocol):
    """What plans are drawn from. `entries`: all that can be in one."""

    entries: list[Entry]

    def draw(self, rng: np.random.Generator) -> list[Entry]: ...


class One:
    """Always the same plan."""

    def __init__(self, plan: Sequence[Entry]):
        self.entries = sorted(plan, key=order)

    def draw(self, rng: np.random.Generator) -> list[Entry]:
        return self.entries


class Within:
    """A named variant, or some of what is in it: fewer plans than all there are, so that each gets its share of the steps."""

    def __init__(self, variants: Iterable[Sequence[Entry]]):
        """`variants`: those with something to train in them."""
        self.variants = [sorted(plan, key=order) for plan in variants]
        self.entries = sorted({entry for plan in self.variants for entry in plan}, key=order)

    def draw(self, rng: np.random.Generator) -> list[Entry]:
        plan = self.variants[rng.integers(len(self.variants))]
        if rng.random() < _WHOLE:
            return plan
        while True:
            share = rng.random()
            some = [entry for entry in plan if rng.random() < share]
            if trainable(some):
                return some


class Any:
    """Any plan of what there is, small plans and nearly full ones as likely as any."""

    def __init__(self, entries: Iterable[Entry]):
        self.entries = sorted((e for e in entries if trainable([e])), key=order)

    def draw(self, rng: np.random.Generator) -> list[Entry]:
        """Kind after kind, in random order: there are far more FFNs than intervals, and taken all together an interval would
        hardly ever find its place free. Each kind is left out, or each of its entries taken with a probability that is itself
        drawn."""
        kinds = sorted({type(entry) for entry in self.entries}, key=lambda kind: kind.__name__)
        plan: list[Entry] = []
        while not plan:
            for kind in rng.permutation(len(kinds)):
                share = rng.random() if rng.random() >= _WITHOUT else 0.0
                for index in rng.permutation(len(self.entries)):
                    entry = self.entries[index]
                    taken = type(entry) is kinds[kind] and rng.random() < share
                    if taken and not any(clash(entry, other) for other in plan):
                        plan.append(entry)
        return sorted(plan, key=order)


def trainable(plan: Iterable[Entry]) -> list[Entry]:
    """What folding loses is not learnt: nothing of it could be told from rounding."""
    return [entry for entry in plan if not isinstance(entry, Fold)]


def random_plans(draws: Draws, count: int, seed: int) -> list[list[Entry]]:
    """Different plans, as many of `count` as can be found."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[Entry, ...], None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[tuple(draws.draw(rng))] = None
    return [list(plan) for plan in found]


def draws_of(settings: Finetuning, known: Iterable[Entry], variants: Mapping[str, Sequence[Entry]], spans: list[range]) -> Draws:
    """What `finetuning.plan` says. `variants`: the named ones. Raises `UserError` where it cannot be."""
    named = {name: plan for name, plan in variants.items() if trainable(plan)}
    for name in settings.variants:
        if name not in named:
            raise UserError(f"finetuning.variants: there is no variant {name!r} with anything to train; there are {', '.join(named) or 'none'}")
    if settings.plan == ANY:
        return Any(known)
    if settings.plan == VARIANTS:
        if not named:
            raise UserError(
                "finetuning.plan is 'variants', but no variant has anything to train; give variants.budgets, or set "
                "finetuning.plan to any"
            )
        return Within(named[name] for name in settings.variants or named)
    if settings.plan in named:
        return One(named[settings.plan])
    return One(_written(settings.plan, known, named, spans))


def _written(text: str, known: Iterable[Entry], named: Iterable[str], spans: list[range]) -> list[Entry]:
    plan = written(text)
    if plan is None:
        raise UserError(
            f"finetuning.plan: {text!r} is neither {VARIANTS} nor {ANY}, no variant ({', '.join(named)}) and no plan; write a "
            "plan as 3-5,text:6-8,ffn:1"
        )
    plan, known = checked(map(entry_of, plan), spans), list(known)
    for entry in plan:
        if entry not in known:
            raise UserError(f"finetuning.plan: there is no replacement {entry}; there are {', '.join(map(str, known))}")
    if not trainable(plan):
        raise UserError(f"finetuning.plan: {text!r} has nothing to train; folded modulations stay as they are")
    return plan
