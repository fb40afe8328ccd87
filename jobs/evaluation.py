"""Choosing the variants and measuring them on Ray: an actor loads the pipeline once and switches variants."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool

from jobs.ranks import Places
from ppcl.artifacts import complete, write_atomically
from ppcl.config import Config
from ppcl.errors import UserError
from ppcl.replacements import files_in
from ppcl.sizes import sizes
from ppcl.storage import gather, writing
from ppcl.teacher import Teacher
from ppcl.variants import TEACHER, Family, best_plans, make_variants, plans_to_measure, read_family

Progress = Callable[[int, int], None]

# Held-out samples on which plans are compared as a whole.
_CHOSEN_ON = 192


@ray.remote
class _Evaluator:
    """Holds one pipeline and all its students; every measurement is one call."""

    def __init__(self, config: Config, teacher: str, students: Path, tuned: tuple[Path, Path] | None, folder: Path, device: str):
        """`tuned`: the stages of fine-tuning and of the variants, where there are fine-tuned replacements."""
        import diffusers
        import torch

        from ppcl.calibration.store import CalibrationSet
        from ppcl.plug import Switch
        from ppcl.tuned import Tuned

        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.evaluation.workers))
        self.config, self.folder, self.device = config, folder, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.teacher = Teacher(teacher)
        self.pipeline = self.teacher.pipeline(device, self.dtype)
        fine = Tuned.read(complete(tuned[0]), read_family(complete(tuned[1])).damage) if tuned else None
        self.switch = Switch(self.teacher, files_in(complete(students)), fine)
        self.samples = lru_cache(lambda calibration: CalibrationSet(complete(calibration)))

    def damages(self, calibration: Path, ids: np.ndarray) -> Any:
        from ppcl.evaluation.velocity import damages

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return damages(self.pipeline.transformer, self.switch, inputs)

    def times(self, calibration: Path, ids: np.ndarray) -> Any:
        from ppcl.evaluation.timing import measure_times

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return measure_times(self.pipeline.transformer, self.switch, inputs)

    def forward_seconds(self, calibration: Path, ids: np.ndarray, plans: list[Any]) -> list[float]:
        from ppcl.evaluation.timing import forward_seconds

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return forward_seconds(self.pipeline.transformer, self.switch, plans, inputs)

    def errors(self, calibration: Path, ids: np.ndarray, variants: dict[str, Any]) -> Any:
        from ppcl.evaluation.velocity import variant_errors

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return variant_errors(self.pipeline.transformer, self.switch, variants, inputs)

    def pictures(self, variant: str, plan: Any, texts: list[str], indices: list[int]) -> None:
        from ppcl.evaluation.pictures import make_pictures, picture_path, save_pictures

        self.switch(self.pipeline.transformer, plan)
        # Seeds above those of calibration, so that no test picture starts from noise that was fitted on.
        seeds = [1_000_000 + self.config.seed + index for index in indices]
        made = make_pictures(self.pipeline, texts, seeds, self.config.sampling)
        with writing(self.folder) as folder:
            save_pictures(made, [picture_path(folder, variant, index) for index in indices])

    def fine_tuned(self, variants: dict[str, Any]) -> dict[str, bool]:
        return {name: bool(self.switch.fine_tuned(plan)) for name, plan in variants.items()}

    def seconds(self, variants: dict[str, Any], texts: list[str]) -> dict[str, float]:
        from ppcl.evaluation.pictures import seconds_per_step

        return seconds_per_step(self.pipeline, self.switch, variants, texts, self.config.sampling)


def _pool(
    config: Config, teacher: Teacher, students: Path, tuned: tuple[Path, Path] | None, folder: Path, device: str
) -> list[Any]:
    places = Places(config.evaluation.workers, device, "evaluation.workers", config.patience)
    places.wait()
    resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
    actor = _Evaluator.options(**resources)
    actors = [actor.remote(config, teacher.place, students, tuned, folder, device) for _ in range(config.evaluation.workers)]
    starting = [one.__ray_ready__.remote() for one in actors]
    while starting:
        _, starting = ray.wait(starting, timeout=5)
        places.enough()
    return actors


def _all(actors: list[Any], call: Callable[[Any, Any], Any], items: list[Any], done: Callable[[int], None]) -> list[Any]:
    """`call(actor, item)` for every item, in the order of the items; raises `UserError` as the worker did."""
    results = []
    try:
        for result in ActorPool(actors).map(call, items):
            results.append(result)
            done(len(results))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    return results


def _chunks(values: Any, size: int) -> list[Any]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def choose_variants(
    config: Config, teacher: Teacher, calibration: Path, students: Path, folder: Path, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure what each entry of the plan costs alone, and some plans a budget as a whole; write `variants.json`."""
    from ppcl.calibration.store import CalibrationSet
    from ppcl.evaluation.velocity import Squares

    actors = _pool(config, teacher, students, None, folder, device)
    ids, size = CalibrationSet(calibration).ids(held_out=True), config.evaluation.batch_size
    chunks = _chunks(ids, size)
    # A plan is chosen on part of them; what is told of it later is measured on all.
    some = _chunks(ids[:: max(1, len(ids) // _CHOSEN_ON)], size)
    total = len(chunks) + len(some) + 2
    parts = _all(actors, lambda a, c: a.damages.remote(calibration, c), chunks, lambda done: progress(done, total))
    damage = {i: Squares.joined(part[i] for part in parts).overall() for i in parts[0]}
    counted, settings = sizes(teacher, files_in(students)), config.variants
    spans = teacher.architecture.spans(teacher.empty_transformer())
    # By one actor alone, and nothing else runs.
    times = None
    if settings.targets:
        (times,) = _all(actors[:1], lambda a, c: a.times.remote(calibration, c), [ids[:size]], lambda _: None)
    plans = plans_to_measure(settings, counted, times, damage)
    every = list(dict.fromkeys(plan for some_plans in plans.values() for plan in some_plans))
    progress(len(chunks) + 1, total)
    speedups: dict[Any, float] = {}
    if timed := [plan for name in settings.targets for plan in plans[name]]:
        on = [(), *timed]
        (seconds,) = _all(actors[:1], lambda a, c: a.forward_seconds.remote(calibration, c, on), [ids[:size]], lambda _: None)
        speedups = {plan: seconds[0] / taken for plan, taken in zip(timed, seconds[1:], strict=True)}
    progress(len(chunks) + 2, total)
    named = {str(number): plan for number, plan in enumerate(every)}
    parts = _all(
        actors, lambda a, c: a.errors.remote(calibration, c, named), some, lambda done: progress(len(chunks) + 2 + done, total)
    )
    errors = {plan: Squares.joined(part[number] for part in parts).overall() for number, plan in named.items()}
    chosen = best_plans(settings, plans, errors, speedups)
    made = make_variants(settings, counted, damage, spans, chosen)
    notes = [
        f"variants: {name} was measured at {speedups[chosen[name]]:.2f} times the teacher's speed, not the {target.speedup:g} that "
        "variants.targets asks for; no plan measured was faster"
        for name, target in settings.targets.items()
        if target.speedup and speedups[chosen[name]] < target.speedup
    ]
    family = Family(counted.total, len(counted.blocks), spans, damage, made)
    write_atomically(folder / "variants.json", json.dumps(family.to_json(), indent=1))
    for actor in actors:
        ray.kill(actor)
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
    from ppcl.calibration.store import CalibrationSet
    from ppcl.evaluation.pictures import load_pictures, picture_path
    from ppcl.evaluation.scores import relative_drop, world_scores
    from ppcl.evaluation.similarity import psnr, ssim
    from ppcl.evaluation.velocity import Squares
    from ppcl.evaluation.world import load_world, passes

    settings = config.evaluation
    family = read_family(variants)
    on = {name: v.plan for name, v in family.variants.items()}
    prompts = _prompts(config, CalibrationSet(calibration))
    indices = list(range(len(prompts)))
    ids = _chunks(CalibrationSet(calibration).ids(held_out=True), settings.batch_size)
    work = [(name, chunk) for name in on for chunk in _chunks(indices, settings.batch_size)]
    total = len(ids) + len(work) + 1

    actors = _pool(config, teacher, students, (finetuning, variants) if finetuning else None, folder, device)
    texts = [p.text for p in prompts]
    # Timed first and by one actor alone: nothing else runs.
    seconds = _all(
        actors[:1], lambda a, _: a.seconds.remote(on, texts[: settings.batch_size]), [None], lambda d: progress(d, total)
    )[0]
    (tuned,) = _all(actors[:1], lambda a, _: a.fine_tuned.remote(on), [None], lambda _: None)
    errors = _all(actors, lambda a, c: a.errors.remote(calibration, c, on), ids, lambda d: progress(1 + d, total))
    _all(
        actors,
        lambda a, item: a.pictures.remote(item[0], on[item[0]], [texts[i] for i in item[1]], item[1]),
        work,
        lambda d: progress(1 + len(ids) + d, total),
    )
    for actor in actors:
        ray.kill(actor)

    gather(folder)
    world = load_world(settings.world) if settings.world else None
    reference = load_pictures([picture_path(folder, TEACHER, i) for i in indices])
    teachers = passes(world, reference, prompts) if world else None
    measured, right = {}, {}
    for name in on:
        pictures = load_pictures([picture_path(folder, name, i) for i in indices])
        squares = Squares.joined(part[name] for part in errors)
        row = {
            "fine_tuned": tuned[name],
            "velocity_error": squares.overall(),
            "velocity_by_timestep": squares.by_timestep(),
            "psnr": float(psnr(pictures, reference).mean()),
            "ssim": float(ssim(pictures, reference).mean()),
            "seconds_per_step": seconds[name],
            "world": None, "R": None, "R_low": None, "R_high": None,
        }  # fmt: skip
        if world:
            passed = passes(world, pictures, prompts)
            row["world"] = world_scores(passed, settings.confidence, config.seed)
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
    from ppcl.evaluation.world import TestPrompt, load_world, named_prompts, world_prompts

    settings = config.evaluation
    if settings.prompts is not None:
        texts = [p.text for p in read_prompts(settings.prompts, config.calibration.prompt_column, None, settings.limit)]
        return named_prompts(load_world(settings.world), texts) if settings.world else [TestPrompt(t) for t in texts]
    if settings.world:
        return world_prompts(load_world(settings.world), settings.limit, config.seed)
    return [TestPrompt(text) for _, text in calibration.prompts(held_out=True)][: settings.limit]
