"""The engine: one process, one set of weights, many requests. It implements `serve.protocol.Backend`.

Requests arrive on an event loop; images are generated in threads. Each request has a queue of events between the two.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncGenerator, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ppcl.calibration.encoding import longest_prompt
from ppcl.errors import UserError
from ppcl.lora import AppliedLora
from ppcl.search.variants import Variant
from serve.config import EngineSettings, Served
from serve.engine import metrics as instruments
from serve.engine.admission import Admission, Decision
from serve.engine.backlog import Backlog, Work
from serve.engine.batcher import Cancelled
from serve.engine.compute_thread import ComputeThread
from serve.engine.cost_model import profile
from serve.engine.generation import GenerationTask, ImageGenerator, calls_per_step
from serve.engine.loading import Weights, load, qualities
from serve.engine.metrics import Metrics
from serve.engine.quality_controller import QualityController, quality_levels
from serve.engine.shared_pipeline import BatchLimits, SharedPipeline, WorkloadKey
from serve.logging import log_failure
from serve.protocol import (
    AUTO,
    WITH,
    Accepted,
    Event,
    FinalImage,
    GenerationRequest,
    ModelInfo,
    PipelineInfo,
    Preview,
    Refused,
)

# Arguments of a pipeline's call that clients may give, where it takes them.
_ARGUMENTS = ("negative_prompt", "guidance_scale", "true_cfg_scale")
_WARM_UP_PROMPT = "a picture"
_WARM_UP_STEPS = 2
# Steps between updates of an image's due time.
_DUE_INTERVAL = 4


@dataclass(eq=False)
class _Job:
    """An accepted request."""

    request: GenerationRequest
    variant: str
    prompt_tokens: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    works: list[Work] = field(default_factory=list)

    def publish(self, event: Event | Exception) -> None:
        """Queue an event, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return


@dataclass(frozen=True)
class _JobImage:
    """Image `index` of a job. `accepted_at`: by `time.monotonic()`."""

    job: _Job
    index: int
    task: GenerationTask
    accepted_at: float


class Engine:
    """Loads, warms up and profiles in its constructor, which takes minutes with a large model. Raises `UserError`."""

    def __init__(self, settings: Served, counters: Metrics | None = None):
        engine = settings.engine
        device = _device(engine)
        self.settings, self.counters = settings, counters or Metrics()
        compute = ComputeThread()
        self.weights: Weights = compute(
            load, settings.result, settings.teacher, engine, device, _precision(engine, device)
        )
        self._lock = threading.Lock()
        self._closed, self._profiled = False, False
        self._names: dict[Any, str] = {variant.plan: name for name, variant in self.weights.variants.items()}
        shared = SharedPipeline(
            self.weights.pipeline,
            self.weights.switch,
            BatchLimits(engine.batch, engine.gather_seconds, engine.decoded_pixels),
            self._record_batch,
            compute,
        )
        self.generator = ImageGenerator(shared)
        self.info = _pipeline_info(self.weights)
        plans = [variant.plan for variant in self.weights.variants.values()]
        self.cost_model = profile(self.generator, self._warm_up_task(), plans, engine.batch)
        self._threads = ThreadPoolExecutor(engine.queue, thread_name_prefix="image")
        self._backlog = Backlog(self.cost_model, engine.batch, lambda work: self._threads.submit(self._run, work))
        self._qualities = qualities(settings.result, self.weights.variants, settings.elastic.score)
        self.quality = QualityController(self._quality_levels(), settings.elastic)
        self.info = replace(self.info, auto=tuple(self.quality.levels), auto_by=self._auto_by())
        self._admission = Admission(self._backlog, self.quality, self.weights.variants, engine.queue, settings.elastic)
        self._profiled = True

    def _warm_up_task(self) -> GenerationTask:
        """Return an image of the default size with the first variant."""
        return GenerationTask(
            next(iter(self.weights.variants.values())).plan,
            _WARM_UP_PROMPT,
            self.info.height,
            self.info.width,
            _WARM_UP_STEPS,
            0,
            # Its steps may lie anywhere.
            {name: value for name, value in self.weights.result.sampling.arguments.items() if name != "sigmas"},
        )

    def _quality_levels(self) -> list[str]:
        """Return the variants of `auto`, from large to small. Raises `UserError` where one is not served."""
        configured, served = self.settings.elastic.variants, self.weights.variants
        for name in configured or ():
            if name not in served:
                raise UserError(f"elastic.variants: {name!r} is not served; served are {', '.join(served)}")
        if configured:
            return list(configured)
        by_size = sorted(served.values(), key=lambda variant: -variant.parameters)
        costs = {variant.name: self._image_seconds(variant, self.settings.engine.batch) for variant in by_size}
        return quality_levels(costs, self._qualities)

    def _auto_by(self) -> str:
        """Return why `auto` takes these variants, for the line at the start."""
        if self.settings.elastic.variants:
            return "elastic.variants lists them"
        if self._qualities[self.quality.levels[0]] is None:
            return (
                "the result has no checker's scores; name another score in elastic.score, or list in elastic.variants "
                "what it may degrade to"
            )
        score = self.settings.elastic.score
        return f"they give the most of {'the checker' if score is None else score}'s score per second"

    def _image_seconds(self, variant: Variant, rows: int) -> float:
        """Return the device-seconds of one image of the default size and steps in batches of `rows` rows."""
        workload = WorkloadKey(variant.plan, self.info.height * self.info.width)
        per_step = self._calls_per_step(self.weights.result.sampling.arguments)
        steps_s = self.info.steps * per_step * self.cost_model.forward(workload, rows) / rows
        return steps_s + self.cost_model.overhead(workload)

    def _calls_per_step(self, arguments: Mapping[str, Any]) -> int:
        pipeline = self.weights.pipeline
        return calls_per_step(pipeline.__call__, arguments) * pipeline.scheduler.order

    async def models(self) -> list[ModelInfo]:
        pixels = self.info.height * self.info.width
        return [
            ModelInfo(
                variant.name,
                variant.parameters,
                variant.share,
                variant.blocks,
                self._qualities[variant.name],
                self.cost_model.forward(WorkloadKey(variant.plan, pixels), 1),
                self.weights.lora_shares.get(variant.name, {}),
            )
            for variant in sorted(self.weights.variants.values(), key=lambda variant: -variant.parameters)
        ]

    async def pipeline(self) -> PipelineInfo:
        return self.info

    async def healthy(self) -> bool:
        return not self._closed and self.generator.shared.alive

    def load(self) -> dict[str, float]:
        """Return `images`, the accepted ones, and `backlog_seconds`, the demand as `Admission.demand` defines it."""
        with self._lock:
            return {
                "backlog_seconds": self._admission.demand(time.monotonic()),
                "images": float(len(self._backlog.images)),
            }

    async def metrics_text(self) -> str:
        return self.counters.text()

    def close(self) -> None:
        """Refuse further requests and fail those that are not done."""
        with self._lock:
            self._closed = True
            for work in list(self._backlog.images):
                work.ticket.cancelled.set()
        self.generator.close()
        self._threads.shutdown()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        variant = self._named(request.model)
        tokens = await asyncio.to_thread(self._count_tokens, request)
        job, accepted = self._admit(request, variant, tokens, self._lora(request))
        outcome = "cancelled"
        try:
            yield accepted
            remaining = request.count
            while remaining:
                event = await job.events.get()
                if isinstance(event, Exception):
                    outcome = "failed"
                    raise event
                remaining -= isinstance(event, FinalImage)
                yield event
            outcome = "done"
        finally:
            self._end(job)
            self.counters.record(instruments.REQUESTS, outcome=outcome)

    def _named(self, model: str) -> Variant | None:
        """Return the variant that a request names, None for `auto`. Raises `Refused` where there is no such variant."""
        if model == AUTO:
            return None
        variant = self.weights.variant(model)
        if variant is None:
            known = ", ".join([AUTO, *self.weights.variants])
            message = f"the model {model[:80]!r} does not exist; there are {known}"
            raise Refused(404, "invalid_request_error", message, "model_not_found", "model")
        return variant

    def _lora(self, request: GenerationRequest) -> AppliedLora | None:
        """Return the LoRA that a request names. Raises `Refused` where it is not served."""
        if request.lora is None:
            return None
        if request.lora.name not in self.weights.loras:
            message = f"there is no LoRA {request.lora.name[:80]!r}"
            raise Refused(404, "invalid_request_error", message, "lora_not_found", "lora")
        return replace(self.weights.loras[request.lora.name], scale=request.lora.scale)

    def _count_tokens(self, request: GenerationRequest) -> int:
        """Return the prompt's tokens. Raises `Refused` where it or the negative prompt has too many.

        The pipeline would cut them without a word to `max_sequence_length`.
        """
        longest = longest_prompt(type(self.weights.pipeline), self.weights.result.sampling)
        limit, counts = min(self.settings.limits.prompt_tokens, longest), {}
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.arguments.get("negative_prompt"))):
            if text is None:
                continue
            counts[name] = self.generator.shared.prompt_tokens(text)
            if counts[name] > limit:
                message = f"the {name} has {counts[name]} tokens; at most {limit} are taken"
                raise Refused(422, "invalid_request_error", message, "string_too_long", name)
        return counts["prompt"]

    def _check_steps(self, steps: int, arguments: Mapping[str, Any]) -> None:
        """Raises `Refused` for other steps than those that the result's own sigmas are for."""
        sigmas = arguments.get("sigmas")
        if sigmas is not None and steps != len(sigmas):
            message = f"num_inference_steps is {steps}; this model is drawn in the {len(sigmas)} steps of its sigmas"
            raise Refused(422, "invalid_request_error", message, "invalid_value", "num_inference_steps")

    def _admit(
        self, request: GenerationRequest, named: Variant | None, tokens: int, lora: AppliedLora | None
    ) -> tuple[_Job, Accepted]:
        """Accept a request and queue its images. Raises `Refused`."""
        arguments = {**self.weights.result.sampling.arguments, **request.arguments}
        self._check_steps(request.steps, arguments)
        per_step = self._calls_per_step(arguments)
        with self._lock:
            now = time.monotonic()
            if self._closed:
                raise Refused(
                    503, "server_error", "the server is shutting down; try again soon", "shutting_down", retry_after=1.0
                )
            try:
                decision = self._admission.decide(request, named, per_step, now, lora)
            except Refused as refused:
                if refused.status == 429:
                    self.counters.record(instruments.REQUESTS, outcome="refused")
                raise
            job = _Job(request, decision.model, tokens, asyncio.get_running_loop())
            deadline = None if request.deadline is None else now + request.deadline
            for index in range(request.count):
                payload = _JobImage(job, index, _task(request, decision, index, arguments), now)
                job.works.append(
                    Work(decision.workload, decision.undegraded, request.steps, per_step, deadline, payload)
                )
            for work in job.works:
                self._backlog.add(work)
            self._update_gauges()
        label, degraded = self._label(decision.model), str(decision.degraded).lower()
        self.counters.record(instruments.ACCEPTED, variant=label, degraded=degraded)
        model = f"{decision.model}{WITH}{request.lora.name}" if request.lora else decision.model
        return job, Accepted(model, decision.degraded, decision.expected)

    def _run(self, work: Work) -> None:
        """Generate one image in this thread and publish it, or the error."""
        event: Event | Exception
        try:
            event = self._generate_image(work)
        except Exception as error:
            event = self._refusal(error, work.payload.job.request)
        with self._lock:
            self._backlog.remove(work)
            self._update_gauges()
        work.payload.job.publish(event)

    def _generate_image(self, work: Work) -> FinalImage:
        """Raises `Cancelled`, `Refused` where the deadline cannot be met any more, and the pipeline's errors."""
        job, index, task = work.payload.job, work.payload.index, work.payload.task
        started_at = time.monotonic()
        work.ticket.check()
        if work.deadline is not None and started_at + self._idle_seconds(work) > work.deadline:
            raise Refused(504, "server_error", "the deadline passed while the images waited", "deadline_exceeded")

        def on_step(step: int) -> None:
            with self._lock:
                work.steps = task.steps - step
                # The due time only moves later with every step, and computing it costs time per image in the backlog.
                if step % _DUE_INTERVAL == 0:
                    work.ticket.due = self._backlog.due(work.workload)

        def on_preview(number: int, step: int, image: Any) -> None:
            job.publish(Preview(index, number, step, image))

        on_step(0)
        generated = self.generator.generate(task, work.ticket, on_step, on_preview)
        seconds = {"queued": started_at - work.payload.accepted_at, **generated.seconds}
        for phase, value in seconds.items():
            self.counters.record(instruments.PICTURE_SECONDS, value, phase=phase)
        self.counters.record(instruments.IMAGES, variant=self._label(job.variant))
        return FinalImage(index, generated.image, task.seed, job.prompt_tokens, seconds)

    def _refusal(self, error: Exception, request: GenerationRequest) -> Refused:
        """Return the error that the client gets for a failed image."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, Cancelled):
            message = "the server was shut down before the images were generated"
            return Refused(503, "server_error", message, "shutting_down", retry_after=1.0)
        if isinstance(error, torch.OutOfMemoryError):
            message = "the server ran out of memory for these images; ask for smaller ones"
            return Refused(503, "server_error", message, "out_of_memory")
        log_failure(request.id, error)
        message = "the images could not be generated; see the server's log"
        return Refused(500, "server_error", message, "engine_error")

    def _idle_seconds(self, work: Work) -> float:
        return self._backlog.idle_seconds(work.workload, work.steps, work.per_step, 1)

    def _end(self, job: _Job) -> None:
        """Cancel what is left of a request. A running image stops at its next step."""
        with self._lock:
            for work in job.works:
                work.ticket.cancelled.set()
                if not work.running:
                    self._backlog.remove(work)
            self._update_gauges()
        for work in job.works:
            self.generator.shared.denoising.leave(work.ticket)

    def _record_batch(self, group: tuple[WorkloadKey, Hashable], rows: int, seconds: float) -> None:
        """Update the cost model and the metrics with a batch, once profiling is done."""
        if not self._profiled:
            return
        self.cost_model.observe(group, rows, seconds)
        variant = self._label(self._names.get(group[0].plan, ""))
        self.counters.record(instruments.BATCH_ROWS, rows, variant=variant)
        self.counters.record(instruments.STEP_SECONDS, seconds, variant=variant)

    def _label(self, name: str) -> str:
        """Return the metric label of a variant. Plans that clients write must not create time series."""
        return name if name in self.weights.variants else "plan"

    def _update_gauges(self) -> None:
        queued = self._backlog.queued
        self.counters.record(instruments.QUEUED, queued)
        self.counters.record(instruments.RUNNING, len(self._backlog.images) - queued)
        self.counters.record(instruments.BACKLOG, self._backlog.undegraded_seconds())


def _device(settings: EngineSettings) -> str:
    """Return the device. Raises `UserError` where a GPU is configured and there is none."""
    has_gpu = torch.cuda.is_available()
    if settings.device == "auto":
        return "cuda" if has_gpu else "cpu"
    if settings.device == "cuda" and not has_gpu:
        raise UserError("engine.device is 'cuda', but there is no GPU here; set engine.device: cpu")
    return settings.device


def _precision(settings: EngineSettings, device: str) -> torch.dtype:
    default = {"cuda": "bfloat16", "cpu": "float32"}[device]
    return getattr(torch, default if settings.precision == "auto" else settings.precision)


def _pipeline_info(weights: Weights) -> PipelineInfo:
    sampling, stock = weights.result.sampling, weights.pipeline
    parameters = inspect.signature(stock.__call__).parameters
    # Latents are cut into patches of 2 × 2.
    multiple = stock.vae_scale_factor * 2
    # A pipeline with both arguments uses guidance_scale only if the model was distilled for it.
    ignores_guidance_scale = "true_cfg_scale" in parameters and not stock.transformer.config.get(
        "guidance_embeds", False
    )
    arguments = tuple(
        name for name in _ARGUMENTS if name in parameters and not (ignores_guidance_scale and name == "guidance_scale")
    )
    return PipelineInfo(
        sampling.steps,
        sampling.height,
        sampling.width,
        multiple,
        arguments,
        tuple(weights.loras),
        largest=weights.result.teacher.largest_side(),
    )


def _task(request: GenerationRequest, decision: Decision, index: int, arguments: dict[str, Any]) -> GenerationTask:
    """Return image `index` of a request. Each image has its own seed."""
    return GenerationTask(
        decision.workload.plan,
        request.prompt,
        request.height,
        request.width,
        request.steps,
        request.seed + index,
        arguments,
        request.previews,
        decision.workload.lora,
    )
