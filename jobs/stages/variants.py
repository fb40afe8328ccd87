"""Choosing the variants on Ray: what each replacement costs alone, then some plans a budget as a whole."""

from __future__ import annotations

import json
from typing import Any

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of, offload_of, workers
from jobs.stage import Stage, StageContext
from ppcl.calibration.dataset import CalibrationSet
from ppcl.evaluation.samples import SEARCH_SAMPLES
from ppcl.evaluation.velocity_error import ErrorSums
from ppcl.replacements import Plan
from ppcl.replacements.io import replacement_files
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.search.variants import VariantCatalog, best_plans, make_variants, missed_targets, plans_to_measure
from ppcl.storage.manifest import write_atomically
from ppcl.training.data import spread_samples


def run(context: StageContext) -> dict[str, Any]:
    """Measure what each replacement costs alone, and some plans of each budget as a whole; writes `variants.json`."""
    config, teacher, progress = context.config, context.teacher, context.events
    calibration, students = context.inputs["calibration"], context.inputs["students"]
    settings, size = config.variants, config.evaluation.batch_size
    counts = parameter_counts(teacher, replacement_files(students.paths()))
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    ids = spread_samples(CalibrationSet.of(calibration).ids(held_out=True), SEARCH_SAMPLES)
    chunks = chunks_of(ids, size)
    with EvaluatorPool(context) as evaluators:
        _, notes = offload_of(evaluators)
        parts = evaluators.all(
            lambda a, chunk: a.sensitivities.remote(calibration, chunk),
            chunks,
            lambda done: progress(done, len(chunks), phase="measuring sensitivities"),
        )
        sensitivity = {r: ErrorSums.joined(part[r] for part in parts).overall() for r in parts[0]}
        latencies = None
        if settings.targets:
            progress(0, 1, phase="timing replacements")
            latencies = evaluators.one(lambda a: a.times.remote(calibration, ids[:size]))
        progress(0, 1, phase="searching plans")
        plans = plans_to_measure(settings, counts, latencies, sensitivity)
        timed = [plan for name in settings.targets for plan in plans[name]]
        speedups: dict[Plan, float] = {}
        if timed:
            progress(0, 1, phase=f"timing {len(timed)} plans")
            seconds = evaluators.one(lambda a: a.forward_seconds.remote(calibration, ids[:size], [(), *timed]))
            speedups = {plan: seconds[0] / taken for plan, taken in zip(timed, seconds[1:], strict=True)}
        numbered = {str(i): p for i, p in enumerate(dict.fromkeys(p for group in plans.values() for p in group))}
        parts = evaluators.all(
            lambda a, chunk: a.errors.remote(calibration, chunk, numbered),
            chunks,
            lambda done: progress(done, len(chunks), phase=f"measuring {len(numbered)} plans"),
        )
        errors = {plan: ErrorSums.joined(part[n] for part in parts).overall() for n, plan in numbered.items()}
    chosen = best_plans(settings, plans, errors, speedups)
    variants = make_variants(settings, counts, sensitivity, block_ranges, chosen)
    catalog = VariantCatalog(counts.total, len(counts.blocks), block_ranges, sensitivity, variants)
    write_atomically(context.folder / "variants.json", json.dumps(catalog.to_json(), indent=1))
    notes = [f"variants: {note}" for note in notes]
    return {"variants": list(variants), "notes": notes + missed_targets(settings, chosen, speedups)}


STAGE = Stage(
    name="variants",
    run=run,
    describe=lambda context: "the sensitivity of every replacement, and the variants of the budgets",
    depends_on=("calibration", "students"),
    reads={"students": "*.safetensors"},  # not the curves, which have times in them
    sections=("variants",),
    workers=workers,
)
