"""The engine: one process, one set of weights, many requests. It implements `serve.protocol.Backend`.

Requests come on an event loop; pictures are drawn in threads; the two meet in one place, a queue of events a request.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncGenerator, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ppcl.errors import UserError
from ppcl.search.variants import Variant
from serve.config import Served
from serve.engine import metrics as counted
from serve.engine.admission import Admission
from serve.engine.backlog import Backlog, Work
from serve.engine.batcher import Cancelled
from serve.engine.compute_thread import Arithmetic
from serve.engine.cost_model import profile
from serve.engine.generation import Order, Studio, calls_per_step
from serve.engine.loading import Weights, load, qualities
from serve.engine.metrics import Metrics
from serve.engine.quality_controller import ElasticQuality, ladder
from serve.engine.shared_pipeline import Kind, SharedPipeline
from serve.logging import tell_failure
from serve.protocol import AUTO, Accepted, Event, GenerationRequest, ModelCard, Picture, PipelineCard, Preview, Refused

# Arguments of a pipeline's call that clients may give, where it takes them.
_ARGUMENTS = ("negative_prompt", "guidance_scale", "true_cfg_scale")
_WARM_UP_PROMPT = "a picture"
_WARM_UP_STEPS = 2
# Steps between looks at how urgent a picture is.
_DUE_EVERY = 4


@dataclass(eq=False)
class _Job:
    """A request that was accepted."""

    request: GenerationRequest
    variant: str
    prompt_tokens: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    works: list[Work] = field(default_factory=list)

    def tell(self, event: Event | Exception) -> None:
        """From any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return


@dataclass(frozen=True)
class _Turn:
    """Picture `index` of a job, and when it was accepted, of `time.monotonic()`."""

    job: _Job
    index: int
    order: Order
    accepted: float


class Engine:
    """Loads, warms up and profiles when it is made; blocking, minutes for a large model. Raises `UserError`."""

    def __init__(self, settings: Served, counters: Metrics | None = None):
        engine = settings.engine
        device = ("cuda" if torch.cuda.is_available() else "cpu") if engine.device == "auto" else engine.device
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device is 'cuda', but there is no GPU here; set engine.device: cpu")
        precision = {"cuda": "bfloat16", "cpu": "float32"}[device] if engine.precision == "auto" else engine.precision
        self.settings, self.counters = settings, counters or Metrics()
        compute = Arithmetic()
        self.weights: Weights = compute(
            load, settings.result, settings.teacher, engine.variants, device, getattr(torch, precision)
        )
        self._lock = threading.Lock()
        self._names: dict[Any, str] = {variant.plan: name for name, variant in self.weights.variants.items()}
        self._backlog: Backlog | None = None
        shared = SharedPipeline(
            self.weights.pipeline,
            self.weights.switch,
            engine.batch,
            engine.gather_seconds,
            engine.decoded_pixels,
            self._batch_done,
            compute,
        )
        self.studio = Studio(shared)
        self.card = self._card()
        sampling, variants = self.weights.result.sampling, list(self.weights.variants.values())
        usual = Order(
            variants[0].plan, _WARM_UP_PROMPT, self.card.height, self.card.width, _WARM_UP_STEPS, 0, sampling.arguments
        )
        self.costs = profile(self.studio, usual, [variant.plan for variant in variants], engine.batch)
        self._threads = ThreadPoolExecutor(engine.queue, thread_name_prefix="picture")
        self._backlog = Backlog(self.costs, engine.batch, lambda work: self._threads.submit(self._draw, work))
        self._qualities = qualities(settings.result, self.weights.variants)
        self.elastic = ElasticQuality(self._ladder(), settings.elastic)
        self._admission = Admission(self._backlog, self.elastic, self.weights.variants, engine.queue, settings.elastic)
        self._closed = False

    def _card(self) -> PipelineCard:
        sampling, stock = self.weights.result.sampling, self.weights.pipeline
        parameters = inspect.signature(stock.__call__).parameters
        # Latents are cut into patches of 2 × 2.
        multiple = stock.vae_scale_factor * 2
        # A pipeline that has both takes this one for models that were distilled for it, and drops it for the others.
        deaf = "true_cfg_scale" in parameters and not stock.transformer.config.get("guidance_embeds", False)
        named = tuple(name for name in _ARGUMENTS if name in parameters and not (deaf and name == "guidance_scale"))
        return PipelineCard(sampling.steps, sampling.height, sampling.width, multiple, named)

    def _ladder(self) -> list[str]:
        chosen, known = self.settings.elastic.variants, self.weights.variants
        for name in chosen or ():
            if name not in known:
                raise UserError(f"elastic.variants: {name!r} is not served; served are {', '.join(known)}")
        by_size = sorted(known.values(), key=lambda variant: -variant.parameters)
        costs = {variant.name: self._usual_seconds(variant.name, self.settings.engine.batch) for variant in by_size}
        return list(chosen) if chosen else ladder(costs, self._qualities)

    def _usual_seconds(self, variant: str, rows: int) -> float:
        """Device-seconds of one picture of the default kind in a batch of so many rows."""
        kind = Kind(self.weights.variants[variant].plan, self.card.height * self.card.width)
        per_step = calls_per_step(self.weights.pipeline.__call__, self.weights.result.sampling.arguments)
        return self.card.steps * per_step * self.costs.forward(kind, rows) / rows + self.costs.besides(kind)

    async def models(self) -> list[ModelCard]:
        usual = self.card.height * self.card.width
        return [
            ModelCard(
                variant.name,
                variant.parameters,
                variant.share,
                variant.blocks,
                self._qualities[variant.name],
                self.costs.forward(Kind(variant.plan, usual), 1),
            )
            for variant in sorted(self.weights.variants.values(), key=lambda variant: -variant.parameters)
        ]

    async def pipeline(self) -> PipelineCard:
        return self.card

    async def healthy(self) -> bool:
        return not self._closed and self.studio.shared.alive

    def load(self) -> dict[str, float]:
        """`backlog_seconds`: of what is accepted and of what was lately refused, at undegraded quality. `pictures`: accepted."""
        with self._lock:
            return {
                "backlog_seconds": self._admission.demand(time.monotonic()),
                "pictures": float(len(self._backlog.pictures)),
            }

    async def metrics_text(self) -> str:
        return self.counters.text()

    def close(self) -> None:
        """Nothing more is accepted; what is not done ends with an error."""
        with self._lock:
            self._closed = True
            for work in list(self._backlog.pictures):
                work.member.cancelled.set()
        self.studio.close()
        self._threads.shutdown()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        variant = self._named(request.model)
        tokens = await asyncio.to_thread(self._tokens, request)
        job, accepted = self._admit(request, variant, tokens)
        outcome = "cancelled"
        try:
            yield accepted
            left = request.count
            while left:
                event = await job.events.get()
                if isinstance(event, Exception):
                    outcome = "failed"
                    raise event
                left -= isinstance(event, Picture)
                yield event
            outcome = "done"
        finally:
            self._end(job)
            self.counters.record(counted.REQUESTS, outcome=outcome)

    def _named(self, model: str) -> Variant | None:
        """The variant of a request, None for `auto`."""
        if model == AUTO:
            return None
        variant = self.weights.variant(model)
        if variant is None:
            known = ", ".join([AUTO, *self.weights.variants])
            raise Refused(
                404,
                "invalid_request_error",
                f"the model {model[:80]!r} does not exist; there are {known}",
                "model_not_found",
                "model",
            )
        return variant

    def _tokens(self, request: GenerationRequest) -> int:
        """The prompt's tokens. Raises `Refused` where it, or the negative prompt, has too many."""
        most, counts = self.settings.limits.prompt_tokens, {}
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.arguments.get("negative_prompt"))):
            if text is None:
                continue
            counts[name] = self.studio.shared.prompt_tokens(text)
            if counts[name] > most:
                message = f"the {name} has {counts[name]} tokens; at most {most} are taken"
                raise Refused(422, "invalid_request_error", message, "string_too_long", name)
        return counts["prompt"]

    def _admit(self, request: GenerationRequest, named: Variant | None, tokens: int) -> tuple[_Job, Accepted]:
        """Accept a request, or raise `Refused`."""
        arguments = {**self.weights.result.sampling.arguments, **request.arguments}
        per_step = calls_per_step(self.weights.pipeline.__call__, arguments)
        with self._lock:
            now = time.monotonic()
            if self._closed:
                raise Refused(
                    503, "server_error", "the server is shutting down; try again soon", "shutting_down", retry_after=1.0
                )
            try:
                decision = self._admission.decide(request, named, per_step, now)
            except Refused as refused:
                if refused.status == 429:
                    self.counters.record(counted.REQUESTS, outcome="refused")
                raise
            job = _Job(request, decision.model, tokens, asyncio.get_running_loop())
            deadline = None if request.deadline is None else now + request.deadline
            for index in range(request.count):
                order = Order(
                    decision.kind.plan,
                    request.prompt,
                    request.height,
                    request.width,
                    request.steps,
                    request.seed + index,
                    arguments,
                    request.previews,
                )
                turn = _Turn(job, index, order, now)
                job.works.append(Work(decision.kind, decision.undegraded, request.steps, per_step, deadline, turn))
            for work in job.works:
                self._backlog.add(work)
            self._show_queue()
        self.counters.record(
            counted.ACCEPTED, variant=self._label(decision.model), degraded=str(decision.degraded).lower()
        )
        return job, Accepted(decision.model, decision.degraded, decision.expected)

    def _draw(self, work: Work) -> None:
        """In a thread of its own: one picture, from its turn to its event."""
        job, index, order, began = work.what.job, work.what.index, work.what.order, time.monotonic()
        try:
            work.member.check()
            if work.deadline is not None and began + self._alone(work) > work.deadline:
                raise Refused(504, "server_error", "the deadline passed while the pictures waited", "deadline_exceeded")

            def stepped(step: int) -> None:
                with self._lock:
                    work.steps = order.steps - step
                    # It only moves back with every step, and takes as long as there are pictures.
                    if step % _DUE_EVERY == 0:
                        work.member.due = self._backlog.due(work.kind)

            stepped(0)
            drawn = self.studio.draw(
                order, work.member, stepped, lambda number, step, image: job.tell(Preview(index, number, step, image))
            )
            seconds = {"queued": began - work.what.accepted, **drawn.seconds}
            for phase, value in seconds.items():
                self.counters.record(counted.PICTURE_SECONDS, value, phase=phase)
            self.counters.record(counted.IMAGES, variant=self._label(job.variant))
            told: Event | Exception = Picture(index, drawn.image, order.seed, job.prompt_tokens, seconds)
        except Cancelled:
            told = Refused(
                503,
                "server_error",
                "the server was shut down before the pictures were drawn",
                "shutting_down",
                retry_after=1.0,
            )
        except Refused as error:
            told = error
        except torch.OutOfMemoryError:
            message = "the server ran out of memory for these pictures; ask for smaller ones"
            told = Refused(503, "server_error", message, "out_of_memory")
        except Exception as error:
            tell_failure(job.request.id, error)
            told = Refused(
                500, "server_error", "the pictures could not be drawn; the server's log says why", "engine_error"
            )
        with self._lock:
            self._backlog.remove(work)
            self._show_queue()
        job.tell(told)

    def _alone(self, work: Work) -> float:
        return self._backlog.alone(work.kind, work.steps, work.per_step, 1)

    def _end(self, job: _Job) -> None:
        """Cancel what is left of a request. A picture under way notices at its next step."""
        with self._lock:
            for work in job.works:
                work.member.cancelled.set()
                if not work.running:
                    self._backlog.remove(work)
            self._show_queue()
        for work in job.works:
            self.studio.shared.denoising.leave(work.member)

    def _batch_done(self, group: tuple[Kind, Hashable], rows: int, seconds: float) -> None:
        if self._backlog is None:  # warming up
            return
        self.costs.observe(group, rows, seconds)
        variant = self._label(self._names.get(group[0].plan, ""))
        self.counters.record(counted.BATCH_ROWS, rows, variant=variant)
        self.counters.record(counted.STEP_SECONDS, seconds, variant=variant)

    def _label(self, name: str) -> str:
        """What clients invent must not make new series."""
        return name if name in self.weights.variants else "plan"

    def _show_queue(self) -> None:
        queued = self._backlog.queued
        self.counters.record(counted.QUEUED, queued)
        self.counters.record(counted.RUNNING, len(self._backlog.pictures) - queued)
        self.counters.record(counted.BACKLOG, self._backlog.undegraded_seconds())
