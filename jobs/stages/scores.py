"""Scoring the images of the evaluation on Ray: every scorer of the configuration, on every suite, for every variant.

A stage of its own: a scorer that fails, or one that is added later, draws no image again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jobs.runtime.evaluator_pool import chunks_of
from jobs.runtime.scorer_pool import Batch, ScorerPool
from jobs.stage import Stage, StageContext
from ppcl.calibration.prompts import read_prompts
from ppcl.config.checks import PROMPTS_SUITE
from ppcl.config.schema import Config, ScorerSettings, result_settings
from ppcl.errors import UserError
from ppcl.evaluation.benchmarks import Benchmark, mean_drops
from ppcl.evaluation.images import FIRST_SEED, image_path, load_images
from ppcl.evaluation.prompt_checker import TestPrompt
from ppcl.evaluation.suites import configured_prompts
from ppcl.search.variants import TEACHER
from ppcl.storage.manifest import write_atomically

NAME = "scores"
# Images of noise that scorers are tried on, and pixels on a side.
_TRIED, _SIDE = 2, 224


def run(context: StageContext) -> dict[str, Any]:
    """Score all images; writes `scores.json`."""
    config = context.config
    folder = context.inputs["evaluation"].fetch().folder
    evaluation = json.loads((folder / "evaluation.json").read_text())
    prompts, variants = [TestPrompt(**prompt) for prompt in evaluation["prompts"]], list(evaluation["variants"])
    values = {name: _score(context, name, folder, prompts, variants) for name in config.evaluation.scorers}
    benchmarks = [one for name, given in values.items() for one in _benchmarks(config, name, prompts, given)]
    confidence, seed = config.evaluation.confidence, context.seed
    record = {
        "benchmarks": [benchmark.record(confidence, seed) for benchmark in benchmarks],
        "mean_drop": mean_drops(benchmarks, confidence, seed),
        "values": values,
    }
    write_atomically(context.folder / "scores.json", json.dumps(record))
    return {"scorers": scorer_settings(config)}


def _score(
    context: StageContext, name: str, folder: Path, prompts: Sequence[TestPrompt], variants: Sequence[str]
) -> dict[str, dict[int, float]]:
    """By variant and number of the image, its score by one scorer; those of other suites have none."""
    settings, seed = context.config.evaluation.scorers[name], FIRST_SEED + context.seed
    wanted = [index for index, prompt in enumerate(prompts) if scores_suite(settings, prompt.suite)]
    if not wanted:
        raise UserError(
            f"evaluation.scorers.{name}.suites is {settings.suites}, and no image is of these; prompts are there only "
            "without suites, or where evaluation.prompts or evaluation.checker gives them"
        )
    # All variants of some prompts, then of the next: the teacher's images of them are read once.
    chunks = [(variant, tuple(chunk)) for chunk in chunks_of(wanted, settings.batch_size) for variant in variants]

    @lru_cache(maxsize=2)
    def images_of(variant: str, indices: tuple[int, ...]) -> np.ndarray:
        return load_images([image_path(folder, variant, index) for index in indices])

    def batch_of(item: tuple[str, tuple[int, ...]]) -> Batch:
        variant, indices = item
        teachers, images = images_of(TEACHER, indices), images_of(variant, indices)
        return _batch([prompts[i] for i in indices], images, variant, [seed + i for i in indices], teachers)

    def told(done: int) -> None:
        context.events(done, len(chunks), phase=f"scoring with {name}, batch")

    def tell(sentence: str) -> None:
        context.events(0, phase=sentence)

    told(0)
    with ScorerPool(name, settings, context.config, tell) as workers:
        scored = workers.scores(batch_of, chunks, told)
    values: dict[str, dict[int, float]] = {variant: {} for variant in variants}
    for (variant, indices), scores in zip(chunks, scored, strict=True):
        values[variant] |= dict(zip(indices, scores.tolist(), strict=True))
    return values


def try_scorers(config: Config, say: Callable[[str], None]) -> None:
    """Score two images of noise with every scorer, before hours of work and not after. Raises `UserError`."""
    settings = config.evaluation
    prompts = configured_prompts(config)
    if not any(prompt.suite == PROMPTS_SUITE for prompt in prompts):
        # As good as the checker's or those of the split test, of which nothing is known yet.
        some = read_prompts(config.prompts, config.calibration.prompt_column, None, _TRIED)
        prompts = [TestPrompt(prompt.text) for prompt in some] + prompts
    for name, scorer in settings.scorers.items():
        tried = [prompt for prompt in prompts if scores_suite(scorer, prompt.suite)][:_TRIED]
        noise = np.random.default_rng(0).integers(256, size=(len(tried), _SIDE, _SIDE, 3), dtype=np.uint8)
        batch = _batch(tried, noise, TEACHER, range(len(tried)), noise)
        say(f"{NAME}: trying {name} on {len(tried)} images of noise")
        with ScorerPool(name, scorer, config, _when_new(say), number=1) as workers:
            workers.scores(lambda batch: batch, [batch], lambda _: None)


def _when_new(say: Callable[[str], None]) -> Callable[[str], None]:
    """Who waits says every second what for; the log has each sentence once."""
    said: list[str] = []

    def tell(sentence: str) -> None:
        if said[-1:] != [sentence]:
            said.append(sentence)
            say(f"{NAME}: {sentence}")

    return tell


def scores_suite(settings: ScorerSettings, suite: str) -> bool:
    return settings.suites is None or suite in settings.suites


def _batch(
    prompts: Sequence[TestPrompt], images: np.ndarray, variant: str, seeds: Sequence[int], teachers: np.ndarray
) -> Batch:
    metadata = [
        {
            **prompt.row,
            "category": prompt.category,
            "suite": prompt.suite,
            "variant": variant,
            "seed": seed,
            "teacher": teacher,
        }
        for prompt, seed, teacher in zip(prompts, seeds, teachers, strict=True)
    ]
    return Batch([prompt.text for prompt in prompts], images, metadata)


def _benchmarks(
    config: Config, name: str, prompts: Sequence[TestPrompt], values: dict[str, dict[int, float]]
) -> list[Benchmark]:
    """One a suite that the scorer has scored."""
    settings = config.evaluation.scorers[name]
    found = []
    for suite in dict.fromkeys(prompt.suite for prompt in prompts if scores_suite(settings, prompt.suite)):
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            if prompt.suite == suite:
                groups.setdefault(prompt.category or "", []).append(index)
        scores = {
            variant: {category: np.array([given[i] for i in indices]) for category, indices in groups.items()}
            for variant, given in values.items()
        }
        found.append(Benchmark(name, suite, scores, settings.higher_is_better))
    return found


def scorer_settings(config: Config) -> dict[str, Any]:
    """Of every scorer, what its scores depend on."""
    return {name: result_settings(settings) for name, settings in config.evaluation.scorers.items()}


STAGE = Stage(
    name=NAME,
    run=run,
    describe=lambda context: f"scores of every image by {', '.join(context.config.evaluation.scorers)}",
    depends_on=("evaluation",),
    enabled=lambda config: bool(config.evaluation.scorers),
    also_reads=lambda context: [scorer_settings(context.config), context.config.evaluation.confidence],
)
