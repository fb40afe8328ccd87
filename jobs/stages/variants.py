"""Choosing the variants on Ray: what each replacement costs alone, then some plans a budget as a whole."""

from __future__ import annotations

import json
from typing import Any

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of, workers
from jobs.stage import Stage, StageContext
from ppcl.calibration.dataset import CalibrationSet
from ppcl.evaluation.velocity_error import ErrorSums
from ppcl.replacements.io import replacement_files
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.search.variants import VariantCatalog, best_plans, make_variants, plans_to_measure
from ppcl.storage.manifest import write_atomically

# Held-out samples on which plans are compared as a whole.
_CHOSEN_ON = 192


def run(context: StageContext) -> dict[str, Any]:
    """Measure what each replacement costs alone, and some plans a budget as a whole; writes `variants.json`."""
    config, teacher, folder, progress = context.config, context.teacher, context.folder, context.events
    calibration, students = context.inputs["calibration"], context.inputs["students"]
    ids, size = CalibrationSet.of(calibration).ids(held_out=True), config.evaluation.batch_size
    chunks = chunks_of(ids, size)
    # A plan is chosen on part of them; what is told of it later is measured on all.
    some = chunks_of(ids[:: max(1, len(ids) // _CHOSEN_ON)], size)
    total = len(chunks) + len(some) + 2
    with EvaluatorPool(context) as evaluators:
        parts = evaluators.all(
            lambda a, c: a.sensitivities.remote(calibration, c), chunks, lambda done: progress(done, total)
        )
        sensitivity = {i: ErrorSums.joined(part[i] for part in parts).overall() for i in parts[0]}
        counted, settings = parameter_counts(teacher, replacement_files(students.paths())), config.variants
        block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
        times = evaluators.one(lambda a: a.times.remote(calibration, ids[:size])) if settings.targets else None
        plans = plans_to_measure(settings, counted, times, sensitivity)
        every = list(dict.fromkeys(plan for some_plans in plans.values() for plan in some_plans))
        progress(len(chunks) + 1, total)
        speedups: dict[Any, float] = {}
        if timed := [plan for name in settings.targets for plan in plans[name]]:
            on = [(), *timed]
            seconds = evaluators.one(lambda a: a.forward_seconds.remote(calibration, ids[:size], on))
            speedups = {plan: seconds[0] / taken for plan, taken in zip(timed, seconds[1:], strict=True)}
        progress(len(chunks) + 2, total)
        named = {str(number): plan for number, plan in enumerate(every)}
        parts = evaluators.all(
            lambda a, c: a.errors.remote(calibration, c, named),
            some,
            lambda done: progress(len(chunks) + 2 + done, total),
        )
        errors = {plan: ErrorSums.joined(part[number] for part in parts).overall() for number, plan in named.items()}
    chosen = best_plans(settings, plans, errors, speedups)
    made = make_variants(settings, counted, sensitivity, block_ranges, chosen)
    notes = [
        f"variants: {name} was measured at {speedups[chosen[name]]:.2f} times the teacher's speed, not the "
        f"{target.speedup:g} that variants.targets asks for; no plan measured was faster"
        for name, target in settings.targets.items()
        if target.speedup and speedups[chosen[name]] < target.speedup
    ]
    catalog = VariantCatalog(counted.total, len(counted.blocks), block_ranges, sensitivity, made)
    write_atomically(folder / "variants.json", json.dumps(catalog.to_json(), indent=1))
    return {"variants": list(made), "notes": notes}


STAGE = Stage(
    name="variants",
    run=run,
    describe=lambda context: "the sensitivity of every replacement, and the variants of the budgets",
    depends_on=("calibration", "students"),
    reads={"students": "*.safetensors"},  # not the curves, which have times in them
    sections=("variants",),
    workers=workers,
)
