"""One picture by a stock pipeline's own call: watched at every step, cancelled at the next one, previewed from its latents."""

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

from serve.engine.batcher import Member
from serve.engine.shared_pipeline import Kind, Plan, SharedPipeline


@dataclass(frozen=True)
class Order:
    """A picture that is to be drawn. `arguments`: further ones of the pipeline's call. `previews`: how many on the way."""

    plan: Plan
    prompt: str | None
    height: int
    width: int
    steps: int
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    previews: int = 0

    @property
    def kind(self) -> Kind:
        return Kind(self.plan, self.height * self.width)


@dataclass(frozen=True)
class Drawn:
    """`image (H, W, 3)` uint8, and the seconds of its phases."""

    image: np.ndarray
    seconds: dict[str, float]


def calls_per_step(call: Callable[..., Any], arguments: Mapping[str, Any]) -> int:
    """Rows of the transformer that a step of one picture takes: two where it is guided by a second prompt.

    `call`: the pipeline's. The families with `true_cfg_scale` need a negative prompt for it; the others guide by it where
    their guidance scale is above one.
    """
    parameters = inspect.signature(call).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    asked = arguments.get(scale, parameters[scale].default) or 0
    guided = asked > 1 and (scale == "guidance_scale" or any(key.startswith("negative_prompt") for key in arguments))
    return 2 if guided else 1


class Studio:
    """Draws pictures, each in the thread that asks; previews are decoded in a thread of their own."""

    def __init__(self, shared: SharedPipeline):
        self.shared = shared
        self._previewing = ThreadPoolExecutor(1, thread_name_prefix="previews")

    def close(self) -> None:
        self._previewing.shutdown(cancel_futures=True)
        self.shared.close()

    def draw(
        self,
        order: Order,
        member: Member,
        stepped: Callable[[int], None] = lambda step: None,
        previewed: Callable[[int, int, np.ndarray], None] = lambda number, step, image: None,
    ) -> Drawn:
        """The picture. `stepped(steps)` after every step; `previewed(number, steps, image)`, from another thread, before the end.

        Raises `Cancelled` at the next step after the member was cancelled.
        """
        pipeline = self.shared.copy(order.kind, member)
        watch = _Watch(pipeline.scheduler)
        shown = _shown(order)
        waiting: list[Future] = []
        began = time.perf_counter()
        times: dict[str, float] = {}

        def step_end(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            member.check()
            times["last step"] = time.perf_counter()
            if index + 1 == order.steps:
                self.shared.denoising.leave(member)
            elif index + 1 in shown:
                waiting.append(
                    self._previewing.submit(
                        self._preview, order, member, watch.clean, shown[index + 1], index + 1, previewed
                    )
                )
            stepped(index + 1)
            return tensors

        pipeline.transformer.register_forward_pre_hook(
            lambda *_: times.setdefault("first step", time.perf_counter()) and None
        )
        try:
            image = self._called(pipeline, order, callback_on_step_end=step_end)
            for preview in waiting:
                preview.result()
        finally:
            self.shared.denoising.leave(member)
        ended = time.perf_counter()
        first, last = times.get("first step", began), times.get("last step", ended)
        return Drawn(image, {"encoding": first - began, "denoising": last - first, "decoding": ended - last})

    def _called(self, pipeline: Any, order: Order, **more: Any) -> np.ndarray:
        images = pipeline(
            prompt=order.prompt,
            height=order.height,
            width=order.width,
            num_inference_steps=order.steps,
            # Of the CPU, so that the noise depends on the seed alone.
            generator=torch.Generator().manual_seed(order.seed),
            output_type="np",
            **order.arguments,
            **more,
        ).images
        return (images[0] * 255).round().clip(0, 255).astype(np.uint8)

    def _preview(
        self,
        order: Order,
        member: Member,
        clean: torch.Tensor,
        number: int,
        step: int,
        previewed: Callable[[int, int, np.ndarray], None],
    ) -> None:
        """The same call of the pipeline, with the clean latents as they are expected and no step left to do."""
        pipeline = self.shared.copy(order.kind, member)
        pipeline.__dict__["scheduler"] = _no_steps(pipeline.scheduler)
        previewed(number, step, self._called(pipeline, order, latents=clean))


def _shown(order: Order) -> dict[int, int]:
    """The steps after which there is a preview, spread evenly, and the previews' numbers; never more than the steps between."""
    steps = {max(1, round(order.steps * (k + 1) / (order.previews + 1))) for k in range(order.previews)}
    return {step: number for number, step in enumerate(sorted(steps - {order.steps}))}


class _Watch:
    """Looks at every step of a scheduler: `clean` is `x_t - σ_t v`, with `v` the velocity after guidance."""

    def __init__(self, scheduler: Any):
        self.clean: torch.Tensor | None = None
        original = scheduler.step

        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            result = original(model_output, timestep, sample, *args, **arguments)
            sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
            self.clean = (sample.float() - sigma * model_output.float()).to(sample.dtype)
            return result

        scheduler.step = step


def _no_steps(scheduler: Any) -> Any:
    made = copy.copy(scheduler)
    made.timesteps = torch.empty(0)

    def set_timesteps(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        pass

    made.set_timesteps = set_timesteps
    return made
