"""Actors that measure variants: each loads the pipeline once, and switches; replacements are read when needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import ray
import torch

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat
from jobs.runtime.watched_actors import WatchedActors
from jobs.stage import StageContext, WorkerContext, Workers
from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.detection.surrogates import Surrogate, fit_surrogates
from ppcl.evaluation.images import FIRST_SEED, generate_images, image_path, save_images, step_times
from ppcl.evaluation.latency import forward_seconds, measure_latencies
from ppcl.evaluation.prompt_cache import keep_embeddings
from ppcl.evaluation.velocity_error import sensitivities, surrogate_errors, variant_errors
from ppcl.models.placement import Images, place
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import replacement_files
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import StageFiles
from ppcl.storage.mirror import upload_on_exit


def workers(config: Config) -> Workers:
    return Workers(config.evaluation.workers, "evaluation.workers")


def chunks_of(values: Any, size: int) -> list[Any]:
    """A list or array cut into parts of at most `size`."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def _finetuned(context: WorkerContext) -> FinetunedSelection | None:
    """The fine-tuned replacements, where the stage has them among its inputs."""
    files = context.inputs.get("finetuning")
    if files is None:
        return None
    files = files.fetch()
    sensitivity = read_catalog(context.inputs["variants"].fetch().folder).sensitivity
    return replace(FinetunedSelection.read(files.folder, sensitivity), files=replacement_files(files.paths()))


class _Evaluator:
    """Holds one pipeline, and replacements within a limit; every measurement is one call."""

    def __init__(self, heartbeat: Heartbeat):
        heartbeat.start()

    def load(self, context: WorkerContext, replacements: str | None, count: int, draws_images: bool) -> None:
        """Called first: Ray does not keep the error of a constructor as it was.

        `replacements`: the stage whose files they are; None: there are none. `count`: of the evaluators.
        `draws_images`: with the text encoders and the VAE.
        """
        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
        self.config, self.folder, self.device = context.config, context.folder, context.device
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        teacher = Teacher(context.teacher)
        files = replacement_files(context.inputs[replacements].fetch().paths()) if replacements else {}
        memory = self.config.memory
        self.switch = VariantSwitcher(teacher, files, _finetuned(context), round(memory.replacements_gb * 1e9))
        self.pipeline = teacher.pipeline("cpu", self.dtype, transformer_only=not draws_images)
        if draws_images:
            # One image after the other: decoding a batch of large ones takes more memory than the teacher.
            self.pipeline.vae.enable_slicing()
        sampling, count = self.config.sampling, self.config.evaluation.batch_size
        images = Images(count, sampling.height, sampling.width)
        self.placement = place(self.pipeline, self.device, memory, images, self.switch.most_bytes(self.dtype))
        keep_embeddings(self.pipeline)
        self.samples = lru_cache(CalibrationSet.of)
        # Those of the last calls: calls for the same intervals come one after another.
        self.surrogates = lru_cache(maxsize=1)(self._fit_surrogates)

    def offload(self) -> tuple[str, str]:
        """What became of `memory.offload`, as a word and as a sentence."""
        return self.placement.mode, str(self.placement)

    def sensitivities(self, calibration: StageFiles, ids: np.ndarray) -> Any:
        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return sensitivities(self.pipeline.transformer, self.switch, inputs)

    def _fit_surrogates(self, probes: StageFiles, intervals: tuple[Interval, ...]) -> dict[Interval, Surrogate]:
        folder, ridge = probes.fetch().folder, self.config.probes.ridge
        lasts: dict[int, list[int]] = {}
        for interval in intervals:
            lasts.setdefault(interval.first, []).append(interval.last)
        found: dict[Interval, Surrogate] = {}
        for first, ends in lasts.items():
            found |= fit_surrogates(folder, first, ends, ridge, self.device, self.dtype)
        return found

    def surrogate_errors(
        self, probes: StageFiles, calibration: StageFiles, intervals: tuple[Interval, ...], ids: np.ndarray
    ) -> tuple[dict[Interval, Any], set[Interval]]:
        """The errors of the surrogates of some intervals, and those that were fitted on too few tokens."""
        surrogates = self.surrogates(probes, intervals)
        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        errors = surrogate_errors(self.pipeline.transformer, surrogates, inputs)
        return errors, {interval for interval, surrogate in surrogates.items() if surrogate.underdetermined}

    def times(self, calibration: StageFiles, ids: np.ndarray) -> Any:
        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return measure_latencies(self.pipeline.transformer, self.switch, inputs)

    def forward_seconds(self, calibration: StageFiles, ids: np.ndarray, plans: list[Any]) -> list[list[float]]:
        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return forward_seconds(self.pipeline.transformer, self.switch, plans, inputs)

    def errors(self, calibration: StageFiles, ids: np.ndarray, variants: dict[str, Any]) -> Any:
        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return variant_errors(self.pipeline.transformer, self.switch, variants, inputs)

    def pictures(self, variant: str, plan: Any, texts: list[str], indices: list[int]) -> None:
        self.switch(self.pipeline.transformer, plan)
        seeds = [FIRST_SEED + self.config.seed + index for index in indices]
        images = generate_images(self.pipeline, texts, seeds, self.config.sampling)
        with upload_on_exit(self.folder) as folder:
            save_images(images, [image_path(folder, variant, index) for index in indices])

    def finetuned(self, variants: dict[str, Any]) -> dict[str, bool]:
        return {name: bool(self.switch.finetuned(plan)) for name, plan in variants.items()}

    def step_times(self, variants: dict[str, Any], texts: list[str]) -> dict[str, list[float]]:
        return step_times(self.pipeline, self.switch, variants, texts, self.config.sampling)


_EvaluatorActor: Any = ray.remote(_Evaluator)


class EvaluatorPool(WatchedActors):
    """A pool of them."""

    def __init__(
        self,
        context: StageContext,
        replacements: str | None = "students",
        workers_of: Callable[[Config], Workers] = workers,
        draws_images: bool = False,
    ):
        """Start the actors. Raises `UserError` where the cluster has too few resources for too long.

        `replacements`: the stage whose replacements they can switch on; None: none. `workers_of`: how many there are.
        `draws_images`: whether they load the text encoders and the VAE too.
        """
        needed = workers_of(context.config)

        def tell(sentence: str) -> None:
            context.events(0, phase=sentence)

        actor = _EvaluatorActor.options(**({"num_gpus": 1} if context.device == "cuda" else {"num_cpus": 1}))
        load = context.for_workers(), replacements, needed.number, draws_images
        super().__init__(actor, load, "an evaluator", Resources.of(needed, context.device, context.config), tell)

    def one(self, call: Callable[[Any], Any]) -> Any:
        """The result of one call on one actor, while nothing else runs."""
        (result,) = self.all(lambda actor, _: call(actor), [None], lambda _: None, by=1)
        return result


def offload_of(evaluators: EvaluatorPool) -> tuple[str, list[str]]:
    """What became of `memory.offload`, and a line for the log where weights come and go."""
    mode, sentence = evaluators.one(lambda evaluator: evaluator.offload.remote())
    return mode, [] if mode == "none" else [sentence]
