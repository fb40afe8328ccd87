"""The ablation on Ray Train: every worker takes seeds of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.ranks import Report, run_ranks
from ppcl.artifacts import write_atomically
from ppcl.config import Config
from ppcl.teacher import Teacher


def _rank(arguments: dict[str, Any], report: Report) -> None:
    import ray.train

    from ppcl.ablation.run import read_detection, run_seed

    config = Config.model_validate(arguments["config"])
    rank, runs = ray.train.get_context().get_world_rank(), Path(arguments["runs"])
    mine = list(range(config.ablation.seeds))[rank :: config.ablation.workers]
    for index, seed in enumerate(mine):
        done = runs / f"seed-{seed}.json"
        if done.exists():
            continue
        work = runs / f"seed-{seed}"
        made = run_seed(
            config,
            Teacher(arguments["teacher"]),
            Path(arguments["calibration"]),
            Path(arguments["probes"]),
            read_detection(Path(arguments["detection"])),
            work,
            config.seed + seed,
            arguments["device"],
            lambda n, total, index=index: report(index * total + n, len(mine) * total, {}),
        )
        write_atomically(done, json.dumps(made))
        shutil.rmtree(work)


def ablate(
    config: Config, teacher: Teacher, calibration: Path, probes: Path, detection: Path, folder: Path, device: str, key: str,
    progress: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:  # fmt: skip
    """Run every seed that is not there yet and write `ablation.json`; a seed that is done is kept under `folder/runs`."""
    from ppcl.ablation.run import read_detection, removed_blocks
    from ppcl.ablation.summary import summary

    settings, runs = config.ablation, folder / "runs" / key
    runs.mkdir(parents=True, exist_ok=True)
    arguments = {
        "config": config.model_dump(mode="json"), "teacher": str(teacher.folder), "calibration": str(calibration),
        "probes": str(probes), "detection": str(detection), "runs": str(runs), "device": device,
    }  # fmt: skip
    run_ranks("ablation", _rank, arguments, settings.workers, device, folder / "runs" / "ray", progress)
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
    shutil.rmtree(folder / "runs")
    return {"seeds": settings.seeds}
