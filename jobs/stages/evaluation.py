"""Measuring the variants on Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.search.variants import TEACHER, read_catalog
from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download

Progress = Callable[[int, int], None]


def evaluate(
    config: Config,
    teacher: Teacher,
    calibration: Path,
    students: Path,
    variants: Path,
    finetuning: Path | None,
    folder: Path,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Velocity errors, pictures, scores and seconds a step of every variant; writes `evaluation.json`.

    `finetuning`: where the fine-tuned replacements are, None where there are none.
    """
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.evaluation.image_metrics import psnr, ssim
    from ppcl.evaluation.images import image_path, load_images
    from ppcl.evaluation.prompt_checker import correctness, load_checker
    from ppcl.evaluation.scoring import checker_scores, relative_drop
    from ppcl.evaluation.velocity_error import ErrorSums

    settings = config.evaluation
    catalog = read_catalog(variants)
    on = {name: v.plan for name, v in catalog.variants.items()}
    prompts = _prompts(config, CalibrationSet(calibration))
    indices = list(range(len(prompts)))
    ids = chunks_of(CalibrationSet(calibration).ids(held_out=True), settings.batch_size)
    work = [(name, chunk) for name in on for chunk in chunks_of(indices, settings.batch_size)]
    total = len(ids) + len(work) + 1

    texts = [p.text for p in prompts]
    with EvaluatorPool(
        config, teacher, students, (finetuning, variants) if finetuning else None, folder, device
    ) as evaluators:
        # Timed first, while nothing else runs.
        seconds = evaluators.one(lambda a: a.seconds.remote(on, texts[: settings.batch_size]))
        progress(1, total)
        tuned = evaluators.one(lambda a: a.finetuned.remote(on))
        errors = evaluators.all(lambda a, c: a.errors.remote(calibration, c, on), ids, lambda d: progress(1 + d, total))
        evaluators.all(
            lambda a, item: a.pictures.remote(item[0], on[item[0]], [texts[i] for i in item[1]], item[1]),
            work,
            lambda d: progress(1 + len(ids) + d, total),
        )

    download(folder)
    world = load_checker(settings.world) if settings.world else None
    reference = load_images([image_path(folder, TEACHER, i) for i in indices])
    teachers = correctness(world, reference, prompts) if world else None
    measured, right = {}, {}
    for name in on:
        pictures = load_images([image_path(folder, name, i) for i in indices])
        squares = ErrorSums.joined(part[name] for part in errors)
        row = {
            "fine_tuned": tuned[name],
            "velocity_error": squares.overall(),
            "velocity_by_timestep": squares.by_timestep(),
            "psnr": float(psnr(pictures, reference).mean()),
            "ssim": float(ssim(pictures, reference).mean()),
            "seconds_per_step": seconds[name],
            "world": None,
            "R": None,
            "R_low": None,
            "R_high": None,
        }
        if world:
            passed = correctness(world, pictures, prompts)
            row["world"] = checker_scores(passed, settings.confidence, config.seed)
            row |= relative_drop(passed, teachers, settings.confidence, config.seed)
            right[name] = [bool(world.check(p, t.text)) for p, t in zip(pictures, prompts, strict=True)]
        measured[name] = row
    record = {
        "variants": measured,
        "prompts": [p.to_json() for p in prompts],
        "right": right,
        "sampling": config.sampling.model_dump(mode="json"),
        "device": device,
    }
    write_atomically(folder / "evaluation.json", json.dumps(record))
    return {"pictures": len(on) * len(prompts)}


def _prompts(config: Config, calibration: Any) -> list[Any]:
    """The test prompts: those of the configuration, else the world's held-out captions, else calibration's held-out ones."""
    from ppcl.calibration.prompts import read_prompts
    from ppcl.evaluation.prompt_checker import TestPrompt, checker_prompts, load_checker, named_prompts

    settings = config.evaluation
    if settings.prompts is not None:
        texts = [p.text for p in read_prompts(settings.prompts, config.calibration.prompt_column, None, settings.limit)]
        return named_prompts(load_checker(settings.world), texts) if settings.world else [TestPrompt(t) for t in texts]
    if settings.world:
        return checker_prompts(load_checker(settings.world), settings.limit, config.seed)
    return [TestPrompt(text) for _, text in calibration.prompts(held_out=True)][: settings.limit]
