"""The API's backend over replicas of the engine, behind a Ray Serve handle: cancellation, retries, and Ray's refusals told as ours."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.config import Http
from serve.protocol import Accepted, Event, FinalImage, GenerationRequest, ModelInfo, PipelineInfo, Preview, Refused

# Seconds that a replica may take to say what does not depend on its load.
_PATIENCE = 10.0
_RETRY_AFTER = 2.0


class RayBackend:
    """`handle`: of the deployment of `serve.ray_app.Replica`."""

    def __init__(self, handle: DeploymentHandle, settings: Http):
        self._handle, self._settings = handle, settings
        self._models: list[ModelInfo] | None = None
        self._pipeline: PipelineInfo | None = None

    async def models(self) -> list[ModelInfo]:
        if self._models is None:
            self._models = await self._ask("models")
        return self._models

    async def pipeline(self) -> PipelineInfo:
        if self._pipeline is None:
            self._pipeline = await self._ask("pipeline")
        return self._pipeline

    async def metrics_text(self) -> str:
        return await self._ask("metrics_text")

    async def healthy(self) -> bool:
        try:
            return await self._ask("healthy")
        except Refused:
            return False

    async def _ask(self, method: str) -> Any:
        response = getattr(self._handle, method).remote()
        try:
            return await asyncio.wait_for(response, _PATIENCE)
        except TimeoutError:
            raise _unavailable("no replica answers yet; try again soon", "not_ready") from None
        except BackPressureError as error:
            raise _full(error) from None
        except (RayError, RayServeException):
            raise _unavailable("no replica answers; try again soon", "not_ready") from None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """A request whose replica dies is given to another one, for the same variant and seeds; what was told already is not
        told again."""
        began, told = time.monotonic(), set()
        accepted: Accepted | None = None
        for _ in range(self._settings.attempts):
            events = self._events(_again(request, accepted, time.monotonic() - began))
            try:
                async for event in events:
                    if (key := _key(event)) not in told:
                        told.add(key)
                        accepted = event if isinstance(event, Accepted) else accepted
                        yield event
            except _ReplicaLost:
                continue
            finally:
                await events.aclose()
            return
        raise _unavailable("the replicas that drew the images died; try again soon", "replica_lost")

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What one replica tells; raises `Refused`, or `_ReplicaLost`."""
        response = self._handle.options(stream=True).generate.remote(request)
        left, wait = request.count, self._settings.assign_seconds
        try:
            while left:
                try:
                    event = await asyncio.wait_for(anext(response), wait)
                except TimeoutError:
                    raise _unavailable("no replica took the request in time; try again soon", "not_ready") from None
                except BackPressureError as error:
                    raise _full(error) from None
                except (RayActorError, TaskCancelledError, RayServeException, StopAsyncIteration) as error:
                    raise _ReplicaLost from error
                except RayError as error:
                    raise Refused(
                        500, "server_error", "the replica failed; its log says why", "engine_error"
                    ) from error
                if isinstance(event, Refused):
                    raise event
                left -= isinstance(event, FinalImage)
                wait = None
                yield event
        finally:
            # Of no effect where it is done; where no replica took it, the reason is raised again.
            with contextlib.suppress(RayError, RayServeException):
                response.cancel()


class _ReplicaLost(Exception):
    """The replica died, or went, before it told everything."""


def _again(request: GenerationRequest, accepted: Accepted | None, seconds: float) -> GenerationRequest:
    """The request as it is now: the variant that was promised, and what is left of its time."""
    deadline = None if request.deadline is None else max(0.0, request.deadline - seconds)
    return dataclasses.replace(request, model=accepted.variant if accepted else request.model, deadline=deadline)


def _key(event: Event) -> tuple:
    if isinstance(event, Preview):
        return "preview", event.index, event.number
    return ("image", event.index) if isinstance(event, FinalImage) else ("accepted",)


def _unavailable(message: str, code: str) -> Refused:
    return Refused(503, "server_error", message, code, retry_after=_RETRY_AFTER)


def _full(error: BackPressureError) -> Refused:
    return Refused(
        429,
        "rate_limit_error",
        "every replica has as many requests as it takes; try again later",
        "queue_full",
        retry_after=error.retry_after_s or _RETRY_AFTER,
    )
