"""Selection: which of the screened intervals are distilled to the end.

Sensitivities are measured again after the short distillation, and plans are searched as for the variants. The intervals
of the best few plans of each variant stay, and those of the best plan of intervals alone that leaves as many blocks:
such a plan is what other engines can load. All replacements in closed form stay.
"""

from __future__ import annotations

import json
from typing import Any

from jobs.runtime.evaluator_pool import workers
from jobs.stage import Stage, StageContext
from jobs.stages.variants import search_plans
from ppcl.replacements import Interval, Replacement, sort_key
from ppcl.search.shortlist import best_depth_plans
from ppcl.search.variants import blocks_to_remove, custom_intervals
from ppcl.storage.manifest import write_atomically

# Plans of each variant whose intervals stay.
_PLANS = 3


def run(context: StageContext) -> dict[str, Any]:
    """Choose; writes `selection.json`: the plan to train, and every replacement's sensitivity."""
    settings = context.config.variants
    found = search_plans(context, "screening")
    sensitivity = found.errors.sensitivity
    kept: set[Replacement] = {r for r in sensitivity if not isinstance(r, Interval)} | set(custom_intervals(settings))
    for name, plans in found.plans.items():
        target = settings.targets.get(name)
        fast = [plan for plan in plans if target is None or found.speedups[plan].meets(target.speedup)]
        for plan in sorted(fast or plans, key=found.measured.__getitem__)[:_PLANS]:
            kept.update(plan)
    block_ranges = context.teacher.adapter.block_ranges(context.teacher.empty_transformer())
    asked = sorted(set(blocks_to_remove(settings, block_ranges).values()))
    intervals = [r for r in sensitivity if isinstance(r, Interval)]
    for depth_plan in best_depth_plans(found.errors.of(intervals), len(found.counts.blocks), asked).values():
        kept.update(depth_plan)
    chosen = sorted(kept, key=sort_key)
    record = {
        "plan": [str(replacement) for replacement in chosen],
        "sensitivity": {str(replacement): value for replacement, value in sensitivity.items()},
    }
    write_atomically(context.folder / "selection.json", json.dumps(record, indent=1))
    stay = [str(r) for r in chosen if isinstance(r, Interval)]
    note = f"selection: {len(stay)} of {len(intervals)} intervals are distilled to the end: {', '.join(stay)}"
    return {"plan": record["plan"], "notes": [*(f"selection: {line}" for line in found.notes), note]}


STAGE = Stage(
    name="selection",
    run=run,
    describe=lambda context: "the sensitivity of every interval after the short distillation, and those that stay",
    depends_on=("calibration", "screening"),
    reads={"screening": "*.safetensors"},  # not the curves, which have times in them
    sections=("variants",),
    workers=workers,
    enabled=lambda config: config.detection.screens,
)
