"""The ablation on Ray Train: every worker takes seeds of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.checkpoints import drop_damaged_checkpoints, open_checkpoints
from jobs.runtime.resources import Resources
from jobs.runtime.worker_group import RankReporter, run_worker_group
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.storage.manifest import fetch_stage, write_atomically
from ppcl.storage.mirror import download, remove


def _rank(arguments: dict[str, Any], report: RankReporter) -> None:
    import ray.train

    config = Config.model_validate(arguments["config"])
    with open_checkpoints("ablation", arguments["runs"], arguments["attempt"], report) as runs:
        _seeds(config, arguments, ray.train.get_context().get_world_rank(), runs, report)


def _seeds(config: Config, arguments: dict[str, Any], rank: int, runs: Path, report: RankReporter) -> None:
    """The seeds of one worker, each with its record in `runs` when it is done."""
    from ppcl.ablation.run import read_detection, run_seed

    calibration, probes = fetch_stage(arguments["calibration"]), fetch_stage(arguments["probes"])
    detection = read_detection(fetch_stage(Path(arguments["detection"]).parent) / Path(arguments["detection"]).name)
    mine = list(range(config.ablation.seeds))[rank :: config.ablation.workers]
    for index, seed in enumerate(mine):
        done = runs / f"seed-{seed}.json"
        if done.exists():
            continue
        work = runs / f"seed-{seed}"
        made = run_seed(
            config,
            Teacher(arguments["teacher"]),
            calibration,
            probes,
            detection,
            work,
            config.seed + seed,
            arguments["device"],
            lambda n, total, index=index: report(index * total + n, len(mine) * total, {}),
        )
        write_atomically(done, json.dumps(made))
        shutil.rmtree(work)


def ablate(
    config: Config,
    teacher: Teacher,
    calibration: Path,
    probes: Path,
    detection: Path,
    folder: Path,
    device: str,
    key: str,
    progress: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:
    """Run every seed that is not there yet and write `ablation.json`; a seed that is done is kept under `folder/runs`."""
    from ppcl.ablation.run import read_detection, removed_blocks
    from ppcl.ablation.summary import summary

    settings, runs = config.ablation, folder / "runs" / key
    notes = drop_damaged_checkpoints("ablation", runs)
    arguments = {
        "config": config.model_dump(mode="json"),
        "teacher": teacher.place,
        "calibration": str(calibration),
        "probes": str(probes),
        "detection": str(detection),
        "runs": str(runs),
        "device": device,
    }
    places = Resources(settings.workers, device, "ablation.workers", config.worker_timeout_s)
    notes += run_worker_group("ablation", _rank, arguments, places, folder / "runs" / "ray", progress)
    download(runs)
    seeds = {seed: json.loads((runs / f"seed-{seed}.json").read_text()) for seed in range(settings.seeds)}
    record = {
        "seeds": settings.seeds,
        "steps": settings.steps,
        "finetuning_steps": settings.finetuning_steps,
        "removed": removed_blocks(config, read_detection(detection)),
        "blocks": read_detection(detection)["blocks"],
        "confidence": config.evaluation.confidence,
        "rows": summary(seeds, config.evaluation.confidence),
    }
    write_atomically(folder / "ablation.json", json.dumps(record, indent=1))
    remove(folder / "runs")
    return {"seeds": settings.seeds, "notes": notes}
