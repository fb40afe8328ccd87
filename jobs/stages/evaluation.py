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
from ppcl.search.variants import (
    TEACHER,
    VariantCatalog,
    best_plans,
    make_variants,
    missed_targets,
    plans_to_measure,
    read_catalog,
)
from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download

Progress = Callable[[int, int], None]


def _chunks(values: Any, size: int) -> list[Any]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def choose_variants(
    config: Config, teacher: Teacher, calibration: Path, students: Path, folder: Path, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure what each entry of the plan costs alone, and some plans a budget as a whole; write `variants.json`."""
    from ppcl.calibration.dataset import CalibrationSet
    from ppcl.evaluation.samples import SEARCH_SAMPLES, spread_samples
    from ppcl.evaluation.velocity_error import ErrorSums

    size = config.evaluation.batch_size
    ids = spread_samples(CalibrationSet(calibration).ids(held_out=True), SEARCH_SAMPLES)
    chunks = _chunks(ids, size)
    total = 2 * len(chunks) + 2
    with EvaluatorPool(config, teacher, students, None, folder, device) as evaluators:
        parts = evaluators.all(
            lambda a, c: a.sensitivities.remote(calibration, c), chunks, lambda done: progress(done, total)
        )
        sensitivity = {i: ErrorSums.joined(part[i] for part in parts).overall() for i in parts[0]}
        counted, settings = parameter_counts(teacher, files_in(students)), config.variants
        block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
        times = evaluators.one(lambda a: a.times.remote(calibration, ids[:size])) if settings.targets else None
        plans = plans_to_measure(settings, counted, times, sensitivity)
        all_plans = list(dict.fromkeys(plan for candidates in plans.values() for plan in candidates))
        progress(len(chunks) + 1, total)
        speedups: dict[Any, float] = {}
        if timed := [plan for name in settings.targets for plan in plans[name]]:
            on = [(), *timed]
            seconds = evaluators.one(lambda a: a.forward_seconds.remote(calibration, ids[:size], on))
            speedups = {plan: seconds[0] / taken for plan, taken in zip(timed, seconds[1:], strict=True)}
        progress(len(chunks) + 2, total)
        named = {str(number): plan for number, plan in enumerate(all_plans)}
        parts = evaluators.all(
            lambda a, c: a.errors.remote(calibration, c, named),
            chunks,
            lambda done: progress(len(chunks) + 2 + done, total),
        )
        errors = {plan: ErrorSums.joined(part[number] for part in parts).overall() for number, plan in named.items()}
    chosen = best_plans(settings, plans, errors, speedups)
    made = make_variants(settings, counted, sensitivity, block_ranges, chosen)
    notes = missed_targets(settings, chosen, speedups)
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
    from ppcl.evaluation.image_scores import ImageScorer
    from ppcl.evaluation.images import TIMED_ROUNDS, image_path, load_images, seconds_per_step
    from ppcl.evaluation.prompt_checker import load_checker
    from ppcl.evaluation.samples import REPORT_SAMPLES, spread_samples
    from ppcl.evaluation.velocity_error import ErrorSums

    settings = config.evaluation
    catalog = read_catalog(variants)
    on = {name: v.plan for name, v in catalog.variants.items()}
    prompts = _prompts(config, CalibrationSet(calibration))
    indices = list(range(len(prompts)))
    held_out = CalibrationSet(calibration).ids(held_out=True)
    ids = _chunks(spread_samples(held_out, REPORT_SAMPLES), settings.batch_size)
    work = [(name, chunk) for name in on for chunk in _chunks(indices, settings.batch_size)]
    total = TIMED_ROUNDS + len(ids) + len(work)

    texts = [p.text for p in prompts]
    with EvaluatorPool(
        config, teacher, students, (finetuning, variants) if finetuning else None, folder, device
    ) as evaluators:
        # Timed first, while nothing else runs.
        timed_texts = texts[: settings.batch_size]
        evaluators.one(lambda a: a.step_times.remote({TEACHER: ()}, timed_texts))  # warms up
        rounds = []
        for done in range(1, TIMED_ROUNDS + 1):
            rounds.append(evaluators.one(lambda a: a.step_times.remote(on, timed_texts)))
            progress(done, total)
        seconds = seconds_per_step(rounds)
        tuned = evaluators.one(lambda a: a.finetuned.remote(on))
        errors = evaluators.all(
            lambda a, c: a.errors.remote(calibration, c, on), ids, lambda done: progress(TIMED_ROUNDS + done, total)
        )
        evaluators.all(
            lambda a, item: a.pictures.remote(item[0], on[item[0]], [texts[i] for i in item[1]], item[1]),
            work,
            lambda done: progress(TIMED_ROUNDS + len(ids) + done, total),
        )

    download(folder)
    checker = load_checker(settings.world) if settings.world else None
    reference = load_images([image_path(folder, TEACHER, i) for i in indices])
    scorer = ImageScorer(prompts, reference, checker, settings.confidence, config.seed)
    measured, correct = {}, {}
    for name in on:
        sums = ErrorSums.joined(part[name] for part in errors)
        scores = scorer.score(load_images([image_path(folder, name, i) for i in indices]))
        measured[name] = {
            "fine_tuned": tuned[name],
            "velocity_error": sums.overall(),
            "velocity_by_timestep": sums.by_timestep(),
            "seconds_per_step": seconds[name],
            **scores.record,
        }
        if scores.correct is not None:
            correct[name] = scores.correct
    record = {
        "variants": measured,
        "prompts": [p.to_json() for p in prompts],
        "right": correct,
        "sampling": config.sampling.model_dump(mode="json"),
        "device": device,
    }
    write_atomically(folder / "evaluation.json", json.dumps(record))
    return {"pictures": len(on) * len(prompts)}


def _prompts(config: Config, calibration: Any) -> list[Any]:
    """The test prompts: the configured ones, else held-out captions of the checker, else those of calibration."""
    from ppcl.calibration.prompts import read_prompts
    from ppcl.evaluation.prompt_checker import TestPrompt, checker_prompts, load_checker, named_prompts

    settings = config.evaluation
    if settings.prompts is not None:
        texts = [p.text for p in read_prompts(settings.prompts, config.calibration.prompt_column, None, settings.limit)]
        return named_prompts(load_checker(settings.world), texts) if settings.world else [TestPrompt(t) for t in texts]
    if settings.world:
        return checker_prompts(load_checker(settings.world), settings.limit, config.seed)
    return [TestPrompt(text) for _, text in calibration.prompts(held_out=True)][: settings.limit]
