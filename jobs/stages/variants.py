"""Choosing the variants on Ray: what each replacement costs alone, then some plans a budget as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of, offload_of, workers
from jobs.stage import Stage, StageContext
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Variants
from ppcl.evaluation.samples import SEARCH_SAMPLES
from ppcl.evaluation.velocity_error import ErrorSums, error_model
from ppcl.replacements import Plan
from ppcl.replacements.io import replacement_files
from ppcl.replacements.parameter_counts import ParameterCounts, parameter_counts
from ppcl.search.error_model import ErrorModel
from ppcl.search.latency_table import Speedup
from ppcl.search.variants import VariantCatalog, best_plans, make_variants, missed_targets, plans_to_measure
from ppcl.storage.manifest import write_atomically
from ppcl.training.data import spread_samples


@dataclass(frozen=True)
class PlanSearch:
    """What was measured of replacements and plans.

    `errors`: predicts the error of a plan. `plans`: by variant, those that were measured as a whole, with `measured`,
    their velocity errors, and `speedups`, of those of targets.
    """

    counts: ParameterCounts
    errors: ErrorModel
    plans: dict[str, list[Plan]]
    measured: dict[Plan, float]
    speedups: dict[Plan, Speedup]
    notes: list[str]

    def chosen(self, settings: Variants) -> dict[str, Plan]:
        return best_plans(settings, self.plans, self.measured, self.speedups)


def search_plans(context: StageContext, replacements: str) -> PlanSearch:
    """Measure each replacement that a stage made alone, then some plans of each budget and target as a whole."""
    config, teacher, progress = context.config, context.teacher, context.events
    calibration, files = context.inputs["calibration"], context.inputs[replacements]
    settings, size = config.variants, config.evaluation.batch_size
    counts = parameter_counts(teacher, replacement_files(files.paths()))
    ids = spread_samples(CalibrationSet.of(calibration).ids("validation"), SEARCH_SAMPLES)
    chunks = chunks_of(ids, size)
    with EvaluatorPool(context, replacements) as evaluators:
        _, notes = offload_of(evaluators)
        parts = evaluators.all(
            lambda a, chunk: a.sensitivities.remote(calibration, chunk),
            chunks,
            lambda done: progress(done, len(chunks), phase="measuring sensitivities"),
        )
        errors = error_model({r: ErrorSums.joined(part[r] for part in parts) for r in parts[0]})
        latencies = None
        if settings.targets:
            progress(0, 1, phase="timing replacements")
            latencies = evaluators.one(lambda a: a.times.remote(calibration, ids[:size]))
        progress(0, 1, phase="searching plans")
        plans = plans_to_measure(settings, counts, latencies, errors)
        timed = list(dict.fromkeys(plan for name in settings.targets for plan in plans[name]))
        speedups: dict[Plan, Speedup] = {}
        if timed:
            progress(0, 1, phase=f"timing {len(timed)} plans")
            teachers, *rounds = evaluators.one(
                lambda a: a.forward_seconds.remote(calibration, ids[:size], [(), *timed])
            )
            speedups = {plan: Speedup.of(teachers, seconds) for plan, seconds in zip(timed, rounds, strict=True)}
        numbered = {str(i): p for i, p in enumerate(dict.fromkeys(p for group in plans.values() for p in group))}
        parts = evaluators.all(
            lambda a, chunk: a.errors.remote(calibration, chunk, numbered),
            chunks,
            lambda done: progress(done, len(chunks), phase=f"measuring {len(numbered)} plans"),
        )
    measured = {plan: ErrorSums.joined(part[n] for part in parts).overall() for n, plan in numbered.items()}
    return PlanSearch(counts, errors, plans, measured, speedups, notes)


def run(context: StageContext) -> dict[str, Any]:
    """Choose the plans of the variants; writes `variants.json`."""
    settings, teacher = context.config.variants, context.teacher
    found = search_plans(context, "students")
    chosen, counts = found.chosen(settings), found.counts
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    sensitivity = found.errors.sensitivity
    variants = make_variants(settings, counts, sensitivity, block_ranges, chosen)
    catalog = VariantCatalog(counts.total, len(counts.blocks), block_ranges, sensitivity, variants)
    write_atomically(context.folder / "variants.json", json.dumps(catalog.to_json(), indent=1))
    notes = [f"variants: {note}" for note in found.notes]
    return {"variants": list(variants), "notes": notes + missed_targets(settings, chosen, found.speedups)}


STAGE = Stage(
    name="variants",
    run=run,
    describe=lambda context: "the sensitivity of every replacement, and the variants of the budgets",
    depends_on=("calibration", "students"),
    reads={"students": "*.safetensors"},  # not the curves, which have times in them
    sections=("variants",),
    workers=workers,
)
