"""Choosing the variants and measuring them on Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.evaluator_pool import EvaluatorPool
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.search.variants import TEACHER, VariantCatalog, best_plans, make_variants, plans_to_measure, read_catalog
from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download

Progress = Callable[[int, int], None]

# Held-out samples on which plans are compared as a whole.
_CHOSEN_ON = 192


def _chunks(values: Any, size: int) -> list[Any]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def choose_variants(
    config: Config, teacher: Teacher, calibration: Path, students: Path, folder: Path, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure what each entry of the plan costs alone, and some plans a budget as a whole; write `variants.json`."""
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.evaluation.velocity_error import ErrorSums

    ids, size = CalibrationSet(calibration).ids(held_out=True), config.evaluation.batch_size
    chunks = _chunks(ids, size)
    # A plan is chosen on part of them; what is told of it later is measured on all.
    some = _chunks(ids[:: max(1, len(ids) // _CHOSEN_ON)], size)
    total = len(chunks) + len(some) + 2
    with EvaluatorPool(config, teacher, students, None, folder, device) as evaluators:
        parts = evaluators.all(
            lambda a, c: a.sensitivities.remote(calibration, c), chunks, lambda done: progress(done, total)
        )
        sensitivity = {i: ErrorSums.joined(part[i] for part in parts).overall() for i in parts[0]}
        counted, settings = parameter_counts(teacher, files_in(students)), config.variants
        block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
        times = evaluators.one(lambda a: a.times.remote(calibration, ids[:size])) if settings.targets else None
        plans = plans_to_measure(settings, counted, times, sensitivity)
        every = list(dict.fromkeys(plan for some_plans in plans.values() for plan in some_plans))
        progress(len(chunks) + 1, total)
        speedups: dict[Any, float] = {}
        if timed := [plan for name in settings.targets for plan in plans[name]]:
            on = [(), *timed]
            seconds = evaluators.one(lambda a: a.forward_seconds.remote(calibration, ids[:size], on))
            speedups = {plan: seconds[0] / taken for plan, taken in zip(timed, seconds[1:], strict=True)}
        progress(len(chunks) + 2, total)
        named = {str(number): plan for number, plan in enumerate(every)}
        parts = evaluators.all(
            lambda a, c: a.errors.remote(calibration, c, named),
            some,
            lambda done: progress(len(chunks) + 2 + done, total),
        )
        errors = {plan: ErrorSums.joined(part[number] for part in parts).overall() for number, plan in named.items()}
    chosen = best_plans(settings, plans, errors, speedups)
    made = make_variants(settings, counted, sensitivity, block_ranges, chosen)
    notes = [
        f"variants: {name} was measured at {speedups[chosen[name]]:.2f} times the teacher's speed, not the {target.speedup:g} that "
        "variants.targets asks for; no plan measured was faster"
        for name, target in settings.targets.items()
        if target.speedup and speedups[chosen[name]] < target.speedup
    ]
    catalog = VariantCatalog(counted.total, len(counted.blocks), block_ranges, sensitivity, made)
    write_atomically(folder / "variants.json", json.dumps(catalog.to_json(), indent=1))
    return {"variants": list(made), "notes": notes}


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
    ids = _chunks(CalibrationSet(calibration).ids(held_out=True), settings.batch_size)
    work = [(name, chunk) for name in on for chunk in _chunks(indices, settings.batch_size)]
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
    world = load_checker(settings.checker) if settings.checker else None
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
        texts = [p.text for p in read_prompts(settings.prompts, config.calibration.prompt_column, None, settings.max_prompts)]
        return named_prompts(load_checker(settings.checker), texts) if settings.checker else [TestPrompt(t) for t in texts]
    if settings.checker:
        return checker_prompts(load_checker(settings.checker), settings.max_prompts, config.seed)
    return [TestPrompt(text) for _, text in calibration.prompts(held_out=True)][: settings.max_prompts]
