"""Distillation on Ray Train: a `(dp, pp)` dims of ranks, each with its own segment and replacements."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.runtime.checkpoints import drop_damaged_checkpoints, open_checkpoints
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import RankReporter, run_worker_group
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.replacements.plan import Replacement, parse_replacement
from ppcl.storage.manifest import fetch_stage
from ppcl.storage.mirror import download, remove, upload_on_exit


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.training.distillation.trainer import distil
    from ppcl.training.parallel_dims import ParallelDims

    config = Config.model_validate(arguments["config"])
    settings = config.distillation
    going = open_checkpoints("students", arguments["checkpoints"], arguments["attempt"], report)
    with going as checkpoints, upload_on_exit(arguments["folder"]) as folder:
        distil(
            teacher=Teacher(arguments["teacher"]),
            samples=CalibrationSet(fetch_stage(arguments["calibration"])),
            plan=[parse_replacement(text) for text in arguments["plan"]],
            settings=settings,
            dims=ParallelDims.join(settings.pipeline_parallel, settings.data_parallel),
            folder=folder,
            checkpoints=checkpoints,
            seed=config.seed,
            device=arguments["device"],
            report=report,
            modulation_error=config.width.modulation_error,
        )


def distil_plan(
    config: Config,
    teacher: Teacher,
    calibration: Path,
    plan: Sequence[Replacement],
    folder: Path,
    device: str,
    key: str,
    progress: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:
    """Train a replacement for every entry of the plan into `folder`; gives what the manifest tells of the stage.

    Checkpoints lie under `folder/checkpoints/<key>` until all are written.
    """
    settings = config.distillation
    workers = settings.pipeline_parallel * settings.data_parallel
    places = Resources(workers, device, "distillation.pipeline_parallel × distillation.data_parallel", config.worker_timeout_s)
    checkpoints = folder / "checkpoints" / key
    notes = drop_damaged_checkpoints("students", checkpoints)
    if plan:
        arguments = {
            "config": config.model_dump(mode="json"),
            "teacher": teacher.place,
            "calibration": str(calibration),
            "plan": [str(entry) for entry in plan],
            "folder": str(folder),
            "checkpoints": str(checkpoints),
            "device": device,
        }
        notes += run_worker_group("distillation", _rank, arguments, places, folder / "checkpoints" / "ray", progress)
        download(folder)
    curves = {str(entry): json.loads((folder / f"{entry.name}.json").read_text()) for entry in plan}
    training = {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "start": settings.init,
        "loss": settings.loss,
        "replacements": curves,
    }
    (folder / "training.json").write_text(json.dumps(training))
    for entry in plan:
        (folder / f"{entry.name}.json").unlink()
    remove(folder / "checkpoints")
    skipped = sum(c["skipped_steps"] for c in curves.values())
    if skipped:
        most = max(curves, key=lambda entry: curves[entry]["skipped_steps"])
        notes.append(
            f"students: {skipped} steps were left out, since a batch or a gradient had NaN or infinite values, of "
            f"{settings.steps} steps the most for {most}: {curves[most]['skipped_steps']}"
        )
    return {"replacements": len(curves), "skipped_steps": skipped, "notes": notes}
