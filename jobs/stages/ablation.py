"""The ablation on Ray Train: every worker takes seeds of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ray.train

from jobs.runtime.checkpoints import drop_damaged_checkpoints, open_checkpoints
from jobs.runtime.progress_board import RankReporter
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import run_worker_group
from jobs.stage import Stage, StageContext, WorkerContext, Workers
from ppcl.ablation.run import AblationInputs, ablated_blocks, read_detection, run_seed
from ppcl.ablation.summary import summary
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download, remove

NAME = "ablation"
_RUNS = "runs"


def workers(config: Config) -> Workers:
    return Workers(config.ablation.workers, "ablation.workers")


def run(context: StageContext) -> dict[str, Any]:
    """Run every seed that is not done yet; writes `ablation.json`. `folder/runs/<key>` keeps those that are."""
    config, folder = context.config, context.folder
    settings, runs = config.ablation, folder / _RUNS / context.key
    resources = Resources.of(workers(config), context.device, config)
    notes = drop_damaged_checkpoints(NAME, runs)
    arguments = {"context": context.for_workers(), "runs": str(runs)}
    notes += run_worker_group(NAME, _rank, arguments, resources, folder / _RUNS / "ray", context.events)
    download(runs)
    seeds = {seed: json.loads((runs / f"seed-{seed}.json").read_text()) for seed in range(settings.seeds)}
    detection = read_detection(context.inputs["detection"].folder / "detection.json")
    record = {
        "seeds": settings.seeds,
        "steps": settings.steps,
        "finetuning_steps": settings.finetuning_steps,
        "removed": ablated_blocks(config, detection),
        "blocks": detection["blocks"],
        "confidence": config.evaluation.confidence,
        "rows": summary(seeds, config.evaluation.confidence),
    }
    write_atomically(folder / "ablation.json", json.dumps(record, indent=1))
    remove(folder / _RUNS)
    return {"seeds": settings.seeds, "notes": notes}


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    context: WorkerContext = arguments["context"]
    with open_checkpoints(NAME, arguments["runs"], arguments["attempt"], report) as runs:
        _run_seeds(context, ray.train.get_context().get_world_rank(), runs, report)


def _run_seeds(context: WorkerContext, rank: int, runs: Path, report: RankReporter) -> None:
    """The seeds of one worker, each with its record in `runs` when it is done."""
    config, inputs = context.config, context.inputs
    detection = read_detection(inputs["detection"].fetch().folder / "detection.json")
    samples, probes = CalibrationSet.of(inputs["calibration"]), inputs["probes"].fetch().folder
    made_from = AblationInputs(config, Teacher(context.teacher), samples, probes, detection, context.device)
    seeds = list(range(config.ablation.seeds))[rank :: config.ablation.workers]
    for index, seed in enumerate(seeds):
        record = runs / f"seed-{seed}.json"
        if record.exists():
            continue
        work = runs / f"seed-{seed}"

        def progress(done: int, total: int, index: int = index) -> None:
            report(index * total + done, len(seeds) * total, {})

        rows = run_seed(made_from, work, config.seed + seed, progress)
        write_atomically(record, json.dumps(rows))
        shutil.rmtree(work)


STAGE = Stage(
    name=NAME,
    run=run,
    describe=lambda context: (
        f"{context.config.ablation.seeds} seeds, {context.config.ablation.steps} distillation steps each"
    ),
    depends_on=("calibration", "probes", "detection"),
    sections=("sampling", "width", "distillation", "finetuning", "evaluation", "ablation"),
    workers=workers,
    also_reads=lambda context: [context.identity.teacher_parts],
    resumes_from=_RUNS,
)
