"""The plans that are trained: one that is given, or any drawn at random from what there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ppcl.config import Finetuning
from ppcl.errors import UserError
from ppcl.plan import Entry, checked, clash, entry_of, order, written

# How often a drawn plan has none of a kind of replacement.
_WITHOUT = 0.4


def random_plan(entries: Sequence[Entry], rng: np.random.Generator) -> list[Entry]:
    """Some of the entries, none that clashes with another; at least one.

    Kind after kind, in random order: there are far more FFNs than intervals, and taken all together an interval would
    hardly ever find its place free. Each kind is left out, or each of its entries taken with a probability that is itself
    drawn, so that small plans and nearly full ones are as likely as any.
    """
    kinds = sorted({type(entry) for entry in entries}, key=lambda kind: kind.__name__)
    plan: list[Entry] = []
    while not plan:
        for kind in rng.permutation(len(kinds)):
            share = rng.random() if rng.random() >= _WITHOUT else 0.0
            for index in rng.permutation(len(entries)):
                entry = entries[index]
                taken = type(entry) is kinds[kind] and rng.random() < share
                if taken and not any(clash(entry, other) for other in plan):
                    plan.append(entry)
    return sorted(plan, key=order)


def random_plans(entries: Sequence[Entry], count: int, seed: int) -> list[list[Entry]]:
    """Different plans, as many of `count` as can be found."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[Entry, ...], None] = {}
    for _ in range(20 * count):
        found[tuple(random_plan(entries, rng))] = None
        if len(found) == count:
            break
    return [list(plan) for plan in found]


def fixed_plan(settings: Finetuning, known: Iterable[Entry], spans: list[range]) -> list[Entry] | None:
    """The one plan that is to be trained, None where plans are drawn. Raises `UserError` where it cannot be."""
    if settings.plan is None:
        return None
    plan = written(settings.plan)
    if plan is None:
        raise UserError(f"finetuning.plan: {settings.plan!r} is no plan; write it as 3-5,text:6-8,ffn:1")
    plan, known = checked(map(entry_of, plan), spans), list(known)
    for entry in plan:
        if entry not in known:
            raise UserError(f"finetuning.plan: there is no replacement {entry}; there are {', '.join(map(str, known))}")
    return plan
