"""Measuring the variants on Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jobs.runtime.evaluator_pool import EvaluatorPool, chunks_of, offload_of, workers
from jobs.stage import Stage, StageContext
from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.prompts import prompts_sha256
from ppcl.calibration.splits import SPLIT_NAMES
from ppcl.config.schema import Config
from ppcl.evaluation.image_scores import ImageScorer
from ppcl.evaluation.images import TIMED_ROUNDS, image_path, load_images, seconds_per_step
from ppcl.evaluation.prompt_checker import TestPrompt, checker_prompts, load_checker
from ppcl.evaluation.samples import REPORT_SAMPLES
from ppcl.evaluation.suites import configured_prompts
from ppcl.evaluation.velocity_error import ErrorSums
from ppcl.search.variants import TEACHER, read_catalog
from ppcl.storage.manifest import write_atomically
from ppcl.storage.mirror import download, local_file
from ppcl.storage.node_cache import file_sha256
from ppcl.training.data import spread_samples


def run(context: StageContext) -> dict[str, Any]:
    """Velocity errors, images, scores and seconds a step of every variant; writes `evaluation.json`.

    Nothing was fitted or chosen on the samples; nor on the prompts, except those that a note counts.
    """
    config, folder = context.config, context.folder
    catalog = read_catalog(context.inputs["variants"].folder)
    plans = {name: variant.plan for name, variant in catalog.variants.items()}
    samples = CalibrationSet.of(context.inputs["calibration"])
    seen = samples.seen_prompts()
    prompts = _prompts(config, samples, seen)
    splits = _splits(samples, prompts, seen)
    measured, offload, notes = _measure(context, plans, samples, [prompt.text for prompt in prompts])
    download(folder)
    scores, right = _score_images(context, list(plans), prompts)
    record = {
        "variants": {name: measured[name] | scores[name] for name in plans},
        "prompts": [prompt.to_json() for prompt in prompts],
        "right": right,
        "splits": splits,
        "sampling": config.sampling.model_dump(mode="json"),
        "device": context.device,
        "offload": offload,
    }
    write_atomically(folder / "evaluation.json", json.dumps(record))
    if count := splits["seen_prompts"]:
        notes.append(
            f"{count} of {len(prompts)} test prompts are also among the calibration prompts that things were fitted or "
            "chosen on"
        )
    return {"pictures": len(plans) * len(prompts), "notes": [f"evaluation: {note}" for note in notes]}


def _measure(
    context: StageContext, plans: Mapping[str, Any], samples: CalibrationSet, texts: list[str]
) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """By variant, what is measured by running it, and what became of `memory.offload`; images go to the folder."""
    calibration, size, progress = context.inputs["calibration"], context.config.evaluation.batch_size, context.events
    ids = chunks_of(spread_samples(samples.ids("test"), REPORT_SAMPLES), size)
    work = [(name, chunk) for name in plans for chunk in chunks_of(list(range(len(texts))), size)]
    with EvaluatorPool(context, draws_images=True) as evaluators:
        offload, notes = offload_of(evaluators)
        # Timed first, while nothing else runs; the first run warms up.
        evaluators.one(lambda a: a.step_times.remote({TEACHER: ()}, texts[:size]))
        rounds = []
        for number in range(TIMED_ROUNDS):
            rounds.append(evaluators.one(lambda a: a.step_times.remote(plans, texts[:size])))
            progress(number + 1, TIMED_ROUNDS, phase="timing steps, round")
        seconds = seconds_per_step(rounds)
        finetuned = evaluators.one(lambda a: a.finetuned.remote(plans))
        errors = evaluators.all(
            lambda a, chunk: a.errors.remote(calibration, chunk, plans),
            ids,
            lambda done: progress(done, len(ids), phase="measuring velocity errors"),
        )
        evaluators.all(
            lambda a, item: a.pictures.remote(item[0], plans[item[0]], [texts[i] for i in item[1]], item[1]),
            work,
            lambda done: progress(done, len(work), phase="generating images, batch"),
        )
    rows = {}
    for name in plans:
        sums = ErrorSums.joined(part[name] for part in errors)
        rows[name] = {
            "fine_tuned": finetuned[name],
            "velocity_error": sums.overall(),
            "velocity_by_timestep": sums.by_timestep(),
            "seconds_per_step": seconds[name],
        }
    return rows, offload, notes


def _score_images(
    context: StageContext, variants: list[str], prompts: list[TestPrompt]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[bool | None]]]:
    """By variant, its images' scores, and which of them are right where a prompt checker is configured."""
    settings, folder = context.config.evaluation, context.folder
    checker = load_checker(settings.checker) if settings.checker else None

    def images_of(variant: str) -> np.ndarray:
        return load_images([image_path(folder, variant, i) for i in range(len(prompts))])

    scorer = ImageScorer(prompts, images_of(TEACHER), checker, settings.confidence, context.seed)
    scores = {name: scorer.score(images_of(name)) for name in variants}
    correct = {name: score.correct for name, score in scores.items() if score.correct is not None}
    return {name: score.record for name, score in scores.items()}, correct


def _prompts(config: Config, calibration: CalibrationSet, seen: set[str]) -> list[TestPrompt]:
    """The test prompts: those of the configuration and its suites; without any, those of calibration's split test.

    `seen`: prompts that variants were fitted or chosen on; the checker gives others, as far as it has them.
    """
    settings = config.evaluation
    prompts = configured_prompts(config)
    if settings.checker and settings.prompts is None:
        drawn = checker_prompts(load_checker(settings.checker), settings.max_prompts, config.seed, seen)
        return drawn + prompts
    return prompts or [TestPrompt(text) for _, text in calibration.prompts("test")][: settings.max_prompts]


def _splits(samples: CalibrationSet, prompts: list[TestPrompt], seen: set[str]) -> dict[str, int]:
    """What the report says of its data: prompts of each split, and test prompts that are of the other two as well."""
    counts = {split: len(samples.prompt_ids(split)) for split in SPLIT_NAMES}
    return counts | {"seen_prompts": sum(prompt.text in seen for prompt in prompts)}


def _also_reads(context: StageContext) -> list[Any]:
    settings = context.config.evaluation
    prompts = prompts_sha256(settings.prompts) if settings.prompts else None
    suites = [file_sha256(local_file(file)) for file in settings.suites.values()]
    return [context.identity.teacher_parts, prompts, *suites]


STAGE = Stage(
    name="evaluation",
    run=run,
    describe=lambda context: "velocity errors and images of every variant",
    depends_on=("calibration", "students", "variants", "finetuning"),
    reads={"students": "*.safetensors"},  # not the curves, which have times in them
    sections=("sampling", "evaluation"),
    workers=workers,
    also_reads=_also_reads,
)
