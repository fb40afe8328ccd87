"""Actors that measure variants: each loads the pipeline and all replacements once, and switches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from ray.util import ActorPool

from jobs.runtime.resources import Resources
from jobs.runtime.watchdog import Heartbeat, Watchdog
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import fetch_stage
from ppcl.storage.mirror import upload_on_exit


@ray.remote
class _Evaluator:
    """Holds one pipeline and all its students; every measurement is one call."""

    def __init__(self, life: Heartbeat):
        life.show()

    def load(
        self, config: Config, teacher: str, students: Path, tuned: tuple[Path, Path] | None, folder: Path, device: str
    ) -> None:
        """The first call, since Ray keeps no error of a constructor as it was. `tuned`: the stages of fine-tuning and of the
        variants, where there are fine-tuned replacements."""
        import diffusers
        import torch

        from ppcl.calibration.dataset import CalibrationSet
        from ppcl.replacements.finetuned_selection import FinetunedSelection
        from ppcl.replacements.switcher import VariantSwitcher

        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.evaluation.workers))
        self.config, self.folder, self.device = config, folder, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        whole = Teacher(teacher)
        self.pipeline = whole.pipeline(device, self.dtype)
        fine = (
            FinetunedSelection.read(fetch_stage(tuned[0]), read_catalog(fetch_stage(tuned[1])).sensitivity)
            if tuned
            else None
        )
        self.switch = VariantSwitcher(whole, files_in(fetch_stage(students)), fine)
        self.samples = lru_cache(lambda calibration: CalibrationSet(fetch_stage(calibration)))

    def sensitivities(self, calibration: Path, ids: np.ndarray) -> Any:
        from ppcl.evaluation.velocity_error import sensitivities

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return sensitivities(self.pipeline.transformer, self.switch, inputs)

    def times(self, calibration: Path, ids: np.ndarray) -> Any:
        from ppcl.evaluation.latency import measure_latencies

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return measure_latencies(self.pipeline.transformer, self.switch, inputs)

    def forward_seconds(self, calibration: Path, ids: np.ndarray, plans: list[Any]) -> list[float]:
        from ppcl.evaluation.latency import forward_seconds

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return forward_seconds(self.pipeline.transformer, self.switch, plans, inputs)

    def errors(self, calibration: Path, ids: np.ndarray, variants: dict[str, Any]) -> Any:
        from ppcl.evaluation.velocity_error import variant_errors

        inputs = self.samples(calibration).batch(ids, self.device, self.dtype)
        return variant_errors(self.pipeline.transformer, self.switch, variants, inputs)

    def pictures(self, variant: str, plan: Any, texts: list[str], indices: list[int]) -> None:
        from ppcl.evaluation.images import generate_images, image_path, save_images

        self.switch(self.pipeline.transformer, plan)
        # Seeds above those of calibration, so that no test picture starts from noise that was fitted on.
        seeds = [1_000_000 + self.config.seed + index for index in indices]
        made = generate_images(self.pipeline, texts, seeds, self.config.sampling)
        with upload_on_exit(self.folder) as folder:
            save_images(made, [image_path(folder, variant, index) for index in indices])

    def finetuned(self, variants: dict[str, Any]) -> dict[str, bool]:
        return {name: bool(self.switch.finetuned(plan)) for name, plan in variants.items()}

    def step_times(self, variants: dict[str, Any], texts: list[str]) -> dict[str, list[float]]:
        from ppcl.evaluation.images import step_times

        return step_times(self.pipeline, self.switch, variants, texts, self.config.sampling)


class EvaluatorPool:
    """A pool of them, given back at the end of a `with` block."""

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        students: Path,
        tuned: tuple[Path, Path] | None,
        folder: Path,
        device: str,
    ):
        places = Resources(config.evaluation.workers, device, "evaluation.workers", config.patience)
        places.wait()
        self._exit = ExitStack()
        self._watch = self._exit.enter_context(Watchdog("an evaluator", places))
        actor = _Evaluator.options(**({"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}))
        self.actors = [actor.remote(self._watch.life) for _ in range(config.evaluation.workers)]
        for one in self.actors:
            self._exit.callback(ray.kill, one)
        self._loading = [one.load.remote(config, teacher.place, students, tuned, folder, device) for one in self.actors]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def all(
        self, call: Callable[[Any, Any], Any], items: list[Any], done: Callable[[int], None], by: int | None = None
    ) -> list[Any]:
        """`call(actor, item)` for every item, in the order of the items, by all actors or so many; raises `UserError` as an actor did."""
        results = []
        for _ in self._results(ray.get(one) for one in self._loading):
            pass
        self._loading = []
        for result in self._results(ActorPool(self.actors[:by]).map(call, items)):
            results.append(result)
            done(len(results))
        return results

    def _results(self, coming: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from self._watch.results(coming)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise

    def one(self, call: Callable[[Any], Any]) -> Any:
        """What one actor alone makes, while nothing else runs."""
        (made,) = self.all(lambda actor, _: call(actor), [None], lambda _: None, by=1)
        return made
