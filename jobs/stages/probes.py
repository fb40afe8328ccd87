"""Probes on Ray Train, every rank its own blocks, and detection from what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import RankReporter, run_worker_group
from ppcl.config.schema import Config
from ppcl.detection import detect as detection
from ppcl.detection.fit_probes import dropped, underdetermined
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import fetch_stage
from ppcl.storage.mirror import download, upload_on_exit


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    import torch

    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.detection.fit_probes import fit_probes
    from ppcl.training.parallel_dims import ParallelDims

    config, device = Config.model_validate(arguments["config"]), arguments["device"]
    with upload_on_exit(arguments["folder"]) as folder:
        fit_probes(
            teacher=Teacher(arguments["teacher"]),
            samples=CalibrationSet(fetch_stage(arguments["calibration"])),
            settings=config.probes,
            dims=ParallelDims.join(config.probes.workers, 1),
            folder=folder,
            seed=config.seed,
            device=device,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            report=report,
        )


def fit_probes(
    config: Config,
    teacher: Teacher,
    calibration: Path,
    folder: Path,
    device: str,
    progress: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:
    """Fit the probes of all blocks into `folder`; progress counts samples.

    `dropped`: calibration tokens left out for NaN or Inf, at the block that lost most. `notes`: what the user should know.
    """
    places = Resources(config.probes.workers, device, "probes.workers", config.worker_timeout_s)
    arguments = {
        "config": config.model_dump(mode="json"),
        "teacher": teacher.place,
        "calibration": str(calibration),
        "folder": str(folder),
        "device": device,
    }
    run_worker_group("probes", _rank, arguments, places, folder / "ray", progress)
    download(folder)
    files = list(folder.glob("block-*.safetensors"))
    few = [tokens for tokens in map(underdetermined, files) if tokens is not None]
    notes = []
    if few:
        notes.append(
            f"probes: {len(few)} of {len(files)} blocks had only {min(few)} calibration tokens of a stream, no more than its width, "
            "and their maps are what the ridge makes of them; use more prompts or more calibration.states_per_prompt"
        )
    return {"blocks": len(files), "dropped": max(map(dropped, files)), "notes": notes}


def detect(
    config: Config, teacher: Teacher, probes: Path, folder: Path, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Find what can be replaced; light enough for the coordinator's own process."""
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    found = detection.detect(probes, block_ranges, config.detection, config.width, progress)
    detection.write_detection(folder, found)
    return {"plan": found["plan"]}
