"""Image generation by a stock pipeline's own call, with progress, cancellation and previews at every step."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ppcl.lora import AppliedLora
from ppcl.replacements import Plan
from serve.engine.batcher import Ticket
from serve.engine.shared_pipeline import SharedPipeline, WorkloadKey


@dataclass(frozen=True)
class GenerationTask:
    """An image to generate. `arguments`: others of the pipeline's call. `previews`: number of partial images."""

    plan: Plan
    prompt: str | None
    height: int
    width: int
    steps: int
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    previews: int = 0
    lora: AppliedLora | None = None

    @property
    def workload(self) -> WorkloadKey:
        return WorkloadKey(self.plan, self.height * self.width, self.lora)


@dataclass(frozen=True)
class GeneratedImage:
    """`image`: (H, W, 3) uint8. `seconds`: by phase (`encoding`, `denoising`, `decoding`)."""

    image: np.ndarray
    seconds: dict[str, float]


def calls_per_step(call: Callable[..., Any], arguments: Mapping[str, Any]) -> int:
    """Return the transformer rows per step of one image: 2 with classifier-free guidance, else 1.

    `call`: the pipeline's. Families with `true_cfg_scale` need a negative prompt for guidance; the others use it where
    their guidance scale is above one.
    """
    parameters = inspect.signature(call).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    value = arguments.get(scale, parameters[scale].default) or 0
    guided = value > 1 and (scale == "guidance_scale" or any(key.startswith("negative_prompt") for key in arguments))
    return 2 if guided else 1


# Receives a preview: its number, the steps done, and the image, (H, W, 3) uint8.
PreviewObserver = Callable[[int, int, np.ndarray], None]


@dataclass(frozen=True)
class _PreviewRequest:
    """Predicted clean latents after `step` steps, and who receives their image."""

    latents: torch.Tensor | None
    number: int
    step: int
    on_preview: PreviewObserver


class ImageGenerator:
    """Generates images, each in its caller's thread. Previews are decoded in a thread of their own."""

    def __init__(self, shared: SharedPipeline):
        self.shared = shared
        self._preview_thread = ThreadPoolExecutor(1, thread_name_prefix="previews")

    def close(self) -> None:
        self._preview_thread.shutdown(cancel_futures=True)
        self.shared.close()

    def generate(
        self,
        task: GenerationTask,
        ticket: Ticket,
        on_step: Callable[[int], None] = lambda step: None,
        on_preview: PreviewObserver = lambda number, step, image: None,
    ) -> GeneratedImage:
        """Generate an image. Calls `on_step(steps_done)` after every step, of two calls with a second-order scheduler.

        Calls `on_preview(number, steps_done, image)` from another thread, always before this returns. Raises
        `Cancelled` at the first step after the ticket was cancelled.
        """
        pipeline = self.shared.copy(task.workload, ticket)
        recorder = _CleanLatentsRecorder(pipeline.scheduler)
        preview_numbers = _preview_numbers(task)
        previews: list[Future[None]] = []
        started_at = time.perf_counter()
        times: dict[str, float] = {}

        def step_end(own: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ticket.check()
            times["last step"] = time.perf_counter()
            # The pipeline counts the calls of its transformer.
            steps, before = ((index + more) * task.steps // own.num_timesteps for more in (1, 0))
            if steps == before:
                return tensors
            if steps == task.steps:
                self.shared.denoising.leave(ticket)
            elif steps in preview_numbers:
                preview = _PreviewRequest(recorder.latents, preview_numbers[steps], steps, on_preview)
                previews.append(self._preview_thread.submit(self._preview, task, ticket, preview))
            on_step(steps)
            return tensors

        pipeline.transformer.register_forward_pre_hook(
            lambda *_: times.setdefault("first step", time.perf_counter()) and None
        )
        try:
            image = self._call(pipeline, task, callback_on_step_end=step_end)
            for future in previews:
                future.result()
        finally:
            self.shared.denoising.leave(ticket)
        ended_at = time.perf_counter()
        first, last = times.get("first step", started_at), times.get("last step", ended_at)
        return GeneratedImage(
            image, {"encoding": first - started_at, "denoising": last - first, "decoding": ended_at - last}
        )

    def _call(self, pipeline: Any, task: GenerationTask, **extra: Any) -> np.ndarray:
        """Return the image of one call of the pipeline, (H, W, 3) uint8."""
        images = pipeline(
            prompt=task.prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            # On the CPU, so that the noise depends on the seed alone.
            generator=torch.Generator().manual_seed(task.seed),
            output_type="np",
            **task.arguments,
            **extra,
        ).images
        return (images[0] * 255).round().clip(0, 255).astype(np.uint8)

    def _preview(self, task: GenerationTask, ticket: Ticket, preview: _PreviewRequest) -> None:
        """Decode predicted clean latents with the same call of the pipeline and no steps."""
        pipeline = self.shared.copy(task.workload, ticket)
        pipeline.__dict__["scheduler"] = _without_steps(pipeline.scheduler)
        image = self._call(pipeline, task, latents=preview.latents)
        preview.on_preview(preview.number, preview.step, image)


def _preview_numbers(task: GenerationTask) -> dict[int, int]:
    """Return the preview's number by the step after which it is made. Previews are spread evenly over the steps."""
    steps = {max(1, round(task.steps * (k + 1) / (task.previews + 1))) for k in range(task.previews)}
    return {step: number for number, step in enumerate(sorted(steps - {task.steps}))}


class _CleanLatentsRecorder:
    """Records the predicted clean latents `x_t - σ_t v` of every step; `v` is the velocity after guidance."""

    def __init__(self, scheduler: Any):
        self.latents: torch.Tensor | None = None
        original = scheduler.step

        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            result = original(model_output, timestep, sample, *args, **arguments)
            sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
            self.latents = (sample.float() - sigma * model_output.float()).to(sample.dtype)
            return result

        scheduler.step = step


def _without_steps(scheduler: Any) -> Any:
    """Return a copy of a scheduler that has no timesteps."""
    empty = copy.copy(scheduler)
    empty.timesteps = torch.empty(0)

    def set_timesteps(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        pass

    empty.set_timesteps = set_timesteps
    return empty
