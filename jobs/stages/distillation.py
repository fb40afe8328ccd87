"""Distillation on Ray Train: `(dp, pp)` dimensions of ranks, each with its own segment and replacements."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jobs.runtime.checkpoints import drop_damaged_checkpoints, open_checkpoints
from jobs.runtime.progress_board import RankReporter
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import run_worker_group
from jobs.stage import Stage, StageContext, WorkerContext, Workers
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config, Distillation
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements import LowRankModulation, Replacement, parse_replacement
from ppcl.replacements.io import replacement_files
from ppcl.search.checks import check_reachable, optimistic_counts
from ppcl.search.pareto import deepest_plan
from ppcl.search.variants import names_of
from ppcl.storage.manifest import CHECKPOINTS
from ppcl.storage.mirror import download, remove, upload_on_exit
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.plan_sampler import plan_sampler
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext

NAME = "students"


def workers(config: Config) -> Workers:
    settings = config.distillation
    return Workers(
        settings.pipeline_parallel * settings.data_parallel,
        "distillation.pipeline_parallel × distillation.data_parallel",
    )


def check_plan(context: StageContext) -> list[str]:
    """The summary of what detection found. Raises `UserError` where it is nothing, or too little for the variants."""
    config, detection = context.config, _detection(context)
    plan = detected_plan(context)
    if not plan:
        raise UserError(
            "nothing redundant was found: no interval, text run or FFN of this teacher can be replaced; nothing to "
            "compress"
        )
    block_ranges = [range(*span) for span in detection["spans"]]
    optimistic = optimistic_counts(context.teacher, plan, config.distillation.student_keep_percent)
    check_reachable(config.variants, plan, block_ranges, optimistic)
    settings = config.distillation
    # Raises where the intervals leave too few places to cut; the ranks would find out after they have started.
    segment_of(0, settings.pipeline_parallel, detection["blocks"], plan, settings.train)
    if config.finetuning.steps:
        # Which plans the variants have is not known yet; that they have one is all that can be checked here.
        names = dict.fromkeys(names_of(config.variants), plan)
        plan_sampler(config.finetuning, plan, names, block_ranges)
    return [plan_summary(plan, detection["blocks"])]


def _check(context: StageContext) -> list[str]:
    # Where there is a screening, that was checked before it.
    return [] if "screening" in context.inputs else check_plan(context)


def plan_summary(plan: Sequence[Replacement], blocks: int) -> str:
    """One line: the intervals, and the number of replacements of the other kinds; `detection.json` lists them."""
    intervals = [replacement for replacement in plan if replacement.removed]
    parts = []
    if intervals:
        # They may overlap.
        removed = sum(one.removed for one in deepest_plan(range(blocks), dict.fromkeys(intervals, 1.0)))
        parts.append(
            f"{_count(len(intervals), 'interval')} ({', '.join(map(str, intervals))}), by which {removed} of "
            f"{blocks} blocks can go"
        )
    others = Counter(replacement.label for replacement in plan if not replacement.removed)
    everywhere = others.pop(LowRankModulation.label, 0)
    parts += [_count(number, label) for label, number in sorted(others.items(), reverse=True)]
    if everywhere:
        parts.append("the modulations of all blocks")
    return f"detection: {'; '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _detection(context: StageContext) -> dict[str, Any]:
    return json.loads((context.inputs["detection"].folder / "detection.json").read_text())


def detected_plan(context: StageContext) -> list[Replacement]:
    """Every replacement that detection found worth making."""
    return [parse_replacement(text) for text in _detection(context)["plan"]]


def _plan(context: StageContext) -> list[Replacement]:
    """What is trained to the end: what the selection chose, or all that detection found."""
    if "selection" not in context.inputs:
        return detected_plan(context)
    selection = json.loads((context.inputs["selection"].folder / "selection.json").read_text())
    return [parse_replacement(text) for text in selection["plan"]]


def run(context: StageContext) -> dict[str, Any]:
    """Train a replacement for every entry of the plan; writes `training.json`."""
    notes = drop_damaged_checkpoints(NAME, context.checkpoints)
    start = "screening" if "screening" in context.inputs else None
    return run_distillation(context, NAME, _plan(context), context.config.distillation, start, notes)


def run_distillation(
    context: StageContext,
    stage: str,
    plan: Sequence[Replacement],
    settings: Distillation,
    start: str | None,
    notes: list[str],
) -> dict[str, Any]:
    """Train a plan on Ray Train, from the replacements of the stage `start`; gives the manifest's info.

    Checkpoints lie under `folder/checkpoints/<key>` until all are written. `notes`: what is to be said already.
    """
    folder = context.folder
    resources = Resources.of(workers(context.config), context.device, context.config)
    arguments = {
        "context": context.for_workers(),
        "plan": [str(replacement) for replacement in plan],
        "stage": stage,
        "settings": settings,
        "start": start,
    }
    scratch = folder / CHECKPOINTS / "ray"
    notes += run_worker_group("distillation", _rank, arguments, resources, scratch, context.events)
    download(folder)
    curves = {str(replacement): json.loads((folder / f"{replacement.name}.json").read_text()) for replacement in plan}
    training = {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "start": settings.init,
        "loss": settings.loss,
        "replacements": curves,
    }
    (folder / "training.json").write_text(json.dumps(training))
    for replacement in plan:
        (folder / f"{replacement.name}.json").unlink()
    remove(folder / CHECKPOINTS)
    skipped = sum(curve["skipped_steps"] for curve in curves.values())
    if skipped:
        most = max(curves, key=lambda replacement: curves[replacement]["skipped_steps"])
        notes.append(
            f"{stage}: {skipped} steps were left out, since a batch or a gradient had NaN or infinite values; most of "
            f"them for {most}: {curves[most]['skipped_steps']} of {settings.steps} steps"
        )
    return {"replacements": len(curves), "skipped_steps": skipped, "notes": notes}


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    context: WorkerContext = arguments["context"]
    config = context.config
    settings: Distillation = arguments["settings"]
    resumed = open_checkpoints(arguments["stage"], str(context.checkpoints), arguments["attempt"], report)
    with resumed as checkpoints, upload_on_exit(context.folder) as folder:
        start = replacement_files(context.inputs[arguments["start"]].fetch().paths()) if arguments["start"] else {}
        distil(
            Teacher(context.teacher),
            CalibrationSet.of(context.inputs["calibration"]),
            [parse_replacement(text) for text in arguments["plan"]],
            settings,
            RunContext(
                folder=folder,
                checkpoints=checkpoints,
                seed=config.seed,
                device=context.device,
                dims=ParallelDims.join(settings.pipeline_parallel, settings.data_parallel),
                report=report,
            ),
            modulation_error=config.width.modulation_error,
            start=start,
        )


STAGE = Stage(
    name=NAME,
    run=run,
    describe=lambda context: f"{len(_plan(context))} replacements, {context.config.distillation.steps} steps",
    depends_on=("calibration", "detection", "screening", "selection"),
    reads={"screening": "*.safetensors"},  # not the curves, which have times in them
    sections=("distillation", "width"),
    workers=workers,
    check=_check,
    resumes_from=CHECKPOINTS,
)
