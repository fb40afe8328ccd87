"""Fine-tuning on Ray Train: data-parallel replicas of the teacher with all its replacements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.checkpoints import drop_damaged_checkpoints, open_checkpoints
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import RankReporter, run_worker_group
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import fetch_stage
from ppcl.storage.mirror import download, remove, upload_on_exit


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.replacements.io import files_in
    from ppcl.search.variants import read_catalog
    from ppcl.training.finetuning.trainer import finetune
    from ppcl.training.parallel_dims import ParallelDims

    config = Config.model_validate(arguments["config"])
    catalog = read_catalog(fetch_stage(arguments["variants"]))
    going = open_checkpoints("finetuning", arguments["checkpoints"], arguments["attempt"], report)
    with going as checkpoints, upload_on_exit(arguments["folder"]) as folder:
        finetune(
            teacher=Teacher(arguments["teacher"]),
            files=files_in(fetch_stage(arguments["students"])),
            variants={name: variant.plan for name, variant in catalog.variants.items()},
            sensitivity=catalog.sensitivity,
            samples=CalibrationSet(fetch_stage(arguments["calibration"])),
            settings=config.finetuning,
            sampling_steps=config.sampling.steps,
            dims=ParallelDims.join(1, config.finetuning.data_parallel),
            folder=folder,
            checkpoints=checkpoints,
            seed=config.seed,
            device=arguments["device"],
            report=report,
        )


def finetune_replacements(
    config: Config,
    teacher: Teacher,
    calibration: Path,
    students: Path,
    variants: Path,
    folder: Path,
    device: str,
    key: str,
    progress: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:
    """Fine-tune what lies in `students`, for what lies in `variants`, into `folder`; gives what the manifest tells of the stage.

    Checkpoints lie under `folder/checkpoints/<key>` until all is written.
    """
    checkpoints = folder / "checkpoints" / key
    notes = drop_damaged_checkpoints("finetuning", checkpoints)
    arguments = {
        "config": config.model_dump(mode="json"),
        "teacher": teacher.place,
        "students": str(students),
        "variants": str(variants),
        "calibration": str(calibration),
        "folder": str(folder),
        "checkpoints": str(checkpoints),
        "device": device,
    }
    places = Resources(config.finetuning.data_parallel, device, "finetuning.data_parallel", config.worker_timeout_s)
    notes += run_worker_group("finetuning", _rank, arguments, places, folder / "checkpoints" / "ray", progress)
    download(folder)
    remove(folder / "checkpoints")
    made = json.loads((folder / "finetuning.json").read_text())
    return {"skipped_steps": made["skipped_steps"], "notes": notes}
