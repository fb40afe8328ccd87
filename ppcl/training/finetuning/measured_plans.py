"""The plans whose velocity error is measured before and after fine-tuning.

From these a result decides which other plans take the fine-tuned replacements; see
`ppcl.replacements.finetuned_selection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppcl.replacements import Replacement
from ppcl.replacements.finetuned_selection import FinetunedSelection, ratios_of
from ppcl.training.data import Samples, spread_samples
from ppcl.training.finetuning.plan_sampler import FixedPlan, PlanSampler, VariantParts, random_plans, trainable
from ppcl.training.finetuning.variant_model import VariantModel
from ppcl.training.run_context import RunContext

# Held-out samples on which plans are measured, at most, and how many at once.
SAMPLES, BATCH = 192, 32

Variants = Mapping[str, Sequence[Replacement]]


def plans_to_measure(sampler: PlanSampler, variants: Variants, count: int, seed: int) -> list[list[Replacement]]:
    """The variants with something to train, and up to `count` drawn plans; for a fixed plan, that one and its parts.

    Where one is trained in full, that one alone: no other takes what was trained.
    """
    if not all(one.in_plans for one in sampler.replacements):
        return [sampler.replacements]
    drawn = []
    if isinstance(sampler, FixedPlan):
        # What was trained for the whole need not be better for its parts.
        drawn, sampler = [sampler.replacements], VariantParts([sampler.replacements])
    drawn += [plan for plan in random_plans(sampler, count, seed) if plan not in drawn]
    named = dict.fromkeys(tuple(plan) for plan in variants.values() if trainable(plan))
    return [*map(list, named), *(plan for plan in drawn if tuple(plan) not in named)]


@torch.no_grad()
def velocity_errors(
    model: VariantModel, samples: Samples, plans: Sequence[Sequence[Replacement]], run: RunContext
) -> list[float]:
    """Each plan's relative squared velocity error on held-out samples, at most `SAMPLES` of them, spread evenly.

    Every replica measures its share of each batch; all have the result.
    """
    ids = spread_samples(samples.ids("validation"), SAMPLES)
    batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    # The plans' errors, and the target's energy.
    sums = torch.zeros(len(plans) + 1, dtype=torch.float64, device=model.device)
    for number, batch in enumerate(batches):
        rows = batch[run.dims.dp_rank :: run.dims.dp]
        # Sharded blocks are gathered by all: who has no sample left runs one that counts nothing.
        counts = float(len(rows) > 0)
        inputs = samples.batch(rows if counts else batch[:1], model.device, model.dtype)
        target = model.velocity((), inputs).double()
        sums[-1] += counts * target.square().sum()
        for index, plan in enumerate(plans):
            sums[index] += counts * (model.velocity(plan, inputs).double() - target).square().sum()
            done = number * len(plans) + index + 1
            run.report(done, len(batches) * len(plans), {}, phase="measuring plans")
    model.unplug()
    run.dims.all_reduce(sums)
    return (sums[:-1] / sums[-1]).tolist()


def plan_rows(
    errors: Mapping[tuple[Replacement, ...], tuple[float, float]],
    variants: Variants,
    trained: Sequence[Replacement],
    sensitivity: Mapping[Replacement, float],
) -> list[dict[str, Any]]:
    """The rows of `finetuning.json`: each plan's errors, and the replacements it would take fine-tuned.

    `errors`: by plan, before and after. `trained`: the replacements that were. `sensitivity`: the velocity error of
    each replacement alone.
    """
    named = {tuple(plan): name for name, plan in variants.items()}
    plans = [tuple(one for one in plan if one.in_plans) for plan in errors]
    rows: list[dict[str, Any]] = [
        {"plan": [str(r) for r in plan], "variant": named.get(plan), "before": before, "after": after}
        for plan, (before, after) in zip(plans, errors.values(), strict=True)
    ]
    ratios = ratios_of(rows)
    in_full = not all(one.in_plans for one in trained)
    for row, plan in zip(rows, plans, strict=True):
        # A drawn plan stands for those that are not measured: what its row says must not come from its own ratio.
        own = row["variant"] or in_full
        known = ratios if own else {p: ratio for p, ratio in ratios.items() if p != frozenset(plan)}
        selection = FinetunedSelection(dict.fromkeys(trained, Path()), sensitivity, known)
        row["taken"] = selection.uses_finetuned(plan)
    return rows
